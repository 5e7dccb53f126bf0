# The usual needs: outputs for samples, and training with an optimiser. More options are in training.jl.

"""
    predict(net, p, X; solver = Auto(), start = nothing)

The outputs (outputs × samples) of `net` with the parameters `p` for the samples `X` (features × samples). Throws an
`ErrorException` if a sample does not reach its equilibrium; [`equilibrium`](@ref) shows which, and [`read_out`](@ref) returns the
outputs of the others.

    y = predict(net, p, randn(2, 5))
"""
function predict(net::Network, p, X; solver = Auto(), start = nothing)
    solution = equilibrium(net, p, X; solver, start)
    check_converged(solution.status, solution.residual)
    return read_out(net, p, solution.state)
end

"""
    read_out(net, p, Z)

The outputs (outputs × samples) of the states `Z` (neurons × samples).

    read_out(net, p, equilibrium(net, p, X).state) == predict(net, p, X)
"""
function read_out(net::Network, p, Z)
    ignore_derivatives() do
        check_shape("the parameters", p, 1)
        check_shape("the states", Z, 2)
        check_length(net, p)
        check_size("states", Z, neurons(net), size(Z, 2))
    end
    net.outputs > 0 || return Z[net.readout, :]
    return readout_weights(net, p) * Z[first(net.readout):last(net.readout), :] .+ readout_bias(net, p)
end

"""
    fit!(p, net, X, Y; epochs = 100, batch_size = size(X, 2), rule = Adam(), schedule = nothing, …)

Train the parameters `p` in place on the samples `X` (features × samples) and the targets `Y` (outputs × samples).

- `epochs`: how often every sample is used, in batches of `batch_size`, in an order that `rng` draws anew for each epoch.
- `rule`: an optimiser of Optimisers.jl with its learning rate; `schedule(t)`, if given, is the learning rate of step t = 1, 2, …
- `loss`: a [`Loss`](@ref), [`MSE`](@ref) by default; `weights`: one per sample.
- `clip`: the largest Euclidean norm of a gradient; `guard`: when to stop, see [`Guard`](@ref).
- `solver`, `adjoint`, `jacobian_penalty`: as for [`Problem`](@ref).
- `warm_start`: whether the solver starts each sample from its equilibrium in the previous epoch (which stores neurons × samples
  numbers) rather than from zero. The results are the same to the tolerance where a constraint guarantees one equilibrium.

Returns a named tuple of `loss`, the mean over the steps of each epoch, and `unconverged`, the number of samples of each epoch that
did not converge. If the guard halts training, or a loss or gradient is not finite, it ends with a warning; the missing losses are NaN,
and the parameters are those at the start of the last good epoch. Parameters of another floating-point type than the network's
are trained in the network's type and rounded at the end. Throws `DimensionMismatch` for arrays of the wrong size, and `ArgumentError`
for options out of range and for anything but arrays of real numbers.

    using Optimisers: Adam
    p = initial_parameters(net)
    history = fit!(p, net, X, Y; epochs = 200, batch_size = 32, rule = Adam(1e-2))
    history.loss[end]
"""
function fit!(
        p, net::Network{T}, X, Y; epochs = 100, batch_size = X isa AbstractMatrix ? size(X, 2) : 1,
        rule = Optimisers.Adam(), schedule = nothing, weights = nothing, rng::AbstractRNG = default_rng(), clip = Inf,
        guard::Guard = Guard(), warm_start = false, solver = Auto(), adjoint = Implicit(), loss = MSE(), jacobian_penalty = 0.0,
    ) where {T}
    check_arrays(p, X, "targets" => Y)
    eltype(p) <: AbstractFloat || throw(ArgumentError("the parameters are of type $(eltype(p)), which cannot be trained; give them as $T.(p)"))
    samples = size(X, 2)
    check_length(net, p)
    check_writable("the parameters", p)
    check_supervised(net, X, Y, weights)
    samples > 0 || throw(ArgumentError("there are no samples to train on"))
    check_count("epochs", epochs)
    check_number("batch_size", batch_size, in(1:samples), "be from 1 to the $samples samples", Integer)
    check_number("clip", clip, >(0), "be positive")
    check_option("rule", rule, Optimisers.AbstractRule, "Adam()")
    schedule === nothing || applicable(schedule, 1) ||
        throw(ArgumentError("schedule is $(repr(schedule)); expected a function of the step that gives a learning rate, such as t -> 0.01 / t"))
    problem = Problem(net; solver, adjoint, loss, jacobian_penalty)
    trainer = Trainer(problem, rule; clip, guard, warm_start, batch_size = batch_size < samples ? batch_size : 0)
    trained = eltype(p) == T ? p : Vector{T}(p)
    nets, order, steps = Replicas(reshape(trained, :, 1)), collect(reshape(1:samples, :, 1)), cld(samples, batch_size)
    X, Y, weights = Matrix{T}(X), Matrix{T}(Y), weights === nothing ? nothing : Vector{T}(weights)
    losses, unconverged = fill(NaN, epochs, 1), zeros(Int, epochs, 1)
    for epoch in 1:epochs
        rates = schedule === nothing ? fill(NaN, steps) : [scheduled_rate(schedule, trainer.steps + k) for k in 1:steps]
        shuffle!(rng, order)
        now = epoch:epoch
        train!(trainer, nets, X, Y, order, Int(batch_size), rates, view(losses, now, :), view(unconverged, now, :); weights)
        halt = Halt(only(nets.halted))
        halt == RUNNING && continue
        @warn "the training halted in epoch $epoch of $epochs: $halt; the parameters are those before it" unconverged[epoch]
        break
    end
    trained === p || copyto!(p, trained)
    return (; loss = vec(losses), unconverged = vec(unconverged))
end

function scheduled_rate(schedule, step::Int)
    rate = schedule(step)
    check_number("the learning rate of step $step that schedule gives", rate, >=(0), "be a number that is not negative")
    return Float64(rate)
end

# Training: minibatch steps of an optimiser from Optimisers.jl, many epochs and many nets in one call.

"""
    Trainer(problem, rule; nets = 1, clip = Inf)

The state of a training run: `rule` is a rule of Optimisers.jl, `clip` the largest allowed Euclidean norm of a
gradient. `nets` replicas with parameters of their own can be trained side by side on the same samples.
"""
mutable struct Trainer{T, R, O}
    const problem::Problem{T}
    const workspace::Workspace{T}
    const gradient::Vector{T}
    const states::Vector{O}               # of the optimiser, per net
    const batch_X::Matrix{T}
    const batch_Y::Matrix{T}
    const clip::T
    const alive::Vector{Bool}             # per net: its loss and gradient have been finite so far
    rule::R
    steps::Int                            # taken so far; numbers the random vectors of the Jacobian penalty
end

function Trainer(problem::Problem{T}, rule; nets::Int = 1, clip = Inf, batch_size::Int = 0) where {T}
    net = problem.net
    zero_parameters = zeros(T, length(net))
    states = [Optimisers.init(rule, zero_parameters) for _ in 1:nets]
    return Trainer{T, typeof(rule), eltype(states)}(
        problem, Workspace(problem), zeros(T, length(net)), states,
        zeros(T, net.inputs, batch_size), zeros(T, output_size(net), batch_size), T(clip),
        fill(true, nets), rule, 0
    )
end

"""
    train!(trainer, P, X, Y, order, batch_size, rates, losses, unconverged)

Train for `size(order, 2)` epochs. Column s of `P` holds the parameters of net s and is updated in place. Column e
of `order` gives the samples (from 1) of epoch e in their order, of which `batch_size` form a step; `rates` is
the learning rate of each step, the same for all nets. Filled in, per epoch and net: `losses` (the mean over
the steps, each before its update) and `unconverged` (samples). A net whose loss or gradient is no longer
finite keeps its last parameters for good; its losses are then NaN.
"""
function train!(trainer::Trainer, P::AbstractMatrix, X, Y, order, batch_size::Int, rates, losses, unconverged)
    for s in axes(P, 2)
        train_net!(trainer, view(P, :, s), s, X, Y, order, batch_size, rates, view(losses, :, s), view(unconverged, :, s))
    end
    trainer.steps += length(rates)
    return losses
end

function train_net!(trainer::Trainer, p, s, X, Y, order, batch_size, rates, losses, unconverged)
    samples, epochs = size(order)
    in_order = batch_size >= samples
    trainer.alive[s] || return (fill!(losses, NaN); fill!(unconverged, 0))
    step = 0
    for epoch in 1:epochs
        total = 0.0
        failed = 0
        for first_sample in 1:batch_size:samples
            step += 1
            selected = view(order, first_sample:min(first_sample + batch_size - 1, samples), epoch)
            loss, quality = if in_order
                loss_and_gradient!(trainer.gradient, trainer.workspace, trainer.problem, p, X, Y, trainer.steps + step)
            else
                m = gather!(trainer, X, Y, selected)
                loss_and_gradient!(
                    trainer.gradient, trainer.workspace, trainer.problem, p,
                    view(trainer.batch_X, :, 1:m), view(trainer.batch_Y, :, 1:m), trainer.steps + step
                )
            end
            total += loss * length(selected)
            failed += quality.unconverged
            gradient_norm = norm(trainer.gradient)
            if !isfinite(loss) || !isfinite(gradient_norm)
                trainer.alive[s] = false
                losses[epoch:end] .= NaN
                unconverged[epoch:end] .= 0
                unconverged[epoch] = failed
                return
            end
            gradient_norm > trainer.clip && (trainer.gradient .*= trainer.clip / gradient_norm)
            update!(trainer, p, s, rates[step])
        end
        losses[epoch] = total / samples
        unconverged[epoch] = failed
    end
    return
end

function gather!(trainer, X, Y, selected)
    for (j, sample) in enumerate(selected)
        copyto!(view(trainer.batch_X, :, j), view(X, :, sample))
        copyto!(view(trainer.batch_Y, :, j), view(Y, :, sample))
    end
    return length(selected)
end

function update!(trainer::Trainer, p, s, rate)
    trainer.rule.eta == rate || (trainer.rule = Optimisers.adjust(trainer.rule, rate))
    trainer.states[s], change = Optimisers.apply!(trainer.rule, trainer.states[s], p, trainer.gradient)
    p .-= change
    return
end

"""
The optimisers Python names, made from a dictionary of their options; the learning rate `learning_rate` is in
force until [`train!`](@ref) is given another.
"""
const OPTIMIZERS = (;
    sgd = o -> Optimisers.Descent(o[:learning_rate]),
    momentum = o -> Optimisers.Momentum(o[:learning_rate], o[:momentum]),
    nesterov = o -> Optimisers.Nesterov(o[:learning_rate], o[:momentum]),
    adam = o -> Optimisers.Adam(o[:learning_rate], (o[:beta1], o[:beta2]), o[:epsilon]),
)

# --- the optimiser's state as numbers, for checkpoints ---------------------------------------------------------

"    optimizer_state(trainer)\n\nThe state of the optimiser of every net and the number of steps, as one vector."
function optimizer_state(trainer::Trainer)
    numbers = Float64[]
    foreach(state -> flatten!(numbers, state), trainer.states)
    return push!(numbers, trainer.steps)
end
flatten!(numbers, x::Union{Number, AbstractArray}) = append!(numbers, x)
flatten!(numbers, x::Tuple) = foreach(part -> flatten!(numbers, part), x)
flatten!(numbers, ::Nothing) = numbers

"    restore_optimizer_state!(trainer, numbers)\n\nThe inverse of [`optimizer_state`](@ref)."
function restore_optimizer_state!(trainer::Trainer, numbers)
    expected = length(optimizer_state(trainer))
    expected == length(numbers) ||
        throw(DimensionMismatch("the optimiser state has $expected numbers, $(length(numbers)) were given"))
    position = Ref(0)
    for s in eachindex(trainer.states)
        trainer.states[s] = refill(trainer.states[s], numbers, position)
    end
    trainer.steps = Int(numbers[position[] += 1])
    return trainer
end
refill(x::Number, numbers, position) = oftype(x, numbers[position[] += 1])
refill(x::AbstractArray, numbers, position) =
    (copyto!(x, 1, numbers, position[] + 1, length(x)); position[] += length(x); x)
refill(x::Tuple, numbers, position) = map(part -> refill(part, numbers, position), x)
refill(::Nothing, numbers, position) = nothing

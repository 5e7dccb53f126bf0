# Training: minibatch steps of an optimiser from Optimisers.jl, many epochs and many nets in one call.

"""
    Guard(; unconverged = 1, parameter_norm = Inf)

When the training of a net is to be halted, besides a loss or gradient that is not finite: when more than that share of an
epoch's samples do not converge, or when the Euclidean norm of the parameters exceeds `parameter_norm`.
"""
struct Guard
    unconverged::Float64
    parameter_norm::Float64
end
Guard(; unconverged = 1.0, parameter_norm = Inf) = Guard(unconverged, parameter_norm)

"What halted the training of a net."
@enum Halt::Int8 RUNNING NOT_FINITE TOO_MANY_UNCONVERGED TOO_LARGE

"""
    Replicas(P)

Nets of one topology that are trained side by side: column s of `parameters` holds those of net s, column s of `good`
those from which its last good epoch began, and `halted[s]` is a [`Halt`](@ref) as a number; a net with another than
`RUNNING` takes no part in the training.
"""
struct Replicas{A <: AbstractMatrix}
    parameters::A
    good::A
    halted::Vector{Int8}
end
Replicas(P::AbstractMatrix) = Replicas(P, copy(P), fill(Int8(RUNNING), size(P, 2)))

"""
    Trainer(problem, rule; workspace = Workspace(problem.net), nets = 1, clip = Inf, guard = Guard(), batch_size = 0)

The state of a training run in a [`workspace`](@ref AbstractWorkspace), where its arrays are: `rule` is a rule of Optimisers.jl,
`clip` the largest allowed Euclidean norm of a gradient. `nets` replicas with parameters of their own can be trained side by side
on the same samples, in batches of up to `batch_size` where these are not all samples.
"""
mutable struct Trainer{T, R, O, W <: AbstractWorkspace{T}, V <: AbstractVector{T}, M <: AbstractMatrix{T}}
    const problem::Problem{T}
    const workspace::W
    const gradient::V
    const states::Vector{O}               # of the optimiser, per net
    const batch_X::M
    const batch_Y::M
    const batch_weights::V
    const before::V                       # parameters at the beginning of an epoch
    const clip::T
    const guard::Guard
    rule::R
    rate::Float64                         # in force in `rule`
    steps::Int                            # taken so far; numbers the random vectors of the Jacobian penalty
end

function Trainer(
        problem::Problem{T}, rule; workspace::AbstractWorkspace{T} = Workspace(problem.net), nets::Int = 1, clip = Inf,
        guard::Guard = Guard(), batch_size::Int = 0,
    ) where {T}
    net = problem.net
    zeros_of(dimensions...) = allocate(workspace, dimensions...)
    gradient, batch_X = zeros_of(length(net)), zeros_of(net.inputs, batch_size)
    states = [Optimisers.init(rule, gradient) for _ in 1:nets]
    return Trainer{T, typeof(rule), eltype(states), typeof(workspace), typeof(gradient), typeof(batch_X)}(
        problem, workspace, gradient, states, batch_X, zeros_of(output_size(net), batch_size), zeros_of(batch_size),
        zeros_of(length(net)), T(clip), guard, rule, NaN, 0
    )
end

"""
    train!(trainer, nets, X, Y, order, batch_size, rates, losses, unconverged; weights = nothing)

Train for `size(order, 2)` epochs. The parameters of the [`Replicas`](@ref) `nets` are updated in place. Column e
of `order` gives the samples (from 1) of epoch e in their order, of which `batch_size` form a step; `rates` is
the learning rate of each step, the same for all nets; `weights` are those of the samples. Filled in, per epoch and
net: `losses` (the mean over the steps, each before its update) and `unconverged` (samples).

A net that its guard halts ends with the parameters from which its last good epoch began, one that had finite losses
and no more unconverged samples than allowed. The losses of an epoch with one that is not finite, and those after it, are
NaN.
"""
function train!(trainer::Trainer, nets::Replicas, X, Y, order, batch_size::Int, rates, losses, unconverged; weights = nothing)
    for s in axes(nets.parameters, 2)
        train_net!(trainer, nets, s, X, Y, weights, order, batch_size, rates, view(losses, :, s), view(unconverged, :, s))
    end
    trainer.steps += length(rates)
    return losses
end

function train_net!(trainer::Trainer, nets, s, X, Y, weights, order, batch_size, rates, losses, unconverged)
    p, good = view(nets.parameters, :, s), view(nets.good, :, s)
    samples, epochs = size(order)
    steps = length(rates) ÷ epochs
    for epoch in 1:epochs
        if nets.halted[s] != Int8(RUNNING)
            losses[epoch:end] .= NaN
            unconverged[epoch:end] .= 0
            return
        end
        copyto!(trainer.before, p)
        loss, failed = train_epoch!(trainer, p, s, X, Y, weights, view(order, :, epoch), batch_size, rates, (epoch - 1) * steps)
        losses[epoch], unconverged[epoch] = loss, failed
        halt = if !isfinite(loss)
            NOT_FINITE
        elseif failed > trainer.guard.unconverged * samples
            TOO_MANY_UNCONVERGED
        else
            copyto!(good, trainer.before)
            size_of_p = norm(p)
            isfinite(size_of_p) && size_of_p <= trainer.guard.parameter_norm ? RUNNING : TOO_LARGE
        end
        halt == RUNNING || copyto!(p, good)
        nets.halted[s] = Int8(halt)
    end
    return
end

# The mean loss, NaN as soon as a loss or gradient is not finite, and the number of unconverged samples.
function train_epoch!(trainer::Trainer, p, s, X, Y, weights, order, batch_size, rates, step)
    samples = length(order)
    total, failed = 0.0, 0
    for first_sample in 1:batch_size:samples
        check_interrupt()
        step += 1
        probe = trainer.steps + step
        selected = view(order, first_sample:min(first_sample + batch_size - 1, samples))
        loss, quality = if batch_size >= samples
            loss_and_gradient!(trainer.gradient, trainer.workspace, trainer.problem, p, X, Y, probe, weights)
        else
            m = gather!(trainer, X, Y, weights, selected)
            loss_and_gradient!(
                trainer.gradient, trainer.workspace, trainer.problem, p,
                view(trainer.batch_X, :, 1:m), view(trainer.batch_Y, :, 1:m), probe,
                weights === nothing ? nothing : view(trainer.batch_weights, 1:m)
            )
        end
        total += loss * length(selected)
        failed += quality.unconverged
        gradient_norm = norm(trainer.gradient)
        isfinite(loss) && isfinite(gradient_norm) || return NaN, failed
        gradient_norm > trainer.clip && (trainer.gradient .*= trainer.clip / gradient_norm)
        update!(trainer, p, s, rates[step])
    end
    return total / samples, failed
end

function gather!(trainer::Trainer, X, Y, weights, selected)
    m = length(selected)
    gather!(trainer.batch_X, X, selected)
    gather!(trainer.batch_Y, Y, selected)
    weights === nothing || copyto!(view(trainer.batch_weights, 1:m), view(weights, selected))
    return m
end

"The selected columns of `from` become the first of `to`."
gather!(to::AbstractMatrix, from::AbstractMatrix, selected) =
    copyto!(view(to, :, eachindex(selected)), view(from, :, selected))
function gather!(to::Matrix, from::StridedMatrix, selected)
    for (j, sample) in enumerate(selected)
        copyto!(view(to, :, j), view(from, :, sample))
    end
    return to
end

function update!(trainer::Trainer, p, s, rate)
    if trainer.rate != rate
        trainer.rule = Optimisers.adjust(trainer.rule, rate)
        trainer.rate = rate
    end
    trainer.states[s], change = Optimisers.apply!(trainer.rule, trainer.states[s], p, trainer.gradient)
    p .-= change
    return
end

"""
The optimisers Python names, made from a dictionary of their options; the learning rate `learning_rate` is in
force until [`train!`](@ref) is given another. `weight_decay` is added to the gradient as `weight_decay ⋅ p`, but for
AdamW, which adds it to its step.
"""
const OPTIMIZERS = (;
    sgd = o -> decaying(Optimisers.Descent(o[:learning_rate]), o),
    momentum = o -> decaying(Optimisers.Momentum(o[:learning_rate], o[:momentum]), o),
    nesterov = o -> decaying(Optimisers.Nesterov(o[:learning_rate], o[:momentum]), o),
    adam = o -> decaying(Optimisers.Adam(o[:learning_rate], (o[:beta1], o[:beta2]), o[:epsilon]), o),
    adamw = o -> Optimisers.AdamW(o[:learning_rate], (o[:beta1], o[:beta2]), o[:weight_decay], o[:epsilon]),
    rmsprop = o -> decaying(Optimisers.RMSProp(o[:learning_rate], o[:decay], o[:epsilon]), o),
)

function decaying(rule, o)
    λ = get(o, :weight_decay, 0.0)
    return λ == 0 ? rule : Optimisers.OptimiserChain(Optimisers.WeightDecay(λ), rule)
end

# --- the optimiser's state as numbers, for checkpoints ---------------------------------------------------------

"    optimizer_state(trainer)\n\nThe state of the optimiser of every net and the number of steps, as one vector."
function optimizer_state(trainer::Trainer)
    numbers = Float64[]
    foreach(state -> flatten!(numbers, state), trainer.states)
    return push!(numbers, trainer.steps)
end
flatten!(numbers, x::Union{Number, AbstractArray}) = append!(numbers, x)
flatten!(numbers, x::Tuple) = foreach(part -> flatten!(numbers, part), x)
flatten!(numbers, ::Union{Nothing, Bool}) = numbers

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
refill(x::Union{Nothing, Bool}, numbers, position) = x       # structure, not state

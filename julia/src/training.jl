# Training: minibatch steps of an optimiser from Optimisers.jl, many epochs and many nets in one call.

"""
    Guard(; unconverged = 1, parameter_norm = Inf)

Conditions that halt the training of a net, besides a loss or gradient that is not finite: a share of more than `unconverged` of an
epoch's samples does not converge, or the Euclidean norm of the parameters exceeds `parameter_norm`.
"""
struct Guard
    unconverged::Float64
    parameter_norm::Float64
    function Guard(unconverged, parameter_norm)
        check_number("unconverged", unconverged, >=(0), "be a share of the samples, from 0 to 1")
        check_number("parameter_norm", parameter_norm, >(0), "be positive")
        return new(unconverged, parameter_norm)
    end
end
Guard(; unconverged = 1.0, parameter_norm = Inf) = Guard(unconverged, parameter_norm)

"Why the training of a net was halted."
@enum Halt::Int8 RUNNING NOT_FINITE TOO_MANY_UNCONVERGED TOO_LARGE

"""
    Replicas(P)

Nets of one topology that are trained side by side: column s of `parameters` holds the parameters of net s, column s of `good`
those at the start of its last good epoch, and `halted[s]` is a [`Halt`](@ref) as a number; only nets with `RUNNING` are
trained.
"""
struct Replicas{A <: AbstractMatrix, B <: AbstractMatrix}
    parameters::A
    good::B
    halted::Vector{Int8}
end
function Replicas(P)
    check_shape("the parameters", P, 2, "a matrix with a column for each net; those of one are reshape(p, :, 1)")
    return Replicas(P, copy(P), fill(Int8(RUNNING), size(P, 2)))
end
Base.show(io::IO, nets::Replicas) =
    print(io, "Replicas($(counted(length(nets.halted), "net")), $(count(!=(Int8(RUNNING)), nets.halted)) halted)")
counted(n, what) = n == 1 ? "1 $what" : "$n $(what)s"

"""
    StepBuffers

The buffers of a thread for training a net: a workspace, a gradient and a minibatch, and the rule with the current learning rate.
"""
mutable struct StepBuffers{T, R, W <: AbstractWorkspace{T}, V <: AbstractVector{T}, M <: AbstractMatrix{T}}
    const workspace::W
    const gradient::V
    const batch_X::M
    const batch_Y::M
    const batch_weights::V
    const batch_states::M                 # initial guesses, empty without warm starts
    const before::V                       # parameters at the beginning of an epoch
    rule::R
    rate::Float64
end
function StepBuffers(net::Network{T}, workspace::AbstractWorkspace{T}, rule, batch_size::Int, warm_start::Bool) where {T}
    zeros_of(dimensions...) = allocate(workspace, dimensions...)
    gradient, X = zeros_of(length(net)), zeros_of(net.inputs, batch_size)
    # A rule whose own rate has another type than those of a schedule, such as Adam(1f-2), is converted to that type.
    R = Union{typeof(rule), typeof(Optimisers.adjust(rule, 1.0))}
    return StepBuffers{T, R, typeof(workspace), typeof(gradient), typeof(X)}(
        workspace, gradient, X, zeros_of(output_size(net), batch_size),
        zeros_of(batch_size), zeros_of(neurons(net), warm_start ? batch_size : 0), zeros_of(length(net)), rule, NaN,
    )
end

"The `rule` at a learning rate, NaN for its own."
function rule_at!(b::StepBuffers, rule, rate)
    if !isequal(b.rate, rate)
        b.rule = isnan(rate) ? rule : Optimisers.adjust(rule, Float64(rate))
        b.rate = rate
    end
    return b.rule
end

"""
    Trainer(problem, rule; workspace, nets = 1, clip = Inf, guard = Guard(), batch_size = 0, warm_start = false)

The state of a training run in a [`workspace`](@ref AbstractWorkspace), on whose device its arrays are: `rule` is a rule of
Optimisers.jl, `clip` the largest allowed Euclidean norm of a gradient. `nets` replicas with their own parameters can be trained side
by side on the same samples, in batches of up to `batch_size` if a batch is not all samples. The default `workspace` is one on the
CPU. With `warm_start` the solver starts each sample from its last equilibrium, which stores a state (neurons ×
samples) per net; the trainer is then for one set of samples.
"""
mutable struct Trainer{T, R, O, B <: StepBuffers{T}}
    const problem::Problem{T}
    const rule::R
    const states::Vector{O}               # of the optimiser, per net
    const clip::T
    const guard::Guard
    const batch_size::Int
    const warm_start::Bool
    const equilibria::Vector{AbstractMatrix{T}}     # the last of all samples, per net, for warm starts
    const buffers::Vector{B}              # per thread
    const side_by_side::Vector{Any}       # of tiny nets, per thread
    steps::Int                            # taken so far; numbers the random vectors of the Jacobian penalty
end

function Trainer(
        problem::Problem{T}, rule; workspace::AbstractWorkspace{T} = Workspace(problem.net), nets = 1, clip = Inf,
        guard::Guard = Guard(), batch_size = 0, warm_start = false,
    ) where {T}
    check_workspace(workspace, problem.net)
    check_option("rule", rule, Optimisers.AbstractRule, "Adam()")
    check_count("nets", nets)
    check_truth("warm_start", warm_start)
    check_number("clip", clip, >(0), "be positive")
    check_number("batch_size", batch_size, x -> 0 <= x <= typemax(Int), "be a whole number, 0 where batches are all samples", Integer)
    warm_start && problem.adjoint isa Unrolled &&
        throw(ArgumentError("warm_start gives a solver its first iterate, which Unrolled does not use: its steps begin at zero"))
    buffers = StepBuffers(problem.net, workspace, rule, Int(batch_size), warm_start)
    states = [Optimisers.init(rule, buffers.gradient) for _ in 1:nets]
    equilibria = AbstractMatrix{T}[]
    return Trainer(problem, rule, states, T(clip), guard, Int(batch_size), warm_start, equilibria, [buffers], Any[], 0)
end

Base.show(io::IO, t::Trainer) =
    print(io, "Trainer($(counted(length(t.states), "net")) of $(t.problem.net), $(t.rule), $(counted(t.steps, "step")) taken)")

"The samples of a call of [`train!`](@ref), and the order in which they are used."
struct Batches{A, B, W, O <: AbstractMatrix{Int}, R}
    X::A
    Y::B
    weights::W
    order::O
    size::Int
    rates::R
    whole::Bool           # each step takes all samples, each once
end
Batches(X, Y, weights, order, batch_size::Int, rates) =
    Batches(X, Y, weights, order, batch_size, rates, batch_size >= size(order, 1) && takes_each_once(order, size(X, 2)))

function takes_each_once(order, samples::Int)
    size(order, 1) == samples || return false
    last_epoch = zeros(Int, samples)
    for epoch in axes(order, 2), i in axes(order, 1)
        sample = order[i, epoch]
        1 <= sample <= samples && last_epoch[sample] != epoch || return false
        last_epoch[sample] = epoch
    end
    return true
end

samples_of(b::Batches) = size(b.order, 1)
epochs_of(b::Batches) = size(b.order, 2)
steps_of(b::Batches) = cld(samples_of(b), b.size)
rate_of(b::Batches, epoch, step) = b.rates[(epoch - 1) * steps_of(b) + step]

"The samples of a step."
batch(b::Batches, epoch, step) = view(b.order, piece(step, b.size, samples_of(b)), epoch)

"""
    train!(trainer, nets, X, Y, order, batch_size, rates, losses, unconverged; weights = nothing)

Train for `size(order, 2)` epochs. The parameters of the [`Replicas`](@ref) `nets` are updated in place. Column e
of `order` lists the samples (from 1) of epoch e in their order, with `batch_size` samples per step; `rates` has
the learning rate of each step, the same for all nets, or NaN for that of the rule itself; `weights` are sample weights. Filled in, per
epoch and net: `losses` (the mean over the steps, each before its update) and `unconverged` (number of samples).

A net that its guard halts ends with the parameters at the start of its last good epoch, one with finite losses
and no more unconverged samples than allowed. From the first epoch with a loss that is not finite on, its losses are
NaN. The nets are shared among threads, and tiny ones are trained side by side in vector registers; neither changes a bit of the result.
"""
function train!(trainer::Trainer, nets::Replicas, X, Y, order, batch_size::Int, rates, losses, unconverged; weights = nothing)
    batches = checked_batches(trainer, nets, X, Y, weights, order, batch_size, rates, losses, unconverged)
    return train!(trainer, nets, batches, losses, unconverged)
end

function train!(trainer::Trainer, nets::Replicas, batches::Batches, losses, unconverged)
    exclusively(first(trainer.buffers).workspace) do
        trainer.steps == 0 && begin_states!(trainer, nets)
        trainer.warm_start && make_equilibria!(trainer, size(batches.X, 2))
        goes_side_by_side(trainer, nets, batches) ? train_side_by_side!(trainer, nets, batches, losses, unconverged) :
            train_each!(trainer, nets, batches, losses, unconverged)
        trainer.steps += length(batches.rates)
    end
    return losses
end

function checked_batches(trainer::Trainer, nets::Replicas, X, Y, weights, order, batch_size::Int, rates, losses, unconverged)
    check_supervised(trainer.problem.net, X, Y, weights)
    batch_size >= 1 || throw(ArgumentError("batch_size is $batch_size; expected 1 or more"))
    order isa AbstractMatrix{Int} || throw(ArgumentError("order is $(described(order)) of $(eltype(order)); expected a matrix of Int, a column for each epoch"))
    samples, count, epochs = size(X, 2), size(nets.parameters, 2), size(order, 2)
    check_replicas(trainer.problem.net, nets)
    all(in(1:samples), order) || throw(ArgumentError("order has numbers from $(minimum(order)) to $(maximum(order)) for $samples samples"))
    b = Batches(X, Y, weights, order, batch_size, rates)
    b.whole || min(batch_size, samples_of(b)) <= trainer.batch_size ||
        throw(ArgumentError("batches of $(min(batch_size, samples_of(b))) samples need a Trainer of that batch_size; it has $(trainer.batch_size)"))
    count <= length(trainer.states) ||
        throw(DimensionMismatch("there are $count nets for a trainer of $(length(trainer.states))"))
    length(rates) == steps_of(b) * epochs ||
        throw(DimensionMismatch("there are $(length(rates)) rates for $epochs epochs of $(steps_of(b)) steps"))
    for (name, A) in (("losses", losses), ("unconverged", unconverged))
        size(A) == (epochs, count) || throw(DimensionMismatch("$name are $(size(A)), but $epochs epochs of $count nets were expected"))
    end
    return b
end

# Initialised at the parameters, since some rules keep a copy of them, as MixedPrecision does.
function begin_states!(trainer::Trainer, nets::Replicas)
    p = first(trainer.buffers).before
    for s in axes(nets.parameters, 2)
        trainer.states[s] = Optimisers.init(trainer.rule, copyto!(p, view(nets.parameters, :, s)))
    end
    return
end

function check_replicas(net::Network, nets::Replicas)
    P = nets.parameters
    size(P, 1) == length(net) || throw(DimensionMismatch("the network has $(length(net)) parameters, the nets to train have $(size(P, 1))"))
    size(nets.good) == size(P) && length(nets.halted) == size(P, 2) || throw(
        DimensionMismatch("`parameters` of the nets are $(size(P)), but `good` is $(size(nets.good)), and `halted` of length $(length(nets.halted))")
    )
    return
end

# Zero until a sample is visited; equilibria of other samples are of no use.
function make_equilibria!(trainer::Trainer, samples::Int)
    (; equilibria) = trainer
    isempty(equilibria) || size(first(equilibria), 2) == samples || empty!(equilibria)
    while length(equilibria) < length(trainer.states)
        push!(equilibria, allocate(first(trainer.buffers).workspace, neurons(trainer.problem.net), samples))
    end
    return
end

function train_each!(trainer::Trainer, nets::Replicas, batches::Batches, losses, unconverged)
    count = size(nets.parameters, 2)
    threads = threads_for_nets(trainer, batches, count)
    add_buffers!(trainer, threads)
    in_parallel(count, threads) do thread, s
        equilibria = trainer.warm_start ? trainer.equilibria[s] : nothing
        train_net!(trainer, trainer.buffers[thread], nets, s, batches, equilibria, view(losses, :, s), view(unconverged, :, s))
    end
    return
end

# Each thread takes a net, if there are enough nets or one net would leave threads idle.
function threads_for_nets(trainer::Trainer, batches::Batches, nets::Int)
    first(trainer.buffers).workspace isa CPUWorkspace || return 1
    alone = threads_for(trainer.problem.net, min(batches.size, samples_of(batches)))
    return alone == 1 || nets >= 2 * Threads.nthreads() ? min(nets, Threads.nthreads()) : 1
end

function add_buffers!(trainer::Trainer, threads::Int)
    net = trainer.problem.net
    while length(trainer.buffers) < threads
        push!(trainer.buffers, StepBuffers(net, Workspace(net), trainer.rule, trainer.batch_size, trainer.warm_start))
    end
    return
end

function train_net!(trainer::Trainer, b::StepBuffers, nets::Replicas, s::Int, batches::Batches, equilibria, losses, unconverged)
    p, good = view(nets.parameters, :, s), view(nets.good, :, s)
    for epoch in 1:epochs_of(batches)
        nets.halted[s] == Int8(RUNNING) || return end_losses!(losses, unconverged, epoch)
        copyto!(b.before, p)
        losses[epoch], unconverged[epoch] = train_epoch!(trainer, b, p, s, batches, equilibria, epoch)
        halt = halt_of(trainer.guard, losses[epoch], unconverged[epoch] / samples_of(batches), p)
        halt in (NOT_FINITE, TOO_MANY_UNCONVERGED) || copyto!(good, b.before)
        halt == RUNNING || copyto!(p, good)
        nets.halted[s] = Int8(halt)
    end
    return
end

function end_losses!(losses, unconverged, epoch::Int)
    fill!(view(losses, epoch:length(losses)), NaN)
    fill!(view(unconverged, epoch:length(unconverged)), 0)
    return
end

"The reason to halt a net after an epoch with this loss and share of unconverged samples, which led to the parameters `p`."
function halt_of(guard::Guard, loss, unconverged, p)
    isfinite(loss) || return NOT_FINITE
    unconverged > guard.unconverged && return TOO_MANY_UNCONVERGED
    size_of_p = euclidean_norm(p)
    return isfinite(size_of_p) && size_of_p <= guard.parameter_norm ? RUNNING : TOO_LARGE
end

# The mean loss, NaN as soon as a loss or gradient is not finite, and the number of unconverged samples.
function train_epoch!(trainer::Trainer, b::StepBuffers, p, s::Int, batches::Batches, equilibria, epoch::Int)
    total, failed, first_probe = 0.0, 0, trainer.steps + (epoch - 1) * steps_of(batches)
    for step in 1:steps_of(batches)
        check_interrupt()
        loss, quality = batch_gradient!(b, trainer.problem, p, batches, epoch, step, first_probe + step, equilibria)
        total += loss * length(batch(batches, epoch, step))
        failed += quality.unconverged
        gradient_norm = euclidean_norm(b.gradient)
        isfinite(loss) && isfinite(gradient_norm) || return NaN, failed
        gradient_norm > trainer.clip && rmul!(b.gradient, trainer.clip / gradient_norm)
        trainer.states[s] = descend!(rule_at!(b, trainer.rule, rate_of(batches, epoch, step)), trainer.states[s], p, b.gradient)
    end
    return total / samples_of(batches), failed
end

"""
The loss and quality of a step for a net with the parameters `p`; the gradient goes to `b.gradient`. For warm starts, `equilibria` are
the last equilibria of all samples, which are updated.
"""
function batch_gradient!(
        b::StepBuffers, problem::Problem, p, batches::Batches, epoch::Int, step::Int, probe::Int, equilibria = nothing
    )
    (; X, Y, weights) = batches
    batches.whole && return loss_and_gradient!(b.gradient, b.workspace, problem, p, X, Y; probe, weights, states = equilibria)
    selected = batch(batches, epoch, step)
    x, y, states = gather!(b.batch_X, X, selected), gather!(b.batch_Y, Y, selected), gather!(b.batch_states, equilibria, selected)
    w = gather!(b.batch_weights, weights, selected)
    result = loss_and_gradient!(b.gradient, b.workspace, problem, p, x, y; probe, weights = w, states)
    states === nothing || copy_columns!(equilibria, selected, states, axes(states, 2))
    return result
end

"    descend!(rule, state, p, g)\n\nA step of a rule of Optimisers.jl for the gradient `g`; returns its state."
function descend!(rule::Optimisers.AbstractRule, state, p, g)
    state, change = Optimisers.apply!(rule, state, p, g)
    change === nothing || (p .-= change)          # rules may wait for further gradients
    return state
end

# The same to the last bit for Adam, except subnormal averages, which are zero here.
const AdamState{T, V <: AbstractVector{T}} = Tuple{V, V, NTuple{2, T}}

descend!(rule::Optimisers.Adam, state::AdamState{T}, p::AbstractVector{T}, g::AbstractVector{T}) where {T <: BlasFloat} =
    adam_step!((p, direction, η) -> p - direction * η, rule, state, p, g)

function descend!(rule::Optimisers.AdamW, state::AdamState{T}, p::AbstractVector{T}, g::AbstractVector{T}) where {T <: BlasFloat}
    λ = T(rule.lambda)
    rule.couple && return adam_step!((p, direction, η) -> p - η * (direction + λ * p), rule, state, p, g)
    return adam_step!((p, direction, η) -> p - (η * direction + λ * p), rule, state, p, g)
end

function descend!(
        rule::Optimisers.OptimiserChain{<:Tuple{Optimisers.WeightDecay, Optimisers.Adam}}, (decay, state)::Tuple{Any, AdamState{T}},
        p::AbstractVector{T}, g::AbstractVector{T}
    ) where {T <: BlasFloat}
    g .+= T(first(rule.opts).lambda) .* p
    return decay, descend!(last(rule.opts), state, p, g)
end

"Larger slopes count as this: an infinite average of squares would freeze a parameter for ever."
largest_slope(::Type{T}) where {T} = sqrt(floatmax(T)) / 2

function adam_step!(step::S, rule, (m, v, powers)::AdamState{T}, p, g) where {S, T}
    η, ε, (β1, β2), (c1, c2), largest = T(rule.eta), T(rule.epsilon), T.(rule.beta), 1 .- powers, largest_slope(T)
    g .= clamp.(g, -largest, largest)
    m .= without_subnormals.(β1 .* m .+ (1 - β1) .* g)
    v .= without_subnormals.(β2 .* v .+ (1 - β2) .* abs2.(g))
    p .= step.(p, m ./ c1 ./ (sqrt.(v ./ c2) .+ ε), η)
    return m, v, without_subnormals.(powers .* (β1, β2))
end

# `sqrt` checks for negative numbers, which prevents loops from being vectorised, as those of Optimisers.jl.
function adam_step!(step::S, rule, (m, v, powers)::AdamState{T, Vector{T}}, p::StridedVector{T}, g::Vector{T}) where {S, T}
    η, ε, (β1, β2), (c1, c2), largest = T(rule.eta), T(rule.epsilon), T.(rule.beta), 1 .- powers, largest_slope(T)
    @inbounds @simd ivdep for i in eachindex(p, g, m, v)
        slope = clamp(g[i], -largest, largest)
        m[i] = without_subnormals(β1 * m[i] + (1 - β1) * slope)
        v[i] = without_subnormals(β2 * v[i] + (1 - β2) * abs2(slope))
        p[i] = step(p[i], m[i] / c1 / (Base.sqrt_llvm(v[i] / c2) + ε), η)
    end
    return m, v, without_subnormals.(powers .* (β1, β2))
end

# The averages of a fully trained net reach such numbers, for which some processors take a hundred times as long.
@inline without_subnormals(x::T) where {T} = ifelse(abs(x) < floatmin(T), zero(T), x)

"The `selected` samples of an array, in the `buffer`."
gather!(buffer, ::Nothing, selected) = nothing
gather!(buffer, x::AbstractVector, selected) = (y = view(buffer, eachindex(selected)); y .= view(x, selected); y)
function gather!(buffer, A::AbstractMatrix, selected)
    copy_columns!(buffer, 1:length(selected), A, selected)
    return view(buffer, :, 1:length(selected))
end

"Columns `here` of `from` become the columns `there` of `to`."
copy_columns!(to::AbstractMatrix, there, from::AbstractMatrix, here) = view(to, :, there) .= view(from, :, here)
function copy_columns!(to::Matrix, there, from::StridedMatrix, here)
    checkbounds(to, :, there)
    checkbounds(from, :, here)
    @inbounds for (j, k) in zip(there, here)
        copy_column!(to, j, from, k)
    end
    return to
end

"""
The optimisers by the names that Python uses, made from a dictionary of their options; `learning_rate` applies
until [`train!`](@ref) is given another. `weight_decay` is added to the gradient as `weight_decay ⋅ p`, except for
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

# Tiny nets of one topology, trained side by side on the same batches: one net in each lane of the vector registers, one sample after
# the other. Every operation is the one that a net alone would see, in the same order, and so is every bit of the result.

"The number of nets side by side: those of two vector registers, of which one need not wait for the other."
nets_side_by_side(::Type{T}) where {T} = lane_count(T, 2)

"""
    LaneWeights(net)

The weights of several nets of one recurrent stage, or gradients with respect to them: [`StageWeights`](@ref) and the readout, with the
net as the first index of every array.
"""
struct LaneWeights{T}
    input::Array{T, 3}
    raw::Array{T, 3}
    recurrent::Array{T, 3}
    transposed::Array{T, 3}        # the recurrent weights, for the adjoint
    bias::Matrix{T}
    scales::Matrix{T}
    scaling::Matrix{T}
    row_sum::Matrix{T}
    row_factor::Matrix{T}
    C::Array{T, 3}
    d::Matrix{T}
end

function LaneWeights(net::Network{T}) where {T}
    L, stage = nets_side_by_side(T), only(net.stages)
    n, k = length(stage.rows), net.outputs
    return LaneWeights{T}(
        zeros(T, L, n, net.inputs), (zeros(T, L, n, n) for _ in 1:3)..., zeros(T, L, n), zeros(T, L, length(stage.scales)),
        ones(T, L, n), zeros(T, L, n), zeros(T, L, n), zeros(T, L, k, k > 0 ? length(net.readout) : 0), zeros(T, L, k),
    )
end

"The sums that the samples of a batch add to."
sums(g::LaneWeights) = (g.input, g.recurrent, g.bias, g.C, g.d)

"""
    SideBySide(problem)

The buffers of a thread for the gradients of L nets at once, whose parameters are the rows of `parameters`; `loss` is that of each,
and `unsolved` says where an equilibrium or adjoint needs the general method. For problems that are [`is_tiny`](@ref).
"""
struct SideBySide{T, L, F <: Activation, C <: Constraint, E <: Loss}
    net::Network{T}
    f::F
    constraint::C
    loss_function::E
    forward::LaneCriterion{T, F}
    adjoint_tol::T
    parameters::Matrix{T}          # nets × parameters
    gradient::Matrix{T}
    weights::LaneWeights{T}
    total::LaneWeights{T}          # of the gradient
    partial::LaneWeights{T}        # of a tile
    lanes::Lanes{T, L}
    Y::Matrix{T}                   # nets × outputs
    GY::Matrix{T}
    loss::Vector{Float64}
    tile_loss::Vector{Float64}
    unsolved::Vector{Bool}
end

function SideBySide(problem::Problem{T}) where {T}
    f = only(problem.net.stages).activation
    return SideBySide(problem.net, f, problem.net.constraint, problem.loss, lane_criteria(problem, f)...)
end
function SideBySide(net::Network{T}, f::F, constraint::C, loss::E, criterion, adjoint_tol) where {T, F, C, E}
    L, k = nets_side_by_side(T), output_size(net)
    return SideBySide{T, L, F, C, E}(
        net, f, constraint, loss, criterion, adjoint_tol, zeros(T, L, length(net)), zeros(T, L, length(net)),
        ntuple(_ -> LaneWeights(net), Val(3))..., Lanes{T, L}(neurons(net)), zeros(T, L, k), zeros(T, L, k),
        zeros(L), zeros(L), zeros(Bool, L),
    )
end

# --- vectors of nets ------------------------------------------------------------------------------------------

# A[:, i] = B[:, k], in the order of memory
@inline copy_vector!(A::Array, i::Int, B::Array, k::Int, lanes) = put_vector!(A, i, vector(B, k, lanes))

function add!(a::LaneWeights, b::LaneWeights)
    map(add!, sums(a), sums(b))
    return a
end
clear!(g::LaneWeights) = foreach(A -> fill!(A, 0), sums(g))

# Call `move(array, i, q)` for the parameters q and the vectors i of the arrays where they belong.
@inline function each_parameter(move::F, w::LaneWeights, net::Network) where {F}
    n, stage = neurons(net), only(net.stages)
    for c in stage.connections
        array, q = c.from == 0 ? w.input : w.raw, c.offset
        for j in c.cols, i in c.rows
            move(array, (j - 1) * n + i, q += 1)
        end
    end
    each_vector(move, w.bias, net.bias)
    each_vector(move, w.scales, first(stage.scales) - 1)
    each_vector(move, w.C, net.weights_out)
    each_vector(move, w.d, net.weights_out + net.outputs * size(w.C, 3))
    return
end
@inline each_vector(move::F, array, offset) where {F} =
    foreach(i -> move(array, i, offset + i), 1:(length(array) ÷ size(array, 1)))

function unpack!(s::SideBySide{T, L}) where {T, L}
    (; weights, parameters, net) = s
    lanes, n = Val(L), neurons(net)
    each_parameter((array, i, q) -> copy_vector!(array, i, parameters, q, lanes), weights, net)
    constrain_lanes!(weights, s.constraint, only(net.stages).slopes)
    for j in 1:n, i in 1:n
        copy_vector!(weights.transposed, (i - 1) * n + j, weights.recurrent, (j - 1) * n + i, lanes)
    end
    return
end

function pack_gradient!(s::SideBySide{T, L}) where {T, L}
    (; total, gradient, net) = s
    constrain_pullback_lanes!(total, s.constraint, s.weights)
    each_parameter((array, i, q) -> copy_vector!(gradient, q, array, i, Val(L)), total, net)
    return
end

# --- constraints, as in `constrain!` and `constrain_pullback!` -----------------------------------------------------

constrain_lanes!(w::LaneWeights, ::Free, slopes) = copyto!(w.recurrent, w.raw)
constrain_pullback_lanes!(g::LaneWeights, ::Free, w::LaneWeights) = copyto!(g.raw, g.recurrent)

function constrain_lanes!(w::LaneWeights{T}, c::Union{InfNorm, Perron}, slopes) where {T}
    (; raw, recurrent, scaling, row_sum, row_factor) = w
    n, L = size(raw, 2), nets_side_by_side(T)
    c isa Perron && exponentials_lanes!(scaling, w.scales)
    fill!(row_sum, 0)
    @inbounds for j in 1:n, i in 1:n
        @lanes T for l in 1:L
            row_sum[l, i] += abs(raw[l, i, j])
        end
    end
    @inbounds for i in 1:n
        limit = T(c.kappa / slopes[i])
        @lanes T for l in 1:L
            row_factor[l, i] = min(one(T), limit / row_sum[l, i])
        end
    end
    @inbounds for j in 1:n, i in 1:n
        @lanes T for l in 1:L
            recurrent[l, i, j] = row_factor[l, i] * raw[l, i, j] * (scaling[l, j] / scaling[l, i])
        end
    end
    return w
end

function exponentials_lanes!(scaling::Matrix{T}, scales) where {T}
    L = nets_side_by_side(T)
    lanes = Val(L)
    low = high = vector(scales, 1, lanes)
    for i in axes(scales, 2)
        a = vector(scales, i, lanes)
        low, high = select(below(a, low), a, low), select(below(high, a), a, high)
    end
    half = same_in_all(T(0.5), lanes)
    middle = muladd_lanes(half, low, times_lanes(half, high))
    for i in axes(scales, 2)
        put_vector!(scaling, i, minus_lanes(vector(scales, i, lanes), middle))
        @inbounds @lanes T for l in 1:L
            scaling[l, i] = exp_bounded(scaling[l, i])
        end
    end
    return scaling
end

function constrain_pullback_lanes!(g::LaneWeights{T}, c::Union{InfNorm, Perron}, w::LaneWeights{T}) where {T}
    (; raw, recurrent, scaling, row_factor, row_sum) = w
    n, L = size(raw, 2), nets_side_by_side(T)
    inner, scaled = fill!(g.row_sum, 0), c isa Perron
    scaled && fill!(g.scales, 0)
    @inbounds for j in 1:n, i in 1:n
        @lanes T for l in 1:L
            flow = g.recurrent[l, i, j] * recurrent[l, i, j]
            inner[l, i] += flow
            scaled && (g.scales[l, j] += flow)
        end
    end
    scaled && subtract!(g.scales, inner)
    @inbounds for i in 1:n
        @lanes T for l in 1:L
            inner[l, i] = ifelse(row_factor[l, i] < 1, inner[l, i] / row_sum[l, i], zero(T))
        end
    end
    @inbounds for j in 1:n, i in 1:n
        @lanes T for l in 1:L
            h = g.recurrent[l, i, j] * row_factor[l, i] * (scaling[l, j] / scaling[l, i])
            g.raw[l, i, j] = h - sign(raw[l, i, j]) * inner[l, i]
        end
    end
    return g
end

# --- the gradient of a batch --------------------------------------------------------------------------------------

"""
    loss_and_gradient!(s::SideBySide, X, Y, weights, samples)

The loss and the gradient of every net on the samples with these numbers, as [`loss_and_gradient!`](@ref) gives them for each.
"""
function loss_and_gradient!(s::SideBySide{T}, X, Y, weights, samples) where {T}
    B = length(samples)
    width = tile_width(s.net, B)
    unpack!(s)
    fill!(s.loss, 0)
    fill!(s.unsolved, false)
    for k in 1:cld(B, width)
        sum = k == 1 ? s.total : s.partial
        clear!(sum)
        fill!(s.tile_loss, 0)
        for j in piece(k, width, B)
            sample = @inbounds samples[j]
            add_sample!(sum, s, X, Y, sample, T(1 / B) * weight_of(weights, sample))
        end
        k == 1 || add!(s.total, sum)
        add!(s.loss, s.tile_loss)
    end
    pack_gradient!(s)
    return
end

function add_sample!(sum::LaneWeights, s::SideBySide{T, L}, X, Y, sample::Int, weight) where {T, L}
    w, net, weights, lanes = s.lanes, s.net, s.weights, Val(L)
    x = view(X, :, sample)
    drive_lanes!(w.U, weights.input, weights.bias, x, lanes)
    newton_lanes!(w, weights.recurrent, s.forward, true, LANE_ITERATIONS)
    note_unsolved!(s)
    slopes_lanes!(w, s.f)
    read_out_lanes!(s.Y, w.F, net, weights.C, weights.d, lanes)
    loss_gradient_lanes!(s, Y, sample, weight / size(Y, 1))
    read_out_adjoint_lanes!(w.U, s.GY, net, weights.C, lanes)
    adjoint_lanes!(w, weights.transposed, s.adjoint_tol)
    note_unsolved!(s)
    add_pullback_lanes!(sum, w, x, s.GY, net, lanes)
    return
end

function note_unsolved!(s::SideBySide{T, L}) where {T, L}
    @inbounds for l in 1:L
        s.unsolved[l] |= has_bit(s.lanes.failed, l)
    end
    return
end

function loss_gradient_lanes!(s::SideBySide{T, L}, targets, sample::Int, w) where {T, L}
    (; Y, GY, tile_loss) = s
    for i in axes(Y, 2)
        t = @inbounds targets[i, sample]
        @inbounds @lanes T for l in 1:L
            GY[l, i] = w * slope(s.loss_function, Y[l, i], t)
            tile_loss[l] += w * value(s.loss_function, Float64(Y[l, i]), Float64(t))
        end
    end
    return
end

# --- training -----------------------------------------------------------------------------------------------------

"Whether the step of a rule of Optimisers.jl for a parameter depends on that parameter only."
is_elementwise(::Optimisers.AbstractRule) = false
is_elementwise(
    ::Union{
        Optimisers.Descent, Optimisers.Momentum, Optimisers.Nesterov, Optimisers.Adam, Optimisers.AdamW, Optimisers.RMSProp,
        Optimisers.WeightDecay,
    }
) = true
is_elementwise(chain::Optimisers.OptimiserChain) = all(is_elementwise, chain.opts)

# Lanes without a net compute as well. The sum over a batch has as many shares as tiles.
function goes_side_by_side(trainer::Trainer, nets::Replicas, batches::Batches)
    runs_in_lanes(trainer, nets, batches) || return false
    net, samples, count = trainer.problem.net, min(batches.size, samples_of(batches)), size(nets.parameters, 2)
    cld(samples, tile_width(net, samples)) <= shares_of(net) || return false
    allequal(map(in_common, trainer.states[findall(==(Int8(RUNNING)), nets.halted)])) || return false
    threads, groups = Threads.nthreads(), cld(count, nets_side_by_side(eltype(net)))
    return cld(groups, threads) * GROUP_SAMPLE * samples < cld(count, threads) * (samples + STEP_OVERHEAD)
end

function runs_in_lanes(trainer::Trainer{T}, nets::Replicas, batches::Batches) where {T}
    first(trainer.buffers).workspace isa CPUWorkspace && nets.parameters isa Matrix{T} || return false
    is_tiny(trainer.problem) && is_elementwise(trainer.rule) && !trainer.warm_start || return false
    return all(A -> A === nothing || eltype(A) == T, (batches.X, batches.Y, batches.weights))
end

function train_side_by_side!(trainer::Trainer{T}, nets::Replicas, batches::Batches, losses, unconverged) where {T}
    running = findall(==(Int8(RUNNING)), nets.halted)
    groups = [view(running, group) for group in pieces_of(length(running), nets_side_by_side(T))]
    for s in setdiff(axes(nets.parameters, 2), running)
        end_losses!(view(losses, :, s), view(unconverged, :, s), 1)
    end
    threads = min(length(groups), Threads.nthreads())
    add_buffers!(trainer, threads)
    while length(trainer.side_by_side) < threads
        push!(trainer.side_by_side, SideBySide(trainer.problem))
    end
    in_parallel(length(groups), threads) do thread, k
        buffers, lanes = trainer.buffers[thread], trainer.side_by_side[thread]
        train_group!(NetGroup(lanes, trainer, nets, groups[k]), lanes, buffers, trainer, nets, batches, losses, unconverged)
    end
    return
end

# The states of the optimisers of L nets as that of one with all of their parameters, those of a lane every L apart; numbers they have
# in common. The lanes for which there is no net repeat the last.
stacked(states::AbstractVector{<:AbstractArray}, L) = [states[min(l, end)][q] for q in eachindex(first(states)) for l in 1:L]
stacked(states::AbstractVector{<:Tuple}, L) = ntuple(i -> stacked(map(state -> state[i], states), L), fieldcount(eltype(states)))
stacked(states::AbstractVector, L) = first(states)

in_common(state::AbstractArray) = ()
in_common(state::Tuple) = map(in_common, state)
in_common(state) = state

# That of the net in lane l; `state`, what it was before, is overwritten.
unstacked!(state::AbstractArray, all, l::Int, L::Int) = copyto!(state, view(all, l:L:length(all)))
unstacked!(state::Tuple, all, l::Int, L::Int) = map((x, y) -> unstacked!(x, y, l, L), state, all)
unstacked!(state, all, l::Int, L::Int) = all

"""
    NetGroup(s, trainer, nets, numbers)

The nets with these numbers, lane by lane, in a call of [`train!`](@ref).
"""
mutable struct NetGroup{T, S}
    const numbers::Vector{Int}
    const good::Matrix{T}          # parameters, as in `Replicas`
    const before::Matrix{T}
    const squares::Vector{T}
    const total::Vector{Float64}   # losses of the epoch
    const failed::Vector{Int}      # samples
    const running::Vector{Bool}    # until a net is halted
    const finite::Vector{Bool}     # the losses and gradients of the epoch, so far
    state::S                       # of the optimiser
end
function NetGroup(s::SideBySide{T, L}, trainer::Trainer, nets::Replicas, numbers) where {T, L}
    rows(A) = [A[q, numbers[min(l, end)]] for l in 1:L, q in axes(A, 1)]
    copyto!(s.parameters, rows(nets.parameters))
    return NetGroup(
        collect(Int, numbers), rows(nets.good), zero(s.parameters), zeros(T, L), zeros(L), zeros(Int, L),
        [l <= length(numbers) for l in 1:L], zeros(Bool, L), stacked(trainer.states[numbers], L),
    )
end

function train_group!(
        g::NetGroup, s::SideBySide{T}, b::StepBuffers, trainer::Trainer{T}, nets::Replicas, batches::Batches, losses, unconverged
    ) where {T}
    (; X, Y, weights) = batches
    p, gradient = vec(s.parameters), vec(s.gradient)
    for epoch in 1:epochs_of(batches)
        copyto!(g.before, s.parameters)
        copyto!(g.finite, g.running)
        fill!(g.total, 0)
        fill!(g.failed, 0)
        for step in 1:steps_of(batches)
            check_interrupt()
            selected = batch(batches, epoch, step)
            loss_and_gradient!(s, X, Y, weights, batches.whole ? (1:samples_of(batches)) : selected)
            any(s.unsolved) && solve_alone!(g, s, b, trainer.problem, batches, epoch, step)
            map_each!((total, loss) -> total + loss * length(selected), g.total, g.total, s.loss)
            check_gradients!(g, s, trainer)
            g.state = descend!(rule_at!(b, trainer.rule, rate_of(batches, epoch, step)), g.state, p, gradient)
        end
        end_epoch!(g, s, trainer, nets, epoch, samples_of(batches), losses, unconverged)
        any(g.running) || break
    end
    for (l, number) in enumerate(g.numbers)
        g.running[l] || continue
        copyto!(view(nets.parameters, :, number), view(s.parameters, l, :))
        copyto!(view(nets.good, :, number), view(g.good, l, :))
        keep_state!(trainer, g, l)
    end
    return
end

# The nets for which the lanes did not do, by the general method.
function solve_alone!(g::NetGroup, s::SideBySide, b::StepBuffers, problem::Problem, batches::Batches, epoch::Int, step::Int)
    for l in eachindex(g.numbers)
        g.finite[l] && s.unsolved[l] || continue
        s.loss[l], quality = batch_gradient!(b, problem, s.parameters[l, :], batches, epoch, step, 0)
        copyto!(view(s.gradient, l, :), b.gradient)
        g.failed[l] += quality.unconverged
    end
    return
end

# Clips the gradients, and notes which are not finite; those nets have taken their last step of the epoch.
function check_gradients!(g::NetGroup, s::SideBySide, trainer::Trainer)
    sum_of_squares!(g.squares, s.gradient)
    within = min(floatmax(eltype(g.squares)), trainer.clip)^2 / 2      # even if the sum is not exact
    for l in eachindex(g.numbers)
        g.finite[l] && !(isfinite(s.loss[l]) && g.squares[l] < within) || continue
        gradient = s.gradient[l, :]
        size = euclidean_norm(gradient)
        g.finite[l] = isfinite(s.loss[l]) && isfinite(size)
        g.finite[l] || keep_state!(trainer, g, l)
        size > trainer.clip && rmul!(view(s.gradient, l, :), trainer.clip / size)
    end
    return
end

function end_epoch!(g::NetGroup, s::SideBySide, trainer::Trainer, nets::Replicas, epoch::Int, samples::Int, losses, unconverged)
    (; guard) = trainer
    sum_of_squares!(g.squares, s.parameters)
    within = min(floatmax(eltype(g.squares)), guard.parameter_norm)^2 / 2
    quiet = true
    for (l, number) in enumerate(g.numbers)
        g.running[l] || continue
        losses[epoch, number] = g.finite[l] ? g.total[l] / samples : NaN
        unconverged[epoch, number] = g.failed[l]
        quiet &= g.finite[l] & (g.failed[l] <= guard.unconverged * samples) & (g.squares[l] < within)
    end
    quiet && (copyto!(g.good, g.before); return)
    for (l, number) in enumerate(g.numbers)
        g.running[l] || continue
        halt = halt_of(guard, losses[epoch, number], g.failed[l] / samples, s.parameters[l, :])
        halt in (NOT_FINITE, TOO_MANY_UNCONVERGED) || copyto!(view(g.good, l, :), view(g.before, l, :))
        halt == RUNNING && continue
        g.finite[l] && keep_state!(trainer, g, l)
        g.running[l] = false
        copyto!(view(nets.parameters, :, number), view(g.good, l, :))
        copyto!(view(nets.good, :, number), view(g.good, l, :))
        nets.halted[number] = Int8(halt)
        end_losses!(view(losses, :, number), view(unconverged, :, number), epoch + 1)
    end
    return
end

keep_state!(trainer::Trainer, g::NetGroup, l::Int) =
    (trainer.states[g.numbers[l]] = unstacked!(trainer.states[g.numbers[l]], g.state, l, length(g.running)); nothing)

"The sum of the squares of the entries of every row."
function sum_of_squares!(squares::Vector{T}, A::Matrix{T}) where {T}
    lanes = Val(nets_side_by_side(T))
    sum = same_in_all(zero(T), lanes)
    for q in axes(A, 2)
        x = vector(A, q, lanes)
        sum = muladd_lanes(x, x, sum)
    end
    return put_vector!(squares, 1, sum)
end

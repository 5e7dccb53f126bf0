# Elementwise operations, each in one pass over the arrays. A sample is a column; its sums are taken in a fixed order.

"Work-items to a column, and columns to a workgroup."
const WORK_ITEMS, GROUP = 32, 8

# --- activations by their row -------------------------------------------------------------------------------------

@inline value_at(f::Activation, i, s) = value(f, s)
@inline slope_at(f::Activation, i, s, z) = slope(f, s, z)
@inline value_at(f::Piecewise, i, s) = at_row((g, s) -> value(g, s), f.ranges, f.activations, i, s)
@inline curvature_at(f::Activation, i, s, z) = curvature(f, s, z)
@inline curvature_at(f::Piecewise, i, s, z) = at_row((g, s, z) -> curvature(g, s, z), f.ranges, f.activations, i, s, z)
@inline slope_at(f::Piecewise, i, s, z) = at_row((g, s, z) -> slope(g, s, z), f.ranges, f.activations, i, s, z)

@inline at_row(f::F, ::Tuple{Any}, groups::Tuple{Any}, i, x...) where {F} = f(only(groups), x...)
@inline at_row(f::F, ranges::Tuple, groups::Tuple, i, x...) where {F} =
    i <= last(first(ranges)) ? f(first(groups), x...) : at_row(f, Base.tail(ranges), Base.tail(groups), i, x...)

# --- one iteration ------------------------------------------------------------------------------------------------

"""
    Activated(f), Scaled(), Deviating(f)

The right-hand side of a fixed point for an argument s: `f(s)`, of a stage; `D s` with the slopes D, of its adjoint system; or
`f(s) - d̄ s` with mean slopes d̄, of a linearised stage, whose residual is related to the size of f(s).
"""
struct Activated{F <: Activation}
    f::F
end
struct Scaled end
struct Deviating{F <: Activation}
    f::F
end
@inline row_value(a::Activated, D, i, j, s) = value_at(a.f, i, s)
@inline row_value(::Scaled, D, i, j, s) = @inbounds D[i, j] * s
@inline row_value(a::Deviating, d, i, j, s) = value_at(a.f, i, s) - @inbounds(d[i]) * s

"The state that a value of the right-hand side means."
@inline state_of(g, D, i, s, z) = z
@inline state_of(::Deviating, d, i, s, t) = t + @inbounds(d[i]) * s

"""
    Rule{T}

When the iteration of a column ends. `settled` says that what Picard iteration converges to is beyond doubt; else an iterate that
converges to a huge size is left to the host, and, unless all solutions are `checked` afterwards, one that converges at once or by
damped steps; as are columns that blow up (where `rescue`), with a finite `patience` those that need more iterations than that, and
columns whose squares overflow or, smaller than `least`, vanish.
"""
@kwdef struct Rule{T}
    tol::T
    floor::T
    damping::T = 1
    limit::Int32
    patience::T = Inf
    settled::Bool = true
    checked::Bool = true
    rescue::Bool = false
    least::T = 0
    latest::Bool = false         # take the value of the last evaluation for the solution
end

"What becomes of a column: it rests, takes the next iterate, or ends, as one that the host has to solve or not."
@enum Decision::Int8 REST ADVANCE FINISH ABANDON

# The decision on a column after `count` evaluations, its status should it end, and its relative residual.
@inline function decide(r::Rule{T}, change, size, largest, count, rate) where {T}
    scale = max(size, r.floor)
    residual = iszero(scale) ? zero(T) : change / scale
    if !isfinite(change + size)
        return (r.rescue || isfinite(largest) ? ABANDON : FINISH), NON_FINITE, residual
    elseif change <= r.tol * scale
        doubtful = !r.settled && (largest > T(SUSPICIOUS_SIZE) || !r.checked && (count == 1 || r.damping < 1))
        return (doubtful || size < r.least && largest > 0 ? ABANDON : FINISH), CONVERGED, residual
    elseif change > T(BLOW_UP) * (1 + r.floor)
        return (r.rescue ? ABANDON : FINISH), DIVERGED, residual
    elseif count >= r.limit
        return FINISH, MAX_ITERATIONS, residual
    end
    slow = count % AUTO_BLOCK == 0 && predicted_iterations(r.tol * scale, change, rate) > r.patience
    return (slow ? ABANDON : ADVANCE), MAX_ITERATIONS, residual
end

# Let column j have its decision, and write down what becomes of it; returns how its iterate is to be changed.
@inline function conclude!(progress, record, j, rule, change, size, largest)
    @inbounds begin
        before, count = progress.change[j], progress.count[j] + one(Int32)
        rate = isfinite(before) ? change / before : progress.rate[j]
        decision, status, residual = decide(rule, change, size, largest, count, rate)
        progress.count[j], progress.change[j], progress.rate[j] = count, change, rate
        progress.running[j] = decision == ADVANCE
        progress.abandoned[j] = decision == ABANDON
    end
    decision == FINISH && record!(record, j, status, count, residual, rate)
    return decision == ADVANCE || (rule.latest && decision == FINISH && status == CONVERGED) ? decision : REST
end

# The same for a column of a group, of which j is the sample, by the sums of its work-items.
@inline function conclude_column!(progress, record, rule, sums, column, j, samples)
    j <= samples && @inbounds(progress.running[j]) || return REST
    change2 = size2 = largest = zero(eltype(sums))
    for lane in axes(sums, 2)
        @inbounds change2 += sums[1, lane, column]
        @inbounds size2 += sums[2, lane, column]
        @inbounds largest = max(largest, sums[3, lane, column])
    end
    return conclude!(progress, record, j, rule, sqrt(change2), sqrt(size2), largest)
end

"""
F = g(S) for the columns that are `running`, and what becomes of each: the next iterate in `Z`, or its end in `record`.
`progress` holds per column whether it is running, abandoned to the host, its evaluations, last ‖F - Z‖ and contraction rate.
Where there is an array `F`, it takes the values of the columns that go on, whose iterates are left to the caller.
"""
@kernel function step!(Z, F, progress, record, @Const(S), g, D, rule)
    lane, column = @index(Local, NTuple)
    _, j = @index(Global, NTuple)
    @uniform n = size(Z, 1)
    @uniform samples = size(Z, 2)
    sums = @localmem eltype(Z) (3, WORK_ITEMS, GROUP)
    decisions = @localmem Int32 (GROUP,)

    if j <= samples && @inbounds(progress.running[j])
        change2, size2, largest = zero(eltype(Z)), zero(eltype(Z)), zero(eltype(Z))
        i = lane
        while i <= n
            @inbounds z = row_value(g, D, i, j, S[i, j])
            @inbounds d = z - Z[i, j]
            z = state_of(g, D, i, S[i, j], z)
            change2 = muladd(d, d, change2)
            size2 = muladd(z, z, size2)
            largest = max(largest, abs(z))
            i += WORK_ITEMS
        end
        @inbounds sums[1, lane, column] = change2
        @inbounds sums[2, lane, column] = size2
        @inbounds sums[3, lane, column] = largest
    end
    @synchronize
    if lane == 1
        @inbounds decisions[column] = Int32(conclude_column!(progress, record, rule, sums, column, j, samples))
    end
    @synchronize
    @inbounds decision = decisions[column]
    if decision != Int32(REST)
        damping = decision == Int32(ADVANCE) ? rule.damping : one(rule.damping)
        i = lane
        while i <= n
            @inbounds z = row_value(g, D, i, j, S[i, j])
            advance!(Z, decision == Int32(ADVANCE) ? F : nothing, i, j, z, damping)
            i += WORK_ITEMS
        end
    end
end

@inline advance!(Z, ::Nothing, i, j, z, damping) = @inbounds Z[i, j] = damping == 1 ? z : muladd(damping, z - Z[i, j], Z[i, j])
@inline advance!(Z, F, i, j, z, damping) = @inbounds F[i, j] = z

@inline function record!(record::NamedTuple, j, status, count, residual, rate)
    @inbounds begin
        record.status[j] = max(record.status[j], status)
        record.iterations[j] = max(record.iterations[j], count)
        record.residual[j] = worse(residual, record.residual[j])
        record.rate[j] = worse(rate, record.rate[j])
    end
    return
end

# --- one evaluation -------------------------------------------------------------------------------------------------

"F = f(S)"
@kernel function activate!(F, @Const(S), f)
    i, j = @index(Global, NTuple)
    @inbounds F[i, j] = value_at(f, i, S[i, j])
end

"D = f′(S); with `latest`, `Z` becomes f(S) in the columns that have converged."
@kernel function slopes!(D, Z, @Const(S), f, @Const(status), latest)
    i, j = @index(Global, NTuple)
    @inbounds begin
        s = S[i, j]
        z = latest && status[j] == CONVERGED ? value_at(f, i, s) : Z[i, j]
        Z[i, j] = z
        D[i, j] = slope_at(f, i, s, z)
    end
end

"D = f′(S) for Z = f(S)"
@kernel function slopes_at!(D, @Const(S), @Const(Z), f)
    i, j = @index(Global, NTuple)
    @inbounds D[i, j] = slope_at(f, i, S[i, j], Z[i, j])
end

"C = f″(S) for Z = f(S)"
@kernel function curvatures!(C, @Const(S), @Const(Z), f)
    i, j = @index(Global, NTuple)
    @inbounds C[i, j] = curvature_at(f, i, S[i, j], Z[i, j])
end

"The random signs of the [`JacobianPenalty`](@ref ImplicitRNN.JacobianPenalty), for neurons and samples after those given."
@kernel function signs!(V, probe, neuron, sample)
    i, j = @index(Global, NTuple)
    @inbounds V[i, j] = rademacher(probe, sample + j, neuron + i)
end

"The columns of a stage that is not recurrent, of which one evaluation is exact."
@kernel function record_evaluation!(record, @Const(Z))
    j = @index(Global, Linear)
    finite = true
    for i in axes(Z, 1)
        @inbounds finite &= isfinite(Z[i, j])
    end
    T = eltype(Z)
    record!(record, j, finite ? CONVERGED : NON_FINITE, one(Int32), finite ? zero(T) : T(NaN), zero(T))
end

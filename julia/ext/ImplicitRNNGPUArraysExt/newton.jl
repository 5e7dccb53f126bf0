# Equations on a device: one work-item per sample of a few unknowns. It does the same as the CPU for one sample (newton.jl, auto.jl
# and iteration.jl of solvers/), by the same rules; samples that need more than Picard and Newton steps are left to the CPU.

"Work-items of a group, whose matrices are in shared memory."
group_of(K::Int) = K <= 5 ? 64 : 32

"What the samples of an equation have in common: when they have converged, and the weights of entries; `least` is the least size of z."
struct SampleRule{K}
    tol::Float64
    eps::Float64
    least::Float64
    limit::Int32                 # of evaluations
    newton_limit::Int32          # of those by Newton's method
    patience::Float64            # iterations of Picard's that Newton's are worth
    damping::Float64
    weights::Short{K, Float64}
    plain::Short{K, Float64}     # all 1
end

"How the iteration of a sample goes, as `Iteration` has it."
struct Course
    largest::Float64
    outset::Float64
    distance::Float64
    rate::Float64
    relative::Float64
    evaluations::Int32
end
@inline begin_course(z, r::SampleRule, evaluations) = Course(0.0, measure(z, r.weights), Inf, 0.0, Inf, evaluations)
@inline once_more(c::Course) = Course(c.largest, c.outset, c.distance, c.rate, c.relative, c.evaluations + one(Int32))

"The course after a step of this length from an iterate of this size, and whether that ends it; see `near!`."
@inline function near(c::Course, r::SampleRule, distance, size, root::Bool)
    size = max(size, r.least)
    largest = max(c.largest, size)
    rate = isfinite(c.distance) ? (distance == 0 ? 0.0 : distance / c.distance) : c.rate
    rounding = r.eps * largest
    relative = distance == 0 ? 0.0 : distance / max(size, rounding / r.tol)
    settled = distance <= rounding && (distance == 0 || (!root && rate >= 1))
    return distance <= r.tol * size || settled, Course(largest, c.outset, distance, rate, relative, c.evaluations)
end
"Whether small steps shrink slowly, or without end: if they go to zero is seen on the CPU, see `converges_to_zero!`."
@inline lingers(c::Course, r::SampleRule) =
    c.distance <= r.eps * c.largest && (c.rate > SLOW || c.distance <= r.eps^2 * c.largest || c.evaluations == r.limit)

"How a fixed point stands at f(z) = `value`: whether it has converged, whether it goes on, and its course; see `assess!`."
@inline function assess(c::Course, r::SampleRule, value, merit, first)
    size = measure(value, r.weights)
    isfinite(merit) && isfinite(size) || return false, false, c
    first && (c = Course(c.largest, max(c.outset, size), c.distance, c.rate, c.relative, c.evaluations))
    converged, c = near(c, r, merit, size, false)
    return converged, !converged && merit <= BLOW_UP * c.outset && !lingers(c, r), c
end

"What came of a sample: where it is, and whether that is the solution."
struct SampleEnd{K, T}
    z::Short{K, T}
    converged::Bool
    course::Course
end

"Newton's method, as `newton!`; what it does not bring to the solution by parts of its steps is left."
@inline function newton(A, t, f::F, z::Short{K, T}, args, r::SampleRule, c::Course, limit, root::Val{R}) where {F, K, T, R}
    value = evaluate!(A, t, 0, f, z, args, root)
    c = once_more(c)
    residual = R ? value : minus(value, z)
    merit = measure(residual, R ? r.plain : r.weights)
    isfinite(merit) || return SampleEnd(z, false, c)
    before, part = oftype(merit, Inf), one(T)
    while true
        if !R
            converged, goes_on, c = assess(c, r, value, merit, c.evaluations == 1)
            goes_on || return SampleEnd(converged ? value : z, converged && is_verified!(A, t, f, value, args, r, c), c)
        end
        step = newton_step!(A, t, residual)
        all_finite(step) || return SampleEnd(z, false, c)
        if R
            converged, after = near(c, r, measure(step, r.weights), measure(z, r.weights), true)
            !converged && lingers(after, r) && return SampleEnd(z, false, after)
            doubtful = converged && merit > 0 && (isinf(c.distance) || merit > oftype(merit, LEFT_OF_CONDITIONS) * before)
            steady = !doubtful || is_steady!(A, t, f, z, step, args)
            # Whether f responds to a step back, and jumps behind part of one, is checked on the CPU.
            doubtful = far_step(r.tol) * after.largest < c.distance < Inf || part < 1
            converged && steady && return SampleEnd(plus(z, step, one(T)), !doubtful, after)
            c = steady ? after : Course(after.largest, after.outset, Inf, after.rate, after.relative, after.evaluations)
        end
        base, before, part = z, merit, one(T)
        moved = false
        while !moved
            c.evaluations < limit && part >= (R ? SMALLEST_ROOT_STEP : SMALLEST_STEP) || return SampleEnd(z, false, c)
            z = plus(base, step, part)
            value = evaluate!(A, t, 0, f, z, args, root)
            c = once_more(c)
            residual = R ? value : minus(value, z)
            merit = measure(residual, R ? r.plain : r.weights)
            moved = decreases(merit, before, part)
            moved || (part /= 2)
        end
    end
    return
end

@inline function newton_step!(A, t, c::Short{K}) where {K}
    K == 1 && return Short((-c[1] / @inbounds(A[t, 1, 1]),))
    unroll(i -> (@inbounds A[t, i, K + 1] = -c[i]; nothing), Val(K))
    divide!(A, t, Val(K), 1)
    return Short(unroll(i -> @inbounds(A[t, i, K + 1]), Val(K)))
end

@inline function is_steady!(A, t, f::F, z::Short{K, T}, step, args) where {F, K, T}
    there = Short(unroll(i -> z[i] + 2 * step[i] + 8eps(T) * z[i], Val(K)))
    evaluate!(A, t, K, f, there, args, Val(true))
    evaluate!(A, t, 0, f, z, args, Val(true))
    for k in 1:K, i in 1:K
        @inbounds A[t, i, K + k] -= A[t, i, k]
    end
    divide!(A, t, Val(K), K)
    return column_sum(A, t, K, Val(K)) <= T(0.5)
end

"Squarings of ∂f/∂z until it is left to the CPU whether its spectral radius is below 1, of which a norm below 1 of a power is proof."
const SQUARINGS = 6

@inline function attracts!(A, t, f::F, z::Short{K, T}, args) where {F, K, T}
    evaluate!(A, t, 0, f, z, args, Val(true))
    from, to = 0, K
    for _ in 0:(K == 1 ? 0 : SQUARINGS)
        column_sum(A, t, from, Val(K)) < 1 && return true
        for j in 1:K, i in 1:K
            total = zero(T)
            for k in 1:K
                @inbounds total = muladd(A[t, i, from + k], A[t, k, from + j], total)
            end
            @inbounds A[t, i, to + j] = total
        end
        from, to = to, from
    end
    return false
end

"Whether a fixed point attracts, and is where it was found; see `verify`."
@inline function is_verified!(A, t, f::F, z::Short{K, T}, args, r::SampleRule, c::Course) where {F, K, T}
    attracts!(A, t, f, z, args) || return false
    value = evaluate!(A, t, 0, f, z, args, Val(false))
    step = newton_step!(A, t, minus(value, z))
    return all_finite(step) && measure(step, r.weights) <= far_step(r.tol) * c.largest
end

"Picard iteration to the end, or until Newton's method is cheaper: where that has to begin, whether it has to, and the course."
@inline function picard(f::F, z::Short{K, T}, args, r::SampleRule) where {F, K, T}
    start, c = z, begin_course(z, r, zero(Int32))
    while c.evaluations < r.limit
        value = evaluate(f, z, args)
        c = once_more(c)
        converged, goes_on, c = assess(c, r, value, measure(minus(value, z), r.weights), c.evaluations == 1)
        converged && return SampleEnd(value, true, c), false
        goes_on || return SampleEnd(start, false, c), c.evaluations > 1          # what runs away begins anew
        z = r.damping == 1 ? value : plus(z, minus(value, z), T(r.damping))
        if c.evaluations % AUTO_BLOCK == 0
            goal = max(r.tol * measure(z, r.weights), r.eps * c.largest)
            predicted_iterations(goal, c.distance, c.rate) > r.patience && return SampleEnd(z, false, c), true
        end
    end
    return SampleEnd(z, false, c), false
end

# What undamped iteration leads to attracts, but not what it starts at, which is `doubtful`.
@inline verified(A, t, f::F, args, r::SampleRule, ended::SampleEnd, doubtful) where {F} =
    SampleEnd(ended.z, ended.converged && !(doubtful && !is_verified!(A, t, f, ended.z, args, r, ended.course)), ended.course)

# By each solver, of which a kernel is given the type.
@inline solve_by(::Union{Val{Newton}, Val{Auto}}, A, t, f::F, z, args, r::SampleRule, root::Val{true}) where {F} =
    newton(A, t, f, z, args, r, begin_course(z, r, zero(Int32)), r.newton_limit, root)
@inline solve_by(::Val{Newton}, A, t, f::F, z, args, r::SampleRule, root::Val{false}) where {F} =
    newton(A, t, f, z, args, r, begin_course(z, r, zero(Int32)), r.newton_limit, root)
@inline function solve_by(::Val{Picard}, A, t, f::F, z, args, r::SampleRule, root::Val{false}) where {F}
    ended, _ = picard(f, z, args, r)
    return verified(A, t, f, args, r, ended, r.damping < 1 || ended.course.evaluations == 1)
end
@inline function solve_by(::Val{Auto}, A, t, f::F, z, args, r::SampleRule, root::Val{false}) where {F}
    ended, unfinished = picard(f, z, args, r)
    evaluations = ended.course.evaluations
    ended.converged && return verified(A, t, f, args, r, ended, evaluations == 1)
    unfinished && evaluations < r.limit || return ended
    c, limit = begin_course(ended.z, r, evaluations), min(r.limit, evaluations + r.newton_limit)
    return newton(A, t, f, ended.z, args, r, c, limit, root)
end

"Solve the samples; those that are left stay where they are, and are not `solved`."
@kernel function solve_samples!(Z, ends, f, args, rule::SampleRule{K}, solver, root, ::Val{G}) where {K, G}
    t = @index(Local, Linear)
    j = @index(Global, Linear)
    matrix = @localmem eltype(Z) (G, K, 2K)
    if j <= size(Z, 2)
        solve_sample!(Z, ends, matrix, t, j, f, args, rule, solver, root)
    end
end

@inline function solve_sample!(Z, ends, matrix, t, j, f::F, args, rule::SampleRule{K}, solver, root) where {F, K}
    ended = solve_by(solver, matrix, t, f, column(Z, j, Val(K)), arguments_at(args, j), rule, root)
    solved = ended.converged && all_finite(ended.z)
    @inbounds ends.solved[j] = solved
    solved || return
    @inbounds ends.iterations[j] = ended.course.evaluations
    @inbounds ends.residual[j] = ended.course.relative
    @inbounds ends.rate[j] = ended.course.rate
    unroll(i -> (@inbounds Z[i, j] = ended.z[i]; nothing), Val(K))
    return
end
@inline column(Z, j, ::Val{K}) where {K} = Short(unroll(i -> @inbounds(Z[i, j]), Val(K)))

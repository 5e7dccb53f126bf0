# Equations on a device: one work-item for a sample of a few unknowns. It does what the CPU does for one sample (equations/newton.jl,
# auto.jl, iteration.jl), by the same rules; what needs more than Picard's and Newton's steps is handed to the CPU in one piece.

"Work-items of a group, whose matrices are in shared memory."
group_of(K::Int) = K <= 5 ? 64 : 32

"Derivatives that one evaluation gives, few enough for its numbers to stay in registers."
width_of(K::Int) = cld(K, cld(K, 4))

"The tuple f(1), …, f(n), with the code of f in each place: what is called by itself on a device keeps its tuples in memory."
@generated unroll(f::F, ::Val{N}) where {F, N} = Expr(:block, Expr(:meta, :inline), Expr(:tuple, (:(@inline f($i)) for i in 1:N)...))

# --- what f is given ----------------------------------------------------------------------------------------------------

"Marks the dual numbers of a device: `[a, b]` of them is a `Short`, which needs no memory."
struct DeviceSeed end
const DeviceDual{T, W} = Dual{Tag{DeviceSeed, T}, T, W}
const GrownDual = Dual{<:Tag{DeviceSeed}}              # f may have constants of another type

@inline Base.vect(x::GrownDual, rest::Vararg{Union{GrownDual, AbstractFloat, Integer, Rational, AbstractIrrational}}) = Short(x, rest...)

Adapt.adapt_structure(to, x::PerSample{K}) where {K} = (array = Adapt.adapt(to, x.array); PerSample{K, typeof(array)}(array))

@inline arguments_at(args::NTuple{N, Any}, j) where {N} = unroll(i -> at(args[i], j), Val(N))

# x with its entries from `first` on as variables; none of them where it is 0.
@inline seeded(x::T, first::Int, ::Val{W}) where {T <: AbstractFloat, W} = DeviceDual{T, W}(x, unit_vector(T, 1, first, Val(W)))
@inline seeded(x::Short{N, T}, first::Int, ::Val{W}) where {N, T <: AbstractFloat, W} =
    Short(unroll(i -> DeviceDual{T, W}(x[i], unit_vector(T, i, first, Val(W))), Val(N)))
@inline seeded(x, first::Int, ::Val) = x
@inline unit_vector(::Type{T}, i::Int, first::Int, ::Val{W}) where {T, W} = Partials(unroll(w -> T(first > 0 && i == first + w - 1), Val(W)))

"The dual numbers f(z, args...): with derivatives by the entries of z from number `first` on, or by those of argument I."
@inline duals(f::F, z::Short{K}, args, first::Int, W::Val, ::Val{0}) where {F, K} =
    entries((@inline f(seeded(z, first, W), seeded_argument(args, 0, W, Val(0))...)), Val(K))
@inline duals(f::F, z::Short{K}, args, first::Int, W::Val, ::Val{I}) where {F, K, I} =
    entries((@inline f(seeded(z, 0, W), seeded_argument(args, first, W, Val(I))...)), Val(K))
@inline seeded_argument(args::Tuple, first::Int, W::Val, ::Val{I}) where {I} = unroll(i -> seeded(args[i], i == I ? first : 0, W), Val(length(args)))

@inline entries(y::Short{K}, ::Val{K}) where {K} = y.entries
@inline entries(y::Number, ::Val{1}) = (y,)

@inline number(::Type{T}, y::GrownDual) where {T} = T(ForwardDiff.value(y))
@inline number(::Type{T}, y::Number) where {T} = T(y)
@inline numbers(::Type{T}, y::NTuple{K, Any}) where {T, K} = Short(unroll(i -> number(T, y[i]), Val(K)))
@inline derivative(::Type{T}, y::GrownDual, w::Int) where {T} = T(partials(y, w))
@inline derivative(::Type{T}, y::Number, w::Int) where {T} = zero(T)

"f(z, args...)."
@inline evaluate(f::F, z::Short{K, T}, args) where {F, K, T} = numbers(T, duals(f, z, args, 0, Val(1), Val(0)))

"""
f(z, args...), and ∂c/∂z in the columns of A[t, :, :] behind `before`, where c is f(z) of a root and else f(z) - z.
"""
@inline function evaluate!(A, t::Int, before::Int, f::F, z::Short{K, T}, args, root::Val) where {F, K, T}
    value = put_columns!(A, t, before, f, z, args, 1, root, Val(width_of(K)))
    first = 1 + width_of(K)
    while first <= K
        put_columns!(A, t, before, f, z, args, first, root, Val(width_of(K)))
        first += width_of(K)
    end
    return value
end
@inline function put_columns!(A, t, before, f::F, z::Short{K, T}, args, first, root::Val, ::Val{W}) where {F, K, T, W}
    y = duals(f, z, args, first, Val(W), Val(0))
    unroll(w -> put_column!(A, t, before, first + w - 1, y, w, root), Val(W))
    return numbers(T, y)
end
@inline function put_column!(A, t, before, k, y::NTuple{K, Any}, w, ::Val{R}) where {K, R}
    k <= K && unroll(i -> (@inbounds A[t, i, before + k] = derivative(eltype(A), y[i], w) - eltype(A)(!R && i == k); nothing), Val(K))
    return
end

# --- short vectors and small matrices -------------------------------------------------------------------------------------

@inline plus(a::Short{K}, b::Short{K}, t) where {K} = Short(unroll(i -> muladd(t, b[i], a[i]), Val(K)))
@inline minus(a::Short{K}, b::Short{K}) where {K} = Short(unroll(i -> a[i] - b[i], Val(K)))
@inline all_finite(x::Short) = reduce(&, map(isfinite, x.entries))

"The Euclidean norm of x, each entry times its weight, without overflow and underflow on the way."
@inline function measure(x::Short{K}, weights::Short{K, Float64}) where {K}
    y = unroll(i -> abs(Float64(x[i])) * weights[i], Val(K))
    total = reduce(+, map(abs2, y))
    1.0e-280 < total < 1.0e280 && return sqrt(total)
    largest = reduce(max, y)
    return 0 < largest < Inf ? largest * sqrt(reduce(+, unroll(i -> abs2(y[i] / largest), Val(K)))) : total
end

"""
The columns of A[t, :, :] behind the first K become those of A⁻¹ times them, by elimination with partial pivoting; not finite where A
has no inverse.
"""
@inline function divide!(A, t::Int, ::Val{K}, columns::Int) where {K}
    for k in 1:K
        @inbounds exchange_rows!(A, t, k, pivot_row(A, t, k, Val(K)), K + columns)
        @inbounds pivot = inv(A[t, k, k])
        for i in (k + 1):K
            @inbounds factor = -(A[t, i, k] * pivot)
            for j in (k + 1):(K + columns)
                @inbounds A[t, i, j] = muladd(factor, A[t, k, j], A[t, i, j])
            end
        end
    end
    for j in (K + 1):(K + columns), k in K:-1:1
        @inbounds x = A[t, k, j] / A[t, k, k]
        @inbounds A[t, k, j] = x
        for i in 1:(k - 1)
            @inbounds A[t, i, j] = muladd(-A[t, i, k], x, A[t, i, j])
        end
    end
    return
end
@inline function pivot_row(A, t, k, ::Val{K}) where {K}
    row = k
    for i in (k + 1):K
        @inbounds abs(A[t, i, k]) > abs(A[t, row, k]) && (row = i)
    end
    return row
end
@inline function exchange_rows!(A, t, k, row, columns)
    row == k && return
    for j in k:columns
        @inbounds A[t, k, j], A[t, row, j] = A[t, row, j], A[t, k, j]
    end
    return
end

"The largest column sum of the columns of A[t, :, :] behind `before`."
@inline function column_sum(A, t, before, ::Val{K}) where {K}
    largest = zero(eltype(A))
    for j in (before + 1):(before + K)
        total = zero(eltype(A))
        for i in 1:K
            @inbounds total += abs(A[t, i, j])
        end
        largest = max(largest, isnan(total) ? oftype(total, Inf) : total)
    end
    return largest
end

# --- one sample ---------------------------------------------------------------------------------------------------------------

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
@inline begin_course(z, r::SampleRule, evaluations) = (size = measure(z, r.weights); Course(size, size, Inf, 0.0, Inf, evaluations))
@inline once_more(c::Course) = Course(c.largest, c.outset, c.distance, c.rate, c.relative, c.evaluations + one(Int32))

"The course after a step of this length from an iterate of this size, and whether that ends it; see `near!`."
@inline function near(c::Course, r::SampleRule, distance, size, limit)
    size = max(size, r.least)
    largest = max(c.largest, size)
    rate = isfinite(c.distance) ? (distance == 0 ? 0.0 : distance / c.distance) : c.rate
    rounding = r.eps * largest
    relative = distance == 0 ? 0.0 : distance / max(size, rounding / r.tol)
    settled = distance <= rounding && (rate > STALLED || distance <= r.eps * rounding || c.evaluations == limit)
    return distance <= r.tol * size || settled, Course(largest, c.outset, distance, rate, relative, c.evaluations)
end

"How a fixed point stands at f(z) = `value`: whether it has converged, whether it goes on, and its course; see `assess!`."
@inline function assess(c::Course, r::SampleRule, value, merit, first, limit)
    size = measure(value, r.weights)
    isfinite(merit) && isfinite(size) || return false, false, c
    first && (c = Course(c.largest, max(c.outset, size), c.distance, c.rate, c.relative, c.evaluations))
    converged, c = near(c, r, merit, size, limit)
    return converged, !converged && merit <= DIVERGENCE * c.outset, c
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
    first = true
    while true
        if !R
            converged, goes_on, c = assess(c, r, value, merit, c.evaluations == 1, limit)
            goes_on || return SampleEnd(converged ? value : z, converged && attracts!(A, t, f, value, args), c)
        end
        step = newton_step!(A, t, residual)
        all_finite(step) || return SampleEnd(z, false, c)
        if R
            converged, after = near(c, r, measure(step, r.weights), measure(z, r.weights), limit)
            # Newton's steps are as short at a pole as at a root, but one may start at it.
            steady = !(converged && isinf(c.distance) && merit > 0) || is_steady!(A, t, f, z, step, args)
            converged && steady && return SampleEnd(plus(z, step, one(T)), true, after)
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
            part /= 2
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

"Picard iteration to the end, or until Newton's method is cheaper: where that has to begin, whether it has to, and the course."
@inline function picard(f::F, z::Short{K, T}, args, r::SampleRule) where {F, K, T}
    start, c = z, begin_course(z, r, zero(Int32))
    while c.evaluations < r.limit
        value = evaluate(f, z, args)
        c = once_more(c)
        converged, goes_on, c = assess(c, r, value, measure(minus(value, z), r.weights), c.evaluations == 1, r.limit)
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

# By each solver, of which a kernel is given the type.
@inline solve_by(::Union{Val{Newton}, Val{Auto}}, A, t, f::F, z, args, r::SampleRule, root::Val{true}) where {F} =
    newton(A, t, f, z, args, r, begin_course(z, r, zero(Int32)), r.newton_limit, root)
@inline solve_by(::Val{Newton}, A, t, f::F, z, args, r::SampleRule, root::Val{false}) where {F} =
    newton(A, t, f, z, args, r, begin_course(z, r, zero(Int32)), r.newton_limit, root)
@inline solve_by(::Val{Picard}, A, t, f::F, z, args, r::SampleRule, ::Val{false}) where {F} = first(picard(f, z, args, r))
@inline function solve_by(::Val{Auto}, A, t, f::F, z, args, r::SampleRule, root::Val{false}) where {F}
    ended, unfinished = picard(f, z, args, r)
    evaluations = ended.course.evaluations
    # What iteration leads to attracts, but not what it starts at.
    ended.converged && return SampleEnd(ended.z, evaluations > 1 || attracts!(A, t, f, z, args), ended.course)
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

# --- derivatives --------------------------------------------------------------------------------------------------------------

"""
A⁻¹ at the solution z in the last K columns of A[t, :, :]; false where ∂c/∂z is singular, or changes so much within the error of the
solution that no solution need be there; see `invert!`.
"""
@inline function invert_at!(A, t, f::F, z::Short{K, T}, args, root::Val{R}) where {F, K, T, R}
    value = evaluate!(A, t, 0, f, z, args, root)
    for k in 1:K, i in 1:K
        @inbounds A[t, i, K + k] = T(i == k)
    end
    size_of_A = column_sum(A, t, 0, Val(K))
    divide!(A, t, Val(K), K)
    size_of_A * column_sum(A, t, K, Val(K)) * eps(T) * K < 1 || return false
    c = R ? value : minus(value, z)
    corrected = Short(unroll(i -> z[i] - reduce(+, unroll(k -> @inbounds(A[t, i, K + k]) * c[k], Val(K))), Val(K)))
    evaluate!(A, t, 0, f, corrected, args, root)
    return deviation(A, t, Val(K)) <= T(0.25)
end

"The largest column sum of A⁻¹A - I, for A in the first columns and A⁻¹ in the last; infinite where it is not finite."
@inline function deviation(A, t, ::Val{K}) where {K}
    largest = zero(eltype(A))
    for j in 1:K
        total = zero(eltype(A))
        for i in 1:K
            entry = -eltype(A)(i == j)
            for k in 1:K
                @inbounds entry = muladd(A[t, i, K + k], A[t, k, j], entry)
            end
            total += abs(entry)
        end
        largest = max(largest, isnan(total) ? oftype(total, Inf) : total)
    end
    return largest
end

"Entries by which to differentiate."
variables(::AbstractFloat) = 1
variables(::Short{N, <:AbstractFloat}) where {N} = N
variables(x) = 0

"`use(e, y, w)` for each entry e of argument I, of which y has the derivatives as number w of its dual numbers."
@inline each_derivative(use::U, f::F, z, args, index::Val{I}) where {U, F, I} = each_derivative(use, f, z, args, index, args[I])
@inline each_derivative(use::U, f::F, z, args, index, x::AbstractFloat) where {U, F} = some_derivatives(use, f, z, args, index, 1, Val(1), 1)
@inline function each_derivative(use::U, f::F, z, args, index, x::Short{M, <:AbstractFloat}) where {U, F, M}
    first = 1
    while first <= M
        some_derivatives(use, f, z, args, index, first, Val(width_of(M)), M)
        first += width_of(M)
    end
    return
end
@inline each_derivative(use::U, f::F, z, args, index, x) where {U, F} = nothing
@inline function some_derivatives(use::U, f::F, z, args, index, first, ::Val{W}, M) where {U, F, W}
    y = duals(f, z, args, first, Val(W), index)
    unroll(w -> (first + w - 1 <= M && use(first + w - 1, y, w); nothing), Val(W))
    return
end

"P[:, j] = -(A⁻ᵀ V[:, j])ᵀ ∂f/∂args, with the entries of one argument after those of another; tells which samples are `regular`."
@kernel function pull_back_samples!(P, regular, @Const(Z), @Const(V), f, args, root, ::Val{K}, ::Val{G}) where {K, G}
    t = @index(Local, Linear)
    j = @index(Global, Linear)
    matrix = @localmem eltype(Z) (G, K, 2K)
    if j <= size(Z, 2)
        pull_back_sample!(P, regular, Z, V, matrix, t, j, f, args, root, Val(K))
    end
end

@inline function pull_back_sample!(P, regular, Z, V, A, t, j, f::F, args, root, ::Val{K}) where {F, K}
    z, v, own = column(Z, j, Val(K)), column(V, j, Val(K)), arguments_at(args, j)
    wanted = reduce(|, map(x -> !iszero(x), v.entries))
    @inbounds regular[j] = !wanted || invert_at!(A, t, f, z, own, root)
    use = wanted && @inbounds regular[j]
    λ = unroll(k -> use ? -reduce(+, unroll(i -> @inbounds(A[t, i, K + k]) * v[i], Val(K))) : zero(eltype(A)), Val(K))
    put_products!(P, j, 0, f, z, own, λ, use, own)
    return
end
# For the arguments that are left.
@inline put_products!(P, j, offset, f::F, z, args, λ, use, ::Tuple{}) where {F} = nothing
@inline function put_products!(P, j, offset, f::F, z, args::NTuple{N, Any}, λ::NTuple{K, Any}, use, left::Tuple{Any, Vararg{Any, L}}) where {F, N, K, L}
    each_derivative(f, z, args, Val(N - L)) do e, y, w
        @inline
        total = reduce(+, unroll(k -> λ[k] * derivative(eltype(P), y[k], w), Val(K)))
        @inbounds P[offset + e, j] = use ? total : zero(total)
    end
    return put_products!(P, j, offset + variables(left[1]), f, z, args, λ, use, Base.tail(left))
end

"J[:, :, j] = -A⁻¹ ∂f/∂(argument I), NaN where it is not `wanted`."
@kernel function jacobian_of_samples!(J, regular, @Const(Z), @Const(wanted), f, args, root, ::Val{K}, index, ::Val{G}) where {K, G}
    t = @index(Local, Linear)
    j = @index(Global, Linear)
    matrix = @localmem eltype(Z) (G, K, 2K)
    if j <= size(Z, 2)
        jacobian_of_sample!(J, regular, Z, wanted, matrix, t, j, f, args, root, Val(K), index)
    end
end

@inline function jacobian_of_sample!(J, regular, Z, wanted, A, t, j, f::F, args, root, ::Val{K}, index) where {F, K}
    z, own = column(Z, j, Val(K)), arguments_at(args, j)
    @inbounds regular[j] = !wanted[j] || invert_at!(A, t, f, z, own, root)
    use = @inbounds wanted[j] && regular[j]
    each_derivative(f, z, own, index) do e, y, w
        @inline
        d = unroll(k -> derivative(eltype(J), y[k], w), Val(K))
        for i in 1:K
            total = zero(eltype(J))
            for k in 1:K
                @inbounds total = muladd(-A[t, i, K + k], d[k], total)
            end
            @inbounds J[i, e, j] = use ? total : oftype(total, NaN)
        end
    end
    return
end

# --- from the equation to the solution ------------------------------------------------------------------------------------------

"The solution of an equation on a device; what of its derivatives is left to the CPU is found there when it is needed."
struct DeviceInverses{T, M <: AbstractMatrix{T}}
    Z::M
end
ImplicitRNN.inverses_at(::EquationProblem{T}, Z::AbstractGPUArray{T, 2}, regular = nothing) where {T} = DeviceInverses{T, typeof(Z)}(Z)

ImplicitRNN.as_argument(::Type{T}, x::AbstractGPUArray) where {T} = eltype(x) <: AbstractFloat ? convert_entries(T, x) : x
convert_entries(::Type{T}, x::AbstractArray{T}) where {T} = x
convert_entries(::Type{T}, x::AbstractArray) where {T} = T.(x)

"The equation with what each sample has of its own on a device, and what they share on the host."
function ImplicitRNN.on_device(problem::EquationProblem{T}, backend::Backend) where {T}
    args = map(problem.args, problem.batched) do x, own
        own ? (x isa AbstractGPUArray ? x : copyto!(KernelAbstractions.allocate(backend, eltype(x), size(x)...), x)) : on_host(x)
    end
    return EquationProblem{T}(problem.f, problem.root, problem.n, problem.samples, args, problem.batched, problem.weights)
end

ImplicitRNN.solve_equation(f, z0::AbstractGPUArray{<:Real}, args; options...) = solve_equation_on_device(f, float.(z0), args; options...)
function solve_equation_on_device(f, value::AbstractGPUArray{T}, args; root, solver = Auto(), batched = (), scale = nothing) where {T}
    problem = ImplicitRNN.on_device(EquationProblem{T}(f, value, args, batched; root, scale), get_backend(value))
    Z, outcome = reshape(value, problem.n, :), Outcome(problem.samples)
    regular = solve!(Z, outcome, problem, solver)
    return ImplicitSolution(problem, value, outcome, ImplicitRNN.inverses_at(problem, Z, regular))
end

"The equation of some of the samples, on the host."
function part_of(problem::EquationProblem{T}, columns) where {T}
    args = map((x, own) -> own ? on_host(selectdim_copy(x, columns)) : x, problem.args, problem.batched)
    return EquationProblem{T}(problem.f, problem.root, problem.n, length(columns), args, problem.batched, problem.weights)
end
selectdim_copy(x::AbstractVector, columns) = x[columns]
selectdim_copy(x::AbstractMatrix, columns) = x[:, columns]

# What f is given: an argument of each sample, or one that they share.
argument_of(x::AbstractArray, own::Bool) = own ? ImplicitRNN.per_sample(x) : ImplicitRNN.shared(x)
arguments_of(problem::EquationProblem) = (map(argument_of, problem.args, problem.batched)...,)

"What a device does not offer of an equation is refused by name."
function check_offered(problem::EquationProblem{T}, solver) where {T}
    problem.n <= MAX_SHORT || refused("equations of more than $MAX_SHORT unknowns ($(problem.n) came)")
    solver isa Union{Auto, Newton} || solver isa Picard && !problem.root ||
        refused("the solver $(nameof(typeof(solver))) for equations", problem.root ? "Auto or Newton" : "Auto, Picard or Newton")
    check_arguments(problem)
    isbits(problem.f) || refused("functions that refer to variables outside, as $(problem.f) does")
    return
end
function check_arguments(problem::EquationProblem)
    for (i, (x, own)) in enumerate(zip(problem.args, problem.batched))
        entries, axes = own ? (div(length(x), problem.samples), ndims(x) - 1) : (length(x), ndims(x))
        axes <= 1 && entries <= MAX_SHORT ||
            refused("arguments but numbers and vectors of up to $MAX_SHORT entries (number $i is an array of $entries entries, $axes axes)")
    end
    return
end

# As far as that can be told without the device: what f gives for dual numbers has to need no memory.
function check_function(problem::EquationProblem{T}, args, ::Val{K}) where {T, K}
    z = seeded(Short(unroll(_ -> zero(T), Val(K))), 1, Val(width_of(K)))
    one = part_of(problem, 1:1)
    given = map(x -> seeded(at(x, 1), 0, Val(width_of(K))), arguments_of(one))
    returned = Base.promote_op(problem.f, typeof(z), map(typeof, given)...)
    returned <: Union{Short{K}, Number} && isbitstype(returned) && return
    # If it is no vector like z at all, that is to be said as it is on the CPU.
    call!(zeros(T, K), ImplicitRNN.Equation(one), zeros(T, K), 1)
    kind = returned isa DataType ? nameof(returned) : returned
    return refused("this function, which gives values of type $kind; it takes formulas of numbers, broadcast formulas, and [a, b] of those")
end

rule_of(problem::EquationProblem{T}, solver, ::Val{K}) where {T, K} = SampleRule{K}(
    Float64(tolerance(solver, T)), Float64(eps(T)), isempty(problem.weights) ? 0.0 : sqrt(K), min(solver.max_iterations, typemax(Int32)),
    newton_limit(solver, problem.root), solver isa Auto ? 4.0 * (K + 2) : Inf, solver isa Picard ? solver.damping : 1.0,
    Short(unroll(i -> isempty(problem.weights) ? 1.0 : problem.weights[i], Val(K))), Short(unroll(_ -> 1.0, Val(K))),
)
newton_limit(s, root) = min(s.max_iterations, typemax(Int32))
newton_limit(s::Auto, root) =
    min(s.max_iterations, max(ceil(Int, (root ? ImplicitRNN.ATTEMPT_SHARES[1] : ImplicitRNN.FIXED_POINT_SHARE) * s.max_iterations), ImplicitRNN.LEAST_ATTEMPT))

function ImplicitRNN.solve!(Z::AbstractGPUArray{T, 2}, outcome::Outcome, problem::EquationProblem{T}, solver::Solver) where {T}
    check_offered(problem, solver)
    # `f` may be newer than this code.
    Base.invokelatest(solve_samples_on_device!, Z, outcome, problem, solver, Val(problem.n))
    return zeros(Bool, problem.samples)
end

function solve_samples_on_device!(Z::AbstractGPUArray{T, 2}, outcome, problem, solver, unknowns::Val{K}) where {T, K}
    args, samples = arguments_of(problem), size(Z, 2)
    check_function(problem, args, unknowns)
    fresh(value) = fill!(similar(Z, typeof(value), samples), value)
    ends = (; solved = fresh(false), iterations = fresh(Int32(0)), residual = fresh(0.0), rate = fresh(0.0))
    each_sample(Z) do range, group
        solve_samples!(get_backend(Z), group)(
            Z, ends, problem.f, args, rule_of(problem, solver, unknowns), Val(typeof(solver)), Val(problem.root), Val(group); ndrange = range
        )
    end
    left = findall(on_host(.!ends.solved))
    fill!(outcome.status, CONVERGED)
    foreach(name -> copyto!(getfield(outcome, name), getfield(ends, name)), (:iterations, :residual, :rate))
    isempty(left) || solve_left!(Z, outcome, problem, solver, left)
    return
end

function solve_left!(Z, outcome, problem, solver, left)
    z, found = on_host(Z[:, left]), Outcome(length(left))
    solve!(z, found, part_of(problem, left), solver)
    foreach(name -> getfield(outcome, name)[left] = getfield(found, name), fieldnames(Outcome))
    Z[:, left] = copyto!(similar(Z, size(z)), z)
    return
end

"`launch(range, group)` for all columns of Z. What the function cannot do on the device is told."
function each_sample(launch, Z)
    check_interrupt()
    group = group_of(size(Z, 1))
    try
        launch(group * cld(size(Z, 2), group), group)
        ImplicitRNN.finish_work(get_backend(Z))
    catch error
        # Only where the device is the CPU; on others they give NaN.
        error isa DomainError && return
        error isa Union{InterruptException, OutOfMemoryError} && rethrow()
        refused("this function: $(first(eachline(IOBuffer(sprint(showerror, error)))))")
    end
    return
end

# --- … and its derivatives ------------------------------------------------------------------------------------------------------

function ImplicitRNN.vjp(solution::ImplicitSolution{T, <:AbstractGPUArray}, v::AbstractArray) where {T}
    size(v) == size(solution.value) ||
        throw(DimensionMismatch("v has size $(size(v)); expected that of the value, $(size(solution.value))"))
    problem, V = solution.problem, reshape(convert_entries(T, v isa AbstractGPUArray ? v : copyto!(similar(solution.value), v)), size(solution.inverses.Z))
    failed = count(on_host(vec(any(!iszero, V; dims = 1))) .& (solution.status .!= CONVERGED))
    failed == 0 || error("$failed samples did not converge and have no derivative; v must be zero for them")
    gradients = Any[is_differentiable(x) ? zero(x) : x for x in problem.args]
    vjp!(gradients, problem, solution.inverses, V)
    return ((is_differentiable(x) ? number_or_array(g) : nothing for (g, x) in zip(gradients, problem.args))...,)
end

function ImplicitRNN.vjp!(gradients, problem::EquationProblem{T}, inverses::DeviceInverses{T}, V::AbstractMatrix{T}) where {T}
    Base.invokelatest(vjp_on_device!, gradients, problem, inverses.Z, V isa AbstractGPUArray ? V : copyto!(similar(inverses.Z), V), Val(problem.n))
    return gradients
end

function vjp_on_device!(gradients, problem::EquationProblem{T}, Z, V, unknowns) where {T}
    args, samples = arguments_of(problem), size(Z, 2)
    counts = [variables_of(x, own) for (x, own) in zip(problem.args, problem.batched)]
    P, regular = fill!(similar(Z, sum(counts), samples), 0), fill!(similar(Z, Bool, samples), false)
    each_sample(Z) do range, group
        pull_back_samples!(get_backend(Z), group)(P, regular, Z, V, problem.f, args, Val(problem.root), unknowns, Val(group); ndrange = range)
    end
    last = 0
    for (g, own, n) in zip(gradients, problem.batched, counts)
        n == 0 && continue
        rows = P[(last + 1):(last += n), :]
        copyto!(g, own ? rows : on_host(sum(rows; dims = 2)))
    end
    left = findall(on_host(.!regular))
    isempty(left) || add_left!(gradients, problem, Z, V, left)
    return
end
variables_of(x, own) = !is_differentiable(x) ? 0 : own ? div(length(x), last(size(x))) : length(x)

"Those of the samples whose derivative the CPU has to find, or to say that there is none."
function add_left!(gradients, problem::EquationProblem{T}, Z, V, left) where {T}
    part, z = part_of(problem, left), on_host(Z[:, left])
    found = [is_differentiable(x) ? zero(x) : x for x in part.args]
    naming_samples(() -> vjp!(found, part, ImplicitRNN.Inverses(part, z), on_host(V[:, left])), left)
    for (g, x, own) in zip(gradients, found, problem.batched)
        is_differentiable(x) || continue
        own ? put_columns!(g, x, left) : (g .+= x)
    end
    return
end
put_columns!(g::AbstractVector, x, left) = (g[left] = on_kind_of(g, x); g)
put_columns!(g::AbstractMatrix, x, left) = (g[:, left] = on_kind_of(g, x); g)
on_kind_of(::Array, x) = x
on_kind_of(g::AbstractGPUArray, x) = copyto!(similar(g, size(x)), x)

naming_samples(work, left) = try
    work()
catch error
    error isa ImplicitRNN.SingularSolution ? throw(ImplicitRNN.SingularSolution(left[error.sample])) : rethrow()
end

function ImplicitRNN.jacobian!(J::AbstractArray{T, 3}, problem::EquationProblem{T}, inverses::DeviceInverses{T}, index::Int, wanted = trues(size(J, 3))) where {T}
    Base.invokelatest(jacobian_on_device!, J, problem, inverses.Z, Val(index), wanted, Val(problem.n))
    return J
end

function jacobian_on_device!(J, problem::EquationProblem{T}, Z, index::Val{I}, wanted, unknowns) where {T, I}
    samples = size(Z, 2)
    asked = copyto!(similar(Z, Bool, samples), Array{Bool}(wanted))
    found, regular = similar(Z, size(J)), fill!(similar(Z, Bool, samples), false)
    each_sample(Z) do range, group
        jacobian_of_samples!(get_backend(Z), group)(
            found, regular, Z, asked, problem.f, arguments_of(problem), Val(problem.root), unknowns, index, Val(group); ndrange = range
        )
    end
    copyto!(J, found)
    left = findall(on_host(.!regular))
    if !isempty(left)
        part, columns = part_of(problem, left), similar(J, size(J, 1), size(J, 2), length(left))
        naming_samples(() -> jacobian!(columns, part, ImplicitRNN.Inverses(part, on_host(Z[:, left])), I), left)
        J[:, :, left] = columns
    end
    return
end

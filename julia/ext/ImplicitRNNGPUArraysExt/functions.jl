# Functions of a few unknowns on a device, with their derivatives by dual numbers, and the algebra of a work-item: short vectors in its
# registers, and matrices A[t, :, :] of work-item t in shared memory.

"Derivatives that one evaluation gives, few enough for its numbers to stay in registers."
width_of(K::Int) = cld(K, cld(K, 4))

"The tuple f(1), …, f(n), with the code of f in each place: what is called by itself on a device keeps its tuples in memory."
@generated unroll(f::F, ::Val{N}) where {F, N} = Expr(:block, Expr(:meta, :inline), Expr(:tuple, (:(@inline f($i)) for i in 1:N)...))

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
@inline duals(f::F, z::Short{K}, args, first::Int, W::Val, index::Val{I}) where {F, K, I} =
    entries((@inline f(seeded(z, I == 0 ? first : 0, W), seeded_argument(args, first, W, index)...)), Val(K))
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

# Elementwise operations as loops. Broadcasts would do the same, but compile about twenty methods for each combination of functions and
# array types: they were a fifth of the compiled package.

"""
    @vectors for i in range … end

As `@simd ivdep for`, one vector at a time. Otherwise the compiler takes two or more together, and what is left over, up to 31 entries,
one by one, which for activations takes longer than all else.
"""
macro vectors(loop)
    return esc(in_vectors(loop))
end

"""
    @lanes T for l in 1:L … end

As [`@vectors`](@ref), for numbers of type T that fill registers of the widest kind, which the compiler does not choose by itself on many
processors: with what is left over it would be slower.
"""
macro lanes(T, loop)
    wide(size) = in_vectors(loop, (Symbol("llvm.loop.vectorize.width"), REGISTER ÷ size))
    return esc(:(sizeof($T) == 8 ? $(wide(8)) : $(wide(4))))
end

function in_vectors(loop, more...)
    (range, body) = loop.args
    info = Expr(:loopinfo, Symbol("julia.simdloop"), Symbol("julia.ivdep"), (Symbol("llvm.loop.interleave.count"), 1), more...)
    return Expr(:for, range, Expr(:block, body, info))
end

"    map_each!(f, C, arrays...)\n\n`C[i] = f(A[i], B[i], …)` for all entries of the arrays."
@inline function map_each!(f::F, C::AbstractArray, arrays::Vararg{AbstractArray, N}) where {F, N}
    all(A -> axes(A) == axes(C), arrays) ||
        throw(DimensionMismatch("entries of arrays of the sizes $(map(size, arrays)) were taken together for one of $(size(C))"))
    @inbounds @simd for i in eachindex(C, arrays...)
        C[i] = f(map(A -> A[i], arrays)...)
    end
    return C
end

"    copy_run!(to, i, from, j, count)\n\n`to[i + k] = from[j + k]` for k < count. `copyto!` takes longer for few numbers, as it looks for common memory."
@inline function copy_run!(to, i::Int, from, j::Int, count::Int)
    @inbounds @simd ivdep for k in 0:(count - 1)
        to[i + k] = from[j + k]
    end
    return to
end

"    add!(A, B)\n\n`A += B`"
add!(A::AbstractArray, B::AbstractArray) = map_each!(+, A, A, B)

"    subtract!(A, B)\n\n`A -= B`"
subtract!(A::AbstractArray, B::AbstractArray) = map_each!(-, A, A, B)

"    multiply_each!(C, A, B)\n\n`C = A ∘ B`, entry by entry."
multiply_each!(C::AbstractArray, A::AbstractArray, B::AbstractArray) = map_each!(*, C, A, B)

"""
    euclidean_norm(x)

‖x‖. Of few numbers from their squares, unless these overflow or vanish, against which BLAS takes care at several times the cost.
"""
euclidean_norm(x::AbstractVector) = norm(x)
function euclidean_norm(x::StridedVector{T}) where {T <: BlasFloat}
    length(x) < SMALL_NORM || return BLAS.nrm2(x)
    squares = zero(T)
    for entry in x
        squares = muladd(entry, entry, squares)
    end
    return floatmin(T) / eps(T) < squares < T(Inf) ? sqrt(squares) : BLAS.nrm2(x)
end

"    any_above(bound, A, j)\n\nWhether an entry of column j is as large as the bound; a NaN is not."
@inline function any_above(bound, A::AbstractMatrix, j::Int)
    found = false
    @inbounds @vectors for i in axes(A, 1)
        found |= abs(A[i, j]) >= bound
    end
    return found
end

"    direction(x)\n\nA vector of as many entries as `x` that no formula would single out."
direction(x::AbstractArray{T}) where {T} = T[sinpi(0.618034k) + 0.1 for k in 1:length(x)]

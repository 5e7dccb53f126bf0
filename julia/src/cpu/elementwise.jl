# Elementwise operations as loops. Broadcasts say the same, but compile some twenty methods for each combination of array types: they
# were a fifth of the compiled package.

"    add!(A, B)\n\n`A += B`"
function add!(A::AbstractArray, B::AbstractArray)
    axes(A) == axes(B) || throw(DimensionMismatch("an array of size $(size(B)) was added to one of size $(size(A))"))
    @inbounds @simd for i in eachindex(A, B)
        A[i] += B[i]
    end
    return A
end

"    multiply_each!(C, A, B)\n\n`C = A ∘ B`, entry by entry."
function multiply_each!(C::AbstractMatrix, A::AbstractMatrix, B::AbstractMatrix)
    axes(A) == axes(B) == axes(C) ||
        throw(DimensionMismatch("entries were multiplied of matrices of the sizes $(size(A)) and $(size(B)) for one of $(size(C))"))
    @inbounds @simd for i in eachindex(A, B, C)
        C[i] = A[i] * B[i]
    end
    return C
end

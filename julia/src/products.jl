# Products with the leading columns of dense matrices, in the sizes in which they are fastest, and their row blocks shared
# among threads.

const Dense{T} = StridedMatrix{T}

"Matrices of up to so many rows and columns are multiplied by plain loops: a BLAS call would cost more than the work."
const SMALL = 12

"""
BLAS libraries multiply small matrices (m n k up to about 10⁶) without packing them, near the peak of a core. A product with
a matrix of medium size reaches the same by going through the columns in groups.
"""
const UNPACKED = 1_000_000

"Matrices with more rows than this are divided into blocks of $(256) rows where threads share a product."
const ROW_BLOCK = 256

column_group(A) = (group = UNPACKED ÷ length(A); group >= 8 ? group & ~7 : typemax(Int) ÷ 2)

is_small(A) = size(A, 1) <= SMALL && size(A, 2) <= SMALL

"    multiply_add!(S, A, B, m)\n\n`S[:, 1:m] += A B[1:k, 1:m]` for A with k columns."
function multiply_add!(S::Dense{T}, A::Dense{T}, B::Dense{T}, m::Int) where {T <: BlasFloat}
    n, k = size(A)
    n * k * m == 0 && return S
    if is_small(A)
        @inbounds for j in 1:m, l in 1:k
            b = B[l, j]
            @simd for i in 1:n
                S[i, j] = muladd(A[i, l], b, S[i, j])
            end
        end
        return S
    end
    group = column_group(A)
    for first_column in 1:group:m
        columns = first_column:min(first_column + group - 1, m)
        BLAS.gemm!('N', 'N', one(T), A, view(B, 1:k, columns), one(T), view(S, :, columns))
    end
    return S
end
multiply_add!(S, A, B, m::Int) = (mul!(view(S, :, 1:m), A, view(B, axes(A, 2), 1:m), true, true); S)

"    multiply_add!(S, A, B, m, threads)\n\nThe same with the rows of a large A shared among threads."
function multiply_add!(S, A, B, m::Int, threads::Int)
    n = size(A, 1)
    (threads == 1 || n <= ROW_BLOCK) && return multiply_add!(S, A, B, m)
    in_parallel(cld(n, ROW_BLOCK), threads) do _, block
        rows = ((block - 1) * ROW_BLOCK + 1):min(block * ROW_BLOCK, n)
        multiply_add!(view(S, rows, :), view(A, rows, :), B, m)
    end
    return S
end

"    add_outer!(G, A, B, m)\n\n`G += A[:, 1:m] B[:, 1:m]ᵀ`"
function add_outer!(G::Dense{T}, A::Dense{T}, B::Dense{T}, m::Int) where {T <: BlasFloat}
    n, k = size(G)
    n * k == 0 && return G
    if is_small(G)
        @inbounds for j in 1:m, l in 1:k
            b = B[l, j]
            @simd for i in 1:n
                G[i, l] = muladd(A[i, j], b, G[i, l])
            end
        end
    else
        BLAS.gemm!('N', 'T', one(T), view(A, :, 1:m), view(B, :, 1:m), one(T), G)
    end
    return G
end
add_outer!(G, A, B, m::Int) = mul!(G, view(A, :, 1:m), view(B, :, 1:m)', true, true)

"    add_outer!(G, A, B, m, threads)\n\nThe same with the columns of a large G shared among threads."
function add_outer!(G, A, B, m::Int, threads::Int)
    k = size(G, 2)
    (threads == 1 || k <= ROW_BLOCK) && return add_outer!(G, A, B, m)
    in_parallel(cld(k, ROW_BLOCK), threads) do _, block
        columns = ((block - 1) * ROW_BLOCK + 1):min(block * ROW_BLOCK, k)
        add_outer!(view(G, :, columns), A, view(B, columns, :), m)
    end
    return G
end

"    add_columns!(g, A, m)\n\n`g += Σⱼ A[:, j]` over the first m columns."
function add_columns!(g, A, m)
    @inbounds for j in 1:m
        @simd for i in eachindex(g)
            g[i] += A[i, j]
        end
    end
    return g
end

"    transpose_into!(B, A)\n\n`B = Aᵀ`, block by block."
function transpose_into!(B::Matrix, A::Matrix)
    n, k = size(A)
    # Blocks of 8: with a power of two for a stride, more columns would not fit in a set of the cache.
    for j0 in 1:8:k, i0 in 1:8:n
        @inbounds for j in j0:min(j0 + 7, k), i in i0:min(i0 + 7, n)
            B[j, i] = A[i, j]
        end
    end
    return B
end

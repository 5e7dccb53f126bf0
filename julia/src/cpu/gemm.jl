# Products with the leading columns of dense matrices, in the sizes in which they are fastest, and their row blocks shared
# among threads.

const Dense{T} = StridedMatrix{T}

"Call `work` for the ranges of a large matrix's rows or columns, of which there are n, shared among threads."
in_blocks(work::F, n::Int, threads::Int, width::Int = BLOCK) where {F} =
    in_parallel((_, k) -> work(piece(k, width, n)), cld(n, width), threads)

column_group(A) = (group = UNPACKED ÷ length(A); group >= 8 ? group & ~7 : Int(typemax(Int32)))

is_small(A) = size(A, 1) <= SMALL && size(A, 2) <= SMALL

"""
    gemm!(tA, tB, α, A, B, β, C)

`C = α op(A) op(B) + β C`, as in BLAS. `mul!` would compile its cases for matrices of two and three rows for every combination
of array types, which were a sixth of the compiled package.
"""
gemm!(tA, tB, α, A::Dense{T}, B::Dense{T}, β, C::Dense{T}) where {T <: BlasFloat} =
    isempty(C) ? C : BLAS.gemm!(tA, tB, T(α), A, B, T(β), C)
gemm!(tA, tB, α, A, B, β, C) = mul!(C, tA == 'N' ? A : transpose(A), tB == 'N' ? B : transpose(B), α, β)

"    gemv!(t, α, A, x, β, y)\n\n`y = α op(A) x + β y`, likewise."
gemv!(t, α, A::Dense{T}, x::StridedVector{T}, β, y::StridedVector{T}) where {T <: BlasFloat} =
    isempty(y) ? y : BLAS.gemv!(t, T(α), A, x, T(β), y)
gemv!(t, α, A, x, β, y) = mul!(y, t == 'N' ? A : transpose(A), x, α, β)

"    multiply_add!(S, A, B, m)\n\n`S[:, 1:m] += A B[1:k, 1:m]` for A with k columns."
function multiply_add!(S::Dense{T}, A::Dense{T}, B::Dense{T}, m::Int) where {T <: BlasFloat}
    n, k = size(A)
    n * k * m == 0 && return S
    is_small(A) && return multiply_add_loops!(S, A, B, m)
    group = column_group(A)
    for k in 1:cld(m, group)
        columns = piece(k, group, m)
        BLAS.gemm!('N', 'N', one(T), A, view(B, axes(A, 2), columns), one(T), view(S, :, columns))
    end
    return S
end
multiply_add!(S, A, B, m::Int) = (gemm!('N', 'N', true, A, view(B, axes(A, 2), 1:m), true, view(S, :, 1:m)); S)

@inline function multiply_add_loops!(S, A, B, m::Int)
    @inbounds for j in 1:m, l in axes(A, 2)
        b = B[l, j]
        @simd for i in axes(A, 1)
            S[i, j] = muladd(A[i, l], b, S[i, j])
        end
    end
    return S
end

"    transposed_multiply!(S, A, B, m)\n\n`S[:, 1:m] = Aᵀ B[:, 1:m]`"
function transposed_multiply!(S::Dense{T}, A::Dense{T}, B::Dense{T}, m::Int) where {T <: BlasFloat}
    is_small(A) || return gemm!('T', 'N', true, A, view(B, :, 1:m), false, view(S, :, 1:m))
    @inbounds for j in 1:m, i in axes(A, 2)
        sum = zero(T)
        for l in axes(A, 1)
            sum = muladd(A[l, i], B[l, j], sum)
        end
        S[i, j] = sum
    end
    return S
end
transposed_multiply!(S, A, B, m::Int) = gemm!('T', 'N', true, A, view(B, :, 1:m), false, view(S, :, 1:m))

"    multiply_add!(S, A, B, m, threads)\n\nThe same with the rows of a large A shared among threads."
function multiply_add!(S, A, B, m::Int, threads::Int)
    n = size(A, 1)
    (threads == 1 || n <= BLOCK) && return multiply_add!(S, A, B, m)
    in_blocks(rows -> multiply_add!(view(S, rows, :), view(A, rows, :), B, m), n, threads)
    return S
end

# --- factors of many products -----------------------------------------------------------------------------------

"""
    Panels{T}(n, k)

An n × k matrix cut into blocks, each of which lies contiguously in memory: products block by block stay within the sizes
that need no packing, which a product with the whole would repeat every time.
"""
struct Panels{T}
    blocks::Matrix{Matrix{T}}
end
Panels{T}(n::Int, k::Int) where {T} = Panels{T}(
    [zeros(T, length(rows), length(columns)) for rows in pieces_of(n, PANEL[1]), columns in pieces_of(k, PANEL[2])]
)

"The left factor of many products."
const Factor{T} = Union{Matrix{T}, Panels{T}}

factor(::Type{T}, n::Int) where {T} = n > LARGE ? Panels{T}(n, n) : zeros(T, n, n)

"    store!(P, A, threads)\n\n`P = A`"
store!(P::Matrix, A::Matrix, threads::Int) = copyto!(P, A)
store!(P::Panels, A::Matrix, threads::Int) =
    each_block((block, rows, columns) -> copyto!(block, view(A, rows, columns)), P, threads)

"    store_transposed!(P, A, threads)\n\n`P = Aᵀ`"
store_transposed!(P::Matrix, A::Matrix, threads::Int) = transpose_into!(P, A)
store_transposed!(P::Panels, A::Matrix, threads::Int) =
    each_block((block, rows, columns) -> transpose_into!(block, view(A, columns, rows)), P, threads)

# Call `work(block, rows, columns)` for all blocks, shared among threads by block rows.
function each_block(work::F, P::Panels, threads::Int) where {F}
    in_parallel(size(P.blocks, 1), threads) do _, i
        for l in axes(P.blocks, 2)
            block = P.blocks[i, l]
            work(block, (i - 1) * PANEL[1] .+ axes(block, 1), (l - 1) * PANEL[2] .+ axes(block, 2))
        end
    end
    return P
end

function multiply_add!(S, P::Panels, B, m::Int, threads::Int)
    each_block((block, rows, columns) -> multiply_add!(view(S, rows, :), block, view(B, columns, :), m), P, threads)
    return S
end

# --- outer products ---------------------------------------------------------------------------------------------

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
add_outer!(G, A, B, m::Int) = gemm!('N', 'T', true, view(A, :, 1:m), view(B, :, 1:m), true, G)

"    add_outer!(G, A, B, m, threads)\n\nThe same with the columns of a large G shared among threads."
function add_outer!(G, A, B, m::Int, threads::Int)
    k = size(G, 2)
    (threads == 1 || k <= BLOCK) && return add_outer!(G, A, B, m)
    in_blocks(columns -> add_outer!(view(G, :, columns), A, view(B, columns, :), m), k, threads)
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
function transpose_into!(B::Dense, A::Dense)
    n, k = size(A)
    # Blocks of 8: with a power of two for a stride, more columns would not fit in a set of the cache.
    for j0 in 1:8:k, i0 in 1:8:n
        @inbounds for j in j0:min(j0 + 7, k), i in i0:min(i0 + 7, n)
            B[j, i] = A[i, j]
        end
    end
    return B
end

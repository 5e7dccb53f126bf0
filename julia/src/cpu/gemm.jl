# Matrix products in the shapes needed here: the weights of a stage with the columns of a tile, and outer products of two
# tiles. A column of `multiply!` is identical to the bit whatever the other columns and the number of threads; up to SMALL, sums are
# taken term by term, as for nets side by side.

const Dense{T} = StridedMatrix{T}

"Matrices whose columns are contiguous in memory."
const Contiguous{T} = Union{Matrix{T}, SubArray{T, 2, Matrix{T}, <:Tuple{AbstractUnitRange, AbstractUnitRange}}}

"    multiply_add!(S, A, B, m, threads = 1)\n\n`S[:, 1:m] += A B[1:k, 1:m]` for A with k columns."
multiply_add!(S, A, B, m::Int, threads::Int = 1) = multiply!(S, S, A, B, m, threads)

"""
    multiply!(S, U, A, B, m, threads = 1)

`S[:, 1:m] = U[:, 1:m] + A B[1:k, 1:m]` for A with k columns. A vector U is the same for all columns; U may be S.
"""
function multiply!(S, U, A, B, m::Int, threads::Int = 1)
    k = size(A, 2)
    k == 0 && U === S && return S
    if in_registers(S, U, A, B)
        GC.@preserve B multiply_in_registers!(S, U, A, Operand(B), size(B), k, m, threads)
    else
        U === S || foreach(j -> copy_column!(S, j, U, U isa AbstractVector ? 1 : j), 1:m)
        k == 0 || gemm!('N', 'N', true, A, view(B, 1:k, 1:m), true, view(S, :, 1:m))
    end
    return S
end

"    add_outer!(G, A, B, m, threads = 1)\n\n`G += A[:, 1:m] B[:, 1:m]ᵀ`"
function add_outer!(G, A, B, m::Int, threads::Int = 1)
    if in_registers(G, G, A, B) && (size(G, 1) >= fewest_rows(eltype(G)) || size(G, 2) <= SMALL)
        GC.@preserve B multiply_in_registers!(G, G, A, transposed(B), reverse(size(B)), m, size(G, 2), threads)
    else
        gemm!('N', 'T', true, view(A, :, 1:m), view(B, :, 1:m), true, G)
    end
    return G
end

"    transposed_multiply!(S, A, B, m)\n\n`S[:, 1:m] = Aᵀ B[:, 1:m]`"
function transposed_multiply!(S, A, B, m::Int)
    k, n = size(A)
    k <= SMALL && n <= SMALL || return gemm!('T', 'N', true, A, view(B, :, 1:m), false, view(S, :, 1:m))
    @inbounds for j in 1:m, i in 1:n
        total = zero(eltype(S))
        for l in 1:k
            total = muladd(A[l, i], B[l, j], total)
        end
        S[i, j] = total
    end
    return S
end

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

"    add_columns!(g, A, m)\n\n`g += Σⱼ A[:, j]` over the first m columns, one after the other."
function add_columns!(g::Vector{T}, A::Contiguous{T}, m) where {T <: Hardware}
    n, L = length(g), register_lanes(T)
    check_product(g, g, A, (m, 1), m, 1)
    one_lanes, a = same_in_all(one(T), Val(L)), Operand(A)
    GC.@preserve g A for row in 0:L:(n - 1)
        lanes = FirstLanes{L}(min(n - row, L))
        sum = load_lanes(pointer(g, row + 1), lanes)
        for j in 0:(m - 1)
            sum = muladd_lanes(load_lanes(address(a, row, j), lanes), one_lanes, sum)
        end
        store_lanes!(pointer(g, row + 1), sum, lanes)
    end
    return g
end
function add_columns!(g::AbstractVector, A, m)
    foreach(j -> add!(g, view(A, :, j)), 1:m)
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

"Call `work` for the ranges of a large matrix's rows or columns, of which there are n, shared among threads."
in_blocks(work::F, n::Int, threads::Int, width::Int = BLOCK) where {F} =
    in_parallel((_, k) -> work(piece(k, width, n)), cld(n, width), threads)

# --- in registers -------------------------------------------------------------------------------------------------

# A block of S, the rows of one or two registers by some columns, stays in registers through all of its sum. BLAS libraries do the same,
# but pack the factors of every product, and choose their kernel by a list of processors.

"Columns of a block at most: of two registers each, they leave some for the factors."
const COLUMNS_AT_ONCE = REGISTER == 64 ? 8 : 6

in_registers(S, U, A, B) = false
in_registers(S::Dense{T}, U::StridedVecOrMat{T}, A::Dense{T}, B::Dense{T}) where {T <: Hardware} =
    stride(S, 1) == stride(U, 1) == stride(A, 1) == 1

"From this number of rows on, half a register, whole registers of rows are computed; below it, the first lanes of one."
fewest_rows(::Type{T}) where {T} = register_lanes(T) ÷ 2

"A matrix in memory: entry (i, j), counted from 0, is `i * down + j * across` numbers after the first."
struct Operand{T}
    first::Ptr{T}
    down::Int
    across::Int
end
Operand(A::AbstractMatrix) = Operand(pointer(A), stride(A, 1), stride(A, 2))
Operand(a::AbstractVector) = Operand(pointer(a), stride(a, 1), 0)          # the same column again and again
transposed(A::AbstractMatrix) = Operand(pointer(A), stride(A, 2), stride(A, 1))
@inline address(A::Operand{T}, i::Int, j::Int) where {T} = A.first + sizeof(T) * (i * A.down + j * A.across)
@inline columns_from(A::Operand, j::Int) = Operand(address(A, 0, j), A.down, A.across)

# S = U + A B for k columns of A and m of S; B has so many rows and columns.
function multiply_in_registers!(S::Dense{T}, U, A, B::Operand{T}, size_of_B, k::Int, m::Int, threads::Int) where {T}
    m == 0 && return S
    check_product(S, U, A, size_of_B, k, m)
    n, lanes = size(S, 1), register_lanes(T)
    GC.@preserve S U A begin
        s, u = Operand(S), Operand(U)
        if n >= lanes
            multiply_pairs!(s, u, A, B, n, k, m, threads, Val(register_lanes(T)))
        elseif n >= fewest_rows(T)
            multiply_pairs!(s, u, A, B, n, k, m, threads, Val(register_lanes(T) ÷ 2))
        elseif A isa Dense                                      # as panels have a register of rows
            multiply_few_rows!(s, u, A, B, n, k, m)
        end
    end
    return S
end

function multiply_few_rows!(S::Operand{T}, U, A, B, n::Int, k::Int, m::Int) where {T}
    if n == stride(A, 2) == B.down == 1 < B.across && k > SMALL         # and not an outer product
        multiply_row!(S, U, Operand(A), B, k, m, Val(COLUMNS_AT_ONCE), Val(register_lanes(T)))
    else
        multiply_rows!(S, U, A, B, n, k, m, 1, nothing, Val(1), FirstLanes{register_lanes(T) ÷ 2}(n))
    end
    return
end

# What is in registers has been read without a look at the bounds.
function check_product(S, U, A, (rows, columns), k::Int, m::Int)
    size(S, 1) == size(U, 1) == size(A, 1) && size(S, 2) >= m && (U isa AbstractVector || size(U, 2) >= m) &&
        size(A, 2) >= k && rows >= k && columns >= m && return
    throw(
        DimensionMismatch(
            "a product of $k terms for $m columns needs more than factors of $(size(A)) and ($rows, $columns) for sums of $(size(S)), " *
                "beginning with $(size(U))"
        )
    )
end

function multiply_pairs!(S::Operand{T}, U, A, B, n::Int, k::Int, m::Int, threads::Int, ::Val{L}) where {T, L}
    registers = max(cld(n, L), L == register_lanes(T) ? 1 : 2)
    n > BLOCK || (threads = 1)
    return multiply_pairs!(S, U, A, B, n, k, m, registers, threads, copies_of_rows(A, k, m, threads, Val(L)), Val(L))
end

function multiply_pairs!(S, U, A, B, n, k, m, registers::Int, threads::Int, copies::C, ::Val{L}) where {C, L}
    in_parallel(cld(registers, 2), threads) do thread, pair
        copy = copies === nothing ? nothing : copies[thread]
        if 2 * pair <= registers
            multiply_rows!(S, U, A, B, n, k, m, pair, copy, Val(2), Val(L))
        else
            multiply_rows!(S, U, A, B, n, k, m, pair, copy, Val(1), Val(L))
        end
    end
    return
end

# The rows of pair number `pair` of registers, of which there are R. The last register of S ends with it, even if it has to begin
# within the one before, whose rows it leaves alone: another thread may be at them.
function multiply_rows!(
        S::Operand, U::Operand, A, B::Operand, n::Int, k::Int, m::Int, pair::Int, copy, ::Val{R}, lanes::WhichLanes{L}
    ) where {R, L}
    register(r) = (2 * (pair - 1) + r - 1) * L
    rows = ntuple(r -> min(register(r), max(n - L, 0)), Val(R))
    kept = map(bits_up_to, ntuple(register, Val(R)) .- rows)
    a, places = rows_of_factor(A, pair, rows, k, copy, lanes)
    for j in 0:COLUMNS_AT_ONCE:(m - 1)
        s, u, b = columns_from(S, j), columns_from(U, j), columns_from(B, j)
        if m - j > COLUMNS_AT_ONCE ÷ 2
            multiply_block!(s, u, a, b, k, rows, places, kept, m - j, Val(COLUMNS_AT_ONCE), lanes)
        else
            multiply_block!(s, u, a, b, k, rows, places, kept, m - j, Val(COLUMNS_AT_ONCE ÷ 2), lanes)
        end
    end
    return
end

"Bytes from one column to the next from which on rows that are used again and again are copied together first."
const FAR_APART = 4096

copies_of_rows(A, k::Int, m::Int, threads::Int, lanes) = nothing
copies_of_rows(A::Dense{T}, k::Int, m::Int, threads::Int, ::Val{L}) where {T, L} =
    stride(A, 2) * sizeof(T) >= FAR_APART && m > 2 * COLUMNS_AT_ONCE ? [Vector{T}(undef, 2L * k) for _ in 1:threads] : nothing

rows_of_factor(A::Dense, ::Int, rows, k::Int, ::Nothing, lanes) = Operand(A), rows
function rows_of_factor(A::Dense{T}, ::Int, rows::NTuple{R, Int}, k::Int, copy::Vector{T}, ::Val{L}) where {T, R, L}
    whole, panel, places = Operand(A), Operand(pointer(copy), 1, R * L), ntuple(r -> (r - 1) * L, Val(R))
    for l in 0:(k - 1), r in 1:R
        unsafe_copyto!(address(panel, places[r], l), address(whole, rows[r], l), L)
    end
    return panel, places
end

"""
    multiply_block!(S, U, A, B, k, rows, places, kept, count, columns, lanes)

`S = U + A B` for the registers of S that begin at `rows` and for its first columns; where there are fewer than `columns`, the last
is computed again and again. The registers of A begin at `places`; the sum is over k columns of A. The lanes whose bits are set in
`kept` are not written.
"""
@generated function multiply_block!(
        S::Operand{T}, U::Operand{T}, A::Operand{T}, B::Operand{T}, k::Int, rows::NTuple{R, Int}, places::NTuple{R, Int},
        kept::NTuple{R, Int}, count::Int, ::Val{C}, lanes::WhichLanes{L},
    ) where {T, R, C, L}
    return quote
        $(Expr(:meta, :noinline))
        @nexprs $C c -> j_c = min(c, count) - 1
        @nexprs $C c -> b_c = address(B, 0, j_c)
        @nexprs $C c -> @nexprs $R r -> s_c_r = load_lanes(address(U, rows[r], j_c), lanes)
        for l in 0:(k - 1)
            @nexprs $R r -> a_r = load_lanes(address(A, places[r], l), lanes)
            @nexprs $C c -> begin
                b = same_in_all(unsafe_load(b_c + sizeof(T) * l * B.down), Val($L))
                @nexprs $R r -> s_c_r = muladd_lanes(a_r, b, s_c_r)
            end
        end
        @nexprs $C c -> @nexprs $R r -> begin
            to = address(S, rows[r], j_c)
            kept[r] == 0 ? store_lanes!(to, s_c_r, lanes) : store_lanes!(to, s_c_r, ~kept[r])
        end
        return
    end
end

"""
    multiply_row!(S, U, A, B, k, m, columns, lanes)

`S = U + A B` for one row, whose k terms lie side by side in registers; so do those of each column of B.
"""
@generated function multiply_row!(
        S::Operand{T}, U::Operand{T}, A::Operand{T}, B::Operand{T}, k::Int, m::Int, ::Val{C}, lanes::Val{L},
    ) where {T, C, L}
    return quote
        rest = FirstLanes{$L}(k % $L)
        last = k - rest.n
        for j in 0:($C):(m - 1)
            @nexprs $C c -> j_c = min(j + c, m) - 1
            @nexprs $C c -> b_c = address(B, 0, j_c)
            @nexprs $C c -> u_c = unsafe_load(address(U, 0, j_c))
            @nexprs $C c -> s_c = same_in_all(zero(T), lanes)
            for l in 0:($L):(last - 1)
                a = load_lanes(address(A, 0, l), lanes)
                @nexprs $C c -> s_c = muladd_lanes(a, load_lanes(b_c + sizeof(T) * l, lanes), s_c)
            end
            a = load_lanes(address(A, 0, last), rest)
            @nexprs $C c -> s_c = muladd_lanes(a, load_lanes(b_c + sizeof(T) * last, rest), s_c)
            @nexprs $C c -> unsafe_store!(address(S, 0, j_c), u_c + sum_lanes(s_c))
        end
        return
    end
end

# --- factors of many products -----------------------------------------------------------------------------------

"""
    Panels{T}(n, k)

An n × k matrix whose rows lie in memory as products take them, those of two registers at a time, column by column: with a power of
two for a stride, the columns of a plain matrix would fight for a few lines of the cache. At least a register of rows.
"""
struct Panels{T}
    rows::Int
    columns::Int
    data::Vector{T}
end
Panels{T}(n::Int, k::Int) where {T} = Panels{T}(n, k, zeros(T, cld(n, register_lanes(T)) * register_lanes(T) * k))
Base.size(P::Panels) = (P.rows, P.columns)
Base.size(P::Panels, d::Int) = size(P)[d]
Base.pointer(P::Panels) = pointer(P.data)

multiply!(S::Dense{T}, U, P::Panels{T}, B::Dense{T}, m::Int, threads::Int = 1) where {T} =
    GC.@preserve B multiply_in_registers!(S, U, P, Operand(B), size(B), P.columns, m, threads)

"The left factor of many products."
const Factor{T} = Union{Matrix{T}, Panels{T}}

factor(::Type{T}, n::Int) where {T} = T <: Hardware && n > LANE_NEURONS ? Panels{T}(n, n) : zeros(T, n, n)

function rows_of_factor(P::Panels{T}, pair::Int, rows::NTuple{R, Int}, k::Int, ::Nothing, ::Val{L}) where {T, R, L}
    start = 2L * (pair - 1) * P.columns
    return Operand(pointer(P) + sizeof(T) * start, 1, R * L), ntuple(r -> (r - 1) * L, Val(R))
end

"    store!(P, A, threads)\n\n`P = A`"
store!(P::Matrix, A::Matrix, threads::Int) = copyto!(P, A)
store!(P, A::Matrix, threads::Int) = fill_factor!((i, l) -> @inbounds(A[i, l]), P, threads)

"    store_transposed!(P, A, threads)\n\n`P = Aᵀ`"
store_transposed!(P::Matrix, A::Matrix, threads::Int) = transpose_into!(P, A)
store_transposed!(P, A::Matrix, threads::Int) = fill_factor!((i, l) -> @inbounds(A[l, i]), P, threads)

"    fill_factor!(value, P, threads)\n\n`P[i, l] = value(i, l)`"
function fill_factor!(value::F, P::Panels{T}, threads::Int) where {F, T}
    (; rows, columns, data) = P
    L = register_lanes(T)
    registers = cld(rows, L)
    in_parallel(cld(registers, 2), rows > BLOCK ? threads : 1) do _, pair
        numbers = (2 * pair - 1):min(2 * pair, registers)
        across = L * length(numbers)
        for (r, number) in enumerate(numbers), l in 1:columns
            above, place = min((number - 1) * L, rows - L), 2L * (pair - 1) * columns + (r - 1) * L + (l - 1) * across
            @inbounds @simd ivdep for i in 1:L
                data[place + i] = value(above + i, l)
            end
        end
    end
    return P
end

# Picard iteration of small stages in one launch: a workgroup iterates its samples until the last of them has ended. The matrix and
# the iterates are in shared memory, the drives and the products in registers.

"Rows and columns of the block that a work-item computes."
const BLOCK = 4

"Up to this number of neurons the iteration is one launch."
const FUSED_NEURONS = 128

"Bytes of a matrix up to which a workgroup keeps a copy; a larger one is read through the cache."
const OWN_MATRIX = 2^14

"""
    Tiling{P, C, Q}

How a workgroup is laid out: `P` rows, of which a stage may leave some empty, by `C` samples, in blocks for (P / 4) (C / 4)
work-items; `Q` is P where the group keeps a copy of the matrix, and 1 where it does not.
"""
struct Tiling{P, C, Q} end
function Tiling(n::Int, ::Type{T}) where {T}
    P = max(16, nextpow(2, n))
    C = P * sizeof(T) > 512 ? 16 : 32            # 48 KiB of shared memory are to suffice
    return Tiling{P, C, P^2 * sizeof(T) <= OWN_MATRIX ? P : 1}()
end
work_items(::Tiling{P, C}) where {P, C} = (P ÷ BLOCK) * (C ÷ BLOCK)
samples_of(::Tiling{P, C}) where {P, C} = C

# A block is a tuple of 16 values, column by column. Its rows lie P / 4 apart, so that neighbouring work-items read neighbours.
@inline block(f::F) where {F} = Base.Cartesian.@ntuple 16 q -> @inline f((q - 1) % BLOCK + 1, (q - 1) ÷ BLOCK + 1)
@inline four(f::F) where {F} = Base.Cartesian.@ntuple 4 r -> @inline f(r)
@inline row_of(t, r, P) = (t - 1) % (P ÷ BLOCK) + 1 + (r - 1) * (P ÷ BLOCK)
@inline column_of(t, c, P) = (t - 1) ÷ (P ÷ BLOCK) * BLOCK + c
@inline add_outer(s, a, b) = block((r, c) -> muladd(a[r], b[c], s[(c - 1) * BLOCK + r]))

# --- the steps of a work-item t, each for its block --------------------------------------------------------------------
# Functions rather than loops within the kernel, whose indices would be captured as they change.

# A block of an array of all samples, zero beyond its rows and columns; `first` is the sample before the group's.
@inline function load_block(A, t, first, ::Tiling{P}) where {P}
    n, samples = size(A)
    return block() do r, c
        i, j = row_of(t, r, P), first + column_of(t, c, P)
        i <= n && j <= samples ? @inbounds(A[i, j]) : zero(eltype(A))
    end
end

@inline function store_block!(z, values, t, ::Tiling{P}) where {P}
    block() do r, c
        @inbounds z[row_of(t, r, P), column_of(t, c, P)] = values[(c - 1) * BLOCK + r]
        nothing
    end
    return
end

@inline function write_block!(A, z, t, first, n, samples, ::Tiling{P}) where {P}
    block() do r, c
        i, j = row_of(t, r, P), first + column_of(t, c, P)
        i <= n && j <= samples && @inbounds(A[i, j] = z[i, column_of(t, c, P)])
        nothing
    end
    return
end

@inline function load_matrix!(matrix, M, t, n, tiling::Tiling{P, C, P}) where {P, C}
    e = t
    while e <= P * P
        i, k = (e - 1) % P + 1, (e - 1) ÷ P + 1
        @inbounds matrix[i, k] = i <= n && k <= n ? M[i, k] : zero(eltype(M))
        e += work_items(tiling)
    end
    return
end
@inline load_matrix!(matrix, M, t, n, ::Tiling) = nothing

# u + M z, with the group's copy of the matrix, or with the matrix, which has no rows beyond n.
@inline affine_block(u, matrix, M, z, t, n, ::Tiling{P, C, P}) where {P, C} =
    multiply_add_block(u, matrix, four(r -> row_of(t, r, P)), z, t, n, Val(P))
@inline affine_block(u, matrix, M, z, t, n, ::Tiling{P}) where {P} =
    multiply_add_block(u, M, four(r -> min(row_of(t, r, P), n)), z, t, n, Val(P))

@inline function multiply_add_block(s, M, rows, z, t, n, ::Val{P}) where {P}
    for k in 1:n
        a = load_rows(M, rows, k)
        b = load_columns(z, k, t, Val(P))
        s = add_outer(s, a, b)
    end
    return s
end
@inline load_rows(M, rows, k) = four(r -> @inbounds(M[rows[r], k]))
@inline load_columns(z, k, t, ::Val{P}) where {P} = four(c -> @inbounds(z[k, column_of(t, c, P)]))

@inline function value_block(g, D, s, t, first, n, samples, ::Tiling{P}) where {P}
    return block() do r, c
        i, j = row_of(t, r, P), first + column_of(t, c, P)
        i <= n && j <= samples ? row_value(g, D, i, j, s[(c - 1) * BLOCK + r]) : zero(s[1])
    end
end

# ‖f - z‖², ‖f‖² and max |f| over the rows of the block, for each of its columns
@inline function sum_columns!(sums, g, D, s, f, z, t, n, ::Tiling{P}) where {P}
    lane = (t - 1) % (P ÷ BLOCK) + 1
    four() do c
        column = column_of(t, c, P)
        change, size, largest = column_sums(g, D, s, f, z, t, c, n, Val(P))
        @inbounds sums[1, lane, column] = change
        @inbounds sums[2, lane, column] = size
        @inbounds sums[3, lane, column] = largest
        nothing
    end
    return
end
@inline function column_sums(g, D, s, f, z, t, c, n, ::Val{P}) where {P}
    change = four(r -> f[(c - 1) * BLOCK + r] - @inbounds(z[row_of(t, r, P), column_of(t, c, P)]))
    state = four() do r
        i, q = row_of(t, r, P), (c - 1) * BLOCK + r
        i <= n ? state_of(g, D, i, s[q], f[q]) : zero(f[1])
    end
    return square(change), square(state), max(abs.(state)...)
end
@inline square(x) = muladd(x[1], x[1], muladd(x[2], x[2], muladd(x[3], x[3], x[4] * x[4])))

@inline function change_block!(z, f, decisions, damping, t, ::Tiling{P}) where {P}
    block() do r, c
        i, column = row_of(t, r, P), column_of(t, c, P)
        @inbounds decision = decisions[column]
        decision == Int32(REST) || advance!(z, nothing, i, column, f[(c - 1) * BLOCK + r], decision == Int32(ADVANCE) ? damping : one(damping))
        nothing
    end
    return
end

@inline function count_running(decisions)
    running = zero(Int32)
    for decision in decisions
        running += decision == Int32(ADVANCE)
    end
    return running
end

# --- the kernel ---------------------------------------------------------------------------------------------------------

"""
The statements by which a workgroup begins, with the matrix `M`: it lays out its memory and takes there the first iterates `Z` of its
samples, with the drives `U`, for a `tiling`.
"""
begin_group(M) = quote
    t = @index(Local, Linear)
    group = @index(Group, Linear)
    @uniform n = size(Z, 1)
    @uniform samples = size(Z, 2)
    matrix = @localmem eltype(Z) (Q, Q)
    z = @localmem eltype(Z) (P + 1, C)                   # of one row more, so that the columns begin in different banks
    sums = @localmem eltype(Z) (3, P ÷ BLOCK, C)
    decisions = @localmem Int32 (C,)
    going = @localmem Int32 (1,)
    first = @localmem Int (1,)                           # the sample before the group's: in registers, addresses would be kept of it
    u = @private NTuple{BLOCK^2, eltype(Z)} (1,)
    f = @private NTuple{BLOCK^2, eltype(Z)} (1,)

    load_matrix!(matrix, $M, t, n, tiling)
    if t == 1
        @inbounds going[1], first[1] = 1, (group - 1) * C
    end
    @synchronize
    @inbounds u[1] = load_block(U, t, first[1], tiling)
    store_block!(z, load_block(Z, t, first[1], tiling), t, tiling)
end

"""
Picard iteration of a group of columns, z = g(u + M z), until the last of them has ended: the text of a loop, since the barriers of a
kernel have to stand in its own body.
"""
picard_loop(progress, record, M, g, D, rule) = quote
    while @inbounds(going[1]) > 0
        s = affine_block(@inbounds(u[1]), matrix, $M, z, t, n, tiling)
        @inbounds f[1] = value_block($g, $D, s, t, first[1], n, samples, tiling)
        sum_columns!(sums, $g, $D, s, @inbounds(f[1]), z, t, n, tiling)
        @synchronize
        if t <= C
            @inbounds decisions[t] = Int32(conclude_column!($progress, $record, $rule, sums, t, first[1] + t, samples))
        end
        @synchronize
        change_block!(z, @inbounds(f[1]), decisions, $rule.damping, t, tiling)
        if t == 1
            @inbounds going[1] = count_running(decisions)
        end
        @synchronize
    end
end

# Picard iteration of z = g(U + M z) for all columns that are `running`, from the iterates in `Z`: what `step!` does for one iteration, by
# the same rule.
@eval @kernel function picard!(Z, progress, record, @Const(U), @Const(M), g, D, rule, tiling::Tiling{P, C, Q}) where {P, C, Q}
    $(begin_group(:M).args...)
    @synchronize
    $(picard_loop(:progress, :record, :M, :g, :D, :rule))
    write_block!(Z, z, t, first[1], n, samples, tiling)
end

# Picard iteration of small stages in one launch: a workgroup iterates its samples until the last of them has ended. The matrix and
# the iterates are in shared memory, the drives and the products in registers.

"Rows and columns of the block that a work-item computes."
const BLOCK = 4

"Up to so many neurons the iteration is one launch."
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
@inline block(f::F) where {F} = ntuple(q -> f((q - 1) % BLOCK + 1, (q - 1) ÷ BLOCK + 1), Val(BLOCK^2))
@inline row_of(t, r, P) = (t - 1) % (P ÷ BLOCK) + 1 + (r - 1) * (P ÷ BLOCK)
@inline column_of(t, c, P) = (t - 1) ÷ (P ÷ BLOCK) * BLOCK + c
@inline add_outer(s, a, b) = block((r, c) -> muladd(a[r], b[c], s[(c - 1) * BLOCK + r]))

# u + M z for the block of work-item t
@inline function affine_block(u, M, z, t, n, ::Val{P}) where {P}
    s = u
    for k in 1:n
        @inbounds a = ntuple(r -> M[row_of(t, r, P), k], Val(BLOCK))
        @inbounds b = ntuple(c -> z[k, column_of(t, c, P)], Val(BLOCK))
        s = add_outer(s, a, b)
    end
    return s
end

# The same, where the matrix has no rows beyond n.
@inline function affine_block_unpadded(u, M, z, t, n, ::Val{P}) where {P}
    rows = ntuple(r -> min(row_of(t, r, P), n), Val(BLOCK))
    s = u
    for k in 1:n
        @inbounds a = ntuple(r -> M[rows[r], k], Val(BLOCK))
        @inbounds b = ntuple(c -> z[k, column_of(t, c, P)], Val(BLOCK))
        s = add_outer(s, a, b)
    end
    return s
end

# ‖f - z‖², ‖f‖² and max |f| over the rows of a block in its column c
@inline function column_sums(g, D, s, f, z, t, c, n, ::Val{P}) where {P}
    at(r) = (c - 1) * BLOCK + r
    change = ntuple(r -> f[at(r)] - @inbounds(z[row_of(t, r, P), column_of(t, c, P)]), Val(BLOCK))
    state = ntuple(Val(BLOCK)) do r
        i = row_of(t, r, P)
        i <= n ? state_of(g, D, i, s[at(r)], f[at(r)]) : zero(f[1])
    end
    return square(change), square(state), max(abs.(state)...)
end
@inline square(x) = muladd(x[1], x[1], muladd(x[2], x[2], muladd(x[3], x[3], x[4] * x[4])))

"""
Picard iteration of z = g(U + M z) for all columns that are `running`, from the iterates in `Z`: what [`step!`](@ref) does for one
iteration, by the same rule.
"""
@kernel function picard!(Z, progress, record, @Const(U), @Const(M), g, D, rule, tiling::Tiling{P, C, Q}) where {P, C, Q}
    t = @index(Local, Linear)
    group = @index(Group, Linear)
    @uniform n = size(Z, 1)
    @uniform samples = size(Z, 2)
    matrix = @localmem eltype(Z) (Q, Q)
    z = @localmem eltype(Z) (P + 1, C)                   # of one row more, so that the columns begin in different banks
    sums = @localmem eltype(Z) (3, P ÷ BLOCK, C)
    verdicts = @localmem Int32 (C,)
    going = @localmem Int32 (1,)
    u = @private NTuple{BLOCK^2, eltype(Z)} (1,)
    values = @private NTuple{BLOCK^2, eltype(Z)} (1,)

    if Q > 1
        e = t
        while e <= P * P
            i, k = (e - 1) % P + 1, (e - 1) ÷ P + 1
            @inbounds matrix[i, k] = i <= n && k <= n ? M[i, k] : zero(eltype(Z))
            e += (P ÷ BLOCK) * (C ÷ BLOCK)
        end
    end
    at(A, r, c) = (i = row_of(t, r, P); j = (group - 1) * C + column_of(t, c, P); i <= n && j <= samples ? @inbounds(A[i, j]) : zero(eltype(Z)))
    @inbounds u[1] = block((r, c) -> at(U, r, c))
    block() do r, c
        @inbounds z[row_of(t, r, P), column_of(t, c, P)] = at(Z, r, c)
        nothing
    end
    t == 1 && @inbounds(going[1] = 1)
    @synchronize
    while @inbounds(going[1]) > 0
        s = Q > 1 ? affine_block(@inbounds(u[1]), matrix, z, t, n, Val(P)) : affine_block_unpadded(@inbounds(u[1]), M, z, t, n, Val(P))
        f = block() do r, c
            i, j = row_of(t, r, P), (group - 1) * C + column_of(t, c, P)
            i <= n && j <= samples ? respond(g, D, i, j, s[(c - 1) * BLOCK + r]) : zero(eltype(Z))
        end
        @inbounds values[1] = f
        lane = (t - 1) % (P ÷ BLOCK) + 1
        ntuple(Val(BLOCK)) do c
            column = column_of(t, c, P)
            change2, size2, largest = column_sums(g, D, s, f, z, t, c, n, Val(P))
            @inbounds sums[1, lane, column] = change2
            @inbounds sums[2, lane, column] = size2
            @inbounds sums[3, lane, column] = largest
            nothing
        end
        @synchronize
        if t <= C
            j, verdict = (group - 1) * C + t, REST
            if j <= samples && @inbounds(progress.running[j])
                change2, size2, largest = zero(eltype(Z)), zero(eltype(Z)), zero(eltype(Z))
                for lane in 1:(P ÷ BLOCK)
                    @inbounds change2 += sums[1, lane, t]
                    @inbounds size2 += sums[2, lane, t]
                    @inbounds largest = max(largest, sums[3, lane, t])
                end
                verdict = conclude!(progress, record, j, rule, sqrt(change2), sqrt(size2), largest)
            end
            @inbounds verdicts[t] = Int32(verdict)
        end
        @synchronize
        @inbounds f = values[1]
        block() do r, c
            i, column = row_of(t, r, P), column_of(t, c, P)
            @inbounds verdict, x = verdicts[column], f[(c - 1) * BLOCK + r]
            damping = verdict == Int32(ADVANCE) ? rule.damping : one(rule.damping)
            verdict == Int32(REST) || put!(z, nothing, i, column, x, damping)
            nothing
        end
        if t == 1
            running = zero(Int32)
            for column in 1:C
                @inbounds running += verdicts[column] == Int32(ADVANCE)
            end
            @inbounds going[1] = running
        end
        @synchronize
    end
    block() do r, c
        i, column = row_of(t, r, P), column_of(t, c, P)
        j = (group - 1) * C + column
        i <= n && j <= samples && @inbounds(Z[i, j] = z[i, column])
        nothing
    end
end

# Small stages: many samples side by side, one in each lane of the vector registers. Every operation of Newton's method,
# including elimination, is then a vector operation, which is not possible for few neurons with one sample per column.

"Samples side by side: those of the widest vector register, or of two independent ones."
lane_count(::Type{T}, registers::Int) where {T} = registers * 64 ÷ sizeof(T)

"""
    Lanes{T, L}(n)

The buffers for L samples of a stage of n neurons; in every array the first index is the sample. Which samples something is true of
is told by bits.
"""
mutable struct Lanes{T, L}
    const U::Matrix{T}
    const Z::Matrix{T}
    const S::Matrix{T}
    const F::Matrix{T}
    const D::Matrix{T}
    const step::Matrix{T}
    const anchor::Matrix{T}              # where Picard iteration was left
    const A::Array{T, 3}
    const power::Array{T, 3}             # of D M
    const change2::Vector{T}             # ‖F - Z‖², ‖F‖²
    const size2::Vector{T}
    const residual2::Vector{T}           # the last ‖F - Z‖² of a lane at work, and the one before
    const last2::Vector{T}
    const residual::Vector{T}            # in the end, relative
    const rate::Vector{T}
    const first2::Vector{T}              # ‖F - Z‖² of the first evaluation
    const reach2::Vector{T}              # square of how far from the anchor the equilibrium may be
    const iterations::Vector{T}
    active::Int
    failed::Int
end
Lanes{T, L}(n::Int) where {T, L} = Lanes{T, L}(
    (zeros(T, L, n) for _ in 1:7)..., zeros(T, L, n, n), zeros(T, L, n, n), (zeros(T, L) for _ in 1:9)..., 0, 0
)

has_bit(bits::Int, l::Int) = isodd(bits >> (l - 1))
bit(l::Int) = 1 << (l - 1)

"""
    LaneCriterion(f, tol, floor, unique)

What the lanes have in common but for the matrix of their equations, see [`Stationary`](@ref): the activation, and when a lane is done.
"""
struct LaneCriterion{T, F <: Activation}
    f::F
    tol::T
    floor::T
    unique::Bool
end
LaneCriterion(p::Stationary) = LaneCriterion(p.f, p.tol, p.floor, p.unique)

# As many as the columns, which are few or many, will ever need.
@inline lanes_of(c::Columns{T}) where {T} =
    size(c.U, 2) <= lane_count(T, 1) ? lanes_of(c, Val(lane_count(T, 1))) : lanes_of(c, Val(lane_count(T, 2)))
lanes_of(c::Columns{T}, ::Val{L}) where {T, L} = buffer!(() -> Lanes{T, L}(size(c.U, 1)), c, Lanes{T, L})

"Evaluations before a lane is given to the general solver."
const LANE_ITERATIONS = 12

"""
    solve_lanes!(w, c, p)

Solve the equation `p` for the samples whose drive and start are in the columns of `c`: a Picard step or three, then Newton's
method. The columns that remain active in `c` are of the samples for which that did not do: which take too long or, without
a guarantee of uniqueness, whose residual grew or whose equilibrium repels or may not be the one that attracts. What happens to a
sample does not depend on the others.
"""
function solve_lanes!(w::Lanes{T, L}, c::Columns{T}, p::Stationary{T}) where {T, L}
    cold, samples = c.cold, c.active
    evaluations, criterion = min(LANE_ITERATIONS, c.limit), LaneCriterion(p)
    left = 0
    for first_sample in 1:L:samples
        check_interrupt()
        count = min(L, samples - first_sample + 1)
        load!(w.U, c.U, first_sample, count)
        cold || load!(w.Z, c.Z, first_sample, count)
        newton_lanes!(w, p.recurrence, criterion, cold, evaluations)
        relate_residuals!(w, p.floor^2)
        find_rates!(w)
        if w.failed & bits_up_to(count) == 0
            store!(p.Z, first_sample, count, p.latest ? w.F : w.Z)
            store!(p.S, first_sample, count, w.S)
            record!(p.outcome, first_sample, count, w)
            continue
        end
        for l in 1:count
            j = first_sample + l - 1
            used = unsafe_trunc(Int, w.iterations[l])
            failed = has_bit(w.failed, l)
            if failed && used < c.limit
                left += 1
                copy_column!(c.U, left, c.U, j)
                copy_column!(c.Z, left, c.Z, j)
                c.sample[left], c.iterations[left], c.singular[left] = j, used, false
            else
                status = failed ? status_of_failed!(c, j, w, p, l) : CONVERGED
                store_lane!(p.Z, j, p.latest && status === CONVERGED ? w.F : w.Z, l)
                store_lane!(p.S, j, w.S, l)
                record!(p.outcome, j, status, used, w.residual[l], w.rate[l])
            end
        end
    end
    c.active = left
    return left == 0
end

# How the sample of a lane that would go on elsewhere ends if it has no evaluation left; column j, its own, is overwritten.
function status_of_failed!(c::Columns, j::Int, w::Lanes{T}, p::Stationary{T}, l::Int) where {T}
    isfinite(w.residual2[l] + w.size2[l]) || return NON_FINITE
    w.residual2[l] <= p.tol^2 * max(w.size2[l], p.floor^2) || return MAX_ITERATIONS
    store_lane!(c.S, j, w.S, l)
    store_lane!(c.F, j, w.F, l)
    return repels(c, p, j) ? UNSTABLE : is_spurious(c, p, j) ? SINGULAR : CONVERGED
end

"""
    newton_lanes!(w, recurrence, p, cold, evaluations)

The equilibria of z = f(U + M z) from Z, or from zero if `cold`. The result is in `F`; lanes that did not converge are marked in
`failed`. M is that of a `Recurrence` for all lanes, or a matrix, or, with the lane as its first index, one for each.
"""
function newton_lanes!(w::Lanes{T, L}, recurrence, p::LaneCriterion{T}, cold::Bool, evaluations::Int) where {T, L}
    M, picard_steps, lanes = matrix_of(recurrence), p.unique ? 1 : 3, Val(L)
    cold && fill!(w.Z, 0)
    w.active, w.failed = bits_up_to(L), 0
    put_vector!(w.residual2, 1, same_in_all(T(Inf), lanes))
    put_vector!(w.last2, 1, same_in_all(T(Inf), lanes))
    for k in 1:evaluations
        evaluate_lanes!(w, M, p.f, cold && k == 1)
        grown = check_convergence!(w, p, k, picard_steps)
        (w.active == 0 || k == evaluations) && break
        if k <= picard_steps
            step_lanes!(w, w.F, lanes, true)
            k == picard_steps && !p.unique && copyto!(w.anchor, w.Z)
        else
            newton_step_lanes!(w, M, p.f, grown)
        end
    end
    w.failed |= w.active
    p.unique || check_stability!(w, recurrence, p, picard_steps)
    return
end

# Takes out the lanes that are done or failed after the evaluation k; returns those where Newton's method has made the residual larger.
function check_convergence!(w::Lanes{T, L}, p::LaneCriterion{T}, k::Int, picard_steps::Int) where {T, L}
    (; active, residual2, last2, iterations) = w
    lanes = Val(L)
    now2, before2, size2 = vector(w.change2, 1, lanes), vector(residual2, 1, lanes), vector(w.size2, 1, lanes)
    put_vector!(last2, 1, select(active, before2, vector(last2, 1, lanes)))
    put_vector!(residual2, 1, select(active, now2, before2))
    put_vector!(iterations, 1, select(active, same_in_all(T(k), lanes), vector(iterations, 1, lanes)))
    done = at_most(now2, times_lanes(same_in_all(p.tol^2, lanes), size2)) | at_most(now2, same_in_all(p.tol^2 * p.floor^2, lanes))
    grown = k > picard_steps + 1 ? below(before2, now2) : 0
    infinite = same_in_all(T(Inf), lanes)
    broken = ~(below(now2, infinite) & below(size2, infinite)) | (p.unique ? 0 : grown)
    w.active &= ~(done | broken)
    w.failed |= active & broken
    p.unique || drop_doubtful!(w, active & done & ~broken, k, picard_steps)
    return grown
end

# Without a guarantee, a start that happens to be an equilibrium may be one that repels; and what is far from where Picard iteration was
# left, or does not contract there, may not be the one that attracts.
function drop_doubtful!(w::Lanes{T, L}, done::Int, k::Int, picard_steps::Int) where {T, L}
    lanes = Val(L)
    k == 1 && copyto!(w.first2, w.change2)
    k == picard_steps && reach!(w)
    far = k == 1 ? done : below(same_in_all(T(SUSPICIOUS_SIZE)^2, lanes), vector(w.size2, 1, lanes))
    k > picard_steps && (far |= below(vector(w.reach2, 1, lanes), distance2(w, lanes)))
    w.failed |= done & far
    return
end

"Squarings of D R for all lanes, before each lane is checked on its own."
const LANE_SQUARINGS = 4

# Newton's method may end at an equilibrium that repels, which is left to the general method.
function check_stability!(w::Lanes{T, L}, recurrence, p::LaneCriterion{T}, picard_steps::Int) where {T, L}
    M, lanes = matrix_of(recurrence), Val(L)
    doubtful = below(same_in_all(T(picard_steps), lanes), vector(w.iterations, 1, lanes)) & ~w.failed
    doubtful == 0 && return
    slopes_lanes!(w, p.f)
    recurrence isa Recurrence && (doubtful &= ~below(largest_slopes(w, lanes), same_in_all(inv(norm_of(recurrence)), lanes)))
    doubtful == 0 && return
    power, next = jacobian_lanes!(w.power, w.D, M, lanes), w.A
    for k in 0:LANE_SQUARINGS
        k == 0 || ((power, next) = (square_lanes!(next, power, lanes), power))
        doubtful &= ~contractions(power, lanes)
        doubtful == 0 && return
    end
    for l in 1:L
        has_bit(doubtful, l) || continue
        (@late repels(matrix_of(M, l), w.D[l, :]))::Bool && (w.failed |= bit(l))
    end
    return
end

function largest_slopes(w::Lanes{T}, lanes) where {T}
    largest = same_in_all(zero(T), lanes)
    for i in axes(w.D, 2)
        slope = abs_lanes(vector(w.D, i, lanes))
        largest = select(below(slope, largest), largest, slope)
    end
    return largest
end

matrix_of(r::Recurrence) = r.R
matrix_of(M::Array) = M
matrix_of(M::Matrix, l::Int) = M
matrix_of(M::Array{<:Any, 3}, l::Int) = M[l, :, :]

# D M
function jacobian_lanes!(J::Array{<:Any, 3}, D, M, lanes)
    n = size(J, 2)
    GC.@preserve J D M for k in 1:n, i in 1:n
        put_vector!(J, (k - 1) * n + i, times_lanes(matrix_entry(M, i, k, lanes), vector(D, i, lanes)))
    end
    return J
end

# P = A A. Two rows and two columns at a time: what they are sums of is read half as often.
function square_lanes!(P::Array{T, 3}, A::Array{T, 3}, lanes) where {T}
    n, zero_lanes = size(A, 2), same_in_all(zero(T), lanes)
    place(i, j) = (j - 1) * n + i
    GC.@preserve P A for j in 1:2:n, i in 1:2:n
        below, next = min(i + 1, n), min(j + 1, n)
        a = b = c = d = zero_lanes
        for k in 1:n
            upper, lower = vector(A, place(i, k), lanes), vector(A, place(below, k), lanes)
            left, right = vector(A, place(k, j), lanes), vector(A, place(k, next), lanes)
            a, b = muladd_lanes(upper, left, a), muladd_lanes(lower, left, b)
            c, d = muladd_lanes(upper, right, c), muladd_lanes(lower, right, d)
        end
        put_vector!(P, place(i, j), a)
        put_vector!(P, place(below, j), b)
        put_vector!(P, place(i, next), c)
        put_vector!(P, place(below, next), d)
    end
    return P
end

# The lanes whose matrix has a norm below 1, that of Frobenius or the largest sum of a column.
function contractions(A::Array{T, 3}, lanes) where {T}
    n, one_lanes = size(A, 2), same_in_all(one(T), lanes)
    squares, columns = same_in_all(zero(T), lanes), bits_up_to(size(A, 1))
    for j in 1:n
        sum = same_in_all(zero(T), lanes)
        for i in 1:n
            a = vector(A, (j - 1) * n + i, lanes)
            sum = muladd_lanes(abs_lanes(a), one_lanes, sum)
            squares = muladd_lanes(a, a, squares)
        end
        columns &= below(sum, one_lanes)
    end
    return columns | below(squares, one_lanes)
end

# Where Newton's method has overshot, the next step is Picard's, which contracts if there is but one equilibrium.
function prefer_picard!(w::Lanes, grown::Int, lanes)
    for i in axes(w.Z, 2)
        put_vector!(w.step, i, select(grown, minus_lanes(vector(w.F, i, lanes), vector(w.Z, i, lanes)), vector(w.step, i, lanes)))
    end
    return
end

# `sqrt` looks for negative numbers first, which keeps loops out of vector registers.
function relate_residuals!(w::Lanes{T, L}, floor2::T) where {T, L}
    @inbounds @lanes T for l in 1:L
        w.residual[l] = Base.sqrt_llvm(w.residual2[l] / max(w.size2[l], floor2))
    end
    return
end

# The quotients of the last two residuals.
function find_rates!(w::Lanes{T, L}) where {T, L}
    @inbounds @lanes T for l in 1:L
        last2 = w.last2[l]
        w.rate[l] = ifelse(isfinite(last2), Base.sqrt_llvm(w.residual2[l] / last2), zero(T))
    end
    return
end

# The rate is that of the last step or, as iterates that turn have some steps that hardly shrink, the mean of the last two.
function reach!(w::Lanes{T, L}) where {T, L}
    find_rates!(w)
    @inbounds for l in 1:L
        q = w.rate[l]
        contracts(q) || (q = sqrt(sqrt(w.residual2[l] / w.first2[l])))
        w.reach2[l] = trust_radius(sqrt(w.residual2[l]), q)^2
        contracts(q) || (w.failed |= w.active & bit(l); w.active &= ~bit(l))
    end
    return
end

# ‖Z - anchor‖²
function distance2(w::Lanes{T}, lanes) where {T}
    total = same_in_all(zero(T), lanes)
    for i in axes(w.Z, 2)
        d = minus_lanes(vector(w.Z, i, lanes), vector(w.anchor, i, lanes))
        total = muladd_lanes(d, d, total)
    end
    return total
end

# --- vector arithmetic ------------------------------------------------------------------------------------------

# The k-th vector of an array whose first index is the lane; the caller keeps the array alive.
@inline vector(A::Array{T}, k::Int, ::Val{L}) where {T, L} = unsafe_load(Ptr{LaneVector{L, T}}(pointer(A)), k)
@inline put_vector!(A::Array{T}, k::Int, v::LaneVector{L, T}) where {T, L} =
    unsafe_store!(Ptr{LaneVector{L, T}}(pointer(A)), v, k)

# Entry (i, k) of the matrix of all lanes, or of each.
@inline matrix_entry(M::Matrix, i::Int, k::Int, lanes) = same_in_all(@inbounds(M[i, k]), lanes)
@inline matrix_entry(M::Array{T, 3}, i::Int, k::Int, lanes) where {T} = vector(M, (k - 1) * size(M, 2) + i, lanes)

# S = U + M Z, F = f(S), ‖F - Z‖² and ‖F‖²
function evaluate_lanes!(w::Lanes, M, f::Activation, cold::Bool)
    n = size(w.Z, 2)
    is_few(n, f) && return for_few(N -> evaluate_few!(w, M, f, N), n)
    affine_lanes!(w, M, cold)
    activate_lanes!(w, f)
    return
end

# Z ← Z + (I - D M)⁻¹ (F - Z), or F where the residual has grown, for the lanes at work
function newton_step_lanes!(w::Lanes{T, L}, M, f::Activation, grown::Int) where {T, L}
    n, lanes = size(w.Z, 2), Val(L)
    is_few(n, f) && return for_few(N -> newton_step_few!(w, M, f, grown, N), n)
    slopes_lanes!(w, f)
    direction_lanes!(w, M)
    grown == 0 || prefer_picard!(w, grown, lanes)
    step_lanes!(w, w.step, lanes, false)
    return
end

# S = U + M Z
function affine_lanes!(w::Lanes{T, L}, M::Array{T}, cold::Bool) where {T, L}
    n, lanes = size(w.Z, 2), Val(L)
    cold && return copyto!(w.S, w.U)
    (; S, U, Z) = w
    GC.@preserve S U Z M for i in 1:n
        sum = vector(U, i, lanes)
        for k in 1:n
            sum = muladd_lanes(matrix_entry(M, i, k, lanes), vector(Z, k, lanes), sum)
        end
        put_vector!(S, i, sum)
    end
    return S
end

# F = f(S), ‖F - Z‖² and ‖F‖²
function activate_lanes!(w::Lanes{T, L}, f::Activation) where {T, L}
    foreach(pieces(f, size(w.S, 2))) do (rows, g)
        @inbounds for i in rows
            @lanes T for l in 1:L
                w.F[l, i] = value(g, w.S[l, i])
            end
        end
    end
    lanes = Val(L)
    change2 = size2 = same_in_all(zero(T), lanes)
    for i in axes(w.F, 2)
        z = vector(w.F, i, lanes)
        d = minus_lanes(z, vector(w.Z, i, lanes))
        change2, size2 = muladd_lanes(d, d, change2), muladd_lanes(z, z, size2)
    end
    put_vector!(w.change2, 1, change2)
    put_vector!(w.size2, 1, size2)
    return
end

# Z ← X or Z + X where a lane is active
function step_lanes!(w::Lanes{T}, X, lanes, replace::Bool) where {T}
    for i in axes(X, 2)
        x, z = vector(X, i, lanes), vector(w.Z, i, lanes)
        put_vector!(w.Z, i, select(w.active, replace ? x : muladd_lanes(x, same_in_all(one(T), lanes), z), z))
    end
    return
end

# D = f′(S) and step = F - Z
function slopes_lanes!(w::Lanes{T, L}, f::Activation) where {T, L}
    foreach(pieces(f, size(w.S, 2))) do (rows, g)
        @inbounds for i in rows
            @lanes T for l in 1:L
                w.D[l, i] = slope(g, w.S[l, i], w.F[l, i])
                w.step[l, i] = w.F[l, i] - w.Z[l, i]
            end
        end
    end
    return
end

# step ← (I - D M)⁻¹ step by elimination without pivoting; the residual afterwards tells where that was not good enough. Two rows and two
# columns at a time: of what the four entries are sums of, each is read once for two. The factors by which rows are added to those below
# lie below the diagonal of A, the negative inverses of the pivots on it.
function direction_lanes!(w::Lanes{T, L}, M::Array{T}) where {T, L}
    n, lanes = size(w.Z, 2), Val(L)
    (; A, D, step) = w
    GC.@preserve A D step M begin
        isodd(n) && eliminate_first!(A, step, M, D, n, lanes)
        for j in (1 + isodd(n)):2:n
            for i in (1 + isodd(n)):2:(j - 2)
                eliminate_above!(A, M, D, n, i, j, lanes)
            end
            eliminate_diagonal!(A, step, M, D, n, j, lanes)
            for i in (j + 2):2:n
                eliminate_below!(A, step, M, D, n, i, j, lanes)
            end
        end
        for k in n:-1:1
            column = (k - 1) * n
            negative = times_lanes(vector(step, k, lanes), vector(A, column + k, lanes))
            put_vector!(step, k, negative)
            for i in 1:(k - 1)
                put_vector!(step, i, muladd_lanes(vector(A, column + i, lanes), negative, vector(step, i, lanes)))
            end
        end
    end
    @inbounds @simd for i in eachindex(step)
        step[i] = -step[i]
    end
    return
end

# Entry (i, j) of I - D M
@inline residual_entry(M, D::Array{T}, i::Int, j::Int, lanes) where {T} =
    muladd_lanes(negative(matrix_entry(M, i, j, lanes)), vector(D, i, lanes), same_in_all(T(i == j), lanes))

# The first of an odd number of rows and columns.
function eliminate_first!(A, step, M, D, n::Int, lanes)
    pivot, right = negative_inverse(residual_entry(M, D, 1, 1, lanes)), vector(step, 1, lanes)
    put_vector!(A, 1, pivot)
    for i in 2:n
        factor = times_lanes(residual_entry(M, D, i, 1, lanes), pivot)
        put_vector!(A, i, factor)
        put_vector!(A, (i - 1) * n + 1, residual_entry(M, D, 1, i, lanes))
        put_vector!(step, i, muladd_lanes(factor, right, vector(step, i, lanes)))
    end
    return
end

# The entries (i, j), (i + 1, j), (i, j + 1), (i + 1, j + 1) after the elimination of the first `steps` unknowns.
@inline function entries_after(steps::Int, A, M, D, n::Int, i::Int, j::Int, lanes)
    a, b = residual_entry(M, D, i, j, lanes), residual_entry(M, D, i + 1, j, lanes)
    c, d = residual_entry(M, D, i, j + 1, lanes), residual_entry(M, D, i + 1, j + 1, lanes)
    for k in 1:steps
        column = (k - 1) * n + i
        first_factor, second_factor = vector(A, column, lanes), vector(A, column + 1, lanes)
        first_top, second_top = vector(A, (j - 1) * n + k, lanes), vector(A, j * n + k, lanes)
        a, b = muladd_lanes(first_factor, first_top, a), muladd_lanes(second_factor, first_top, b)
        c, d = muladd_lanes(first_factor, second_top, c), muladd_lanes(second_factor, second_top, d)
    end
    return a, b, c, d
end

@inline function put_entries!(A, n::Int, i::Int, j::Int, a, b, c, d)
    put_vector!(A, (j - 1) * n + i, a)
    put_vector!(A, (j - 1) * n + i + 1, b)
    put_vector!(A, j * n + i, c)
    put_vector!(A, j * n + i + 1, d)
    return
end

@inline function eliminate_above!(A, M, D, n::Int, i::Int, j::Int, lanes)
    a, b, c, d = entries_after(i - 1, A, M, D, n, i, j, lanes)
    factor = vector(A, (i - 1) * n + i + 1, lanes)
    return put_entries!(A, n, i, j, a, muladd_lanes(factor, a, b), c, muladd_lanes(factor, c, d))
end

@inline function eliminate_diagonal!(A, step, M, D, n::Int, j::Int, lanes)
    a, b, c, d = entries_after(j - 1, A, M, D, n, j, j, lanes)
    pivot = negative_inverse(a)
    factor = times_lanes(b, pivot)
    put_vector!(step, j + 1, muladd_lanes(factor, vector(step, j, lanes), vector(step, j + 1, lanes)))
    return put_entries!(A, n, j, j, pivot, factor, c, negative_inverse(muladd_lanes(factor, c, d)))
end

@inline function eliminate_below!(A, step, M, D, n::Int, i::Int, j::Int, lanes)
    a, b, c, d = entries_after(j - 1, A, M, D, n, i, j, lanes)
    diagonal = (j - 1) * n + j
    pivot, top, next_pivot = vector(A, diagonal, lanes), vector(A, diagonal + n, lanes), vector(A, diagonal + n + 1, lanes)
    a, b = times_lanes(a, pivot), times_lanes(b, pivot)
    c, d = times_lanes(muladd_lanes(a, top, c), next_pivot), times_lanes(muladd_lanes(b, top, d), next_pivot)
    right, next_right = vector(step, j, lanes), vector(step, j + 1, lanes)
    put_vector!(step, i, muladd_lanes(c, next_right, muladd_lanes(a, right, vector(step, i, lanes))))
    put_vector!(step, i + 1, muladd_lanes(d, next_right, muladd_lanes(b, right, vector(step, i + 1, lanes))))
    return put_entries!(A, n, i, j, a, b, c, d)
end

"""
    solve_adjoint_lanes!(w, c, p, D, G)

Solve the adjoint systems of the samples with the slopes `D` and G = ∂L/∂z by elimination. Those for which that was not exact enough
become the active columns of `c`.
"""
function solve_adjoint_lanes!(w::Lanes{T, L}, c::Columns{T}, p::AdjointSystem{T}, D, G) where {T, L}
    samples, left = size(G, 2), 0
    for first_sample in 1:L:samples
        check_interrupt()
        count = min(L, samples - first_sample + 1)
        load!(w.U, G, first_sample, count)
        load!(w.D, D, first_sample, count)
        adjoint_lanes!(w, p.M::Matrix{T}, adjoint_tolerance(p.tol))
        if w.failed & bits_up_to(count) == 0
            store!(p.Z, first_sample, count, w.Z)
            record!(p.outcome, first_sample, count, w)
            continue
        end
        for l in 1:count
            j = first_sample + l - 1
            if !has_bit(w.failed, l)
                store_lane!(p.Z, j, w.Z, l)
                record!(p.outcome, j, CONVERGED, 1, w.residual[l], zero(T))
            else
                left += 1
                copy_column!(c.U, left, G, j)
                copy_column!(c.coefficients, left, D, j)
                c.sample[left] = j
            end
        end
    end
    c.active = left
    return left == 0
end

"Z = D λ with (I - M D) λ = U, and its residual relative to ‖Z‖; `failed` where that is above `tol`."
function adjoint_lanes!(w::Lanes{T, L}, M::Array{T}, tol::T) where {T, L}
    n = size(w.Z, 2)
    is_few(n) ? for_few(N -> adjoint_few!(w, M, N), n) : adjoint_of_many!(w, M)
    relate_residuals!(w, floatmin(T))
    w.failed = ~at_most(vector(w.residual, 1, Val(L)), same_in_all(tol, Val(L)))
    put_vector!(w.iterations, 1, same_in_all(one(T), Val(L)))
    put_vector!(w.rate, 1, same_in_all(zero(T), Val(L)))
    return
end

function adjoint_of_many!(w::Lanes{T, L}, M::Array{T}) where {T, L}
    multiply_lanes!(w.step, w.D, w.U, Val(L))
    direction_lanes!(w, M)
    copyto!(w.Z, w.step)
    affine_lanes!(w, M, false)
    residual_lanes!(w)
    return
end

# Elimination does not come nearer.
adjoint_tolerance(tol::T) where {T} = max(tol, 100 * eps(T))

function multiply_lanes!(X::Matrix{T}, A, B, ::Val{L}) where {T, L}
    @inbounds for i in axes(X, 2)
        @lanes T for l in 1:L
            X[l, i] = A[l, i] * B[l, i]
        end
    end
    return
end

# ‖D S - Z‖² and ‖Z‖²
function residual_lanes!(w::Lanes{T, L}) where {T, L}
    lanes = Val(L)
    residual2 = size2 = same_in_all(zero(T), lanes)
    for i in axes(w.Z, 2)
        z = vector(w.Z, i, lanes)
        d = muladd_lanes(vector(w.D, i, lanes), vector(w.S, i, lanes), negative(z))
        residual2, size2 = muladd_lanes(d, d, residual2), muladd_lanes(z, z, size2)
    end
    put_vector!(w.residual2, 1, residual2)
    put_vector!(w.size2, 1, size2)
    return
end

# --- few neurons ------------------------------------------------------------------------------------------------

# What is above in passes through memory is here one loop over the lanes, written out for each number of neurons, in which all numbers of a
# lane stay in registers: the neurons i have z_i, s_i, …, the matrices a_i_k. The operations are the same to the last bit.

"Neurons that are few."
const FEW = 4
is_few(n::Int) = n <= FEW
is_few(n::Int, ::Activation) = is_few(n)
is_few(n::Int, ::Piecewise) = false

# `work(Val(n))`, each compiled.
@inline for_few(work::F, n::Int) where {F} =
    n == 1 ? work(Val(1)) : n == 2 ? work(Val(2)) : n == 3 ? work(Val(3)) : work(Val(4))

# Entry (i, k) of the matrix of all lanes, or of lane l.
@inline entry_of_lane(M::Matrix, l::Int, i::Int, k::Int) = @inbounds M[i, k]
@inline entry_of_lane(M::Array{<:Any, 3}, l::Int, i::Int, k::Int) = @inbounds M[l, i, k]

# Code for x = (I - D M)⁻¹ b by elimination without pivoting.
function elimination(N::Int)
    a(i, k) = Symbol(:a_, i, :_, k)
    b(i) = Symbol(:b_, i)
    x(i) = Symbol(:x_, i)
    pivot(k) = Symbol(:pivot_, k)
    code = [
        :($(a(i, k)) = multiply_add(-entry_of_lane(M, l, $i, $k), $(Symbol(:d_, i)), $(i == k ? :one : :zero)(T))) for i in 1:N for k in 1:N
    ]
    for k in 1:N
        push!(code, :($(pivot(k)) = -one(T) / $(a(k, k))))
        for i in (k + 1):N
            push!(code, :(factor = $(a(i, k)) * $(pivot(k))), :($(b(i)) = multiply_add(factor, $(b(k)), $(b(i)))))
            append!(code, [:($(a(i, j)) = multiply_add(factor, $(a(k, j)), $(a(i, j)))) for j in (k + 1):N])
        end
    end
    for k in N:-1:1             # the negative solution, by the negative inverses of the pivots
        append!(code, [:($(b(k)) = multiply_add($(a(k, j)), $(x(j)), $(b(k)))) for j in N:-1:(k + 1)])
        push!(code, :($(x(k)) = $(b(k)) * $(pivot(k))))
    end
    return Expr(:block, code..., [:($(x(k)) = -$(x(k))) for k in 1:N]...)
end

@generated function evaluate_few!(w::Lanes{T, L}, M, f::Activation, ::Val{N}) where {T, L, N}
    return quote
        (; U, Z, S, F, change2, size2) = w
        @inbounds @lanes T for l in 1:L
            @nexprs $N i -> z_i = Z[l, i]
            change = size = zero(T)
            @nexprs $N i -> begin
                s_i = U[l, i]
                @nexprs $N k -> s_i = multiply_add(entry_of_lane(M, l, i, k), z_k, s_i)
                y_i = @inline value(f, s_i)
                S[l, i], F[l, i] = s_i, y_i
                change, size = multiply_add(y_i - z_i, y_i - z_i, change), multiply_add(y_i, y_i, size)
            end
            change2[l], size2[l] = change, size
        end
    end
end

@generated function newton_step_few!(w::Lanes{T, L}, M, f::Activation, grown::Int, ::Val{N}) where {T, L, N}
    return quote
        (; Z, S, F, active) = w
        @inbounds @lanes T for l in 1:L
            @nexprs $N i -> begin
                z_i = Z[l, i]
                d_i = @inline slope(f, S[l, i], F[l, i])
                b_i = picard_i = F[l, i] - z_i
            end
            $(elimination(N))
            @nexprs $N i -> Z[l, i] = ifelse(has_bit(active, l), z_i + ifelse(has_bit(grown, l), picard_i, x_i), z_i)
        end
    end
end

@generated function adjoint_few!(w::Lanes{T, L}, M, ::Val{N}) where {T, L, N}
    return quote
        (; U, Z, D, residual2, size2) = w
        @inbounds @lanes T for l in 1:L
            @nexprs $N i -> begin
                d_i = D[l, i]
                b_i = d_i * U[l, i]
            end
            $(elimination(N))
            residual = size = zero(T)
            @nexprs $N i -> begin
                s_i = U[l, i]
                @nexprs $N k -> s_i = multiply_add(entry_of_lane(M, l, i, k), x_k, s_i)
                Z[l, i], r_i = x_i, multiply_add(d_i, s_i, -x_i)
                residual, size = multiply_add(r_i, r_i, residual), multiply_add(x_i, x_i, size)
            end
            residual2[l], size2[l] = residual, size
        end
    end
end

# --- to and from columns ----------------------------------------------------------------------------------------

# Columns to lanes; the lanes for which there is no sample repeat the last.
function load!(lanes::Matrix{T}, A, first_column::Int, count::Int) where {T}
    L = size(lanes, 1)
    @inbounds for l in 1:L
        j = first_column + min(l, count) - 1
        for i in axes(lanes, 2)
            lanes[l, i] = A[i, j]
        end
    end
    return
end

# The first lanes to columns.
function store!(A, first_column::Int, count::Int, lanes)
    for l in 1:count
        store_lane!(A, first_column + l - 1, lanes, l)
    end
    return
end

@inline function store_lane!(A, j::Int, lanes, l::Int)
    @inbounds for i in axes(lanes, 2)
        A[i, j] = lanes[l, i]
    end
    return
end

# What `record!` does for the samples of the first lanes, which have converged.
function record!(o::Outcome, first_sample::Int, count::Int, w::Lanes)
    (; iterations, residual, rate) = o
    @inbounds @simd ivdep for l in 1:count
        j = first_sample + l - 1
        iterations[j] = max(iterations[j], unsafe_trunc(Int32, w.iterations[l]))
        residual[j] = worse(Float64(w.residual[l]), residual[j])
        rate[j] = worse(Float64(w.rate[l]), rate[j])
    end
    return
end

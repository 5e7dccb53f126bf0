# Small stages: many samples side by side, one in each lane of the vector registers. Every operation of Newton's method, the
# elimination included, is then a vector operation, which no layout with one sample per column gives for a few neurons.

"Samples side by side: a vector register of the widest kind."
lane_count(::Type{T}) where {T} = 64 ÷ sizeof(T)

"""
    Lanes{T, L}(n)

The buffers for L samples of a stage of n neurons; in every array the first index is the sample.
"""
struct Lanes{T, L}
    U::Matrix{T}
    Z::Matrix{T}
    S::Matrix{T}
    F::Matrix{T}
    D::Matrix{T}
    step::Matrix{T}
    anchor::Matrix{T}              # where Picard iteration was left
    A::Array{T, 3}
    power::Array{T, 3}             # of D M
    active::Vector{T}              # 1 or 0
    failed::Vector{Bool}
    change2::Vector{T}             # ‖F - Z‖², ‖F‖²
    size2::Vector{T}
    residual2::Vector{T}           # the last ‖F - Z‖² of a lane at work, and the one before
    last2::Vector{T}
    reach::Vector{T}               # how far from the anchor the equilibrium may be
    iterations::Vector{T}
    decision::Vector{T}
    grown::Vector{T}               # 1 where the last step of Newton's method made the residual larger
end
Lanes{T, L}(n::Int) where {T, L} = Lanes{T, L}(
    (zeros(T, L, n) for _ in 1:7)..., zeros(T, L, n, n), zeros(T, L, n, n), zeros(T, L), zeros(Bool, L), (zeros(T, L) for _ in 1:8)...
)

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

lanes_of(c::Columns{T}) where {T} = buffer!(() -> Lanes{T, lane_count(T)}(size(c.U, 1)), c, Lanes{T, lane_count(T)})

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
        cold ? fill!(w.Z, 0) : load!(w.Z, c.Z, first_sample, count)
        newton_lanes!(w, p.recurrence.R, criterion, cold, evaluations)
        for l in 1:count
            j = first_sample + l - 1
            used = unsafe_trunc(Int, w.iterations[l])
            if w.failed[l] && used < c.limit
                left += 1
                copy_column!(c.U, left, c.U, j)
                copy_column!(c.Z, left, c.Z, j)
                c.sample[left], c.iterations[left] = j, used
            else
                status = w.failed[l] ? status_of_failed!(c, j, w, p, l) : CONVERGED
                store!(p.Z, j, p.latest && status === CONVERGED ? w.F : w.Z, l)
                store!(p.S, j, w.S, l)
                scale = max(sqrt(w.size2[l]), p.floor)
                record!(p.outcome, j, status, used, sqrt(w.residual2[l]) / scale, rate(w, l))
            end
        end
    end
    c.active = left
    return left == 0
end

# How the sample of a lane that would go on elsewhere ends if it has no evaluation left; column j, its own, is overwritten.
function status_of_failed!(c::Columns, j::Int, w::Lanes{T}, p::Stationary{T}, l::Int) where {T}
    isfinite(w.residual2[l]) || return NON_FINITE
    w.residual2[l] <= p.tol^2 * max(w.size2[l], p.floor^2) || return MAX_ITERATIONS
    foreach((A, B) -> store!(A, j, B, l), (c.S, c.F), (w.S, w.F))
    return repels(c, p, j) ? UNSTABLE : is_spurious(c, p, j) ? SINGULAR : CONVERGED
end

"""
    newton_lanes!(w, M, p, cold, evaluations)

The equilibria of z = f(U + M z) from Z, or from zero if `cold`: in F, or `failed`. `M` is that of all lanes or, with the lane as its first
index, one for each.
"""
function newton_lanes!(w::Lanes{T, L}, M::Array{T}, p::LaneCriterion{T}, cold::Bool, evaluations::Int) where {T, L}
    picard_steps = p.unique ? 1 : 3
    fill!(w.active, 1)
    fill!(w.failed, false)
    fill!(w.iterations, 0)
    fill!(w.residual2, T(Inf))
    fill!(w.last2, T(Inf))
    for k in 1:evaluations
        affine_lanes!(w, M, cold && k == 1)
        activate_lanes!(w, p.f)
        check_convergence!(w, p, k, picard_steps) || break
        k == evaluations && break
        if k <= picard_steps
            step_lanes!(w, w.F, Val(L), true)
            k == picard_steps && !p.unique && copyto!(w.anchor, w.Z)
        else
            slopes_lanes!(w, p.f)
            direction_lanes!(w, M)
            prefer_picard!(w)
            step_lanes!(w, w.step, Val(L), false)
        end
    end
    @inbounds for l in 1:L
        w.failed[l] |= w.active[l] > 0
    end
    p.unique || check_stability!(w, M, p, picard_steps)
    return
end

# Takes out the lanes that are done or failed after the evaluation k; returns whether any is still at work.
function check_convergence!(w::Lanes{T, L}, p::LaneCriterion{T}, k::Int, picard_steps::Int) where {T, L}
    (; active, residual2, last2, iterations, decision, grown, change2, size2) = w
    newton = k > picard_steps + 1
    tol2, floor2 = p.tol^2, p.floor^2
    settled = zero(T)
    @inbounds @simd ivdep for l in 1:L
        at_work = active[l] > 0
        now2, before2 = change2[l], residual2[l]
        done = now2 <= tol2 * max(size2[l], floor2)
        grows = newton & (now2 > before2)
        grown[l] = ifelse(grows, one(T), zero(T))
        broken = !(now2 < T(Inf)) | (grows & !p.unique)
        last2[l] = ifelse(at_work, before2, last2[l])
        residual2[l] = ifelse(at_work, now2, before2)
        iterations[l] = ifelse(at_work, T(k), iterations[l])
        decision[l] = ifelse(at_work, ifelse(broken, T(FAILED), ifelse(done, T(DONE), zero(T))), zero(T))
        settled += decision[l]
    end
    p.unique || k != picard_steps || reach!(w)
    if settled > 0
        @inbounds @simd ivdep for l in 1:L
            active[l] = ifelse(decision[l] > 0, zero(T), active[l])
            w.failed[l] |= decision[l] == T(FAILED)
        end
        # Without a guarantee, a start that happens to be an equilibrium may be one that repels.
        p.unique || @inbounds for l in 1:L
            w.failed[l] |= decision[l] == DONE &&
                (k == 1 || size2[l] > T(SUSPICIOUS_SIZE)^2 || k > picard_steps && distance2(w, l) > w.reach[l]^2)
        end
    end
    return any_above_zero(active)
end

"Squarings of D M after which eigenvalues are cheaper: powers of a matrix have norms below 1 where its spectral radius is."
const SQUARINGS = 4

# Newton's method may end at an equilibrium that repels, which is left to the general method.
function check_stability!(w::Lanes{T, L}, M::Array{T}, p::LaneCriterion{T}, picard_steps::Int) where {T, L}
    (; active, failed, iterations) = w
    @inbounds for l in 1:L
        active[l] = ifelse(failed[l] | (iterations[l] <= picard_steps), zero(T), one(T))
    end
    any_above_zero(active) || return
    slopes_lanes!(w, p.f)
    power, next = jacobian_lanes!(w.power, w.D, M, Val(L)), w.A
    for k in 0:SQUARINGS
        k == 0 || ((power, next) = (square_lanes!(next, power, Val(L)), power))
        drop_contractions!(w, power)
        any_above_zero(active) || return
    end
    for l in 1:L
        active[l] > 0 || continue
        failed[l] = !((@late spectral_radius(matrix_of(M, l), w.D[l, :]))::T < 1)
    end
    return
end

matrix_of(M::Matrix, l::Int) = M
matrix_of(M::Array{<:Any, 3}, l::Int) = M[l, :, :]

# D M
function jacobian_lanes!(J::Array{T, 3}, D, M, lanes) where {T}
    n, zero_lanes = size(J, 2), same_in_all(zero(T), lanes)
    GC.@preserve J D M for k in 1:n, i in 1:n
        put_vector!(J, (k - 1) * n + i, muladd_lanes(matrix_entry(M, i, k, lanes), vector(D, i, lanes), zero_lanes))
    end
    return J
end

# P = A A. Two columns at a time: what they are sums of is read half as often.
function square_lanes!(P::Array{T, 3}, A::Array{T, 3}, lanes) where {T}
    n, zero_lanes = size(A, 2), same_in_all(zero(T), lanes)
    GC.@preserve P A for j in 1:2:n, i in 1:n
        next = min(j + 1, n)
        sum, sum_of_next = zero_lanes, zero_lanes
        for k in 1:n
            a = vector(A, (k - 1) * n + i, lanes)
            sum = muladd_lanes(a, vector(A, (j - 1) * n + k, lanes), sum)
            sum_of_next = muladd_lanes(a, vector(A, (next - 1) * n + k, lanes), sum_of_next)
        end
        put_vector!(P, (j - 1) * n + i, sum)
        put_vector!(P, (next - 1) * n + i, sum_of_next)
    end
    return P
end

# Lanes whose matrix has a norm below 1, that of Frobenius or the largest sum of a column, are active no more.
function drop_contractions!(w::Lanes{T}, A::Array{T, 3}) where {T}
    (; active, decision, change2, grown) = w
    largest, squares, sum = fill!(decision, 0), fill!(grown, 0), change2
    @inbounds for j in axes(A, 3)
        fill!(sum, 0)
        for i in axes(A, 2)
            @simd ivdep for l in eachindex(sum)
                sum[l] += abs(A[l, i, j])
                squares[l] = muladd(A[l, i, j], A[l, i, j], squares[l])
            end
        end
        @simd ivdep for l in eachindex(sum)
            largest[l] = ifelse(sum[l] <= largest[l], largest[l], sum[l])      # NaN, too
        end
    end
    @inbounds for l in eachindex(active)
        active[l] = ifelse((largest[l] < 1) | (squares[l] < 1), zero(T), active[l])
    end
    return
end

# Of numbers that are not below zero; faster than `any`, which stops at the first.
@inline function any_above_zero(x::Vector)
    sum = zero(eltype(x))
    @inbounds @simd for l in eachindex(x)
        sum += x[l]
    end
    return sum > 0
end

const DONE, FAILED = 1, 2

# Where Newton's method has overshot, the next step is Picard's, which contracts if there is but one equilibrium.
function prefer_picard!(w::Lanes)
    any_above_zero(w.grown) || return
    @inbounds for i in axes(w.Z, 2)
        @simd ivdep for l in eachindex(w.grown)
            w.step[l, i] = ifelse(w.grown[l] > 0, w.F[l, i] - w.Z[l, i], w.step[l, i])
        end
    end
    return
end

# The quotient of the last two residuals of a lane.
rate(w::Lanes, l::Int) = @inbounds isfinite(w.last2[l]) ? sqrt(w.residual2[l] / w.last2[l]) : zero(w.last2[l])

function reach!(w::Lanes{T, L}) where {T, L}
    @inbounds for l in 1:L
        q = rate(w, l)
        w.reach[l] = trust_radius(sqrt(w.residual2[l]), q)
        w.active[l] > 0 && w.decision[l] == 0 && !contracts(q) && (w.decision[l] = w.active[l] = 0; w.failed[l] = true)
    end
    return
end

function distance2(w::Lanes{T}, l::Int) where {T}
    total = zero(T)
    @inbounds for i in axes(w.Z, 2)
        total += (w.Z[l, i] - w.anchor[l, i])^2
    end
    return total
end

# --- vector arithmetic ------------------------------------------------------------------------------------------

# The k-th vector of an array whose first index is the lane; the caller keeps the array alive.
@inline vector(A::Array{T}, k::Int, ::Val{L}) where {T, L} = unsafe_load(Ptr{LaneVector{L, T}}(pointer(A)), k)
@inline put_vector!(A::Array{T}, k::Int, v::LaneVector{L, T}) where {T, L} =
    unsafe_store!(Ptr{LaneVector{L, T}}(pointer(A)), v, k)
@inline negative_inverse(v::LaneVector) = map(x -> VecElement(-inv(x.value)), v)

# Entry (i, k) of the matrix of all lanes, or of each.
@inline matrix_entry(M::Matrix, i::Int, k::Int, lanes) = same_in_all(@inbounds(M[i, k]), lanes)
@inline matrix_entry(M::Array{T, 3}, i::Int, k::Int, lanes) where {T} = vector(M, (k - 1) * size(M, 2) + i, lanes)

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
    fill!(w.change2, 0)
    fill!(w.size2, 0)
    foreach(piece -> activate_lane_rows!(w, piece[2], piece[1]), pieces(f, size(w.S, 2)))
    return
end
function activate_lane_rows!(w::Lanes{T, L}, f::Activation, rows) where {T, L}
    @inbounds for i in rows
        @simd ivdep for l in 1:L
            z = value(f, w.S[l, i])
            w.F[l, i] = z
            d = z - w.Z[l, i]
            w.change2[l] = muladd(d, d, w.change2[l])
            w.size2[l] = muladd(z, z, w.size2[l])
        end
    end
    return
end

# Z ← X or Z + X where a lane is active
function step_lanes!(w::Lanes{T}, X, ::Val{L}, replace::Bool) where {T, L}
    @inbounds for i in axes(X, 2)
        @simd ivdep for l in 1:L
            z = w.Z[l, i]
            w.Z[l, i] = ifelse(w.active[l] > 0, replace ? X[l, i] : z + X[l, i], z)
        end
    end
    return
end

# D = f′(S) and step = F - Z
function slopes_lanes!(w::Lanes{T, L}, f::Activation) where {T, L}
    foreach(pieces(f, size(w.S, 2))) do (rows, g)
        @inbounds for i in rows
            @simd ivdep for l in 1:L
                w.D[l, i] = slope(g, w.S[l, i], w.F[l, i])
                w.step[l, i] = w.F[l, i] - w.Z[l, i]
            end
        end
    end
    return
end

# step ← (I - D M)⁻¹ step by elimination without pivoting; the residual afterwards tells where that was not good enough.
function direction_lanes!(w::Lanes{T, L}, M::Array{T}) where {T, L}
    n, lanes = size(w.Z, 2), Val(L)
    zero_lanes = same_in_all(zero(T), lanes)
    (; A, D, step) = w
    GC.@preserve A D step M begin
        for j in 1:n, i in 1:n
            m = map(x -> VecElement(-x.value), matrix_entry(M, i, j, lanes))
            put_vector!(A, (j - 1) * n + i, muladd_lanes(m, vector(D, i, lanes), same_in_all(T(i == j), lanes)))
        end
        # Two columns at a time: what is left of the matrix is read and written half as often.
        for k in 1:2:n
            eliminate_lanes!(A, step, n, k, lanes)
            k == n && break
            subtract_lanes!(A, n, k, k + 1, lanes)
            eliminate_lanes!(A, step, n, k + 1, lanes)
            for j in (k + 2):n
                subtract_two_lanes!(A, n, k, j, lanes)
            end
        end
        for k in n:-1:1
            column = (k - 1) * n
            negative = muladd_lanes(vector(step, k, lanes), vector(A, column + k, lanes), zero_lanes)
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

# Column k of A becomes -1 / pivot and, below it, the factors by which row k is added to the rows below; they act on `step`.
@inline function eliminate_lanes!(A::Array{T}, step, n::Int, k::Int, lanes) where {T}
    column = (k - 1) * n
    pivot = negative_inverse(vector(A, column + k, lanes))
    put_vector!(A, column + k, pivot)
    right, zero_lanes = vector(step, k, lanes), same_in_all(zero(T), lanes)
    for i in (k + 1):n
        factor = muladd_lanes(vector(A, column + i, lanes), pivot, zero_lanes)
        put_vector!(A, column + i, factor)
        put_vector!(step, i, muladd_lanes(factor, right, vector(step, i, lanes)))
    end
    return
end

# The factors in column k act on column j.
@inline function subtract_lanes!(A, n::Int, k::Int, j::Int, lanes)
    column, target = (k - 1) * n, (j - 1) * n
    top = vector(A, target + k, lanes)
    for i in (k + 1):n
        put_vector!(A, target + i, muladd_lanes(vector(A, column + i, lanes), top, vector(A, target + i, lanes)))
    end
    return
end

# Those in the columns k and k + 1 act on column j.
@inline function subtract_two_lanes!(A, n::Int, k::Int, j::Int, lanes)
    first_column, second_column, target = (k - 1) * n, k * n, (j - 1) * n
    first_top = vector(A, target + k, lanes)
    second_top = muladd_lanes(vector(A, first_column + k + 1, lanes), first_top, vector(A, target + k + 1, lanes))
    put_vector!(A, target + k + 1, second_top)
    for i in (k + 2):n
        entry = muladd_lanes(vector(A, first_column + i, lanes), first_top, vector(A, target + i, lanes))
        put_vector!(A, target + i, muladd_lanes(vector(A, second_column + i, lanes), second_top, entry))
    end
    return
end

"""
    solve_adjoint_lanes!(w, c, p)

Solve the adjoint systems of the columns of `c` by elimination. The columns that remain active are those for which that was not
exact enough.
"""
function solve_adjoint_lanes!(w::Lanes{T, L}, c::Columns{T}, p::AdjointSystem{T}) where {T, L}
    samples, D = c.active, c.coefficients
    left = 0
    for first_sample in 1:L:samples
        check_interrupt()
        count = min(L, samples - first_sample + 1)
        load!(w.U, c.U, first_sample, count)
        load!(w.D, D, first_sample, count)
        adjoint_lanes!(w, p.M::Matrix{T})
        for l in 1:count
            j = first_sample + l - 1
            residual, scale = adjoint_residual(w, l, p.floor)
            if residual <= adjoint_tolerance(p.tol) * scale
                store!(p.Z, j, w.Z, l)
                record!(p.outcome, j, CONVERGED, 1, residual / scale, zero(T))
            else
                left += 1
                copy_column!(c.U, left, c.U, j)
                copy_column!(D, left, D, j)
                c.sample[left] = j
            end
        end
    end
    c.active = left
    return left == 0
end

"Z = D λ with (I - M D) λ = U."
function adjoint_lanes!(w::Lanes{T, L}, M::Array{T}) where {T, L}
    multiply_lanes!(w.step, w.D, w.U, Val(L))
    direction_lanes!(w, M)
    copyto!(w.Z, w.step)
    affine_lanes!(w, M, false)
    return residual_lanes!(w)
end

# Of a lane after `adjoint_lanes!`: the residual, and what it is related to.
@inline adjoint_residual(w::Lanes, l::Int, floor) = @inbounds sqrt(w.change2[l]), max(sqrt(w.size2[l]), floor)

# Elimination does not come nearer.
adjoint_tolerance(tol::T) where {T} = max(tol, 100 * eps(T))

function multiply_lanes!(X::Matrix{T}, A, B, ::Val{L}) where {T, L}
    @inbounds for i in axes(X, 2)
        @simd ivdep for l in 1:L
            X[l, i] = A[l, i] * B[l, i]
        end
    end
    return
end

# ‖D S - Z‖² and ‖Z‖²
function residual_lanes!(w::Lanes{T, L}) where {T, L}
    fill!(w.change2, 0)
    fill!(w.size2, 0)
    @inbounds for i in axes(w.Z, 2)
        @simd ivdep for l in 1:L
            z = w.Z[l, i]
            d = muladd(w.D[l, i], w.S[l, i], -z)
            w.change2[l] = muladd(d, d, w.change2[l])
            w.size2[l] = muladd(z, z, w.size2[l])
        end
    end
    return
end

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

function store!(A, j::Int, lanes, l::Int)
    @inbounds for i in axes(lanes, 2)
        A[i, j] = lanes[l, i]
    end
    return
end

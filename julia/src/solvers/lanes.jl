# Small stages: many samples side by side, one in each lane of the vector registers. Every operation of Newton's method, the
# elimination included, is then a vector operation, which no layout with one sample per column gives for a few neurons.

"Stages of up to so many neurons are solved side by side."
const LANE_NEURONS = 16

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
    active::Vector{T}              # 1 or 0
    lost::Vector{Bool}
    change2::Vector{T}             # ‖F - Z‖², ‖F‖²
    size2::Vector{T}
    residual::Vector{T}
    rate::Vector{T}
    reach::Vector{T}               # how far from the anchor the equilibrium may be
    iterations::Vector{Int}
end
function Lanes{T}(n::Int) where {T}
    L = lane_count(T)
    return Lanes{T, L}(
        (zeros(T, L, n) for _ in 1:7)..., zeros(T, L, n, n), zeros(T, L), zeros(Bool, L), (zeros(T, L) for _ in 1:5)..., zeros(Int, L)
    )
end

lanes!(c::Columns{T}) where {T} =
    (c.lanes === nothing && (c.lanes = Lanes{T}(size(c.U, 1))); c.lanes::Lanes{T, lane_count(T)})

"Evaluations before a lane is given to the general solver."
const LANE_ITERATIONS = 12

"""
    solve_lanes!(w, c, p, samples)

Solve the equation `p` for the samples whose drive and start are in the columns of `c`: a Picard step or three, then Newton's
method. The columns that remain active in `c` are of the samples for which that did not do: whose residual grew or
whose equilibrium may not be the one that attracts. What happens to a sample does not depend on the others.
"""
function solve_lanes!(w::Lanes{T, L}, c::Columns{T}, p::Stationary{T}, samples::Int) where {T, L}
    cold = c.cold
    left = 0
    for first_sample in 1:L:samples
        count = min(L, samples - first_sample + 1)
        load!(w.U, c.U, first_sample, count)
        cold ? fill!(w.Z, 0) : load!(w.Z, c.Z, first_sample, count)
        newton_lanes!(w, p, cold)
        for l in 1:count
            j = first_sample + l - 1
            if w.lost[l]
                left += 1
                copy_column!(c.U, left, c.U, j)
                copy_column!(c.Z, left, c.Z, j)
                c.sample[left] = j
            else
                store!(p.Z, j, w.Z, l)
                store!(p.S, j, w.S, l)
                scale = max(sqrt(w.size2[l]), p.floor)
                record!(p.outcome, j, CONVERGED, w.iterations[l], w.residual[l] / scale, w.rate[l])
            end
        end
    end
    c.active = left
    return left == 0
end

function newton_lanes!(w::Lanes{T, L}, p::Stationary{T}, cold::Bool) where {T, L}
    picard_steps = p.unique ? 1 : 3
    fill!(w.active, 1)
    fill!(w.lost, false)
    fill!(w.iterations, 0)
    fill!(w.residual, T(Inf))
    fill!(w.reach, T(Inf))
    for k in 1:LANE_ITERATIONS
        affine_lanes!(w, p.M, cold && k == 1)
        activate_lanes!(w, p.f)
        judge!(w, p, k, picard_steps) == 0 && return
        if k <= picard_steps
            step_lanes!(w, w.F, Val(L), true)
            k == picard_steps && !p.unique && copyto!(w.anchor, w.Z)
        else
            slopes_lanes!(w, p.f)
            direction_lanes!(w, p.M)
            step_lanes!(w, w.step, Val(L), false)
        end
    end
    @inbounds for l in 1:L
        w.lost[l] |= w.active[l] > 0
    end
    return
end

# How each lane stands after the evaluation k; returns the number of those still at work.
function judge!(w::Lanes{T, L}, p::Stationary{T}, k::Int, picard_steps::Int) where {T, L}
    working = 0
    @inbounds for l in 1:L
        w.active[l] > 0 || continue
        residual, last_residual = sqrt(w.change2[l]), w.residual[l]
        w.iterations[l] = k
        rate = k > 1 ? residual / last_residual : zero(T)
        w.rate[l] = rate
        w.residual[l] = residual
        if k == picard_steps && !p.unique
            # The equilibrium that attracts this iterate is within r / (1 - q), with some room for q to change.
            w.reach[l] = 3 * residual / (1 - min(rate, T(0.9)))
            w.lost[l] = !(rate < T(0.8))
        end
        w.lost[l] |= !isfinite(residual) || (k > picard_steps + 1 && rate > 1)
        done = residual <= p.tol * max(sqrt(w.size2[l]), p.floor)
        if done && !w.lost[l] && isfinite(w.reach[l]) && k > picard_steps
            w.lost[l] = distance2(w, l) > w.reach[l]^2
        end
        # Without a guarantee, a start that happens to be an equilibrium may be one that repels.
        done && k == 1 && !p.unique && (w.lost[l] = true)
        done || w.lost[l] ? (w.active[l] = 0) : (working += 1)
    end
    return working
end

function distance2(w::Lanes{T}, l::Int) where {T}
    total = zero(T)
    @inbounds for i in axes(w.Z, 2)
        total += (w.Z[l, i] - w.anchor[l, i])^2
    end
    return total
end

# S = U + M Z
function affine_lanes!(w::Lanes{T, L}, M::Matrix{T}, cold::Bool) where {T, L}
    n = size(M, 1)
    @inbounds for i in 1:n
        @simd ivdep for l in 1:L
            w.S[l, i] = w.U[l, i]
        end
        cold && continue
        for k in 1:n
            m = M[i, k]
            @simd ivdep for l in 1:L
                w.S[l, i] = muladd(m, w.Z[l, k], w.S[l, i])
            end
        end
    end
    return
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
function direction_lanes!(w::Lanes{T, L}, M::Matrix{T}) where {T, L}
    n = size(M, 1)
    A, x = w.A, w.step
    @inbounds for j in 1:n, i in 1:n
        m, one_here = M[i, j], T(i == j)
        @simd ivdep for l in 1:L
            A[l, i, j] = muladd(-m, w.D[l, i], one_here)
        end
    end
    @inbounds for k in 1:n
        @simd ivdep for l in 1:L
            A[l, k, k] = inv(A[l, k, k])
        end
        for i in (k + 1):n
            @simd ivdep for l in 1:L
                A[l, i, k] *= A[l, k, k]
                x[l, i] = muladd(-A[l, i, k], x[l, k], x[l, i])
            end
        end
        for j in (k + 1):n, i in (k + 1):n
            @simd ivdep for l in 1:L
                A[l, i, j] = muladd(-A[l, i, k], A[l, k, j], A[l, i, j])
            end
        end
    end
    @inbounds for k in n:-1:1
        @simd ivdep for l in 1:L
            x[l, k] *= A[l, k, k]
        end
        for i in 1:(k - 1)
            @simd ivdep for l in 1:L
                x[l, i] = muladd(-A[l, i, k], x[l, k], x[l, i])
            end
        end
    end
    return
end

"""
    solve_adjoint_lanes!(w, c, p)

Solve the adjoint systems of the columns of `c` by elimination. The columns that remain active are those for which that was not
exact enough.
"""
function solve_adjoint_lanes!(w::Lanes{T, L}, c::Columns{T}, p::AdjointSystem{T}) where {T, L}
    samples, D = c.active, c.extra[1]
    left = 0
    for first_sample in 1:L:samples
        count = min(L, samples - first_sample + 1)
        load!(w.U, c.U, first_sample, count)
        load!(w.D, D, first_sample, count)
        multiply_lanes!(w.step, w.D, w.U, Val(L))
        direction_lanes!(w, p.M)
        copyto!(w.Z, w.step)
        affine_lanes!(w, p.M, false)
        residual_lanes!(w)
        for l in 1:count
            j = first_sample + l - 1
            residual, scale = sqrt(w.change2[l]), max(sqrt(w.size2[l]), p.floor)
            if residual <= max(p.tol, 100 * eps(T)) * scale
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

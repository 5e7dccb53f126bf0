# Newton's method on the columns of an equation, with its linear systems solved by coarse products: only evaluations of the equation
# itself, which decide convergence, take products in full precision.

"The largest number of corrections, and the factor by which each must reduce the residual for another one to follow."
const COARSE_PASSES, COARSE_GAIN = 8, 0.8

"Above this relative residual, the linearisation error exceeds the round-off of coarse products."
const ROUGH = 2.0^-2

"The largest number of evaluations of all corrections together."
const COARSE_EVALUATIONS = 16

"Where Picard's step led to before a correction, and the residual there."
struct CorrectionState{T} <: SolverState
    Z::Matrix{T}
    residual::Vector{T}
end

correction_state(c::Columns{T}) where {T} = buffer!(() -> CorrectionState{T}(zero(c.Z), zeros(T, size(c.Z, 2))), c, CorrectionState{T})
corrections_of(c::Columns, p::FixedPoint) = buffer!(() -> @late(Corrections(coarse_factor(p), size(c.Z)...)), c, Corrections)

"""
    step_coarsely!(c, p)

A step of Picard iteration by a coarse product: Z ← F, S ← S + M (F - Z).
"""
function step_coarsely!(c::Columns, p::FixedPoint)
    q = corrections_of(c, p)
    foreach(j -> take_residual!(q, c, j), 1:c.active)
    @late solve_corrections!(q, coarse_factor(p), q.buffers, c.active, Inf32, p.threads)
    for j in 1:c.active
        add_change!(c, q, j, c.residual[j])
        copy_column!(c.Z, j, c.F, j)
    end
    return evaluate_coarsely!(c, p)
end

"""
    iterate_coarsely!(c, p)

Correct the iterates of the active columns, which have been evaluated, as long as that reduces their residuals; true when all are done.
Those left go on from their Z. Without a guarantee of uniqueness a correction is taken only if it leads no farther than the residual
and the rate of the iteration before say.
"""
function iterate_coarsely!(c::Columns{T}, p::FixedPoint{T}) where {T}
    aside, A, q, state = length(c.deferred), coarse_factor(p), corrections_of(c, p), correction_state(c)
    c.state, least = state, accuracy_of(A)::Float32
    for _ in 1:COARSE_PASSES
        c.active == 0 && break
        slopes!(q.slopes, c, p)
        residual = maximum(j -> begin_correction!(q, c, p, state, j), 1:c.active)
        neglected = is_linear(p) ? zero(T) : residual
        accuracy = clamp(Float32(max(neglected, p.tol / (2 * residual))), least, 0.25f0)
        @late solve_corrections!(q, A, q.buffers, c.active, accuracy, p.threads)
        foreach(j -> correct!(c, p, q, j), 1:c.active)
        neglected > ROUGH ? evaluate_coarsely!(c, p) : evaluate_all!(c, p; rescue = true)
        for j in c.active:-1:1
            c.residual[j] <= T(COARSE_GAIN) * state.residual[j] && continue
            if !(c.residual[j] < state.residual[j])
                copy_column!(c.F, j, state.Z, j)
                c.residual[j] = state.residual[j]
            end
            copy_column!(c.Z, j, c.F, j)
            defer!(c, j)
        end
    end
    advance!(c, one(T))
    c.state = nothing
    return reclaim!(c, aside) == 0
end

# The relative residual of column j is returned; one that is NaN is no concern of the others.
function begin_correction!(q::Corrections, c::Columns{T}, p::FixedPoint{T}, state::CorrectionState{T}, j::Int) where {T}
    copy_column!(state.Z, j, c.F, j)
    state.residual[j] = c.residual[j]
    relative = c.residual[j] / max(take_residual!(q, c, j), p.floor)
    return ifelse(isnan(relative), zero(T), relative)
end

# The residual of column j, made to have norm 1, or zero where it has none; returns ‖F‖. Rows beyond the neurons are zero.
function take_residual!(q::Corrections, c::Columns{T}, j::Int) where {T}
    residual, size2 = c.residual[j], zero(T)
    usual = floatmin(T) <= residual < T(Inf)
    inverse = usual ? inv(residual) : zero(T)
    @inbounds @vectors for i in axes(c.F, 1)
        z = c.F[i, j]
        q.residuals[i, j] = ifelse(usual, inverse * (z - c.Z[i, j]), zero(T))
        size2 = muladd(z, z, size2)
    end
    fill!(view(q.residuals, (size(c.F, 1) + 1):size(q.residuals, 1), j), 0)
    return sqrt(size2)
end

# Z ← Z + δ, S ← S + M δ
function correct!(c::Columns{T}, p::FixedPoint{T}, q::Corrections, j::Int) where {T}
    residual, size2 = c.residual[j], zero(T)
    radius = min(T(FARTHEST) * residual, trust_radius(p, c, j))
    c.residual[j] = Inf            # the next is no step of this iteration, and has no rate
    @inbounds @vectors for i in axes(c.Z, 1)
        δ = residual * q.residuals[i, j]
        size2 = muladd(δ, δ, size2)
    end
    sqrt(size2) <= radius || return
    @inbounds @vectors for i in axes(c.Z, 1)
        c.Z[i, j] = muladd(residual, q.residuals[i, j], c.Z[i, j])
    end
    return add_change!(c, q, j, residual)
end

function add_change!(c::Columns{T}, q::Corrections, j::Int, residual::T) where {T}
    @inbounds @vectors for i in axes(c.S, 1)
        c.S[i, j] = muladd(residual, q.changes[i, j], c.S[i, j])
    end
    return
end

# F = f(S) for an S by coarse products, which settles nothing.
evaluate_coarsely!(c::Columns, p::FixedPoint) = foreach(j -> evaluate!(c, p, j), 1:c.active)

"The length of a correction, relative to the residual, above which it is not an improvement."
const FARTHEST = 1.0e3

slopes!(D::Matrix{Float32}, c::Columns, p::Stationary) = slopes!(view(D, :, 1:c.active), p.f, c.S, c.F)
is_linear(::Stationary) = false
coarse_factor(p::Stationary) = p.recurrence.coarse_factors[1]

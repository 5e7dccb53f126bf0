# Newton's method with a line search.

"""
    Newton(; tol = nothing, max_iterations = 100)

Newton's method on `r(z) = f(u + R z) - z`, `z ← z + t (I - D R)⁻¹ r` with one LU factorisation per sample and iteration.
The step t is halved while ‖r‖ does not decrease; where six halvings do not help, a Picard step is taken. Without a
uniqueness guarantee (`Free`) the equilibrium found may be one that no iteration would stay at: it is then reported as
`UNSTABLE`. Where I - D R is singular, the direction is that of the Picard step; a sample whose iterations end at such a place
is `SINGULAR`.
"""
struct Newton <: Solver
    tol::Union{Nothing, Float64}
    max_iterations::Int
    function Newton(; tol = nothing, max_iterations = 100)
        check_options(tol, max_iterations)
        return new(tol, max_iterations)
    end
end

"The smallest part of a Newton step that is tried on a fixed point, for which a Picard step follows."
const SMALLEST_STEP = 2.0^-6

"Whether the part `t` of a Newton step has reduced the norm of the residual as far as could be asked of it (Armijo's rule)."
@inline decreases(norm::N, before::N, t) where {N} = norm < (1 - N(1.0e-4) * t) * before

"""
    NewtonState{T}(n, width)

The line search of each sample: its `base`, with the Picard step from there (`picard` = f(base)) and the `residual`, the
`direction`, and the length of the step under way (0 where the iterate is taken as it is).
"""
struct NewtonState{T} <: SolverState
    base::Matrix{T}
    picard::Matrix{T}
    direction::Matrix{T}
    step::Vector{T}
    residual::Vector{T}
end
NewtonState{T}(n::Int, width::Int) where {T} =
    NewtonState{T}((zeros(T, n, width) for _ in 1:3)..., zeros(T, width), zeros(T, width))

"A factorisation, and the slopes that it is made of."
struct FactorBuffers{T}
    A::Matrix{T}
    pivots::Vector{Int}
    slopes::Matrix{T}
end
FactorBuffers{T}(n::Int) where {T} = FactorBuffers{T}(zeros(T, n, n), zeros(Int, n), zeros(T, n, 1))

function iterate!(::Newton, c::Columns{T}, p::Stationary{T}, iterations::Int) where {T}
    n, width = size(c.Z)
    state = buffer!(() -> NewtonState{T}(n, width), c, NewtonState{T})
    fill!(view(state.step, 1:c.active), 0)
    fill!(view(state.residual, 1:c.active), T(Inf))
    c.state = state
    done = search_lines!(state, buffer!(() -> FactorBuffers{T}(n), c, FactorBuffers{T}), c, p, iterations)
    c.state = nothing
    return done
end

function search_lines!(state::NewtonState{T}, buffers, c::Columns{T}, p::Stationary{T}, iterations::Int) where {T}
    for _ in 1:iterations
        evaluate_all!(c, p; check = true) && return true
        for j in 1:c.active
            t, residual = state.step[j], c.residual[j]
            if t > 0 && !decreases(residual, state.residual[j], t)
                t /= 2
                if t < SMALLEST_STEP
                    t = zero(T)
                    copy_column!(c.Z, j, state.picard, j)
                else
                    step_from_base!(c, state, j, t)
                end
                c.residual[j] = state.residual[j]
            else
                t = one(T)
                state.residual[j] = residual
                copy_column!(state.base, j, c.Z, j)
                copy_column!(state.picard, j, c.F, j)
                newton_direction!(view(state.direction, :, j), buffers, c, p, j)
                step_from_base!(c, state, j, t)
            end
            state.step[j] = t
        end
    end
    return false
end

@inline function step_from_base!(c::Columns{T}, state::NewtonState{T}, j::Int, t::T) where {T}
    @inbounds @simd for i in axes(c.Z, 1)
        c.Z[i, j] = muladd(t, state.direction[i, j], state.base[i, j])
    end
    return
end

# direction = (I - D R)⁻¹ (F - Z) for column j; the Picard step F - Z where the matrix is singular.
function newton_direction!(direction, buffers::FactorBuffers, c::Columns, p::Stationary, j::Int)
    check_interrupt()
    @inbounds @simd for i in eachindex(direction)
        direction[i] = c.F[i, j] - c.Z[i, j]
    end
    if p.factors === nothing
        solved = factorize!(buffers.A, buffers.pivots, buffers.slopes, c, p, j) && lu_solve_finite!(direction, buffers.A, buffers.pivots)
    else
        sample = c.sample[j]
        A, pivots = view(p.factors.LU, :, :, sample), view(p.factors.pivots, :, sample)
        solved = factorize!(A, pivots, buffers.slopes, c, p, j) && lu_solve_finite!(direction, A, pivots)
        p.factors.known[sample] = solved
    end
    if !solved
        @inbounds @simd for i in eachindex(direction)
            direction[i] = c.F[i, j] - c.Z[i, j]
        end
    end
    return
end

lu_solve_finite!(x, A, pivots) = all(isfinite, lu_solve!(x, A, pivots))

# A = I - D R for column j, factorised; false where A is singular to rounding, of which `c.singular` is told.
function factorize!(A::StridedMatrix{T}, pivots, slopes, c::Columns{T}, p::Stationary{T}, j::Int) where {T}
    slopes!(slopes, p.f, view(c.S, :, j:j), view(c.F, :, j:j))
    residual_jacobian!(A, view(slopes, :, 1), p.recurrence.R)
    c.singular[j] = !lu_factor!(A, pivots) || is_singular(A)
    return !c.singular[j]
end

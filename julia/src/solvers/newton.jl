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

const SMALLEST_STEP = 2.0^-6

function iterate!(::Newton, c::Columns{T}, p::Stationary{T}, iterations::Int) where {T}
    n = size(c.F, 1)
    base, direction, picard = extra!(c, 3, n, own_extra(p) + 1)
    A, pivots = Matrix{T}(undef, n, n), zeros(Int, n)
    d, step = zeros(T, n, 1), zeros(T, n)
    kept = c.factors
    for j in 1:c.active
        c.scalars[1, j] = 0               # step length; 0: the iterate is accepted as it is
        c.scalars[2, j] = Inf             # residual at the base of the step
    end
    for _ in 1:iterations
        evaluate_all!(c, p; check = true) && return true
        for j in 1:c.active
            t, residual = c.scalars[1, j], c.residual[j]
            if t > 0 && !(residual < (1 - T(1.0e-4) * t) * c.scalars[2, j])
                t /= 2
                if t < SMALLEST_STEP
                    c.scalars[1, j] = 0
                    copy_column!(c.Z, j, picard, j)
                else
                    c.scalars[1, j] = t
                    @inbounds @simd for i in 1:n
                        c.Z[i, j] = muladd(t, direction[i, j], base[i, j])
                    end
                end
                c.residual[j] = c.scalars[2, j]
                continue
            end
            if kept === nothing
                newton_direction!(step, A, pivots, d, c, p, j)
            else
                sample = c.sample[j]
                kept.known[sample] =
                    newton_direction!(step, view(kept.LU, :, :, sample), view(kept.pivots, :, sample), d, c, p, j)
            end
            c.scalars[1, j] = 1
            c.scalars[2, j] = residual
            @inbounds @simd for i in 1:n
                base[i, j] = c.Z[i, j]
                direction[i, j] = step[i]
                picard[i, j] = c.F[i, j]
                c.Z[i, j] += step[i]
            end
        end
    end
    return false
end

# A = I - D R for column j, factorised; false where that is not possible. `c.singular` is told whether A is singular to rounding.
function factorize!(A::StridedMatrix{T}, pivots, d, c::Columns{T}, p::Stationary{T}, j::Int) where {T}
    slopes!(d, p.f, view(c.S, :, j:j), view(c.F, :, j:j))
    residual_jacobian!(A, view(d, :, 1), p.recurrence.R)
    factorized = lu_factor!(A, pivots)
    c.singular[j] = !factorized || is_singular(A)
    return factorized
end

# step = (I - D R)⁻¹ (F - Z) for column j; the Picard step F - Z where the matrix is singular, and then false.
function newton_direction!(step, A, pivots, d, c::Columns, p::Stationary, j::Int)
    check_interrupt()
    n = size(A, 1)
    @inbounds @simd for i in 1:n
        step[i] = c.F[i, j] - c.Z[i, j]
    end
    if factorize!(A, pivots, d, c, p, j)
        lu_solve!(step, A, pivots)
        all(isfinite, step) && return true
        @inbounds @simd for i in 1:n
            step[i] = c.F[i, j] - c.Z[i, j]
        end
    end
    return false
end

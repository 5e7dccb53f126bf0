# Newton's method with a line search, and the chord method that shares one factorisation among samples.

"""
    Newton(; tol = nothing, max_iterations = 100)

Newton's method on `r(z) = f(u + R z) - z`, `z ← z + t (I - D R)⁻¹ r` with one LU factorisation per sample and iteration.
The step t is halved while ‖r‖ does not decrease; where six halvings do not help, a Picard step is taken. Without a
uniqueness guarantee (`Free`) the equilibrium found may be one that no iteration would stay at: it is then reported as
`UNSTABLE`.
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
            newton_direction!(step, A, pivots, d, c, p, j)
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

# step = (I - D R)⁻¹ (F - Z) for column j; the Picard step F - Z where the matrix is singular.
function newton_direction!(step, A, pivots, d, c::Columns, p::Stationary, j::Int)
    n = size(A, 1)
    slopes!(d, p.f, view(c.S, :, j:j), view(c.F, :, j:j))
    residual_jacobian!(A, view(d, :, 1), p.R)
    @inbounds @simd for i in 1:n
        step[i] = c.F[i, j] - c.Z[i, j]
    end
    if lu_factor!(A, pivots)
        lu_solve!(step, A, pivots)
        all(isfinite, step) && return
        @inbounds @simd for i in 1:n
            step[i] = c.F[i, j] - c.Z[i, j]
        end
    end
    return
end

"""
    Chord(; tol = nothing, max_iterations = 200)

Newton's method with one matrix for all samples of a tile, `z ← z + (I - D̄ R)⁻¹ r` with D̄ the mean of f′ over the samples
still at work, renewed at the iterations 1, 2, 4, 8, …: two matrix products an iteration and no factorisation per sample.
A sample whose residual grows takes a Picard step. The iterates of a sample depend on its tile, its equilibrium does not.
"""
struct Chord <: Solver
    tol::Union{Nothing, Float64}
    max_iterations::Int
    function Chord(; tol = nothing, max_iterations = 200)
        check_options(tol, max_iterations)
        return new(tol, max_iterations)
    end
end

function iterate!(::Chord, c::Columns{T}, p::Stationary{T}, iterations::Int) where {T}
    n = size(c.F, 1)
    D, step = extra!(c, 2, n, own_extra(p) + 1)
    M = Matrix{T}(undef, n, n)
    mean_slope = zeros(T, n)
    for j in 1:c.active
        c.scalars[2, j] = Inf
    end
    for k in 1:iterations
        evaluate_all!(c, p; check = true) && return true
        m = c.active
        (ispow2(k) && k <= 64) && chord_inverse!(M, D, mean_slope, c, p)
        @inbounds @simd for i in 1:(n * m)
            D[i] = c.F[i] - c.Z[i]
        end
        mul!(view(step, :, 1:m), M, view(D, :, 1:m))
        for j in 1:m
            grown = c.residual[j] > c.scalars[2, j]
            c.scalars[2, j] = c.residual[j]
            grown ? copy_column!(c.Z, j, c.F, j) : add_column!(c.Z, step, j)
        end
    end
    return false
end

function add_column!(Z, step, j)
    @inbounds @simd for i in axes(Z, 1)
        Z[i, j] += step[i, j]
    end
    return
end

# M = (I - D̄ R)⁻¹, or the identity (a Picard step) where that is singular.
function chord_inverse!(M::Matrix{T}, D, mean_slope, c::Columns, p::Stationary) where {T}
    m = c.active
    slopes!(view(D, :, 1:m), p.f, view(c.S, :, 1:m), view(c.F, :, 1:m))
    fill!(mean_slope, 0)
    add_columns!(mean_slope, D, m)
    mean_slope ./= m
    residual_jacobian!(M, mean_slope, p.R)
    all(isfinite, M) || return copyto!(M, I)
    factors, pivots, info = LAPACK.getrf!(M)
    info == 0 ? LAPACK.getri!(factors, pivots) : copyto!(M, I)
    return M
end

# Whether an equilibrium attracts: the spectral radius of its Jacobian D R.

"Up to this many rows all eigenvalues are computed."
const DENSE_EIGEN = 256

"""
    spectral_radius(R, d)

The spectral radius of `diag(d) R`, from all eigenvalues up to $(DENSE_EIGEN) rows and by Arnoldi iteration above.
(The Rayleigh quotients of power iteration are wrong for complex pairs.)
"""
function spectral_radius(R::AbstractMatrix{T}, d) where {T}
    n = size(R, 1)
    all(isfinite, d) && all(isfinite, R) || return NaN
    n <= DENSE_EIGEN && return maximum(abs, eigvals(d .* R); init = zero(T))
    values, _, info = eigsolve(v -> d .* (R * v), normalize!(ones(T, n)), 1, :LM; krylovdim = 40, maxiter = 100, tol = 1.0e-6)
    info.converged > 0 || return maximum(abs, eigvals(d .* R))
    return abs(first(values))
end

"""
Like [`evaluate_all!`](@ref) for methods that may find equilibria which do not attract: where the constraint does not
guarantee a unique one, a sample that has converged is `UNSTABLE` if the spectral radius of its Jacobian is 1 or more.
"""
function evaluate_with_stability!(c::Columns{T}, p::Stationary{T}) where {T}
    p.check_stability || return evaluate_all!(c, p)
    affine!(c, p)
    n = size(c.F, 1)
    d = Matrix{T}(undef, n, 1)
    for j in c.active:-1:1
        status, residual = evaluate!(c, p, j)
        if status === CONVERGED
            slopes!(d, p.f, view(c.S, :, j:j), view(c.F, :, j:j))
            repels(p.R, d) && (status = UNSTABLE)
        end
        status === nothing || finish!(c, p, j, status, residual)
    end
    return c.active == 0
end

# A norm of D R below 1 proves stability at the price of one pass; only others need eigenvalues.
function repels(R::Matrix{T}, d) where {T}
    largest = zero(T)
    for j in axes(R, 2)
        total = zero(T)
        @inbounds @simd for i in axes(R, 1)
            total += abs(d[i] * R[i, j])
        end
        largest = max(largest, total)
    end
    return largest >= 1 && spectral_radius(R, vec(d)) >= 1
end

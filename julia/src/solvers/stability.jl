# Whether an equilibrium attracts: the spectral radius of its Jacobian D R.

"Up to this number of rows all eigenvalues are computed."
const DENSE_EIGEN = 256

"Squarings of D R before its eigenvalues are computed, which take as long as about fifty squarings."
const SQUARINGS = 10

"""
    spectral_radius(R, d)

The spectral radius of `diag(d) R`, from all eigenvalues up to $(DENSE_EIGEN) rows and by Arnoldi iteration above.
(The Rayleigh quotients of power iteration are wrong for complex pairs.)
"""
function spectral_radius(R::AbstractMatrix{T}, d) where {T}
    check_interrupt()
    n = size(R, 1)
    all(isfinite, d) && all(isfinite, R) || return T(NaN)
    n <= DENSE_EIGEN && return largest_eigenvalue!(rows_times(d, R))
    values, _, info = @late eigsolve(v -> d .* (R * v), direction(view(R, :, 1)), 1, :LM; krylovdim = 40, maxiter = 100, tol = 1.0e-6)
    info.converged > 0 || return largest_eigenvalue!(rows_times(d, R))
    return abs(first(values))
end

# `eigvals` checks for symmetry and sorts, which takes longer to compile than everything else here.
largest_eigenvalue!(A::Matrix) = largest_eigenvalue!(Matrix{Float64}(A))
function largest_eigenvalue!(A::Matrix{T}) where {T <: BlasFloat}
    isempty(A) && return zero(T)
    _, real, imag = LAPACK.geevx!('B', 'N', 'N', 'N', A)
    return maximum(i -> hypot(real[i], imag[i]), eachindex(real))
end

"    rows_times(d, R)\n\n`diag(d) R`"
function rows_times(d, R::AbstractMatrix)
    length(d) == size(R, 1) || throw(DimensionMismatch("a matrix of the size $(size(R)) cannot have its rows scaled by $(length(d)) numbers"))
    A = Matrix{eltype(R)}(undef, size(R))
    @inbounds for j in axes(R, 2), i in axes(R, 1)
        A[i, j] = d[i] * R[i, j]
    end
    return A
end

"""
    repels(c, p, j)

Whether Picard iteration moves away from the solution in column j: the spectral radius of its Jacobian is 1 or more. Asked
only where the constraint does not guarantee a unique equilibrium.
"""
repels(::Columns, ::ColumnEquation, ::Int) = false
function repels(c::Columns{T}, p::Stationary{T}, j::Int) where {T}
    p.unique && return false
    slopes = buffer!(() -> zeros(T, size(c.F, 1), 1), c, Matrix{T})
    d = slopes!(slopes, p.f, view(c.S, :, j:j), view(c.F, :, j:j))
    return maximum(abs, d) * norm_of(p.recurrence) >= 1 && (@late repels(p.recurrence.R, d))::Bool
end

"""
    repels(R, d)

Whether the spectral radius of J = `diag(d) R` (n × n) is 1 or more. It is not where a power of J has a norm below 1, and it is where
the trace of one, a sum of n powers of eigenvalues, is above n. Eigenvalues are computed only if this does not decide.
"""
function repels(R::AbstractMatrix{T}, d) where {T}
    n, size2 = size(R, 1), zero(T)
    power = rows_times(d, R)
    next = similar(power)
    for k in 0:(n <= DENSE_EIGEN ? SQUARINGS : 0)
        k == 0 || ((power, next) = (gemm!('N', 'N', true, power, power, false, next), power))
        rounding = 2^k * eps(T) * size2            # of the power, in its Euclidean norm
        norm = euclidean_norm(vec(power))
        min(opnorm(power, 1), norm) < 1 && return false
        abs(tr(power)) > n + sqrt(T(n)) * rounding && return true
        size2 = norm^2
    end
    return spectral_radius(R, vec(d)) >= 1
end

"""
    is_spurious(c, p, j)

Whether the iterate in column j has converged only because it is so large that its residual is lost in rounding, as for
f(z) = z + b: its Jacobian is then singular to rounding.
"""
is_spurious(::Columns, ::ColumnEquation, ::Int) = false
function is_spurious(c::Columns{T}, p::Stationary{T}, j::Int) where {T}
    (p.unique || !any_above(T(SUSPICIOUS_SIZE), c.F, j)) && return false
    n = size(c.F, 1)
    (; A, pivots, slopes) = buffer!(() -> FactorBuffers{T}(n), c, FactorBuffers{T})
    return !factorize!(A, pivots, slopes, c, p, j)
end

"States beyond this size are checked."
const SUSPICIOUS_SIZE = 1.0e6

# Where there may be several equilibria, methods that jump may find another than the one that attracts the iterates. A
# contraction with rate q has its equilibrium within r / (1 - q) of an iterate with residual r; this is trusted, with some margin
# for changes of q, for iterates that are seen to contract.

"Whether the iterates contract fast enough for [`trust_radius`](@ref) to mean anything."
contracts(rate::T) where {T} = rate < T(0.8)

"    trust_radius(residual, rate)\n\nThe largest distance from an iterate to the equilibrium that attracts it."
trust_radius(residual::T, rate::T) where {T} = 3 * residual / (1 - min(rate, T(0.9)))

"""
    norm_estimate(R)

The Euclidean norm of `R`, hardly too large: of few rows by [`norm_by_squaring`](@ref), of many by power iteration on RᵀR (which
approaches it from below), with a margin of 2 %; at most the geometric mean of the row and column norms.
"""
function norm_estimate(R::Matrix{T}) where {T}
    n = size(R, 1)
    ceiling = sqrt(opnorm(R, 1) * opnorm(R, Inf))
    isfinite(ceiling) && n > 1 || return ceiling
    n <= LANE_NEURONS && return min(ceiling, norm_by_squaring(R))
    v, w = direction(view(R, :, 1)), zeros(T, n)
    estimate = zero(T)
    for _ in 1:50
        gemv!('N', true, R, v, false, w)
        estimate = euclidean_norm(w) / euclidean_norm(v)
        gemv!('T', true, R, w, false, v)
        size = euclidean_norm(v)
        size > 0 || return ceiling
        map_each!(x -> x / size, v, v)
    end
    return min(ceiling, T(1.02) * estimate)
end

"Squarings of RᵀR: the bound is at most the 64th root of the number of rows, 1.05 for 24, times the norm."
const GRAM_SQUARINGS = 5

"""
    norm_by_squaring(R)

A bound on the Euclidean norm of `R`, for few rows at most a few per cent too large: ‖R‖²ᵐ = ‖Gᵐ‖ <= ‖Gᵐ‖_F with G = RᵀR and
m = 2^$(GRAM_SQUARINGS). Infinite where G overflows or vanishes.
"""
function norm_by_squaring(R::Matrix{T}) where {T}
    power, next = similar(R), similar(R)
    gemm!('T', 'N', true, R, R, false, power)
    logarithm = zero(T)
    for k in 0:GRAM_SQUARINGS
        k == 0 || (gemm!('N', 'N', true, power, power, false, next); (power, next) = (next, power))
        size = euclidean_norm(vec(power))
        0 < size < T(Inf) || return T(Inf)
        map_each!(x -> x / size, power, power)
        logarithm += log(size) / 2^k
    end
    rounding = (4 * length(R) + abs(logarithm)) * eps(T)
    return (1 + rounding) * exp(logarithm / 2)
end

"""
    spectral_radius(net, p, X, Z)

The spectral radius of the Jacobian D R at the states `Z` (neurons × samples) for the samples `X`, per sample; of the
stages of a layered net, the largest.
"""
function spectral_radius(net::Network{T}, p, X, Z) where {T}
    w = unpack!(Weights(net), net, p)
    samples = size(X, 2)
    radius = zeros(samples)
    for (stage, ws) in zip(net.stages, w.stages)
        stage.recurrent || continue
        z = Z[stage.rows, :]
        s = drive!(Matrix{T}(undef, size(z)), ws, Z, X, samples)
        s .+= ws.recurrent * z
        d = slopes!(similar(s), stage.activation, s, z)
        for j in 1:samples
            radius[j] = max(radius[j], spectral_radius(ws.recurrent, d[:, j]))
        end
    end
    return radius
end

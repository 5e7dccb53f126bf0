# The adjoint of an equilibrium: λ with (I - RᵀD) λ = ∂L/∂z*, D = diag f′(s*), from which every gradient
# follows (Almeida 1987, Pineda 1987): e = ∂L/∂s = D λ. It is itself a fixed point, e = D (∂L/∂z* + Rᵀe).

"""
    AdjointSystem{T}

`e = D (g + Rᵀe)` for each sample, a linear [`FixedPoint`](@ref) in e = D λ: the drive is g = ∂L/∂z*, S is λ, and the slopes D
are the coefficients of the columns. The derivative of an equilibrium along a direction, its `tangent`, has the same equation with
R for Rᵀ: `z′ = D (g + R z′)`, where g is that of what drives the stage and of R at fixed z.
"""
@kwdef struct AdjointSystem{T, V} <: FixedPoint{T}
    M::Factor{T}                 # Rᵀ, or R for a tangent
    recurrence::Recurrence{T}
    tol::T
    floor::T
    Z::V
    outcome::Outcome
    latest::Bool                 # write out D (g + M e) of the last e
    threads::Int                 # among which products may be shared
    tangent::Bool = false
end

@inline function activate!(c::Columns{T}, ::AdjointSystem{T}, j::Int) where {T}
    D, S = c.coefficients, c.S
    return fill_column!(put_value!, c.F, c.Z, j, axes(c.F, 1)) do i
        e = @inbounds D[i, j] * S[i, j]
        return e, e
    end
end

store_result!(p::AdjointSystem, sample::Int, c::Columns, j::Int, ::Status) =
    copy_column!(p.Z, sample, p.latest ? c.F : c.Z, j)

# The linearised system: t = (D - d̄) λ.

@inline function activate!(c::Columns{T}, p::Linearized{T, <:AdjointSystem}, j::Int) where {T}
    D, S, slope = c.coefficients, c.S, p.slope
    return fill_column!(put_change!, c.F, c.Z, j, axes(c.F, 1)) do i
        λ = @inbounds S[i, j]
        e = @inbounds D[i, j] * λ
        return e - @inbounds(slope[i]) * λ, e
    end
end

linearized(p::AdjointSystem, outcome) = Linearized(p, !p.tangent, outcome)

slopes!(D::Matrix{Float32}, c::Columns, ::AdjointSystem) =
    foreach(j -> copy_column!(D, j, c.coefficients, j), 1:c.active)
is_linear(::AdjointSystem) = true
coarse_factor(p::AdjointSystem) = p.recurrence.coarse_factors[p.tangent ? 1 : 2]

"""
    solve_adjoint!(E, adjoint, c, recurrence, D, G; outcome, factors = nothing, latest = false, threads = 1, tangent = false)

`E = D λ` for every sample, given the slopes `D` and `G = ∂L/∂z`; or the `tangent` E = z′ given G, see [`AdjointSystem`](@ref). The
relative residual of each sample is merged into `outcome` (NaN where the system is singular). `factors` are those of the forward
pass, if there are any, for the adjoint; `latest` asks for the value of the last evaluation; the products may be shared among
`threads`.
"""
function solve_adjoint!(E, ::JacobianFree, c, recurrence, D, G; options...)
    return multiply_each!(E, D, G)
end

function solve_adjoint!(
        E, s::Implicit, c::Columns{T}, r::Recurrence{T}, D, G;
        outcome, factors = nothing, latest = false, threads = 1, tangent = false
    ) where {T}
    n, samples = size(r.R, 1), size(G, 2)
    start!(c, samples; cold = true)
    system(; tol, latest) = AdjointSystem{T, typeof(E)}(;
        M = tangent ? r.forward : r.backward, recurrence = r, tol, floor = floatmin(T), Z = E, outcome, latest, threads, tangent
    )
    p = system(; tol = tolerance(s, T), latest)
    if s.linear_solver === :auto && factors === nothing && n <= LANE_NEURONS
        solve_adjoint_lanes!(lanes_of(c), c, p, D, G) || solve_columns!(c, p, s)
        return E
    end
    for j in 1:samples
        copy_column!(c.U, j, G, j)
        copy_column!(c.coefficients, j, D, j)
    end
    enlarged = enlarge_tiny!(c, p.tol)
    refined = factors !== nothing && s.linear_solver in (:auto, :lu) && refine!(c, system(; tol = 100 * eps(T), latest = false), factors)
    refined || solve_columns!(c, p, s)
    foreach(((j, factor),) -> rmul!(view(E, :, j), inv(factor)), enlarged)
    return E
end

# Squares of tiny numbers vanish, and residuals with them: such columns are solved for a multiple. Returns the samples and factors.
function enlarge_tiny!(c::Columns{T}, tol::T) where {T}
    enlarged, tiny = (), 16 * sqrt(floatmin(T)) / tol
    for j in 1:c.active
        any_above(tiny, c.U, j) && continue
        largest = maximum(abs, view(c.U, :, j))
        0 < largest < tiny || continue
        factor = ldexp(one(T), min(-exponent(largest), -exponent(floatmin(T))))
        rmul!(view(c.U, :, j), factor)
        enlarged = push!(enlarged === () ? Tuple{Int, T}[] : enlarged, (j, factor))
    end
    return enlarged
end

function solve_columns!(c::Columns{T}, p::AdjointSystem{T}, s::Implicit) where {T}
    n, method = size(c.Z, 1), s.linear_solver
    if method === :auto
        if p.recurrence.linearized
            evaluate_all!(c, p) || iterate_linearized!(c, p, LINEARIZED_PATIENCE) ||
                (advance!(c, one(T)); iterate!(Picard(), c, p, AUTO_BLOCK))
        elseif p.recurrence.coarse
            evaluate_all!(c, p) || iterate_coarsely!(c, p) || iterate!(Picard(), c, p, AUTO_BLOCK)
        end
        method = n <= SMALL_LU ? :lu : :switching
    end
    if method === :neumann
        iterate!(Picard(), c, p, s.max_iterations)
    elseif method === :anderson
        iterate!(Anderson(), c, p, s.max_iterations)
    elseif method === :switching
        iterate!(Picard(), c, p, NEUMANN_PATIENCE) || iterate!(Anderson(), c, p, s.max_iterations)
    elseif method === :gmres
        gmres_each!(c, p, s.max_iterations)
    end
    reclaim!(c)
    factorize_each!(c, p)
    return
end

# What blows up, as Neumann's series where the spectral radius of D R is above 1, is left to the factorisation.
rescues(::AdjointSystem) = true

"Neumann iterations before Anderson acceleration takes over."
const NEUMANN_PATIENCE = 30

function gmres_each!(c::Columns{T}, p::AdjointSystem{T}, iterations) where {T}
    n = size(c.Z, 1)
    R = p.recurrence.R
    M = p.tangent ? R : R'
    for j in c.active:-1:1
        check_interrupt()
        g, d = c.U[:, j], c.coefficients[:, j]
        if iszero(g)  # as behind dead neurons; a Krylov space needs a direction
            view(c.Z, :, j) .= 0
            continue
        end
        λ, _ = @late linsolve(
            v -> v - M * (d .* v), g, g; ishermitian = false, krylovdim = min(n, 50), maxiter = cld(iterations, 50),
            atol = zero(T), rtol = p.tol / 2, verbosity = 0,  # the residual is recorded below
        )
        view(c.Z, :, j) .= d .* λ
    end
    c.cold = false
    evaluate_all!(c, p)
    return
end

"Corrections by the factors of a matrix nearby, before they are given up."
const REFINEMENTS = 4

"The λ that is refined."
struct RefinementState{T} <: SolverState
    λ::Matrix{T}
end

# λ ← λ + (I - D₀R)⁻ᵀ (g + Rᵀ D λ - λ), with D₀ the slopes at which Newton's method factorised last.
function refine!(c::Columns{T}, p::AdjointSystem{T}, factors::Factorisations{T}) where {T}
    all(j -> factors.known[j], 1:c.active) || return false
    D, state = c.coefficients, buffer!(() -> RefinementState{T}(zero(c.Z)), c, RefinementState{T})
    λ = state.λ
    c.state = state
    for j in 1:c.active
        copy_column!(c.S, j, c.U, j)
        fill!(view(λ, :, j), 0)
    end
    c.cold = false
    for _ in 1:REFINEMENTS
        for j in 1:c.active
            sample = c.sample[j]
            correction = view(c.S, :, j)
            subtract!(correction, view(λ, :, j))
            lu_solve_transposed!(correction, view(factors.LU, :, :, sample), view(factors.pivots, :, sample))
            @inbounds @simd for i in axes(λ, 1)
                λ[i, j] += correction[i]
                c.Z[i, j] = D[i, j] * λ[i, j]
            end
        end
        evaluate_all!(c, p) && break
    end
    c.state = nothing
    return reclaim!(c) == 0
end

function factorize_each!(c::Columns{T}, p::AdjointSystem{T}) where {T}
    c.active == 0 && return
    n = size(c.Z, 1)
    A, pivots, d, λ = Matrix{T}(undef, n, n), zeros(Int, n), zeros(T, n, 1), zeros(T, n, 1)
    for j in 1:c.active
        check_interrupt()
        copy_column!(d, 1, c.coefficients, j)
        copy_column!(λ, 1, c.U, j)
        residual_jacobian!(A, d, p.recurrence.R)
        p.tangent && multiply_each!(λ, λ, d)
        if lu_factor!(A, pivots)
            p.tangent ? lu_solve!(λ, A, pivots) : lu_solve_transposed!(λ, A, pivots)
        else
            fill!(λ, T(NaN))
        end
        p.tangent || multiply_each!(λ, λ, d)
        copy_column!(c.Z, j, λ, 1)
    end
    c.cold = false
    affine!(c, p)
    for j in c.active:-1:1
        _, residual = evaluate!(c, p, j)
        finish!(c, p, j, CONVERGED, residual)
    end
    return
end

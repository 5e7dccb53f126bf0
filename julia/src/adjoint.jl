# The adjoint of an equilibrium: λ with (I - RᵀD) λ = ∂L/∂z*, D = diag f′(s*), from which every gradient
# follows (Almeida 1987, Pineda 1987): ∂L/∂s = D λ. It is itself a fixed point, λ = ∂L/∂z* + RᵀD λ.

"""
    Adjoint

How the gradient passes through an equilibrium: [`Implicit`](@ref), [`JacobianFree`](@ref) or [`Unrolled`](@ref).
"""
abstract type Adjoint end

"""
    Implicit(; linear_solver = :auto, tol = nothing, max_iterations = 200)

The implicit function theorem: `(I - RᵀD) λ = ∂L/∂z*`, each sample to the residual `tol` relative to ‖λ‖.

- `:lu`: one LU factorisation of `I - D R` per sample; exact.
- `:neumann`: `λ ← g + RᵀDλ`, one product for all samples an iteration.
- `:anderson`: the same with [`Anderson`](@ref) acceleration.
- `:gmres`: GMRES of KrylovKit.jl, sample by sample.
- `:auto`: `:lu` up to $(SMALL_LU) neurons a stage, above it `:neumann` as long as that is fast, then `:anderson`.

Samples which an iterative method leaves unsolved are solved by LU.
"""
struct Implicit <: Adjoint
    linear_solver::Symbol
    tol::Union{Nothing, Float64}
    max_iterations::Int
    function Implicit(; linear_solver = :auto, tol = nothing, max_iterations = 200)
        linear_solver = Symbol(linear_solver)
        linear_solver in (:auto, :lu, :neumann, :anderson, :gmres) || throw(
            ArgumentError("unknown linear solver :$linear_solver; choose auto, lu, neumann, anderson or gmres")
        )
        check_options(tol, max_iterations)
        return new(linear_solver, tol, max_iterations)
    end
end

"""
    JacobianFree()

λ = ∂L/∂z*, the inverse of I - RᵀD replaced by the identity (Fung et al., AAAI 2022): cheap, and not the gradient.
"""
struct JacobianFree <: Adjoint end

"""
    Unrolled(steps)

Backpropagation through `steps` Picard iterations from zero (BPTT). It is the exact gradient of that many steps, whether
or not they reach an equilibrium; the forward solver is not used, and memory grows with the steps.
"""
struct Unrolled <: Adjoint
    steps::Int
    function Unrolled(steps)
        steps > 0 || throw(ArgumentError("steps must be positive, got $steps"))
        return new(steps)
    end
end
Unrolled(; steps = 8) = Unrolled(steps)

const ADJOINTS = (; Implicit, JacobianFree, Unrolled)

"""
    AdjointSystem{T}

`λ = g + Rᵀ D λ` for each sample, a linear [`FixedPoint`](@ref): the drive is g, the slopes D are `extra[1]` of the
columns.
"""
struct AdjointSystem{T, V} <: FixedPoint{T}
    R::Matrix{T}
    f::Identity
    tol::T
    floor::T
    Z::V
    S::V
    outcome::Outcome
end

"Matrices of `Columns.extra` that belong to the equation."
own_extra(::FixedPoint) = 0
own_extra(::AdjointSystem) = 2

function affine!(c::Columns{T}, p::AdjointSystem{T}) where {T}
    n, m = size(c.U, 1), c.active
    D, E = c.extra[1], c.extra[2]
    @inbounds @simd for k in 1:(n * m)
        E[k] = D[k] * c.Z[k]
    end
    copyto!(c.S, 1, c.U, 1, n * m)
    mul!(view(c.S, :, 1:m), p.R', view(E, :, 1:m), one(T), one(T))
    return c.S
end

"""
    solve_adjoint!(E, adjoint, c, R, D, G, outcome)

`E = D λ` for every sample, given the slopes `D` and `G = ∂L/∂z`; the relative residual of each sample is merged into
`outcome` (NaN where the system is singular).
"""
function solve_adjoint!(E, ::JacobianFree, c, R, D, G, outcome)
    E .= D .* G
    return E
end

function solve_adjoint!(E, s::Implicit, c::Columns{T}, R::Matrix{T}, D, G, outcome) where {T}
    n, samples = size(R, 1), size(G, 2)
    slopes_moving, _ = extra!(c, 2)
    for j in 1:samples
        copy_column!(c.U, j, G, j)
        copy_column!(c.Z, j, G, j)
        copy_column!(slopes_moving, j, D, j)
    end
    start!(c, samples)
    p = AdjointSystem{T, typeof(E)}(R, Identity(), tolerance(s, T), floatmin(T), E, E, outcome)
    method = s.linear_solver
    method === :auto && (method = n <= SMALL_LU ? :lu : :switching)
    if method === :neumann
        iterate!(Picard(), c, p, s.max_iterations)
    elseif method === :anderson
        iterate!(Anderson(), c, p, s.max_iterations)
    elseif method === :switching
        iterate!(Picard(), c, p, NEUMANN_PATIENCE) || iterate!(Anderson(), c, p, s.max_iterations)
    elseif method === :gmres
        gmres_each!(c, p, s.max_iterations)
    end
    factorize_each!(c, p)
    E .*= D
    return E
end

"Neumann iterations before Anderson acceleration takes over."
const NEUMANN_PATIENCE = 30

function gmres_each!(c::Columns{T}, p::AdjointSystem{T}, iterations) where {T}
    n = size(p.R, 1)
    for j in c.active:-1:1
        g, d = c.U[:, j], c.extra[1][:, j]
        λ, _ = linsolve(
            v -> v - p.R' * (d .* v), g, g; ishermitian = false, krylovdim = min(n, 50), maxiter = cld(iterations, 50),
            atol = zero(T), rtol = p.tol / 2,
        )
        copyto!(view(c.Z, :, j), λ)
    end
    evaluate_all!(c, p)
    return
end

function factorize_each!(c::Columns{T}, p::AdjointSystem{T}) where {T}
    c.active == 0 && return
    n = size(p.R, 1)
    A, pivots, d, λ = Matrix{T}(undef, n, n), zeros(Int, n), zeros(T, n, 1), zeros(T, n, 1)
    for j in 1:c.active
        copy_column!(d, 1, c.extra[1], j)
        copy_column!(λ, 1, c.U, j)
        residual_jacobian!(A, d, p.R)
        if lu_factor!(A, pivots)
            lu_solve_transposed!(λ, A, pivots)
        else
            fill!(λ, T(NaN))
        end
        copy_column!(c.Z, j, λ, 1)
    end
    affine!(c, p)
    for j in c.active:-1:1
        _, residual = evaluate!(c, p, j)
        finish!(c, p, j, CONVERGED, residual)
    end
    return
end

# The adjoint of an equilibrium: λ with (I - RᵀD) λ = ∂L/∂z*, D = diag f′(s*), from which every gradient
# follows (Almeida 1987, Pineda 1987): ∂L/∂s = D λ.

"""
    Adjoint

How the gradient passes through an equilibrium: [`Implicit`](@ref).
"""
abstract type Adjoint end

"""
    Implicit(; linear_solver = :auto, tol = nothing, max_iterations = 200)

The implicit function theorem: `(I - RᵀD) λ = ∂L/∂z*` solved to the relative residual `tol`, per sample.

- `:lu`: one LU factorisation of `I - D R` per sample; exact.
- `:neumann`: `λ ← g + RᵀDλ`, one product for all samples an iteration; samples that do not converge are
  solved by LU.
- `:auto`: `:lu` up to $(SMALL_LU) neurons a stage, `:neumann` above.
"""
struct Implicit <: Adjoint
    linear_solver::Symbol
    tol::Union{Nothing, Float64}
    max_iterations::Int
    function Implicit(; linear_solver = :auto, tol = nothing, max_iterations = 200)
        linear_solver = Symbol(linear_solver)
        linear_solver in (:auto, :lu, :neumann) ||
            throw(ArgumentError("unknown linear solver :$linear_solver; choose auto, lu or neumann"))
        check_options(tol, max_iterations)
        return new(linear_solver, tol, max_iterations)
    end
end

const ADJOINTS = (; Implicit)

"""
    AdjointColumns{T}(n, width)

Buffers of the adjoint of one stage, a sample per column: slopes `D`, right-hand side `G`, the solution `Λ`
and the product `RᵀDΛ`; `A` and `pivots` serve the factorisation of one sample.
"""
mutable struct AdjointColumns{T}
    D::Matrix{T}
    G::Matrix{T}
    Λ::Matrix{T}
    E::Matrix{T}
    P::Matrix{T}
    const A::Matrix{T}
    const pivots::Vector{Int}
    const b::Vector{T}
    const sample::Vector{Int}
    active::Int
end

AdjointColumns{T}(n::Int, width::Int) where {T} = AdjointColumns{T}(
    zeros(T, n, width), zeros(T, n, width), zeros(T, n, width), zeros(T, n, width), zeros(T, n, width),
    zeros(T, n, n), zeros(Int, n), zeros(T, n), zeros(Int, width), 0
)

"""
    solve_adjoint!(E, adjoint, a::AdjointColumns, R, samples, residual)

`E[:, j] = D λ` for each sample, given `a.D` and `a.G`; the relative residual of each sample is merged into
`residual` (NaN where the system is singular).
"""
function solve_adjoint!(E, s::Implicit, a::AdjointColumns{T}, R::Matrix{T}, samples::Int, residual) where {T}
    a.active = samples
    for j in 1:samples
        a.sample[j] = j
    end
    direct = s.linear_solver == :lu || (s.linear_solver == :auto && size(R, 1) <= SMALL_LU)
    direct || neumann!(E, s, a, R, residual)
    factorize_each!(E, a, R, residual)
    return E
end

function neumann!(E, s::Implicit, a::AdjointColumns{T}, R, residual) where {T}
    tol = tolerance(s, T)
    n = size(R, 1)
    copyto!(a.Λ, 1, a.G, 1, n * a.active)
    for _ in 1:s.max_iterations
        m = a.active
        @inbounds @simd for k in 1:(n * m)
            a.E[k] = a.D[k] * a.Λ[k]
        end
        copyto!(a.P, 1, a.G, 1, n * m)
        mul!(view(a.P, :, 1:m), R', view(a.E, :, 1:m), one(T), one(T))
        for j in m:-1:1
            change2 = size2 = zero(T)
            @inbounds @simd for i in 1:n
                change = a.P[i, j] - a.Λ[i, j]
                change2 = muladd(change, change, change2)
                size2 = muladd(a.G[i, j], a.G[i, j], size2)
            end
            change2 <= tol * tol * size2 && finish!(E, a, j, sqrt(change2) / max(sqrt(size2), floatmin(T)), residual)
        end
        a.active == 0 && return
        a.Λ, a.P = a.P, a.Λ
    end
    return
end

function factorize_each!(E, a::AdjointColumns{T}, R, residual) where {T}
    n = size(R, 1)
    for j in a.active:-1:1
        residual_jacobian!(a.A, view(a.D, :, j), R)
        λ = view(a.Λ, :, j)
        copyto!(λ, view(a.G, :, j))
        regular = lu_factor!(a.A, a.pivots)
        regular && lu_solve_transposed!(λ, a.A, a.pivots)
        @inbounds @simd for i in 1:n
            a.E[i, j] = a.D[i, j] * λ[i]
        end
        finish!(E, a, j, regular ? adjoint_residual(a, R, λ, j) : T(NaN), residual)
    end
    return
end

function adjoint_residual(a::AdjointColumns{T}, R, λ, j) where {T}
    n = size(R, 1)
    change2 = size2 = zero(T)
    @inbounds for k in 1:n
        r = a.G[k, j] - λ[k]
        @simd for i in 1:n
            r = muladd(R[i, k], a.E[i, j], r)
        end
        change2 += r * r
        size2 += a.G[k, j] * a.G[k, j]
    end
    return sqrt(change2) / max(sqrt(size2), floatmin(T))
end

function finish!(E, a::AdjointColumns, j::Int, value, residual)
    sample = a.sample[j]
    residual[sample] = worse(Float64(value), residual[sample])
    last = a.active
    @inbounds for i in axes(a.E, 1)
        E[i, sample] = a.E[i, j]
        a.D[i, j] = a.D[i, last]
        a.G[i, j] = a.G[i, last]
        a.Λ[i, j] = a.Λ[i, last]
        a.P[i, j] = a.P[i, last]
        a.E[i, j] = a.E[i, last]
    end
    a.sample[j] = a.sample[last]
    a.active = last - 1
    return
end

# How the gradient passes through an equilibrium: the options. Their implementation on the CPU is in cpu/adjoint.jl.

"""
    Adjoint

How the gradient passes through an equilibrium: [`Implicit`](@ref), [`JacobianFree`](@ref) or [`Unrolled`](@ref).
"""
abstract type Adjoint end

"""
    Implicit(; linear_solver = :auto, tol = nothing, max_iterations = 200)

The implicit function theorem: `(I - RᵀD) λ = ∂L/∂z*`, each sample to a residual of D λ of `tol` relative to ‖D λ‖.

- `:lu`: one LU factorisation of `I - D R` per sample; exact. After [`Newton`](@ref), the last factorisation of the forward
  pass, refined.
- `:neumann`: `λ ← ∂L/∂z* + RᵀDλ`, one product per iteration for all samples.
- `:anderson`: the same with [`Anderson`](@ref) acceleration.
- `:gmres`: GMRES of KrylovKit.jl, sample by sample.
- `:auto`: up to $(LANE_NEURONS) neurons per stage elimination for many samples side by side. Above that, `:neumann` with coarse products
  where available (`iterate_coarsely!`), or first the common linear part of the batch, as in [`Chord`](@ref), if the batch is
  large enough for that to pay; else `:lu` up to $(SMALL_LU) neurons, above that `:neumann` as long as it is fast, then `:anderson`.

Samples that an iterative method leaves unsolved are solved by LU.
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

Backpropagation through `steps` Picard iterations (BPTT) from zero, or from `start` if given. It is the exact gradient of that many
steps, whether or not they reach an equilibrium; the forward solver is not used, and memory grows with the steps.
"""
struct Unrolled <: Adjoint
    steps::Int
    function Unrolled(steps)
        check_count("steps", steps)
        return new(steps)
    end
end
Unrolled(; steps = 8) = Unrolled(steps)

const ADJOINTS = (; Implicit, JacobianFree, Unrolled)

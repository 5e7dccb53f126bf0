# Generic solving: fixed points z = f(z, args...) and roots f(z, args...) = 0 of any function, for one problem or for many
# at once, and their derivatives with respect to the arguments by the implicit function theorem.

include("short.jl")
include("problem.jl")
include("function_derivatives.jl")
include("solvers.jl")
include("solution_derivatives.jl")
include("implicit_function.jl")
include("text.jl")

"""
    ImplicitSolution{T}

What [`fixed_point`](@ref) and [`root`](@ref) return: `value` (shaped like the start), and per sample `status`, `iterations`
(evaluations of f), the relative `residual` and the `rate` of its last decrease. [`vjp`](@ref) differentiates it.
"""
struct ImplicitSolution{T, N}
    problem::GenericProblem{T}
    value::Array{T, N}
    outcome::Outcome
end
Base.getproperty(s::ImplicitSolution, name::Symbol) =
    name in fieldnames(Outcome) ? getfield(getfield(s, :outcome), name) : getfield(s, name)
converged(s::ImplicitSolution) = s.status .== CONVERGED

"""
    fixed_point(f, z0, args...; solver = Auto(), batched = ())

Solve `z = f(z, args...)` from the start `z0`: a vector, or a matrix whose columns are independent samples. `batched` lists
the positions of the arguments whose last axis counts the samples. `f` is given a vector and returns one as long; up to $(MAX_SHORT)
entries it is given a vector it cannot write to. Returns an [`ImplicitSolution`](@ref), whose `status` says what converged;
a fixed point found by `Newton` or `NLsolver` from which Picard iteration would move away is `UNSTABLE`.

    solution = fixed_point((z, a) -> cos.(a .* z), [0.5], 0.8)
    vjp(solution, [1.0])                   # (dz/da,)
"""
fixed_point(f, z0::AbstractVecOrMat, args...; solver = Auto(), batched = ()) = solve_generic(f, z0, args, batched, solver, false)

"""
    root(f, z0, args...; solver = Auto(), batched = ())

Solve `f(z, args...) = 0`; otherwise as [`fixed_point`](@ref). A sample has converged when the Newton step is at most
`tol ⋅ max(‖z‖₂, 10⁻³√n)`, and that relative size is the residual. Solvers are `Auto`, `Newton` and `NLsolver`.
"""
root(f, z0::AbstractVecOrMat, args...; solver = Auto(), batched = ()) = solve_generic(f, z0, args, batched, solver, true)

function solve_generic(f, z0, args, batched, solver, root)
    value = float(Array(z0))
    T = eltype(value)
    problem = GenericProblem{T}(f, value, args, batched; root)
    outcome = Outcome(problem.samples)
    solve!(reshape(value, problem.n, :), outcome, problem, solver)
    return ImplicitSolution(problem, value, outcome)
end

"""
    vjp(solution, v)

The products vᵀ ∂z/∂argument as a tuple of arrays shaped like the arguments, `nothing` for those that are not floating-point
numbers; those of shared arguments are summed over the samples. `v` is shaped like `solution.value`. Throws an `ErrorException` if
`v` is not zero for a sample that has not converged, and [`SingularSolution`](@ref).
"""
function vjp(solution::ImplicitSolution{T}, v::AbstractVecOrMat) where {T}
    size(v) == size(solution.value) ||
        throw(DimensionMismatch("v has size $(size(v)); expected that of the value, $(size(solution.value))"))
    problem = solution.problem
    V = reshape(Array{T}(v), problem.n, :)
    failed = count(j -> concerned(V, j) && solution.status[j] != CONVERGED, 1:problem.samples)
    failed == 0 || error("$failed samples did not converge and have no derivative; v must be zero for them")
    gradients = [is_differentiable(x) ? zero(x) : x for x in problem.args]
    vjp!(gradients, problem, reshape(solution.value, problem.n, :), V)
    return ((is_differentiable(x) ? number_or_array(g) : nothing for (g, x) in zip(gradients, problem.args))...,)
end

include("precompile.jl")

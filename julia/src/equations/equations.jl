# Equations of any kind: fixed points z = f(z, args...) and roots f(z, args...) = 0 of any function, for one problem or for many
# at once, and their derivatives with respect to the arguments by the implicit function theorem.

include("short.jl")
include("vectors.jl")
include("total_functions.jl")
include("elementary.jl")
include("jets.jl")
include("problem.jl")
include("function_derivatives.jl")
include("reverse_mode.jl")
include("pullback.jl")
include("lanes.jl")
include("solve.jl")
include("solution_derivatives.jl")
include("lanes_derivatives.jl")
include("implicit_function.jl")
include("text.jl")

"""
    ImplicitSolution{T}

The result of [`fixed_point`](@ref) and [`root`](@ref): `value` (a number or an array like the start), and per sample `status`,
`iterations` (evaluations of f), the relative `residual` and the `rate` of its last decrease. [`vjp`](@ref) differentiates it at the
solution, even if `value` has been written to.
"""
struct ImplicitSolution{T, A <: Union{T, AbstractArray{T}}, I} <: AbstractSolution
    problem::EquationProblem{T}
    value::A
    outcome::Outcome
    inverses::I
end

"""
    fixed_point(f, z0, args...; solver = Auto(), batched = (), scale = nothing)

Solve `z = f(z, args...)` from the start `z0`: a vector, a matrix whose columns are independent samples, or a number. `batched`
lists the positions of the arguments whose last axis is that of the samples. `f` is given a vector, or a number if `z0` is one, and
returns the same; up to $(MAX_SHORT) entries it is given a vector that it cannot write to. From $(MANY) samples on `f` is given $(LANES)
samples at once if it can be evaluated that way, where each number stands for those of all these samples, and may be called from several
threads. A broadcast formula is the fastest; one that branches on values or has a `try` is solved one sample after the other.
Outside its domain `f` may throw a `DomainError`, or be NaN, which is much faster where iterations leave it often.

A sample has converged when ‖f(z) - z‖₂ is at most `tol ⋅ ‖f(z)‖₂`, whatever the unit of z; or, at a solution that is zero to
rounding, when it is below the round-off of the largest iterate so far. `scale`, a number or a vector, gives the typical sizes of
entries that differ much: sizes are measured in units of it. Returns an [`ImplicitSolution`](@ref), whose `status` says which samples
converged; a fixed point from which Picard iteration would move away is `UNSTABLE` (beyond $(DENSE) unknowns, `Picard` and `Anderson` do
not check). Throws an `ArgumentError` for invalid starts, arguments, `batched` and solvers.

If `z0` is a device array, such as a `CuArray`, all samples are solved on the device, one per work-item, and the value is a device
array as well. This supports up to $(MAX_SHORT) unknowns, numbers and vectors of up to $(MAX_SHORT) entries as arguments, and the solvers
`Auto`, `Newton` and `Picard`; samples for which Picard and Newton steps are not enough are passed to the CPU in one batch.

    solution = fixed_point((z, a) -> cos.(a .* z), [0.5], 0.8)
    vjp(solution, [1.0])                   # (dz/da,)
"""
fixed_point(f, z0, args...; solver = Auto(), batched = (), scale = nothing) =
    solve_equation(f, z0, args; root = false, solver, batched, scale)

"""
    root(f, z0, args...; solver = Auto(), batched = (), scale = nothing)

Solve `f(z, args...) = 0`; otherwise like [`fixed_point`](@ref). A sample has converged when the Newton step is small in the same sense,
relative to z, and that relative size is the residual. Solvers are `Auto`, `Newton` and `NLsolver`. A sample is `SINGULAR` if the Jacobian
has no inverse and no step makes progress, for example at a local minimum of ‖f‖.
"""
root(f, z0, args...; solver = Auto(), batched = (), scale = nothing) =
    solve_equation(f, z0, args; root = true, solver, batched, scale)

ChainRulesCore.rrule(::Union{typeof(root), typeof(fixed_point)}, args...; options...) =
    throw(ArgumentError("a solution is differentiated by vjp(solution, v), not through the solver"))

solve_equation(f, z0, args; options...) = refuse_start(z0)
solve_equation(f, z0::AbstractVecOrMat, args; options...) = solve_from!(as_start(z0), f, args; options...)
function solve_from!(value::AbstractVecOrMat{T}, f, args; root, solver = Auto(), batched = (), scale = nothing) where {T}
    problem = beside(value, EquationProblem{T}(f, value, args, batched; root, scale))
    Z, outcome = reshape(value, problem.n, :), Outcome(problem.samples)
    check_option("solver", solver, Solver, "Auto() or Newton()")
    regular = solve!(Z, outcome, problem, solver)
    # The user may write to the value; derivatives are taken at the stored solution.
    return ImplicitSolution(problem, copy(value), outcome, inverses_at(problem, Z, regular))
end

"    beside(value, x)\n\nAn equation or an array `x` in the memory of `value`, and an array with entries of its type."
beside(::Array, problem::EquationProblem) = (map!(on_host, problem.args, problem.args); problem)
beside(::Array{T}, x::AbstractArray) where {T} = Array{T}(x)
beside(::T, x::AbstractArray) where {T <: Real} = Array{T}(x)

"A function of one number as a function of a vector."
struct OfNumber{F}
    f::F
end
(g::OfNumber)(z, args...) = g.f(only(z), args...)

function solve_equation(f, z0::Real, args; options...)
    s = solve_equation(OfNumber(f), [z0], args; options...)
    return ImplicitSolution(s.problem, only(s.value), s.outcome, s.inverses)
end

"""
    vjp(solution, v)

The products vᵀ ∂z/∂argument as a tuple of arrays shaped like the arguments, `nothing` for those that are not floating-point
numbers; those of shared arguments are summed over the samples. `v` is shaped like `solution.value`. Throws an `ErrorException` if
`v` is not zero for a sample that has not converged, and [`SingularSolution`](@ref).
"""
vjp(solution::ImplicitSolution, v::Real) = vjp(solution, fill(v))
function vjp(solution::ImplicitSolution{T}, v::AbstractArray) where {T}
    size(v) == size(solution.value) ||
        throw(DimensionMismatch("v has size $(size(v)); expected that of the value, $(size(solution.value))"))
    eltype(v) <: Real || all(x -> x isa Real, v) || throw(ArgumentError("v has entries of type $(eltype(v)); expected real numbers"))
    problem = solution.problem
    V = reshape(beside(solution.value, v), problem.n, :)
    unsolved = findall(!=(CONVERGED), solution.status)
    failed = isempty(unsolved) ? 0 : count(Array(any(!iszero, V[:, unsolved]; dims = 1)))
    failed == 0 || error("$failed samples did not converge and have no derivative; v must be zero for them")
    gradients = [is_differentiable(x) ? zero(x) : x for x in problem.args]
    vjp!(gradients, problem, solution.inverses, V)
    return ((is_differentiable(x) ? number_or_array(g) : nothing for (g, x) in zip(gradients, problem.args))...,)
end

include("precompile.jl")

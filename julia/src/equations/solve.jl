# From an equation and a solver to the solution, one sample after the other.

const ROOT_SOLVERS = Union{Auto, Newton, NLsolver}
const FIXED_POINT_SOLVERS = Union{Auto, Picard, Anderson, Newton, NLsolver}

"""
    solve!(Z, outcome, problem, solver)

Solve an [`EquationProblem`](@ref) from the start `Z` (n × samples), which becomes the solution; `outcome` says how each sample
ended. Returns the samples for which ∂c/∂z is known to be regular at the solution. Throws an `ArgumentError` if f has written to its
arguments, which other samples and derivatives need unchanged.
"""
function solve!(Z::Matrix{T}, outcome::Outcome, problem::EquationProblem{T}, solver::Solver) where {T}
    solver isa (problem.root ? ROOT_SOLVERS : FIXED_POINT_SOLVERS) ||
        throw(ArgumentError("$(nameof(typeof(solver))) does not solve $(problem.root ? "f(z) = 0" : "z = f(z) in general")"))
    # `f` may be newer than this code.
    regular = zeros(Bool, problem.samples)
    given = [k => copy(x) for (k, x) in enumerate(problem.args) if can_be_written_to(x, problem.batched[k])]
    explaining_types(problem, Z) do
        Base.invokelatest(solve_samples!, Z, outcome, regular, suited(problem), solver, Float64(tolerance(solver, T)))
    end
    for (k, x) in given
        isequal(x, problem.args[k]) || throw(
            ArgumentError("f has written to its argument number $k; it may write to z and to arrays of its own: let it copy the argument first")
        )
    end
    return regular
end

# Numbers and `Short` vectors cannot.
can_be_written_to(x::AbstractArray, batched::Bool) = ndims(x) - batched > 1 || ndims(x) - batched == 1 && size(x, 1) > MAX_SHORT

function solve_samples!(Z::Matrix{T}, outcome::Outcome, regular, p::AbstractEquation{T}, solver, tol::Float64) where {T}
    may_run_in_lanes(solver, p) && runs_side_by_side(p, Z) && return solve_side_by_side!(Z, outcome, regular, p, solver, tol)
    # For an equation that runs side by side the rest need not be compiled.
    return @late solve_one_by_one!(Z, outcome, p, solver, tol)
end

function solve_one_by_one!(Z::Matrix{T}, outcome::Outcome, p::AbstractEquation{T}, solver, tol::Float64) where {T}
    s = Iteration{T}(p.n)
    foreach(sample -> solve_sample!(s, Z, outcome, p, solver, tol, sample), axes(Z, 2))
    return
end

function solve_sample!(s::Iteration{T}, Z::Matrix{T}, outcome::Outcome, p::AbstractEquation{T}, solver, tol::Float64, sample::Int) where {T}
    begin!(s, p, Z, sample, solver.max_iterations)
    status = iterate!(solver, s, p, tol)
    copy_column!(Z, sample, s.z, 1)
    set_outcome!(outcome, sample, status, s.evaluations, s.relative, s.rate)
    return
end

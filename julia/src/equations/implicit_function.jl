# A small equation as an ImplicitFunction of ImplicitDifferentiation.jl, and its derivatives by that.

"""
    EquationConditions(problem)

`c(θ, z) = f(z, args...) - z`, or `f(z, args...)` for a root, for all samples, where θ stacks the differentiable arguments.
"""
struct EquationConditions{T}
    problem::EquationProblem{T}
end
function (c::EquationConditions)(θ, z, _)
    problem = c.problem
    out = similar(z, promote_type(eltype(θ), eltype(z)))
    args = unstack(problem, θ)
    Z, C = reshape(z, problem.n, :), reshape(out, problem.n, :)
    for j in 1:problem.samples
        y = checked(problem.f(Z[:, j], as_arrays(args, problem.batched, j)...), problem.n)
        for i in 1:problem.n
            C[i, j] = problem.root ? y[i] : y[i] - Z[i, j]
        end
    end
    return out
end

stacked(problem::EquationProblem{T}) where {T} = reduce(vcat, (vec(x) for x in problem.args if is_differentiable(x)); init = T[])

function unstack(problem::EquationProblem, θ)
    offset = 0
    return map(problem.args) do x
        is_differentiable(x) || return x
        offset += length(x)
        return reshape(θ[(offset - length(x) + 1):offset], size(x))
    end
end

"The linear solver of an ImplicitFunction whose Jacobian is block-diagonal with blocks of which the inverses are known."
struct KnownInverses{T} <: ImplicitDifferentiation.AbstractSolver
    inverses::Array{T, 3}
    transposed::Bool
end
function (s::KnownInverses)(_, _, b, _)
    rhs = reshape(b, size(s.inverses, 1), :)
    solution = similar(rhs)
    for j in axes(rhs, 2)
        inverse = view(s.inverses, :, :, j)
        gemv!(s.transposed ? 'T' : 'N', true, inverse, view(rhs, :, j), false, view(solution, :, j))
    end
    return vec(solution)
end

# ForwardDiff is all that differentiates the conditions, in either direction.
function implicit_function(problem::EquationProblem, inverses::Inverses; transposed)
    forward = ImplicitDifferentiation.ADTypes.AutoForwardDiff()
    return ImplicitFunction(
        θ -> (vec(inverses.Z), nothing), EquationConditions(problem);
        linear_solver = KnownInverses(inverses.kept, transposed),
        representation = ImplicitDifferentiation.OperatorRepresentation(),
        backends = (; x = forward, y = forward),
    )
end

struct ForwardDiffOnly <: ChainRulesCore.RuleConfig{Union{ChainRulesCore.NoForwardsMode, ChainRulesCore.NoReverseMode}} end

function vjp_by_implicit_function!(gradients, problem::EquationProblem{T}, inverses, v) where {T}
    θ = stacked(problem)
    isempty(θ) && return gradients
    _, pullback = ChainRulesCore.rrule(ForwardDiffOnly(), implicit_function(problem, inverses; transposed = true), θ)
    offset = 0
    dθ = unthunk(pullback((vec(v), nothing))[2])
    for (g, x) in zip(gradients, problem.args)
        is_differentiable(x) || continue
        copyto!(g, 1, dθ, offset + 1, length(x))
        offset += length(x)
    end
    return gradients
end

function jacobian_by_implicit_function!(J, problem::EquationProblem{T}, inverses, index) where {T}
    isempty(J) && return J
    θ = stacked(problem)
    implicit = implicit_function(problem, inverses; transposed = false)
    full = reshape(ForwardDiff.jacobian(x -> first(implicit(x)), θ), problem.n, problem.samples, :)
    offset = sum(length(x) for x in problem.args[1:(index - 1)] if is_differentiable(x); init = 0)
    entries = size(J, 2)
    for j in 1:problem.samples
        begins = offset + (problem.batched[index] ? (j - 1) * entries : 0)
        J[:, :, j] = full[:, j, (begins + 1):(begins + entries)]
    end
    return J
end

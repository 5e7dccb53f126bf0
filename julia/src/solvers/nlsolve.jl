# NLsolve.jl, sample by sample, with the exact Jacobian.

"""
    NLsolver(; method = :trust_region, tol = nothing, max_iterations = 200)

NLsolve.jl on `f(u + R z) - z = 0` with its exact Jacobian `D R - I`, one sample at a time and in double precision. `method` is
`:trust_region`, `:newton` or `:anderson`. The slowest of the solvers and the hardest to defeat. A sample whose Jacobian is
singular where the method ends is `SINGULAR`.
"""
struct NLsolver <: Solver
    method::Symbol
    tol::Union{Nothing, Float64}
    max_iterations::Int
    function NLsolver(; method = :trust_region, tol = nothing, max_iterations = 200)
        method = Symbol(method)
        method in (:trust_region, :newton, :anderson) || throw(
            ArgumentError("unknown NLsolve method :$method; choose trust_region, newton or anderson")
        )
        check_options(tol, max_iterations)
        return new(method, tol, max_iterations)
    end
end

function iterate!(s::NLsolver, c::Columns{T}, p::Stationary{T}, iterations::Int) where {T}
    c.cold = false
    root = RootProblem(Matrix{Float64}(p.recurrence.R), p.f)
    tol, floor = Float64(p.tol), Float64(p.floor)
    for j in c.active:-1:1
        evaluations = min(iterations, c.limit - c.iterations[j]) - 1
        evaluations > 0 || continue
        c.iterations[j] += (@late attempts!(root, s, view(c.U, :, j), view(c.Z, :, j), tol, floor, evaluations))::Int
        c.residual[j] = T(Inf)
    end
    # What has converged is found by the same evaluation as for every other solver.
    evaluate_all!(c, p; check = true) && return true
    (; A, pivots, slopes) = buffer!(() -> FactorBuffers{T}(size(c.F, 1)), c, FactorBuffers{T})
    foreach(j -> factorize!(A, pivots, slopes, c, p, j), 1:c.active)
    return false
end

# Improve z for the drive u; returns the evaluations used.
function attempts!(root, s::NLsolver, u, z, tol, floor, evaluations)
    begin_sample!(root, u, evaluations)
    start = Vector{Float64}(z)
    r = similar(start)
    # NLsolve stops on an absolute maximum norm; ours is relative, so ask again where that was too loose.
    target = tol * max(norm(root(r, start)), floor) / (2 * sqrt(length(start)))
    for _ in 1:3
        found = attempt(s, root, start, target)
        found === nothing && break
        copyto!(start, found)
        root.left > 0 || break
        norm(root(r, start)) <= tol * max(norm(root.z), floor) && break
        target /= 100
    end
    copyto!(z, start)
    return evaluations - root.left
end

# The solution found, or as far as the evaluations lead; nothing where the method breaks down.
function attempt(s::NLsolver, root, start, target)
    result = call_nlsolve(
        root, (J, z) -> (jacobian!(J, root, z); s.method === :newton && check_regular(J)), start;
        method = s.method, ftol = target, iterations = root.left,
    )
    result isa Stop && return root.best
    return result !== nothing && all(isfinite, result.zero) ? result.zero : nothing
end

"Thrown out of NLsolve.jl, which cannot be told to stop: `status` says why."
struct Stop <: Exception
    status::Status
end

"    call_nlsolve(arguments...; options...)\n\nThe result of NLsolve.jl; the [`Stop`](@ref) thrown out of it; `nothing` where its method breaks down."
function call_nlsolve(arguments...; options...)
    try
        return @late nlsolve(arguments...; xtol = 0.0, options...)
    catch error
        error isa Stop && return error
        error isa Union{LinearAlgebra.SingularException, LinearAlgebra.LAPACKException, NLsolve.IsFiniteException} || rethrow()
        return nothing
    end
end

# NLsolve's own Newton method would take the step of a matrix that is singular to rounding.
function check_regular(J)
    A, pivots = -J, zeros(Int, size(J, 1))
    lu_factor!(A, pivots) && !is_singular(A) || throw(LinearAlgebra.SingularException(0))
    return
end

# r(z) = f(u + R z) - z, with the buffers of its evaluation: in double precision and for whatever activation, so that NLsolve
# is compiled once.
mutable struct RootProblem
    const R::Matrix{Float64}
    const f::Activation
    const u::Matrix{Float64}
    const input::Matrix{Float64}
    const s::Matrix{Float64}
    const z::Matrix{Float64}
    const d::Matrix{Float64}
    const best::Vector{Float64}    # where the residual was smallest
    best_residual::Float64
    evaluated::Bool                # at `input`
    left::Int                      # evaluations of f
end
RootProblem(R, f) = RootProblem(R, f, (zeros(size(R, 1), 1) for _ in 1:5)..., zeros(size(R, 1)), Inf, false, 0)

function begin_sample!(p::RootProblem, u, evaluations)
    copyto!(p.u, u)
    p.best_residual, p.evaluated, p.left = Inf, false, evaluations
    return p
end

function (p::RootProblem)(r, z)
    evaluate!(p, z)
    r .= vec(p.z) .- z
    return r
end
# NLsolve asks for the residual and the Jacobian at the same z one after the other.
function evaluate!(p::RootProblem, z)
    check_interrupt()
    p.evaluated && vec(p.input) == z && return
    p.left > 0 || throw(Stop(MAX_ITERATIONS))
    p.left -= 1
    p.evaluated = true
    copyto!(p.input, z)
    gemm!('N', 'N', true, p.R, p.input, true, copyto!(p.s, p.u))
    change2, _ = activate!(p.z, p.f, p.s, p.input, 1)
    if p.best_residual == Inf || change2 < p.best_residual
        p.best_residual = change2
        copyto!(p.best, z)
    end
    return
end
function jacobian!(J, p::RootProblem, z)
    evaluate!(p, z)
    slopes!(p.d, p.f, p.s, p.z)
    J .= p.d .* p.R
    for i in axes(J, 1)
        J[i, i] -= 1
    end
    return J
end

# NLsolve.jl, sample by sample, with the exact Jacobian.

"""
    NLsolver(; method = :trust_region, tol = nothing, max_iterations = 200)

NLsolve.jl on `f(u + R z) - z = 0` with its exact Jacobian `D R - I`, one sample at a time. `method` is
`:trust_region`, `:newton` or `:anderson`. The slowest of the solvers and the hardest to defeat.
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
    n = size(p.M, 1)
    iterations > 0 || return false
    c.cold = false
    root = RootProblem(p.M, p.f, zeros(T, n, 1), zeros(T, n, 1), zeros(T, n, 1), zeros(T, n, 1), zeros(T, n, 1))
    for j in c.active:-1:1
        copyto!(root.u, view(c.U, :, j))
        start = c.Z[:, j]
        # NLsolve stops on an absolute maximum norm; ours is relative, so ask again where that was too loose.
        scale = max(norm(root(similar(start), start)), p.floor)
        target = p.tol * scale / (2 * sqrt(T(n)))
        used = 0
        for _ in 1:3
            result = attempt(s, root, start, target, iterations - used)
            result === nothing && break
            used += result.iterations
            all(isfinite, result.zero) || break
            copyto!(start, result.zero)
            root(view(c.F, :, j), start)
            residual = norm(view(c.F, :, j))
            residual <= p.tol * max(norm(root.z), p.floor) && break
            used < iterations || break
            target /= 100
        end
        copyto!(view(c.Z, :, j), start)
        c.iterations[j] += max(used - 1, 0)
        c.residual[j] = T(Inf)
    end
    # The verdict is ours, by the same evaluation as for every other solver.
    return evaluate_all!(c, p; check = true)
end

function attempt(s::NLsolver, root, start::Vector{T}, target, iterations) where {T}
    try
        return nlsolve(
            root, (J, z) -> jacobian!(J, root, z), start;
            method = s.method, ftol = target, xtol = zero(T), iterations,
        )
    catch error
        error isa Union{LinearAlgebra.SingularException, LinearAlgebra.LAPACKException, NLsolve.IsFiniteException} ||
            rethrow()
        return nothing
    end
end

# r(z) = f(u + R z) - z, with the buffers of its evaluation.
struct RootProblem{T, F}
    R::Matrix{T}
    f::F
    u::Matrix{T}
    input::Matrix{T}
    s::Matrix{T}
    z::Matrix{T}
    d::Matrix{T}
end
function (p::RootProblem)(r, z)
    copyto!(p.input, z)
    mul!(copyto!(p.s, p.u), p.R, p.input, true, true)
    activate!(p.z, p.f, p.s, p.input, 1)
    r .= vec(p.z) .- z
    return r
end
function jacobian!(J, p::RootProblem, z)
    p(similar(z), z)
    slopes!(p.d, p.f, p.s, p.z)
    J .= p.d .* p.R
    for i in axes(J, 1)
        J[i, i] -= 1
    end
    return J
end

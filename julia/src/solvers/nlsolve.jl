# NLsolve.jl, sample by sample, with the exact Jacobian.

"""
    NLsolver(; method = :trust_region, tol = nothing, max_iterations = 200)

NLsolve.jl on `f(u + R z) - z = 0` with its exact Jacobian `D R - I`, one sample at a time and in double precision. `method` is
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
    iterations > 0 || return false
    c.cold = false
    root = RootProblem(Matrix{Float64}(p.recurrence.R), p.f)
    tol, floor = Float64(p.tol), Float64(p.floor)
    for j in c.active:-1:1
        used = Base.invokelatest(attempts!, root, s, view(c.U, :, j), view(c.Z, :, j), tol, floor, iterations)::Int
        c.iterations[j] += max(used - 1, 0)
        c.residual[j] = T(Inf)
    end
    # The verdict is ours, by the same evaluation as for every other solver.
    return evaluate_all!(c, p; check = true)
end

# Improve z for the drive u; returns the iterations used.
function attempts!(root, s::NLsolver, u, z, tol, floor, iterations)
    copyto!(root.u, u)
    start = Vector{Float64}(z)
    r = similar(start)
    # NLsolve stops on an absolute maximum norm; ours is relative, so ask again where that was too loose.
    target = tol * max(norm(root(r, start)), floor) / (2 * sqrt(length(start)))
    used = 0
    for _ in 1:3
        result = attempt(s, root, start, target, iterations - used)
        result === nothing && break
        used += result.iterations
        all(isfinite, result.zero) || break
        copyto!(start, result.zero)
        norm(root(r, start)) <= tol * max(norm(root.z), floor) && break
        used < iterations || break
        target /= 100
    end
    copyto!(z, start)
    return used
end

function attempt(s::NLsolver, root, start, target, iterations)
    try
        return nlsolve(
            root, (J, z) -> jacobian!(J, root, z), start;
            method = s.method, ftol = target, xtol = 0.0, iterations,
        )
    catch error
        error isa Union{LinearAlgebra.SingularException, LinearAlgebra.LAPACKException, NLsolve.IsFiniteException} ||
            rethrow()
        return nothing
    end
end

# r(z) = f(u + R z) - z, with the buffers of its evaluation: in double precision and for whatever activation, so that NLsolve
# is compiled once.
struct RootProblem
    R::Matrix{Float64}
    f::Activation
    u::Matrix{Float64}
    input::Matrix{Float64}
    s::Matrix{Float64}
    z::Matrix{Float64}
    d::Matrix{Float64}
end
RootProblem(R, f) = RootProblem(R, f, (zeros(size(R, 1), 1) for _ in 1:5)...)

function (p::RootProblem)(r, z)
    check_interrupt()
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

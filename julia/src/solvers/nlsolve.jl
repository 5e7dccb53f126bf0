# NLsolve.jl, sample by sample, with the exact Jacobian. It is given unknowns and residuals of the size 1, since its first trust region
# and some of its thresholds are absolute, and is stopped from within as soon as our own criterion holds or no evaluation is left.

"""
    NLsolver(; method = :trust_region, tol = nothing, max_iterations = 200)

NLsolve.jl on `f(u + R z) - z = 0` with its exact Jacobian `D R - I`, one sample at a time and in double precision. `method` is
`:trust_region`, `:newton` or `:anderson`. It is the slowest and most robust of the solvers. A sample whose Jacobian is
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

# --- one sample -------------------------------------------------------------------------------------------------

function iterate!(solver::NLsolver, s::Iteration, p::AbstractEquation, tol)
    equation = erased(p)
    status = (@late nlsolve!(s, equation, solver, tol))::Status
    status === CONVERGED && !p.root && finish!(s, status)
    return verify(status, s, equation, tol)
end

# The status at the end; s.z is the solution or the last iterate.
function nlsolve!(s::Iteration{T}, p::AbstractEquation{T}, solver::NLsolver, tol) where {T}
    l = linearization!(s)
    evaluate!(s, l, p) || return MAX_ITERATIONS
    isfinite(s.merit) || return NON_FINITE
    unit, unit_of_c = nlsolve_units(s, l, p, solver)
    known = true                # c at the iterate
    function moved!(x)
        all(isfinite, x) || throw(Stop(NON_FINITE))
        known && all(i -> s.z[i] == T(x[i] * unit), eachindex(x)) && return
        known = false
        copyto!(s.base, s.z)
        for i in eachindex(x)
            s.z[i] = T(x[i] * unit)
        end
        evaluate!(s, l, p) || (copyto!(s.z, s.base); throw(Stop(MAX_ITERATIONS)))
        known = true
        p.root ? solver.method === :anderson && assessed(assess_root!(s, l, newton_step!(s, l, p), p, tol)) : assessed(assess!(s, p, tol))
        return
    end
    assessed(status) = status === CONVERGED && throw(Stop(CONVERGED))
    function conditions!(c, x)
        moved!(x)
        c .= s.c ./ unit_of_c
        return
    end
    function jacobian!(J, x)
        moved!(x)
        p.root && assessed(assess_root!(s, l, newton_step!(s, l, p), p, tol))
        p.root || ImplicitRNN.jacobian!(s, l, p)
        all(isfinite, l.J) && isfinite(s.merit) || throw(Stop(NON_FINITE))
        # NLsolve's own Newton method would take the step of a matrix that is singular to rounding.
        solver.method === :newton && !p.root && !is_regular!(l) && throw(Stop(SINGULAR))
        J .= l.J .* (unit / unit_of_c)
        return
    end
    both!(c, J, x) = (conditions!(c, x); jacobian!(J, x))
    p.root || assess!(s, p, tol) !== CONVERGED || return CONVERGED
    # It also counts trials of the same point while its trust region shrinks, which are not evaluated and may go on without end.
    iterations = 4 * (s.limit - s.evaluations) + 200
    return call_nlsolve(Opaque(conditions!), Opaque(jacobian!), Opaque(both!), Float64.(s.z) ./ unit, solver.method, iterations)
end

is_regular!(l::Linearization) = lu_factor!(copyto!(l.LU, l.J), l.pivots) && !is_singular(l.LU)

# The size of an unknown, and of a condition: for NLsolve's Anderson acceleration, which adds them, one and the same.
function nlsolve_units(s::Iteration, l::Linearization, p::AbstractEquation, solver::NLsolver)
    roughly = sqrt(p.n)
    of_c = max(s.merit, 0.0) / roughly
    unit = measure(s.z) / roughly
    unit > 0 || (unit = newton_step!(s, l, p) ? measure(l.step) / roughly : of_c / measure(vec(l.J)))
    unit > 0 && isfinite(unit) || (unit = 1.0)
    solver.method === :anderson && return unit, unit
    return unit, of_c > 0 ? of_c : 1.0
end

"Thrown out of NLsolve.jl, which offers no other way to stop it: `status` says why."
struct Stop <: Exception
    status::Status
end

"""
The Jacobian of the trust region, in whose division nothing is thrown. Where it is singular NLsolve.jl takes the same least-squares step,
but by an exception in each iteration, which takes as long as hundreds of steps.
"""
struct Jacobian <: AbstractMatrix{Float64}
    entries::Matrix{Float64}
end
Base.size(J::Jacobian) = size(J.entries)
Base.copy(J::Jacobian) = Jacobian(copy(J.entries))
Base.IndexStyle(::Type{Jacobian}) = IndexLinear()
Base.@propagate_inbounds Base.getindex(J::Jacobian, i::Int) = J.entries[i]
Base.@propagate_inbounds Base.setindex!(J::Jacobian, x, i::Int) = J.entries[i] = x
function Base.:\(J::Jacobian, r::Vector{Float64})
    factors = lu(J.entries; check = false)
    return issuccess(factors) ? factors \ r : pinv(J.entries; atol = eps()) * r
end

function call_nlsolve(conditions!::Opaque, jacobian!::Opaque, both!::Opaque, start, method, iterations)
    try
        J = zeros(length(start), length(start))
        df = OnceDifferentiable(conditions!, jacobian!, both!, start, copy(start), method === :trust_region ? Jacobian(J) : J)
        result = nlsolve(df, start; method, xtol = 0.0, ftol = 0.0, iterations)
        return all(isfinite, result.zero) ? SINGULAR : NON_FINITE
    catch error
        error isa Stop && return error.status
        error isa Union{LinearAlgebra.SingularException, LinearAlgebra.LAPACKException, NLsolve.IsFiniteException} || rethrow()
        return SINGULAR
    end
end

# --- columns ----------------------------------------------------------------------------------------------------

"""
    StageEquation(p)

The equilibrium of a stage for one sample, driven by `u`, in double precision and for whatever activation, so that all of this is
compiled once. Its weights make the smallest size to which residuals are relative the floor of the [`Stationary`](@ref) equation.
"""
struct StageEquation <: AbstractEquation{Float64}
    root::Bool
    n::Int
    weights::Vector{Float64}
    R::Matrix{Float64}
    f::Activation
    u::Vector{Float64}
    s::Vector{Float64}
    slopes::Vector{Float64}
end
function StageEquation(p::Stationary)
    n = size(p.recurrence.R, 1)
    return StageEquation(false, n, fill(sqrt(n) / p.floor, n), Matrix{Float64}(p.recurrence.R), p.f, (zeros(n) for _ in 1:3)...)
end

# The interface to NLsolve.jl: the value, and the Jacobian at little extra cost.
function call!(y::Vector{Float64}, p::StageEquation, z, ::Int)
    check_interrupt()
    gemv!('N', true, p.R, z, true, copyto!(p.s, p.u))
    return activate!(y, p.f, p.s, z, 1)
end
function call!(y::Vector{Float64}, J::Matrix{Float64}, p::StageEquation, z, sample::Int)
    call!(y, p, z, sample)
    rmul!(residual_jacobian!(J, slopes!(p.slopes, p.f, p.s, y), p.R), -1)
    return true
end

function iterate!(solver::NLsolver, c::Columns{T}, p::Stationary{T}, iterations::Int) where {T}
    c.cold = false
    equation, s = StageEquation(p), Iteration{Float64}(size(c.F, 1))
    for j in c.active:-1:1
        evaluations = min(iterations, c.limit - c.iterations[j]) - 1
        evaluations > 0 || continue
        copyto!(equation.u, view(c.U, :, j))
        begin!(s, equation, c.Z, j, evaluations)
        @late nlsolve!(s, equation, solver, Float64(p.tol) / 2)         # the other half is for the rounding of z
        copy_column!(c.Z, j, s.z, 1)
        c.iterations[j] += s.evaluations
        c.residual[j] = T(Inf)
    end
    # Convergence is decided by the same evaluation as for every other solver.
    evaluate_all!(c, p; check = true) && return true
    (; A, pivots, slopes) = buffer!(() -> FactorBuffers{T}(size(c.F, 1)), c, FactorBuffers{T})
    foreach(j -> factorize!(A, pivots, slopes, c, p, j), 1:c.active)
    return false
end

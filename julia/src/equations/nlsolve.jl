# NLsolve.jl with the exact Jacobian. It is given unknowns and residuals of the size 1, since its first trust region and some of its
# thresholds are absolute, and is stopped from within as soon as our own criterion holds or no evaluation is left.

# NLsolve is compiled once, for functions it knows nothing of.
struct Erased
    call::Any
end
(e::Erased)(out, z) = (e.call(out, z); nothing)
(e::Erased)(out, J, z) = (e.call(out, J, z); nothing)

iterate!(solver::NLsolver, s::Iteration, p::Equation, tol) = (@late iterate!(solver, s, erased(p), tol))::Status
function iterate!(solver::NLsolver, s::Iteration{T}, p::ErasedEquation{T}, tol) where {T}
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
        p.root || assessed(assess!(s, p, tol))
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
        J .= l.J .* (unit / unit_of_c)
        return
    end
    both!(c, J, x) = (conditions!(c, x); jacobian!(J, x))
    p.root || assess!(s, p, tol) !== CONVERGED || return attracts(finish!(s, CONVERGED), s, p)
    status = erased_nlsolve(
        solver.method, Erased(conditions!), Erased(jacobian!), Erased(both!), Float64.(s.z) ./ unit, s.limit - s.evaluations
    )
    # It goes through its iterations even where it stays where it is.
    status === MAX_ITERATIONS && s.evaluations < s.limit && (status = SINGULAR)
    status === CONVERGED && !p.root && finish!(s, status)
    return attracts(status, s, p)
end

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

function erased_nlsolve(method, conditions!, jacobian!, both!, start, iterations)
    result = call_nlsolve(conditions!, jacobian!, both!, start; method, ftol = 0.0, iterations, inplace = true)
    result isa Stop && return result.status
    result === nothing && return SINGULAR
    return result.iterations < iterations ? NON_FINITE : MAX_ITERATIONS
end

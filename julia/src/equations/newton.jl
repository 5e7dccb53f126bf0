# Newton's method with a line search, for fixed points and roots.

"The smallest part of a Newton step that is tried on a root, for which nothing else follows; that of a fixed point is `SMALLEST_STEP`."
const SMALLEST_ROOT_STEP = 2.0^-20

function iterate!(::Newton, s::Iteration, p::AbstractEquation, tol)
    return attracts(newton!(s, linearization!(s), p, tol), s, p)
end

"`UNSTABLE` for a fixed point that has been found but repels."
attracts(status::Status, s::Iteration, p::AbstractEquation) = status === CONVERGED && !p.root && repels!(s, p) ? UNSTABLE : status

"""
    newton!(s, l, p, tol)

`z ← z + t δ` with the Newton step δ, which is halved until ‖c‖ decreases. A fixed point is judged by ‖f(z) - z‖; a root, whose
f may have any unit, by ‖δ‖, which estimates the error of z.
"""
function newton!(s::Iteration, l::Linearization, p::AbstractEquation, tol)
    evaluate!(s, l, p) || return MAX_ITERATIONS
    isfinite(s.merit) || return NON_FINITE
    while true
        status = p.root ? nothing : assess!(s, p, tol)
        status === nothing || return finish!(s, status)
        solvable = newton_step!(s, l, p)
        if p.root
            status = assess_root!(s, l, solvable, p, tol)
            status === nothing || return status
        end
        status = search_line!(s, l, solvable, p)
        status === nothing || return status
    end
    return
end

"How a root stands, given the Newton step; `nothing`: go on. One that has converged takes the step, which is as good as another iteration."
@inline function assess_root!(s::Iteration, l::Linearization, solvable::Bool, p::AbstractEquation, tol::Float64)
    size = measure(s.z, p.weights)
    proven = isfinite(s.distance) && s.merit <= LEFT_OF_CONDITIONS * s.judged
    s.judged = s.merit
    if solvable
        near!(s, p, tol, measure(l.step, p.weights), size) || return nothing
        if !proven && s.merit > 0 && !is_steady!(s, l, p)
            s.distance = Inf
            return nothing
        end
        @inbounds for i in eachindex(s.z)
            s.z[i] += l.step[i]
        end
        return CONVERGED
    end
    s.merit == 0 || return nothing
    # An f that has faded away, as exp(-z) does, is zero with all its derivatives.
    s.evaluations > 1 && all(iszero, l.J) && return SINGULAR
    near!(s, p, tol, 0.0, size)
    return CONVERGED
end

# A short step to a root makes the conditions much smaller than they were. Newton's steps are as short at a pole, from which they lead
# away, and where f has an infinite slope, as √z + 1 at zero.
"What is left of ‖c‖ behind a step to a root, at most."
const LEFT_OF_CONDITIONS = 0.5

"Whether a root has been found, to rounding, where nothing leads on."
function found!(s::Iteration, l::Linearization, p::AbstractEquation)
    settled(s) || return false
    p.root || return true
    conditions_jacobian!(l.J, p, s.z, s.sample)
    return is_steady!(s, l, p)
end

# Whether the Jacobian is about the same two steps further, as at a root at which one may have started.
@noinline function is_steady!(s::Iteration{T}, l::Linearization{T}, p::AbstractEquation{T}) where {T}
    s.base .= s.z .+ 2 .* l.step .+ 8eps(T) .* s.z
    change = similar(l.J)
    conditions_jacobian!(change, p, s.base, s.sample)
    change .-= l.J
    foreach(k -> lu_solve!(view(change, :, k), l.LU, l.pivots), axes(change, 2))
    return largest_column_sum(change) <= T(0.5)
end

# Move along the step, halved while ‖c‖ does not decrease; where that does not help, by a Picard step for a fixed point. How the
# iteration ended, or `nothing`.
function search_line!(s::Iteration{T}, l::Linearization{T}, solvable::Bool, p::AbstractEquation{T}) where {T}
    before, smallest = s.merit, p.root ? SMALLEST_ROOT_STEP : SMALLEST_STEP
    copyto!(s.base, s.z)
    p.root || copyto!(s.picard, s.value)
    t = one(T)
    while solvable && t >= smallest
        @inbounds for i in eachindex(s.z)
            s.z[i] = muladd(t, l.step[i], s.base[i])
        end
        if !evaluate!(s, l, p)
            copyto!(s.z, s.base)
            return MAX_ITERATIONS
        end
        decreases(s.merit, before, t) && return nothing
        t /= 2
    end
    if p.root
        copyto!(s.z, s.base)
        return found!(s, l, p) ? CONVERGED : SINGULAR
    end
    copyto!(s.z, s.picard)
    evaluate!(s, l, p) || return MAX_ITERATIONS
    return nothing
end

"Whether Picard iteration moves away from the fixed point: the spectral radius of ∂f/∂z is 1 or more."
function repels!(s::Iteration{T}, p::AbstractEquation{T}) where {T}
    J = linearization!(s).J
    conditions_jacobian!(J, p, s.z, s.sample)
    for i in axes(J, 1)
        J[i, i] += one(T)
    end
    s.linearized = false
    length(J) == 1 && return abs(J[1]) >= 1
    return (@late repels(J, ones(T, p.n, 1)))::Bool
end

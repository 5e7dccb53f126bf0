# The default: Picard iteration as long as it is fast, then faster methods for the slow samples.

"Picard iterations between two checks of the rate."
const AUTO_BLOCK = 8

"Picard iterations that a sample gets, where there may be several equilibria, after Newton's method has failed."
const PERSISTENCE = 256

"""
    Auto(; tol = nothing, max_iterations = 1000)

Picard iteration first, or corrections by shared work where available (`correct_first!`). Every $(AUTO_BLOCK) iterations, samples
whose contraction rate predicts more work than the alternative
are set aside; these continue with Newton's method (stages of up to $(SMALL_LU) neurons) or with Anderson acceleration and
then Newton's method (larger stages), and the last ones with NLsolve's trust region.
"""
@kwdef struct Auto <: Solver
    tol::Union{Nothing, Float64} = nothing
    max_iterations::Int = 1000
    Auto(tol, max_iterations) = (check_options(tol, max_iterations); new(tol, max_iterations))
end

function iterate!(::Auto, c::Columns{T}, p::Stationary{T}, ::Int) where {T}
    n = size(c.F, 1)
    if n <= LANE_NEURONS
        solve_lanes!(lanes_of(c), c, p) && return true
        c.cold = false
    end
    # Newton costs about 4 iterations of n/3 + 2 products each, at a third of the speed of a product.
    # Without a guarantee Newton's method may find a repelling equilibrium; Picard iteration gets more time.
    patience = (n <= SMALL_LU ? 4 * (n ÷ 3 + 2) : 30) * (p.unique ? 1 : 8)
    coarse = p.recurrence.coarse && c.limit >= COARSE_EVALUATIONS
    begun = coarse || p.recurrence.linearized
    begun && correct_first!(c, p, coarse) && return true
    while c.active > 0
        for _ in 1:AUTO_BLOCK
            evaluate_all!(c, p; check = !begun, rescue = true) && break
            begun = true
            advance!(c, one(T))
        end
        for j in c.active:-1:1
            predicted_iterations(c, p, j) > patience && defer!(c, j)
        end
    end
    reclaim!(c) == 0 && return true
    n > SMALL_LU && iterate!(Anderson(), c, p, 60) && return true
    iterate!(Newton(), c, p, 50) && return true
    p.unique || persist!(c, p) && return true
    return iterate!(NLsolver(), c, p, 100)
end

# Picard iteration may be slow only for a while, as where two equilibria have just vanished; Newton's method finds nothing there, and may
# have left a sample where iteration would not lead: hence the check.
function persist!(c::Columns{T}, p::Stationary{T}) where {T}
    for _ in 1:PERSISTENCE
        evaluate_all!(c, p; check = true, rescue = true) && break
        advance!(c, one(T))
    end
    return reclaim!(c) == 0
end

"""
    correct_first!(c, p, coarse)

Begin with corrections by shared work: `coarse` products, or the linearised equation; true when all are done. Where there may be
several equilibria, these may lead to another one than Picard iteration from the start does: they are then used only once
Picard iteration is seen to contract. One coarse step, which takes a fraction of the time of a correction, always pays.
"""
function correct_first!(c::Columns{T}, p::Stationary{T}, coarse::Bool) where {T}
    evaluate_all!(c, p; check = true, rescue = true) && return reclaim!(c) == 0
    for _ in 1:(p.unique ? Int(coarse) : 2)
        if coarse
            step_coarsely!(c, p)
        else
            advance!(c, one(T))
            evaluate_all!(c, p; rescue = true) && return reclaim!(c) == 0
        end
    end
    p.unique || foreach(j -> contracts(c.rate[j]) || defer!(c, j), c.active:-1:1)
    coarse ? iterate_coarsely!(c, p) : (iterate_linearized!(c, p, LINEARIZED_PATIENCE) || advance!(c, one(T)))
    return reclaim!(c) == 0
end

predicted_iterations(c::Columns, p, j) =
    predicted_iterations(p.tol * max(euclidean_norm(view(c.F, :, j)), p.floor), c.residual[j], c.rate[j])

"Iterations until a residual that shrinks at the present rate is as small as the goal."
predicted_iterations(goal::T, residual::T, rate::T) where {T <: AbstractFloat} = log(goal / residual) / min(log(rate), -floatmin(T))

# --- one sample of an equation: what is cheap first, then what is robust ----------------------------------------

"""
Variants of the trust region for samples on which Newton's method with a line search fails, each from the start. On the systems of
Moré, Garbow and Hillstrom (1981), from their starts and from 10 and 100 times as far, each solves some that the others do not.
"""
const TRUST_REGIONS = (
    TrustRegion(true, 0.1, 1.0), TrustRegion(false, 0.0, 1.0), TrustRegion(true, 1.0, 100.0), TrustRegion(false, 0.0, 0.1),
)

"The share of the evaluations that each method may use, beginning with Newton's; the last gets all that are left."
const ATTEMPT_SHARES = (0.2, 0.2, 0.3, 0.2, 1.0)

"""
The share of the evaluations that whole Newton steps may use after the first trust region. They leave the local minima of ‖f‖, where
everything else ends; the roots they find are farther from the start than those of a trust region.
"""
const WHOLE_STEPS_SHARE = 0.1

"The share of the evaluations that Newton's method may use on a fixed point."
const FIXED_POINT_SHARE = 0.05

"Evaluations that each method gets in any case, if that many are left."
const LEAST_ATTEMPT = 60

iterate!(::Auto, s::Iteration, p::AbstractEquation, tol) = p.root ? find_root!(s, p, tol) : find_fixed_point!(s, p, tol)

# `attempt` with a share of all evaluations, as far as they are left.
with_share!(attempt, s::Iteration, share) = with_limit!(attempt, s, s.evaluations + max(ceil(Int, share * s.limit), LEAST_ATTEMPT))
function with_limit!(attempt, s::Iteration, below)
    limit = s.limit
    s.limit = min(limit, below)
    status = attempt()
    s.limit = limit
    return status
end

function find_root!(s::Iteration, p::AbstractEquation, tol)
    l = linearization!(s)
    status = with_share!(() -> newton!(s, l, p, tol), s, ATTEMPT_SHARES[1])
    status in (CONVERGED, NON_FINITE) && return status
    return (@late trust_regions!(s, l, erased(p), tol))::Status
end

# Each variant of the trust region from the start, and whole Newton steps; evaluations left in the end go to one that was not finished.
function trust_regions!(s::Iteration, l::Linearization, p::AbstractEquation, tol)
    w = Dogleg(p.n)
    unfinished = nothing
    for (way, share) in zip(TRUST_REGIONS, tail(ATTEMPT_SHARES))
        s.evaluations < s.limit || return MAX_ITERATIONS
        restart!(s, p)
        status = with_share!(() -> trust_region!(s, l, w, p, tol, way), s, share)
        status === CONVERGED && return verify(status, s, p, tol)
        status === MAX_ITERATIONS && (unfinished = way)
        p.root && way === first(TRUST_REGIONS) && whole_steps_lead!(s, l, p, tol) && return CONVERGED
    end
    unfinished === nothing && return SINGULAR
    s.evaluations < s.limit || return MAX_ITERATIONS
    restart!(s, p)
    return verify(trust_region!(s, l, w, p, tol, unfinished), s, p, tol)
end

# Whether whole Newton steps from the start lead to a root; else what was found before remains.
function whole_steps_lead!(s::Iteration, l::Linearization, p::AbstractEquation, tol)
    s.evaluations < s.limit || return false
    z, relative, rate = copy(s.z), s.relative, s.rate
    restart!(s, p)
    with_share!(() -> newton!(s, l, p, tol, step_wholly!), s, WHOLE_STEPS_SHARE) === CONVERGED && return true
    copyto!(s.z, z)
    s.relative, s.rate = relative, rate
    return false
end

function step_wholly!(s::Iteration, l::Linearization, solvable::Bool, p::AbstractEquation)
    solvable || return SINGULAR
    copyto!(s.base, s.z)
    s.z .+= l.step
    return evaluate!(s, l, p) && isfinite(s.merit) ? nothing : SINGULAR
end

"Up to this number of unknowns fixed points are found by methods with a matrix."
const DENSE = 2000

# Picard iteration while it is fast, else Newton's method, whose result counts if it attracts; else more of Picard iteration, and
# trust regions in the end. Where none finds a fixed point that attracts, one that Newton's method has found is `UNSTABLE`.
function find_fixed_point!(s::Iteration, p::AbstractEquation, tol)
    status = picard_while_fast!(s, p, tol)
    status === nothing || return status
    if p.n <= DENSE
        copyto!(s.start, s.z)
        forget!(s, p)
        status = with_share!(() -> iterate!(Newton(), s, p, tol), s, FIXED_POINT_SHARE)
        status === CONVERGED && return CONVERGED
    end
    return (@late slow_fixed_point!(s, erased(p), tol, status))::Status
end

"Picard iterations between two trials of Newton's method."
const PICARD_BURSTS = (32, 128, 512)

function slow_fixed_point!(s::Iteration, p::AbstractEquation, tol, status::Status)
    p.n <= DENSE || return iterate!(Anderson(), s, p, tol)
    repelling = as_repelling(s, status)
    for burst in PICARD_BURSTS
        restart!(s, p)
        status = with_limit!(() -> iterate!(Picard(), s, p, tol), s, s.evaluations + burst)
        status === CONVERGED && return CONVERGED
        status === MAX_ITERATIONS || break
        copyto!(s.start, s.z)
        found = with_share!(() -> iterate!(Newton(), s, p, tol), s, FIXED_POINT_SHARE)
        found === CONVERGED && return CONVERGED
        repelling = something(repelling, as_repelling(s, found), Some(nothing))
    end
    found = trust_regions!(s, linearization!(s), p, tol)
    found in (CONVERGED, UNSTABLE) && return found
    repelling === nothing || return return_to!(s, repelling)
    return status === DIVERGED ? DIVERGED : found
end

"A fixed point that has been found, and repels."
struct Repelling{T}
    z::Vector{T}
    relative::Float64
    rate::Float64
end
as_repelling(s::Iteration, status::Status) = status === UNSTABLE ? Repelling(copy(s.z), s.relative, s.rate) : nothing
function return_to!(s::Iteration, r::Repelling)
    copyto!(s.z, r.z)
    s.relative, s.rate = r.relative, r.rate
    return UNSTABLE
end

"The number of Picard iterations that cost as much as a start of Newton's method."
picard_patience(n::Int) = 4 * (n + 2)

# Until the iteration ends, or is so slow that Newton's method is cheaper (`nothing`); a diverging iteration is restarted.
function picard_while_fast!(s::Iteration{T}, p::AbstractEquation{T}, tol) where {T}
    patience = picard_patience(p.n)
    while evaluate!(s, p)
        status = assess!(s, p, tol)
        if status === CONVERGED
            # What iteration leads to attracts, but not what it starts at.
            return finish!(s, CONVERGED, p, tol, s.evaluations == 1)
        elseif status !== nothing
            s.evaluations == 1 && return status
            restart!(s, p)
            return nothing
        end
        advance!(s, one(T))
        s.evaluations % AUTO_BLOCK == 0 && predicted_iterations(s, p, tol) > patience && return nothing
    end
    return MAX_ITERATIONS
end

predicted_iterations(s::Iteration, p::AbstractEquation, tol) =
    predicted_iterations(max(tol * measure(s.z, p.weights), rounding(s)), s.distance, s.rate)

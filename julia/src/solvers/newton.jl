# Newton's method with a line search.

"""
    Newton(; tol = nothing, max_iterations = 100)

Newton's method on `r(z) = f(u + R z) - z`, `z ← z + t (I - D R)⁻¹ r` with one LU factorisation per sample and iteration.
The step t is halved while ‖r‖ does not decrease; where six halvings do not help, a Picard step is taken. Without a
uniqueness guarantee (`Free`) the equilibrium may be one that Picard iteration moves away from: it is then reported as
`UNSTABLE`. Where I - D R is singular, the direction is that of the Picard step; a sample whose iterations end at such a point
is `SINGULAR`.
"""
@kwdef struct Newton <: Solver
    tol::Union{Nothing, Float64} = nothing
    max_iterations::Int = 100
    Newton(tol, max_iterations) = (check_options(tol, max_iterations); new(tol, max_iterations))
end

"The smallest fraction of a Newton step that is tried on a fixed point, after which a Picard step follows."
const SMALLEST_STEP = 2.0^-6

"Whether the fraction `t` of a Newton step has reduced the norm of the residual sufficiently (Armijo's rule)."
@inline decreases(norm::N, before::N, t) where {N} = norm < (1 - N(1.0e-4) * t) * before

"""
    NewtonState{T}(n, width)

The line search of each sample: its `base`, with the Picard step from there (`picard` = f(base)) and the `residual`, the
`direction`, and the size of the current step (0 where the iterate is accepted as it is).
"""
struct NewtonState{T} <: SolverState
    base::Matrix{T}
    picard::Matrix{T}
    direction::Matrix{T}
    step::Vector{T}
    residual::Vector{T}
end
NewtonState{T}(n::Int, width::Int) where {T} =
    NewtonState{T}((zeros(T, n, width) for _ in 1:3)..., zeros(T, width), zeros(T, width))

"A factorisation, and the slopes from which it was computed."
struct FactorBuffers{T}
    A::Matrix{T}
    pivots::Vector{Int}
    slopes::Matrix{T}
end
FactorBuffers{T}(n::Int) where {T} = FactorBuffers{T}(zeros(T, n, n), zeros(Int, n), zeros(T, n, 1))

function iterate!(::Newton, c::Columns{T}, p::Stationary{T}, iterations::Int) where {T}
    n, width = size(c.Z)
    state = buffer!(() -> NewtonState{T}(n, width), c, NewtonState{T})
    fill!(view(state.step, 1:c.active), 0)
    fill!(view(state.residual, 1:c.active), T(Inf))
    c.state = state
    done = search_lines!(state, buffer!(() -> FactorBuffers{T}(n), c, FactorBuffers{T}), c, p, iterations)
    c.state = nothing
    return done
end

function search_lines!(state::NewtonState{T}, buffers, c::Columns{T}, p::Stationary{T}, iterations::Int) where {T}
    for _ in 1:iterations
        evaluate_all!(c, p; check = true) && return true
        for j in 1:c.active
            t, residual = state.step[j], c.residual[j]
            if t > 0 && !decreases(residual, state.residual[j], t)
                t /= 2
                if t < SMALLEST_STEP
                    t = zero(T)
                    copy_column!(c.Z, j, state.picard, j)
                else
                    step_from_base!(c, state, j, t)
                end
                c.residual[j] = state.residual[j]
            else
                t = one(T)
                state.residual[j] = residual
                copy_column!(state.base, j, c.Z, j)
                copy_column!(state.picard, j, c.F, j)
                newton_direction!(view(state.direction, :, j), buffers, c, p, j)
                step_from_base!(c, state, j, t)
            end
            state.step[j] = t
        end
    end
    return false
end

@inline function step_from_base!(c::Columns{T}, state::NewtonState{T}, j::Int, t::T) where {T}
    @inbounds @simd for i in axes(c.Z, 1)
        c.Z[i, j] = muladd(t, state.direction[i, j], state.base[i, j])
    end
    return
end

# direction = (I - D R)⁻¹ (F - Z) for column j; the Picard step F - Z where the matrix is singular.
function newton_direction!(direction, buffers::FactorBuffers, c::Columns, p::Stationary, j::Int)
    check_interrupt()
    picard_step!(direction, c, j)
    if p.factors === nothing
        solved = factorize!(buffers.A, buffers.pivots, buffers.slopes, c, p, j) && lu_solve_finite!(direction, buffers.A, buffers.pivots)
    else
        sample = c.sample[j]
        A, pivots = view(p.factors.LU, :, :, sample), view(p.factors.pivots, :, sample)
        solved = factorize!(A, pivots, buffers.slopes, c, p, j) && lu_solve_finite!(direction, A, pivots)
        p.factors.known[sample] = solved
    end
    solved || picard_step!(direction, c, j)
    return
end

@inline function picard_step!(direction, c::Columns, j::Int)
    @inbounds @simd for i in eachindex(direction)
        direction[i] = c.F[i, j] - c.Z[i, j]
    end
    return
end

lu_solve_finite!(x, A, pivots) = all(isfinite, lu_solve!(x, A, pivots))

# A = I - D R for column j, factorised; false, and noted in `c.singular`, where A is singular to rounding.
function factorize!(A::StridedMatrix{T}, pivots, slopes, c::Columns{T}, p::Stationary{T}, j::Int) where {T}
    slopes!(slopes, p.f, view(c.S, :, j:j), view(c.F, :, j:j))
    residual_jacobian!(A, view(slopes, :, 1), p.recurrence.R)
    c.singular[j] = !lu_factor!(A, pivots) || is_singular(A)
    return !c.singular[j]
end

# --- one sample -------------------------------------------------------------------------------------------------

"The smallest fraction of a Newton step that is tried on a root, which has no fallback; that of a fixed point is `SMALLEST_STEP`."
const SMALLEST_ROOT_STEP = 2.0^-20

function iterate!(::Newton, s::Iteration, p::AbstractEquation, tol)
    return verify(newton!(s, linearization!(s), p, tol), s, p, tol)
end

"""
The status of a converged fixed point: `UNSTABLE` if it repels, and `SINGULAR` if the fixed point may be far away however small
f(z) - z is, as for z = z + 1/z, which has none.
"""
function verify(status::Status, s::Iteration, p::AbstractEquation, tol)
    status === CONVERGED && !p.root || return status
    repels!(s, p) && return UNSTABLE
    return is_located!(s, p, tol) ? CONVERGED : SINGULAR
end

"""
    newton!(s, l, p, tol, move! = search_line!)

`z ← z + t δ` with the Newton step δ, which is halved until ‖c‖ decreases, or taken as `move!` does. A fixed point has converged by
‖f(z) - z‖; a root, whose f may have any unit, by ‖δ‖, which estimates the error of z.
"""
function newton!(s::Iteration, l::Linearization, p::AbstractEquation, tol, move!::M = search_line!) where {M}
    evaluate!(s, l, p) || return MAX_ITERATIONS
    isfinite(s.merit) || return NON_FINITE
    while true
        status = p.root ? nothing : assess!(s, p, tol)
        status === nothing || return finish!(s, status)
        solvable = newton_step!(s, l, p)
        p.root && solvable && s.last_merit == Inf && weigh_rows!(s, l, p, EQUAL_TERMS)
        if p.root
            status = assess_root!(s, l, solvable, p, tol)
            status === nothing || return status
        end
        status = move!(s, l, solvable, p)
        status === nothing || return status
    end
    return
end

"The status of a root, given the Newton step; `nothing`: continue. A converged root takes the step, which is as good as another iteration."
@inline function assess_root!(s::Iteration, l::Linearization, solvable::Bool, p::AbstractEquation, tol::Float64)
    size = measure(s.z, p.weights)
    proven = isfinite(s.distance) && s.merit <= LEFT_OF_CONDITIONS * s.last_merit
    s.last_merit = s.merit
    if solvable
        last = s.distance
        is_sudden = far_step(tol) * max(size, s.largest) < last < Inf
        near!(s, p, tol, measure(l.step, p.weights), size) || return converges_to_zero!(s, p) ? CONVERGED : nothing
        is_part(s, p, last) && jumps!(s, l, p) && return nothing
        if !proven && s.merit > 0 && !is_steady!(s, l, p)
            s.distance = Inf
            return nothing
        end
        is_sudden && !responds!(s, l, p) && return SINGULAR
        @inbounds for i in eachindex(s.z)
            s.z[i] += l.step[i]
        end
        return CONVERGED
    end
    s.merit == 0 || return nothing
    # A condition that has underflowed, as exp(-z) does, is zero with all its derivatives.
    s.evaluations > 1 && any(i -> all(iszero, view(l.J, i, :)), axes(l.J, 1)) && return SINGULAR
    near!(s, p, tol, 0.0, size)
    return CONVERGED
end

# A short step to a root makes the conditions much smaller. Newton steps are equally short at a pole, from which they lead
# away, and where f has an infinite slope, as √z + 1 at zero.
"The largest fraction of ‖c‖ that remains after a step to a root."
const LEFT_OF_CONDITIONS = 0.5

"The largest last-but-one step of Newton's method near a root, relative to the largest iterate."
far_step(tol) = max(1.0e-3, 10sqrt(tol))

"The fraction of the last step that is taken back to see whether f responds, and the factor within which the response must agree."
const BACKSTEP, RESPONSE = 2.0^-10, 32.0

# Whether f changes roughly as its derivatives predict around a root that appeared suddenly. If it does not, it is rounding that makes
# the conditions zero, as those of z/(1 + z) = 1 from 1e16 on, and z is not a root.
@noinline function responds!(s::Iteration{T}, l::Linearization{T}, p::AbstractEquation{T}) where {T}
    expected, found = similar(s.z), similar(s.c)
    map_each!((z, before) -> z + T(BACKSTEP) * (before - z), s.picard, s.z, s.base)
    map_each!(-, expected, s.picard, s.z)
    call!(found, p, s.picard, s.sample)
    subtract!(found, s.c)
    lu_solve!(found, l.LU, l.pivots)
    return all(i -> is_response(found[i], expected[i]), eachindex(found)) &&
        !(measure(found, p.weights) > RESPONSE * measure(expected, p.weights))
end
is_response(found, expected) = !(oftype(found, RESPONSE) * abs(found) < abs(expected))

"Whether a root has been found, to rounding, if no step makes progress."
function is_at_root!(s::Iteration, l::Linearization, p::AbstractEquation)
    settled(s) || return false
    p.root || return true
    conditions_jacobian!(l.J, p, s.z, s.sample)
    call!(s.c, p, s.z, s.sample)
    return is_steady!(s, l, p) && !jumps!(s, l, p)
end

# Whether the Jacobian is about the same two steps further, as at a root at which one may have started; in any units of the unknowns.
@noinline function is_steady!(s::Iteration{T}, l::Linearization{T}, p::AbstractEquation{T}) where {T}
    map_each!((z, step) -> z + 2step + 8eps(T) * z, s.picard, s.z, l.step)
    change = similar(l.J)
    conditions_jacobian!(change, p, s.picard, s.sample)
    subtract!(change, l.J)
    foreach(k -> lu_solve!(view(change, :, k), l.LU, l.pivots), axes(change, 2))
    units = map_each!((z, step) -> abs(z) + abs(step), similar(s.z), s.z, l.step)
    smallest = max(eps(T) * maximum(units), floatmin(T))
    map_each!(unit -> max(unit, smallest), units, units)
    for j in axes(change, 2), i in axes(change, 1)
        change[i, j] = change[i, j] * units[j] / units[i]
    end
    return largest_column_sum(change) <= T(0.5)
end

# Whether f jumps a little further on or back, as floor(z) does at whole numbers: only fractions of Newton steps lead there.
@noinline function jumps!(s::Iteration{T}, l::Linearization{T}, p::AbstractEquation{T}) where {T}
    way, change = map_each!((step, z) -> 2step + copysign(8eps(T) * z, step), similar(s.z), l.step, s.z), similar(s.c)
    return any((1, -1)) do sign
        map_each!((z, d) -> z + sign * d, s.picard, s.z, way)
        call!(change, p, s.picard, s.sample)
        subtract!(change, s.c)
        lu_solve!(change, l.LU, l.pivots)
        2 * measure(way, p.weights) + sqrt(default_tolerance(T)) * s.largest < measure(change, p.weights) < Inf
    end
end

"Whether the last step was part of a Newton step of that size."
function is_part(s::Iteration, p::AbstractEquation, size::Float64)
    map_each!(-, s.picard, s.z, s.base)
    return measure(s.picard, p.weights) < 0.9 * size < Inf
end

# Move along the step, halved while ‖c‖ does not decrease. If that does not help, a fixed point takes a Picard step, and the
# conditions of a root get new weights. Returns the status of the iteration if it ended, or `nothing`.
function search_line!(s::Iteration{T}, l::Linearization{T}, solvable::Bool, p::AbstractEquation{T}) where {T}
    copyto!(s.base, s.z)
    if !p.root
        copyto!(s.picard, s.value)
        halve_step!(s, l, solvable, p, SMALLEST_STEP) && return nothing
        copyto!(s.z, s.picard)
        return evaluate!(s, l, p) ? nothing : MAX_ITERATIONS
    end
    halve_step!(s, l, solvable, p, SMALLEST_ROOT_STEP) && return nothing
    copyto!(s.z, s.base)
    s.evaluations < s.limit || return MAX_ITERATIONS
    if solvable && p.n > 1
        evaluate!(s, l, p)
        weigh_rows!(s, l, p, 1.0)
        halve_step!(s, l, solvable, p, SMALLEST_ROOT_STEP) && return nothing
        copyto!(s.z, s.base)
        s.evaluations < s.limit || return MAX_ITERATIONS
    end
    return is_at_root!(s, l, p) ? CONVERGED : SINGULAR
end

"Whether a fraction of the step, halved down to `smallest`, decreases ‖c‖; the iterate is then there. Also false if no evaluation is left."
@inline function halve_step!(s::Iteration{T}, l::Linearization{T}, solvable::Bool, p::AbstractEquation{T}, smallest) where {T}
    before, t = s.merit, one(T)
    while solvable && t >= smallest
        @inbounds for i in eachindex(s.z)
            s.z[i] = muladd(t, l.step[i], s.base[i])
        end
        evaluate!(s, l, p) || return false
        decreases(s.merit, before, t) && all(isfinite, s.z) && return true
        t /= 2
    end
    return false
end

"Conditions whose terms differ by less than this factor at the start have equal weights in ‖c‖, as long as steps make progress."
const EQUAL_TERMS = 1.0e8

# Conditions of very different units hide each other in ‖c‖: the round-off of a large one may exceed the whole of a small one.
# So each is divided by the terms of its linear model, |J| (|z| + |step|), unless those differ by less than `equal`.
function weigh_rows!(s::Iteration, l::Linearization, p::AbstractEquation, equal::Float64)
    p.n > 1 || return
    J = jacobian!(s, l, p)
    smallest, largest = Inf, 0.0
    for i in axes(J, 1)
        terms = terms_of_row(J, i, s.z, l.step)
        smallest, largest = min(smallest, terms), max(largest, terms)
    end
    floatmin(Float64) < smallest && equal * smallest < largest < Inf || return
    resize!(s.row_weights, p.n)
    for i in axes(J, 1)
        s.row_weights[i] = 1 / terms_of_row(J, i, s.z, l.step)
    end
    s.merit = s.last_merit = measure(s.c, s.row_weights)
    return
end

@inline function terms_of_row(J, i, z, step)
    terms = 0.0
    @inbounds for j in eachindex(z)
        terms += abs(Float64(J[i, j])) * (abs(Float64(z[j])) + abs(Float64(step[j])))
    end
    return terms
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

# With rounding errors of z: where there is a line of fixed points, as of averages, Newton's method finds any of them, and exactly.
"Whether the Newton step from a fixed point, which estimates its error, is one that leads to it."
function is_located!(s::Iteration{T}, p::AbstractEquation, tol) where {T}
    s.merit == 0 && iszero(s.z) && return true
    l = linearization!(s)
    near(c) = solve_step!(l, c) && measure(l.step, p.weights) <= far_step(tol) * s.largest
    return newton_step!(s, l, p) && near(s.c) && near(s.c .+ eps(T) .* abs.(s.z) .* direction(s.z))
end

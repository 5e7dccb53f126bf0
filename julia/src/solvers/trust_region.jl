# Powell's hybrid method, the dogleg in a trust region, with the exact Jacobian, for samples that Newton's method with a line search
# does not solve. After Powell (1970) and Moré, Garbow and Hillstrom, User guide for MINPACK-1 (1980), with dimensionless numbers:
# the residual in units of its norm, the unknowns in units in which every column of the Jacobian has norm 1.

"""
    TrustRegion(scaled, memory, radius)

One way to measure steps: with each unknown in the unit in which its column of the Jacobian has norm 1 (`scaled`), using
the largest norms so far, reduced by the factor `memory` per step since; or with all unknowns in the same unit. The first
`radius` is in units of the norm of the start.
"""
struct TrustRegion
    scaled::Bool
    memory::Float64
    radius::Float64
end

"Buffers of the trust region for one sample, in double precision."
struct Dogleg
    units::Vector{Float64}       # norms of the columns
    J::Matrix{Float64}           # of c / ‖c‖ in these units
    c::Vector{Float64}           # c / ‖c‖
    newton::Vector{Float64}
    cauchy::Vector{Float64}
    gradient::Vector{Float64}
    step::Vector{Float64}
    image::Vector{Float64}       # J times something
end
Dogleg(n::Int) = Dogleg(zeros(n), zeros(n, n), (zeros(n) for _ in 1:6)...)

# The ratio rules of MINPACK: shrink below 0.1, double from 0.5, and accept from 10⁻⁴.
const SHRINK_BELOW, DOUBLE_FROM, TWICE_STEP_FROM, ACCEPT_FROM = 0.1, 0.5, 0.9, 1.0e-4

"The radius for the next step after one of length `step`, of which `ratio` of the predicted reduction came true."
next_radius(radius, step, ratio) = !(ratio >= SHRINK_BELOW) ? min(radius, step) / 2 :
    ratio >= TWICE_STEP_FROM ? 2step : ratio >= DOUBLE_FROM ? max(radius, 2step) : radius

function trust_region!(s::Iteration{T}, l::Linearization{T}, w::Dogleg, p::AbstractEquation{T}, tol, way::TrustRegion) where {T}
    evaluate!(s, l, p) || return MAX_ITERATIONS
    isfinite(s.merit) || return NON_FINITE
    fill!(w.units, 0)
    radius = NaN
    while true
        # The status of the iterate.
        status = p.root ? nothing : assess!(s, p, tol)
        status === nothing || status === DIVERGED || return finish!(s, status)
        solvable = newton_step!(s, l, p)
        if p.root
            status = assess_root!(s, l, solvable, p, tol)
            status === nothing || return status
        end
        all(isfinite, l.J) && linear_model!(w, s, l, p, way) || return SINGULAR
        if isnan(radius)
            radius = way.radius * sqrt(sum(i -> abs2(w.units[i] * Float64(s.z[i])), eachindex(s.z)))
            radius > 0 || (radius = way.radius * s.merit)
        end
        # A step that reduces ‖c‖.
        copyto!(s.base, s.z)
        before = s.merit
        while true
            dogleg!(w, l, solvable, radius / before, before) || return SINGULAR
            moved = take_step!(s, w, p, before)
            if !moved || !evaluate!(s, l, p)
                copyto!(s.z, s.base)
                return moved ? MAX_ITERATIONS : is_at_root!(s, l, p) ? CONVERGED : SINGULAR
            end
            ratio = isfinite(s.merit) ? (1 - (s.merit / before)^2) / predicted_reduction(w) : -Inf
            radius = next_radius(radius, before * norm(w.step), ratio)
            ratio >= ACCEPT_FROM && break
        end
    end
    return
end

# c/‖c‖ and its Jacobian in the units of this variant; false where the Jacobian is zero.
function linear_model!(w::Dogleg, s::Iteration, l::Linearization, p::AbstractEquation, way::TrustRegion)
    rows = p.root ? NO_WEIGHTS : p.weights         # as in the merit function
    largest = 0.0
    for k in axes(l.J, 2)
        w.newton[k] = measure(view(l.J, :, k), rows)
        largest = max(largest, w.newton[k] / weight(p.weights, k))
    end
    largest > 0 || return false
    for k in axes(l.J, 2)
        # An unknown on which nothing depends here has the unit of the others.
        uniform = largest * weight(p.weights, k)
        own = w.newton[k] > 1.0e-14 * uniform ? w.newton[k] : uniform
        w.units[k] = way.scaled ? max(own, way.memory * w.units[k]) : w.units[k] == 0 ? uniform : w.units[k]
    end
    for k in axes(l.J, 2), i in axes(l.J, 1)
        w.J[i, k] = weight(rows, i) * l.J[i, k] / w.units[k]
    end
    for i in eachindex(w.c)
        w.c[i] = weight(rows, i) * s.c[i] / s.merit
    end
    return true
end

# w.step = the minimiser of ‖c + J q‖ within the radius along Powell's dogleg; false at a stationary point of ‖c‖.
function dogleg!(w::Dogleg, l::Linearization, solvable::Bool, radius::Float64, size_of_c::Float64)
    if solvable
        for i in eachindex(w.newton)
            w.newton[i] = w.units[i] * (l.step[i] / size_of_c)
        end
        if norm(w.newton) <= radius
            copyto!(w.step, w.newton)
            return true
        end
    end
    gemv!('T', true, w.J, w.c, false, w.gradient)
    steepness = norm(w.gradient)
    gemv!('N', true, w.J, w.gradient, false, w.image)
    steepness > 0 && (length_of_cauchy = steepness * (steepness / norm(w.image))^2; isfinite(length_of_cauchy)) || return false
    if !solvable || length_of_cauchy >= radius
        w.step .= w.gradient .* (-min(length_of_cauchy, radius) / steepness)
        return true
    end
    w.cauchy .= w.gradient .* (-length_of_cauchy / steepness)
    w.newton .-= w.cauchy
    a, b, c = sum(abs2, w.newton), dot(w.cauchy, w.newton), abs2(length_of_cauchy) - abs2(radius)
    t = b > 0 ? -c / (b + sqrt(b^2 - a * c)) : (sqrt(b^2 - a * c) - b) / a
    w.step .= w.cauchy .+ t .* w.newton
    return true
end

# z = base + step; false if the step no longer changes z.
function take_step!(s::Iteration{T}, w::Dogleg, p::AbstractEquation, size_of_c::Float64) where {T}
    moved, size = false, measure(s.base, p.weights)
    for i in eachindex(s.z)
        s.z[i] = s.base[i] + T(w.step[i] * (size_of_c / w.units[i]))
        moved |= abs(s.z[i] - s.base[i]) > max(2eps(T) * abs(s.base[i]), Float64(eps(T))^2 * size / weight(p.weights, i))
    end
    return moved
end

# Of ‖c‖², relative.
function predicted_reduction(w::Dogleg)
    gemv!('N', true, w.J, w.step, false, w.image)
    return 1 - sum(i -> abs2(w.c[i] + w.image[i]), eachindex(w.c))
end

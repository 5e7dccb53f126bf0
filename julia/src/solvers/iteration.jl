# The iteration of one sample of an equation: its state, evaluations of f and their count, and convergence. The iteration of the stages
# of a network in columns, many samples at a time, is in cpu/columns.jl.

"""
    AbstractEquation{T}

The interface of solvers to an equation of one sample, z = f(z), or f(z) = 0 for a `root`. A subtype has the fields `root`; `n`, the
number of unknowns; and `weights`, by which entries are multiplied in norms, empty if all count alike; and the methods

- [`call!`](@ref)`(y, p, z, sample)`, and `call!(y, J, p, z, sample)` where the Jacobian comes with the value;
- [`conditions_jacobian!`](@ref)`(J, p, z, sample)`.
"""
abstract type AbstractEquation{T} end

"∂c/∂z of one sample, its LU factorisation, and the Newton step."
struct Linearization{T}
    J::Matrix{T}
    LU::Matrix{T}
    pivots::Vector{Int}
    step::Vector{T}
end
Linearization{T}(n::Int) where {T} = Linearization{T}(zeros(T, n, n), zeros(T, n, n), zeros(Int, n), zeros(T, n))

"""
    Iteration{T}(n)

The current sample, of `n` unknowns: the iterate `z`, the `value` f(z), and the residual `c` of the conditions f(z) - z or f(z);
`base` and `picard` are the z and f(z) at which the current step begins (for a root, `picard` is a trial point). Norms are in double
precision. Made once and used for one sample after the other.
"""
mutable struct Iteration{T}
    const z::Vector{T}
    const value::Vector{T}
    const c::Vector{T}
    const base::Vector{T}
    const picard::Vector{T}
    const start::Vector{T}
    linear::Union{Nothing, Linearization{T}}         # made when a solver first needs it
    linearized::Bool          # its J is that at z
    sample::Int
    evaluations::Int
    limit::Int                # of evaluations
    merit::Float64            # ‖c‖, which steps are to reduce
    largest::Float64          # largest norm so far, that of f(z) for a fixed point: so that a distant start does not loosen the criterion
    outset::Float64           # size of z and f(z) at the start
    distance::Float64         # size of the last step: f(z) - z, or of Newton's method on a root
    rate::Float64             # its quotient with the previous one
    relative::Float64         # its quotient with the size it is relative to
    last_merit::Float64       # ‖c‖ at the Newton step of a root before
    const row_weights::Vector{Float64}    # of the conditions of a root in ‖c‖, none where all count alike
end
Iteration{T}(n::Int) where {T} =
    Iteration{T}((zeros(T, n) for _ in 1:6)..., nothing, false, 0, 0, 0, NaN, 0.0, 0.0, Inf, 0.0, Inf, Inf, Float64[])

"Begin with a sample from the start `z`, with a limit on the evaluations of f."
@inline function begin!(s::Iteration, p::AbstractEquation, Z::Matrix, sample::Int, limit::Int)
    copy_column!(s.z, 1, Z, sample)
    copyto!(s.start, s.z)
    s.sample, s.evaluations, s.limit = sample, 0, limit
    return forget!(s, p)
end

"Begin again from the start; the count of evaluations continues."
@inline restart!(s::Iteration, p::AbstractEquation) = (copyto!(s.z, s.start); forget!(s, p))

@inline function forget!(s::Iteration, p::AbstractEquation)
    s.largest, s.outset = 0.0, measure(s.z, p.weights)
    s.distance, s.rate, s.relative, s.merit, s.last_merit = Inf, 0.0, Inf, NaN, Inf
    isempty(s.row_weights) || empty!(s.row_weights)
    return s
end

linearization!(s::Iteration{T}) where {T} =
    (s.linear === nothing && (s.linear = Linearization{T}(length(s.z))); s.linear::Linearization{T})

const NO_WEIGHTS = Float64[]

weight(weights::Vector{Float64}, i) = isempty(weights) ? 1.0 : weights[i]

"The Euclidean norm of x, each entry times its weight if there are weights, without intermediate overflow or underflow."
@inline function measure(x::AbstractVector, weights::Vector{Float64} = NO_WEIGHTS)
    total = 0.0
    if isempty(weights)
        @inbounds @simd for i in eachindex(x)
            total += abs2(Float64(x[i]))
        end
    else
        @inbounds @simd for i in eachindex(x)
            total += abs2(Float64(x[i]) * weights[i])
        end
    end
    return 1.0e-280 < total < 1.0e280 ? sqrt(total) : measure_scaled(x, weights)
end

@noinline function measure_scaled(x, weights)
    weighted(i) = abs(Float64(x[i])) * weight(weights, i)
    largest = maximum(weighted, eachindex(x))
    (largest > 0 && isfinite(largest)) || return largest         # NaN, too
    return largest * sqrt(sum(i -> abs2(weighted(i) / largest), eachindex(x)))
end

"""
    evaluate!(s, p)

Evaluate f at the iterate; return false without evaluating if no evaluation is left. Evaluations are counted only here.
"""
@inline function evaluate!(s::Iteration, p::AbstractEquation)
    s.evaluations < s.limit || return false
    s.evaluations += 1
    s.linearized = false
    call!(s.value, p, s.z, s.sample)
    conditions!(s, p)
    return true
end

"`evaluate!` for a solver that is going to need ∂c/∂z at the iterate as well."
@inline function evaluate!(s::Iteration, l::Linearization, p::AbstractEquation)
    s.evaluations < s.limit || return false
    s.evaluations += 1
    s.linearized = call!(s.value, l.J, p, s.z, s.sample)
    if s.linearized && !all(isfinite, s.value)          # dual numbers may have missed a guard, see `step_beside!`
        call!(s.value, p, s.z, s.sample)
        s.linearized = false
    end
    conditions!(s, p)
    return true
end

@inline function conditions!(s::Iteration, p::AbstractEquation)
    @inbounds for i in eachindex(s.c)
        s.c[i] = p.root ? s.value[i] : s.value[i] - s.z[i]
    end
    s.merit = measure(s.c, p.root ? s.row_weights : p.weights)
    return
end

"∂c/∂z at the iterate, at which f has just been evaluated."
@inline function jacobian!(s::Iteration, l::Linearization, p::AbstractEquation)
    s.linearized || conditions_jacobian!(l.J, p, s.z, s.sample)
    s.linearized = true
    return l.J
end

# A guard such as `x == 0 ? 1 : x / expm1(x)` is not seen by dual numbers, which differ from 0 by their derivatives, and the slope of
# cbrt at 0 is infinite. Where f has a value, a step by the derivatives a little beside the iterate, on one side of it, leads on.
@noinline function step_beside!(s::Iteration, l::Linearization, p::AbstractEquation{T}) where {T}
    all(isfinite, s.c) && !all(isfinite, l.J) || return false
    unit(k) = iszero(s.z[k]) ? inv(T(weight(p.weights, k))) : abs(s.z[k])
    beside = s.z .+ T(2)^-17 .* unit.(eachindex(s.z)) .* direction(s.z)
    conditions_jacobian!(l.J, p, beside, s.sample)
    return solve_step!(l, s.c)
end

"The Newton step -(∂c/∂z)⁻¹ c; false where the matrix has no inverse."
@inline function newton_step!(s::Iteration, l::Linearization, p::AbstractEquation)
    jacobian!(s, l, p)
    return solve_step!(l, s.c) || step_beside!(s, l, p)
end
@inline function solve_step!(l::Linearization, c)
    copyto!(l.LU, l.J)
    lu_factor!(l.LU, l.pivots) || return false
    @inbounds for i in eachindex(l.step)
        l.step[i] = -c[i]
    end
    lu_solve!(l.step, l.LU, l.pivots)
    return all(isfinite, l.step)
end

"The quotient of two steps above which convergence is so slow that zero is tried, if steps are below the round-off of the largest iterate."
const SLOW = 0.4

"""
    near!(s, p, tol, distance, size)

Whether a step of size `distance` from an iterate of that `size` ends the iteration: one of at most `tol ⋅ size`, where entries
count as no smaller than their scale if they have one; or, since a solution may be zero to rounding, one below the round-off of the
largest iterate so far, if steps no longer shrink. Steps to a root no longer shrink if no part of them makes progress, see `is_at_root!`.
"""
@inline function near!(s::Iteration{T}, p::AbstractEquation, tol::Float64, distance::Float64, size::Float64) where {T}
    isempty(p.weights) || (size = max(size, sqrt(p.n)))
    s.largest = max(s.largest, size)
    isfinite(s.distance) && (s.rate = distance == 0 ? 0.0 : distance / s.distance)
    s.distance = distance
    s.relative = distance == 0 ? 0.0 : distance / max(size, rounding(s) / tol)
    distance <= tol * size && return true
    return settled(s) && (distance == 0 || (!p.root && s.rate >= 1))
end

rounding(s::Iteration{T}) where {T} = Float64(eps(T)) * s.largest

"Whether the last step was below the round-off of the largest iterate: good enough if no step makes progress."
settled(s::Iteration) = s.distance <= rounding(s)

# However far the start, shrinking steps lead to a solution, which may be small; or they approach zero without end.
"Whether small steps approach zero, and zero solves the equation and, for a fixed point, attracts. Zero is then the iterate."
@inline converges_to_zero!(s::Iteration, p::AbstractEquation) = settled(s) && is_slow(s) && (@late zero_solves!(s, p))::Bool
@inline is_slow(s::Iteration{T}) where {T} = s.rate > SLOW || s.distance <= eps(T) * rounding(s) || s.evaluations == s.limit

function zero_solves!(s::Iteration, p::AbstractEquation)
    z, value = copy(s.z), similar(s.value)
    fill!(s.z, 0)
    try
        call!(value, p, s.z, s.sample)
    catch error                      # f need not have a value there
        error isa Union{Interrupted, InterruptException} && rethrow()
        fill!(value, NaN)
    end
    if !all(iszero, value) || (!p.root && p.n <= DENSE && repels!(s, p))
        copyto!(s.z, z)
        return false
    end
    fill!(s.value, 0)
    s.merit = s.distance = s.relative = 0.0
    return true
end

"The status of a fixed-point iteration after an evaluation of f; `nothing`: continue."
@inline function assess!(s::Iteration, p::AbstractEquation, tol::Float64)
    size = measure(s.value, p.weights)
    isfinite(s.merit) && isfinite(size) || return NON_FINITE
    s.evaluations == 1 && (s.outset = max(s.outset, size))
    (near!(s, p, tol, s.merit, size) || converges_to_zero!(s, p)) && return CONVERGED
    return s.merit > BLOW_UP * s.outset ? DIVERGED : nothing
end

"The solution of a fixed point is f(z), which is more accurate than z, unless it is not finite."
@inline function finish!(s::Iteration, status::Status)
    status === NON_FINITE || copyto!(s.z, s.value)
    return status
end

"The same for a fixed point that, if `doubtful`, may repel or be spurious: this is checked where a matrix is affordable."
function finish!(s::Iteration, status::Status, p::AbstractEquation, tol, doubtful::Bool)
    finish!(s, status)
    return doubtful && p.n <= DENSE ? verify(status, s, p, tol) : status
end

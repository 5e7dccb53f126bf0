# Common to all solvers: their options, and the status of a solve.

"""
How the solve of one sample ended: `CONVERGED`, `MAX_ITERATIONS`, `DIVERGED`, `NON_FINITE`, `UNSTABLE` (an equilibrium that
Picard iteration moves away from, the spectral radius of its Jacobian being >= 1), or `SINGULAR` (the Jacobian of the equation
has no inverse, and no step makes progress).
"""
@enum Status::Int8 CONVERGED MAX_ITERATIONS DIVERGED NON_FINITE UNSTABLE SINGULAR

"""
    Solver

A configuration of the forward solve; every solver has a relative tolerance `tol` (`nothing` for the
default of the element type) and `max_iterations`, the largest number of evaluations of f. A sample has converged when
`‖f(u + R z) - z‖₂ <= tol ⋅ max(‖f(u + R z)‖₂, 10⁻³√n)`.
"""
abstract type Solver end

default_tolerance(::Type{T}) where {T} = T === Float32 ? 1.0e-6 : 1.0e-10
tolerance(s, ::Type{T}) where {T} = T(something(s.tol, default_tolerance(T)))

function check_options(tol, max_iterations)
    tol === nothing || check_fraction("tol", tol)
    check_count("max_iterations", max_iterations)
    return
end

"""
    Outcome(samples)

How the solve of each sample ended: `status`, `iterations`, the relative `residual` reached and the
observed contraction `rate`, the quotient of the last two residuals. Stages of a layered net are merged:
the worst of each.
"""
struct Outcome
    status::Vector{Status}
    iterations::Vector{Int32}
    residual::Vector{Float64}
    rate::Vector{Float64}
end
Outcome(samples::Int) = reset!(
    Outcome(
        Vector{Status}(undef, samples), Vector{Int32}(undef, samples),
        Vector{Float64}(undef, samples), Vector{Float64}(undef, samples)
    )
)

function reset!(o::Outcome)
    fill!(o.status, CONVERGED)
    fill!(o.iterations, 0)
    fill!(o.residual, 0)
    fill!(o.rate, 0)
    return o
end

"Copy the outcome of the first samples of `from` to the `samples` with these numbers."
function copy_outcome!(to::Outcome, samples, from::Outcome)
    checkbounds(to.status, samples)
    for (k, j) in enumerate(samples)
        set_outcome!(to, j, from.status[k], from.iterations[k], from.residual[k], from.rate[k])
    end
    return to
end

@inline function set_outcome!(o::Outcome, sample::Int, status::Status, iterations, residual, rate)
    @inbounds o.status[sample], o.iterations[sample], o.residual[sample], o.rate[sample] = status, iterations % Int32, residual, rate
    return
end

worse(a, b) = ifelse((a > b) | isnan(a), a, b)

function record!(o::Outcome, sample::Int, status::Status, iterations, residual, rate)
    @inbounds begin
        o.status[sample] = max(o.status[sample], status)
        o.iterations[sample] = max(o.iterations[sample], iterations % Int32)
        o.residual[sample] = worse(Float64(residual), o.residual[sample])
        o.rate[sample] = worse(Float64(rate), o.rate[sample])
    end
    return
end

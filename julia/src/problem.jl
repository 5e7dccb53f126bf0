# Problems and their solutions.

const SOLVERS = (; Auto, Picard, Anderson, Newton, Chord, NLsolve = NLsolver)

"""
    Problem(net; solver = Auto(), adjoint = Implicit(), loss = MSE(), jacobian_penalty = 0)

A network with all options for its solution and its training; for the penalty see [`JacobianPenalty`](@ref).
"""
mutable struct Problem{T}
    const net::Network{T}
    # Of abstract types: they are dispatched on once per tile, and the code is compiled once for all of their combinations.
    const solver::Solver
    const adjoint::Adjoint
    const loss::Loss
    const jacobian_penalty::Float64
end
function Problem(net::Network; solver = Auto(), adjoint = Implicit(), loss = MSE(), jacobian_penalty = 0.0)
    check_option("solver", solver, Solver, "Auto() or Newton()")
    check_option("adjoint", adjoint, Adjoint, "Implicit()")
    check_option("loss", loss, Loss, "MSE()")
    check_number("jacobian_penalty", jacobian_penalty, x -> 0 <= x < Inf, "be finite and not negative")
    jacobian_penalty > 0 && adjoint isa Unrolled &&
        throw(ArgumentError("the Jacobian penalty is taken at an equilibrium, which Unrolled does not have"))
    return Problem(net, solver, adjoint, loss, Float64(jacobian_penalty))
end

# --- how it went ----------------------------------------------------------------------------------------------

"The solution for the samples of a problem; the fields of `outcome` can be read from it directly."
abstract type AbstractSolution end
Base.getproperty(s::AbstractSolution, name::Symbol) =
    name in fieldnames(Outcome) ? getfield(getfield(s, :outcome), name) : getfield(s, name)
Base.propertynames(s::AbstractSolution, private::Bool = false) = (fieldnames(typeof(s))..., fieldnames(Outcome)...)

function Base.show(io::IO, s::AbstractSolution)
    done, residual = count(converged(s)), round(maximum(s.residual; init = 0.0); sigdigits = 2)
    return print(
        io, nameof(typeof(s)), "($done of $(length(s.status)) samples converged, iterations up to $(maximum(s.iterations; init = 0)), \
        residual up to $residual)"
    )
end

"Which samples reached their solution."
converged(s::AbstractSolution) = s.status .== CONVERGED

"""
    Solution

The equilibria of a batch: `state` (neurons × samples) and, per sample, `status`, `iterations`, the relative
`residual`, the observed contraction `rate`, and `bound`, a bound on max |z - z*| that is certified up to the rounding of one
evaluation (NaN where the constraint provides none).
"""
struct Solution{T, A <: AbstractMatrix{T}} <: AbstractSolution
    state::A
    outcome::Outcome
    bound::Vector{Float64}
end

"A solution for that many samples, to be filled in."
Solution(net::Network{T}, samples::Int) where {T} =
    Solution(Matrix{T}(undef, neurons(net), samples), Outcome(samples), Vector{Float64}(undef, samples))

"An `ErrorException` if not all samples reached their equilibrium."
function check_converged(status, residual)
    failed = count(!=(CONVERGED), status)
    failed == 0 || error(
        "$failed of $(length(status)) samples did not reach an equilibrium, the largest relative residual is $(maximum(residual)); " *
            "`equilibrium` tells which, and another solver or a constraint may help"
    )
    return
end

"A sample whose adjoint has a relative residual of this or more counts as unconverged."
const WORST_ADJOINT = 1.0e-3

"""
Summary of the solves behind a gradient: the number of samples that did not converge (forward or adjoint), and the worst residuals of
the forward solves and of the adjoint systems (NaN where one was singular).
"""
struct Quality
    unconverged::Int
    residual::Float64
    adjoint_residual::Float64
end
Quality() = Quality(0, 0.0, 0.0)

function check_converged(quality::Quality, samples::Int)
    (; unconverged, residual, adjoint_residual) = quality
    unconverged == 0 || error(
        "$unconverged of $samples samples did not reach an equilibrium, or the derivative there was not found; the largest relative " *
            "residuals are $residual and $adjoint_residual; `equilibrium` tells which, and another solver or a constraint may help"
    )
    return
end

"The quality of the solves of the first samples, given their outcome and the residuals of their adjoint systems."
function Quality(outcome, adjoint_residual, adjoint::Adjoint, samples::Int = length(adjoint_residual))
    needed, unconverged, forward, backward = needs_equilibrium(adjoint), 0, 0.0, 0.0
    for j in 1:samples
        unconverged += needed && (outcome.status[j] != CONVERGED || !(adjoint_residual[j] < WORST_ADJOINT))
        forward, backward = worse(outcome.residual[j], forward), worse(adjoint_residual[j], backward)
    end
    return Quality(unconverged, forward, backward)
end

"The arrays (status, residual, adjoint residual) that a caller wants filled in, or nothing; of one type, so that all calls share their code."
struct Report
    arrays::Union{Nothing, NTuple{3, AbstractVector}}
end
is_wanted(report::Report) = report.arrays !== nothing

"Fill in a report for the samples with these numbers, which are the first ones of `outcome` and `adjoint_residual`."
report!(report::Report, samples, outcome, adjoint_residual) =
    is_wanted(report) && fill_arrays!(report.arrays, samples, outcome, adjoint_residual)
function fill_arrays!(arrays, samples, outcome, adjoint_residual)
    put!(to, from) = copyto!(view(to, samples), view(from, eachindex(samples)))
    foreach(put!, arrays, (outcome.status, outcome.residual, adjoint_residual))
    return
end

Base.merge(a::Quality, b::Quality) = Quality(
    a.unconverged + b.unconverged, worse(a.residual, b.residual), worse(a.adjoint_residual, b.adjoint_residual)
)

"The loss over some samples, and the quality of their solves."
struct Summary
    loss::Float64
    quality::Quality
end
Summary() = Summary(0.0, Quality())
Base.merge(a::Summary, b::Summary) = Summary(a.loss + b.loss, merge(a.quality, b.quality))

"Whether the gradient is that of the loss at an equilibrium only."
needs_equilibrium(::Adjoint) = true
needs_equilibrium(::Unrolled) = false

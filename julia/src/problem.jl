# What is posed and what comes of it; and the seam between them and the hardware: a workspace does batches.

const SOLVERS = (; Auto, Picard, Anderson, Newton, Chord, NLsolve = NLsolver)

"""
    Problem(net; solver = Auto(), adjoint = Implicit(), loss = MSE(), jacobian_penalty = 0)

A network with all that is chosen about its solution and its training; for the penalty see [`JacobianPenalty`](@ref).
"""
mutable struct Problem{T}
    const net::Network{T}
    # Left abstract: they are dispatched on once per tile, and the code is compiled once for all of their combinations.
    const solver::Solver
    const adjoint::Adjoint
    const loss::Loss
    const jacobian_penalty::Float64
end
function Problem(net::Network; solver = Auto(), adjoint = Implicit(), loss = MSE(), jacobian_penalty = 0.0)
    check_option("solver", solver, Solver, "Auto() or Newton()")
    check_option("adjoint", adjoint, Adjoint, "Implicit()")
    check_option("loss", loss, Loss, "MSE()")
    check_number("jacobian_penalty", jacobian_penalty, >=(0), "not be negative")
    jacobian_penalty > 0 && adjoint isa Unrolled &&
        throw(ArgumentError("the Jacobian penalty is taken at an equilibrium, which Unrolled does not have"))
    return Problem(net, solver, adjoint, loss, Float64(jacobian_penalty))
end

check_option(name, option, kind, examples) = option isa kind ||
    throw(ArgumentError("$name is $(repr(option)); expected one made by its constructor, such as $examples"))
check_number(name, x, holds, what, kind = Real) = x isa kind && holds(x) || throw(ArgumentError("$name must $what, got $(repr(x))"))

# --- how it went ----------------------------------------------------------------------------------------------

"What was found for the samples of a problem; the fields of `outcome` can be read from it directly."
abstract type AbstractSolution end
Base.getproperty(s::AbstractSolution, name::Symbol) =
    name in fieldnames(Outcome) ? getfield(getfield(s, :outcome), name) : getfield(s, name)

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
`residual`, the contraction `rate` observed and `bound`, a bound on max |z - z*| that is certified but for the rounding of one
evaluation (NaN where the constraint gives none).
"""
struct Solution{T, A <: AbstractMatrix{T}} <: AbstractSolution
    state::A
    outcome::Outcome
    bound::Vector{Float64}
end

"A solution for so many samples, to be filled in."
Solution(net::Network{T}, samples::Int) where {T} =
    Solution(Matrix{T}(undef, neurons(net), samples), Outcome(samples), Vector{Float64}(undef, samples))

"An `ErrorException` where not all samples reached their equilibrium."
function check_converged(status, residual)
    failed = count(!=(CONVERGED), status)
    failed == 0 || error(
        "$failed of $(length(status)) samples did not reach an equilibrium, the largest relative residual is $(maximum(residual)); " *
            "`equilibrium` tells which, and another solver or a constraint may help"
    )
    return
end

"A sample whose adjoint is solved to no better relative residual than this counts as unconverged."
const WORST_ADJOINT = 1.0e-3

"""
Summary of the solves behind a gradient: samples that did not converge (forward or adjoint), the worst residual of the forward
solves and of the adjoint (NaN where an adjoint system was singular).
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

"Fill in what a caller wants to know of the samples with these numbers, the first ones of `outcome` and `adjoint_residual`."
report!(::Nothing, samples, outcome, adjoint_residual) = nothing
function report!(report, samples, outcome, adjoint_residual)
    put!(to, from) = copyto!(view(to, samples), view(from, eachindex(samples)))
    foreach(put!, report, (outcome.status, outcome.residual, adjoint_residual))
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

# --- the seam -------------------------------------------------------------------------------------------------

"""
    AbstractWorkspace{T}

Where and how batches of a network are computed: all buffers of its passes, on some hardware. It is made for a network, and each
call is given the [`Problem`](@ref) with the options in force. A subtype has the network as its field `net`, an [`Owner`](@ref) as
its field `owner` if its methods are to work [`exclusively`](@ref), and the methods

- [`equilibrium!`](@ref)`(solution, ws, problem, p, X, start = nothing)`
- [`loss_and_gradient!`](@ref)`(g, ws, problem, p, X, Y; probe, weights, report, states)`
- [`vjp!`](@ref)`(g, dX, ws, problem, p, X, V; of, start, probe, report)`
- [`jvp!`](@ref)`(tangent, ws, problem, p, X, dp, dX; of, start, report)`
- `hessian_vector_product!(h, ws, problem, p, X, Y, v, weights = nothing)`
- [`allocate`](@ref)`(ws, dimensions...)`

All else, the training included, is written in terms of these, for any type of array. [`CPUWorkspace`](@ref) is the one of this
package; that of devices comes with the extension for GPU arrays.

One call works in a workspace at a time: tasks that work at once need one each.
"""
abstract type AbstractWorkspace{T} end

"The task that is at work in a workspace, or nothing."
mutable struct Owner
    @atomic task::Union{Nothing, Task}
end
Owner() = Owner(nothing)

"""
    exclusively(work, ws)

`work()`, during which no other task may work in the workspace, if that has an `owner`. Throws an `ErrorException` where another one
does; within its own work a task may call it again.
"""
@inline function exclusively(work::F, ws::AbstractWorkspace) where {F}
    hasfield(typeof(ws), :owner) || return work()
    owner, task = ws.owner, current_task()
    before, free = @atomicreplace owner.task nothing => task
    free || return before === task ? work() : refuse_second_task()
    try
        return work()
    finally
        @atomic :release owner.task = nothing
    end
end

@noinline refuse_second_task() = error(
    "another task is at work in this workspace, whose buffers are for one call at a time; give each task a workspace of its own, \
    `Workspace(net)`, and a trainer of its own"
)

"""
    equilibrium!(solution, ws, problem, p, X, start = nothing)

Fill in the [`Solution`](@ref) for the samples `X` (features × samples) and the parameters `p`, from the iterate `start` (neurons ×
samples) or zero.
"""
function equilibrium! end

"""
    loss_and_gradient!(g, ws, problem, p, X, Y; probe = 0, weights = nothing, report = nothing, states = nothing)

The loss and its [`Quality`](@ref); the gradient goes to `g`. A `report` (status, residual, adjoint residual) of vectors is filled
in per sample. Where `states` (neurons × samples) are given, they are the first iterates, and become the equilibria found; zero for a
sample that has not converged.
"""
function loss_and_gradient! end

"""
    vjp!(g, dX, ws, problem, p, X, V; of = :outputs, start = nothing, probe = 0, report = nothing)

The derivative of Σ ⟨V, outputs⟩, or with `of = :state` of Σ ⟨V, state⟩, with respect to the parameters goes to `g`, that with
respect to the samples to `dX` (features × samples). Where `start` (neurons × samples) holds the equilibria, one evaluation of f confirms
it. The loss of the problem plays no part; its Jacobian penalty is added. Returns the penalty and the [`Quality`](@ref); the
`report` is that of [`loss_and_gradient!`](@ref).
"""
function vjp! end

"""
    jvp!(tangent, ws, problem, p, X, dp, dX; of = :outputs, start = nothing, report = nothing)

The derivative of the outputs, or with `of = :state` of the states, along the direction `dp` of the parameters and `dX` of the
samples goes to `tangent`: the map whose transpose [`vjp!`](@ref) is. Returns the [`Quality`](@ref), whose adjoint residuals are those
of the systems of the tangents.
"""
function jvp! end

"    allocate(ws, dimensions...)\n\nAn array of zeros where the workspace computes."
function allocate end

"""
    Workspace(net)
    Workspace(net, backend)

The [`AbstractWorkspace`](@ref) for a network on this machine's CPU, or on a device: `backend` is one of KernelAbstractions.jl, such as
`CUDABackend()`, or a type of GPU arrays, such as `CuArray`. Needs the package of the device to be loaded. Tasks that compute at once
need a workspace each: a call throws an `ErrorException` while another task is at work in it.
"""
Workspace(net::Network) = CPUWorkspace(net)

# --- with a workspace of their own ----------------------------------------------------------------------------

"""
    equilibrium(net, p, X; solver = Auto(), start = nothing)

The [`Solution`](@ref) for the samples `X` (features × samples) and the parameters `p`; `start` (neurons ×
samples) is the first iterate, zero if absent. Nothing is thrown for unconverged samples: see `status`. Throws `ArgumentError` for
what is no vector or matrix of real numbers, and `DimensionMismatch` for arrays that do not fit.
"""
function equilibrium(net::Network, p, X; solver = Auto(), start = nothing)
    check_arrays(p, X, "states" => start)
    problem = Problem(net; solver)
    return equilibrium!(Solution(net, size(X, 2)), Workspace(net), problem, p, X, start)
end

"""
    loss_and_gradient(net, p, X, Y; loss = MSE(), weights = nothing, solver = Auto(), adjoint = Implicit(), jacobian_penalty = 0, probe = 0)

The [`Loss`](@ref) of the outputs for `X` (features × samples) against the targets `Y` (outputs × samples), and its
gradient with respect to the parameters `p`; with a [`JacobianPenalty`](@ref) where its weight is not zero, whose
random vectors `probe` numbers. Throws an `ErrorException` if a sample does not converge, unless the adjoint is `Unrolled`.
"""
function loss_and_gradient(net::Network{T}, p, X, Y; weights = nothing, probe = 0, options...) where {T}
    check_arrays(p, X, "targets" => Y)
    g = zeros(T, length(net))
    value, quality = loss_and_gradient!(g, Workspace(net), Problem(net; options...), p, X, Y; probe, weights)
    check_converged(quality, size(X, 2))
    return value, g
end

"""
    vjp(net, p, X, V; of = :outputs, start = nothing, solver = Auto(), adjoint = Implicit())

The derivatives of Σ ⟨V, outputs⟩ with respect to the parameters `p` and to the samples `X` (features × samples), see
[`vjp!`](@ref): those of any loss L for V = ∂L/∂outputs (outputs × samples). Throws as [`loss_and_gradient`](@ref) does.
"""
function vjp(net::Network{T}, p, X, V; of = :outputs, start = nothing, options...) where {T}
    check_arrays(p, X, "cotangents" => V, "states" => start)
    g, dX = zeros(T, length(net)), zeros(T, size(X))
    _, quality = vjp!(g, dX, Workspace(net), Problem(net; options...), p, X, V; of, start)
    check_converged(quality, size(X, 2))
    return g, dX
end

"""
    jvp(net, p, X, dp, dX; of = :outputs, start = nothing, solver = Auto(), adjoint = Implicit())

The derivative of the outputs along the direction `dp` of the parameters and `dX` of the samples, see [`jvp!`](@ref). Throws as
[`loss_and_gradient`](@ref) does.
"""
function jvp(net::Network{T}, p, X, dp, dX; of = :outputs, start = nothing, options...) where {T}
    check_arrays(p, X, "directions" => dX, "states" => start)
    check_array("the direction of the parameters", dp, 1)
    tangent = zeros(T, rows_of(net, of), size(X, 2))
    check_converged(jvp!(tangent, Workspace(net), Problem(net; options...), p, X, dp, dX; of, start), size(X, 2))
    return tangent
end

"Entries of a sample of what is differentiated."
function rows_of(net::Network, of::Symbol)
    of in (:outputs, :state) || throw(ArgumentError("of must be :outputs or :state, got :$of"))
    return of === :outputs ? output_size(net) : neurons(net)
end

# --- checks, for the workspaces of all devices -----------------------------------------------------------------

"An `ArgumentError` where parameters, samples or other arrays, pairs of a name and a matrix or nothing, are not arrays of real numbers."
function check_arrays(p, X, others...)
    check_array("the parameters", p, 1)
    check_array("the samples", X, 2)
    foreach(((what, A),) -> A === nothing || check_array("the $what", A, 2), others)
    return
end

function check_array(what, A, axes::Int, expected = EXPECTED[axes])
    check_shape(what, A, axes, expected)
    eltype(A) <: Dual && throw(
        ArgumentError(
            "$what have dual numbers of ForwardDiff.jl; take derivatives by `loss_and_gradient`, `vjp` or `jvp`, or differentiate \
            `Equilibrium(net)` and `read_out`"
        )
    )
    eltype(A) <: Real || all(x -> x isa Real, A) || throw(ArgumentError("$what have entries of type $(eltype(A)); expected real numbers"))
    return
end

const EXPECTED = ("a vector, as `initial_parameters` gives", "a matrix with a column for each sample; one sample is reshape(x, :, 1)")
check_shape(what, A, axes::Int, expected = EXPECTED[axes]) = A isa AbstractArray && ndims(A) == axes ||
    throw(ArgumentError("$what are $(described(A)); expected $expected"))

function check_supervised(net, X, Y, weights)
    check_features(net, X)
    check_size("targets", Y, output_size(net), size(X, 2))
    weights === nothing && return
    check_array("the weights", weights, 1, "a vector with a number for each sample")
    length(weights) == size(X, 2) || throw(DimensionMismatch("there are $(length(weights)) weights for $(size(X, 2)) samples"))
    return
end

function check_pullback(net, dX, X, V, of, start)
    check_features(net, X)
    check_size("cotangents", V, rows_of(net, of), size(X, 2))
    check_size("derivatives", dX, net.inputs, size(X, 2))
    return check_start(net, X, start)
end

function check_pushforward(net, tangent, X, dp, dX, of, start)
    check_features(net, X)
    check_size("tangents", tangent, rows_of(net, of), size(X, 2))
    check_size("directions", dX, net.inputs, size(X, 2))
    check_length(net, dp, "direction")
    return check_start(net, X, start)
end

check_start(net, X, start) = start === nothing || check_size("states", start, neurons(net), size(X, 2))

check_features(net, X) = size(X, 1) == net.inputs ||
    throw(DimensionMismatch("the network takes $(net.inputs) features, the samples have $(size(X, 1))"))

check_size(what, A, rows, samples) = size(A) == (rows, samples) ||
    throw(DimensionMismatch("$what are $(size(A)), but $rows rows for $samples samples were expected"))

# The seam between what is asked and the hardware: a workspace does batches.

"""
    AbstractWorkspace{T}

Where and how batches of a network are computed: all buffers of its passes, on some hardware. It is made for a network, and each
call is given the [`Problem`](@ref) with the options in force. A subtype has the network as its field `net`, an [`Owner`](@ref) as
its field `owner` if its methods are to work [`exclusively`](@ref), and the methods

- `settle!(solution, ws, problem, p, X, start)`, which [`equilibrium!`](@ref) calls
- `pull_back!(g, ws, problem, p, X, seed; dX, start, probe, report, states)`, which [`loss_and_gradient!`](@ref) and [`vjp!`](@ref)
  call: the [`Summary`](@ref), from one of the seeds below
- `push_forward!(tangent, ws, problem, p, X, dp, dX, of, start, report)`, which [`jvp!`](@ref) calls
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
function equilibrium!(solution::Solution, ws::AbstractWorkspace, problem::Problem, p, X, start = nothing)
    check_workspace(ws, problem.net)
    check_features(problem.net, X)
    check_start(problem.net, X, start)
    check_size("states of the solution", solution.state, neurons(problem.net), size(X, 2))
    return exclusively(() -> settle!(solution, ws, problem, p, X, start), ws)
end

"""
    loss_and_gradient!(g, ws, problem, p, X, Y; probe = 0, weights = nothing, report = nothing, states = nothing)

The loss and its [`Quality`](@ref); the gradient goes to `g`. A `report` (status, residual, adjoint residual) of vectors is filled
in per sample. Where `states` (neurons × samples) are given, they are the first iterates, and become the equilibria found; zero for a
sample that has not converged.
"""
function loss_and_gradient!(
        g, ws::AbstractWorkspace{T}, problem::Problem, p, X, Y; probe = 0, weights = nothing, report = nothing, states = nothing
    ) where {T}
    check_workspace(ws, problem.net)
    check_supervised(problem.net, X, Y, weights)
    check_length(problem.net, g, "gradient")
    check_start(problem.net, X, states)
    seed = LossSeed(problem.loss, Y, weights, T(1 / size(X, 2)))
    summary = exclusively(() -> pull_back!(g, ws, problem, p, X, seed; start = states, probe, report, states), ws)
    return summary.loss, summary.quality
end

"""
    vjp!(g, dX, ws, problem, p, X, V; of = :outputs, start = nothing, probe = 0, report = nothing)

The derivative of Σ ⟨V, outputs⟩, or with `of = :state` of Σ ⟨V, state⟩, with respect to the parameters goes to `g`, that with
respect to the samples to `dX` (features × samples). Where `start` (neurons × samples) holds the equilibria, one evaluation of f confirms
it. The loss of the problem plays no part; its Jacobian penalty is added. Returns the penalty and the [`Quality`](@ref); the
`report` is that of [`loss_and_gradient!`](@ref).
"""
function vjp!(
        g, dX, ws::AbstractWorkspace, problem::Problem, p, X, V; of = :outputs, start = nothing, probe = 0, report = nothing
    )
    check_workspace(ws, problem.net)
    check_pullback(problem.net, dX, X, V, of, start)
    check_length(problem.net, g, "gradient")
    seed = of === :outputs ? OutputSeed(V) : StateSeed(V)
    samples = Base.unalias(dX, X)             # which the gradient needs when the derivatives are there
    summary = exclusively(() -> pull_back!(g, ws, problem, p, samples, seed; dX, start, probe, report), ws)
    return summary.loss, summary.quality
end

"""
    jvp!(tangent, ws, problem, p, X, dp, dX; of = :outputs, start = nothing, report = nothing)

The derivative of the outputs, or with `of = :state` of the states, along the direction `dp` of the parameters and `dX` of the
samples goes to `tangent`: the map whose transpose [`vjp!`](@ref) is. Returns the [`Quality`](@ref), whose adjoint residuals are those
of the systems of the tangents.
"""
function jvp!(
        tangent, ws::AbstractWorkspace, problem::Problem, p, X, dp, dX; of = :outputs, start = nothing, report = nothing
    )
    check_workspace(ws, problem.net)
    check_pushforward(problem.net, tangent, X, dp, dX, of, start)
    return exclusively(() -> push_forward!(tangent, ws, problem, p, X, dp, dX, of, start, report), ws)
end

# Where the way back begins.

"∂L/∂z of the [`Loss`](@ref) of the outputs against targets."
struct LossSeed{A, W, T}
    loss::Loss                   # left abstract, as in a problem
    targets::A
    weights::W
    scale::T
end

"∂L/∂y is given."
struct OutputSeed{A}
    V::A
end

"∂L/∂z is given."
struct StateSeed{A}
    V::A
end

Base.show(io::IO, ws::AbstractWorkspace) = print(io, nameof(typeof(ws)), "($(ws.net))")

"    allocate(ws, dimensions...)\n\nAn array of zeros where the workspace computes."
function allocate end

"""
    Workspace(net)
    Workspace(net, backend)

The [`AbstractWorkspace`](@ref) for a network on this machine's CPU, or on a device: `backend` is one of KernelAbstractions.jl, such as
`CUDABackend()`, or a type of GPU arrays, such as `CuArray`. Needs the package of the device to be loaded. It is given to
[`equilibrium!`](@ref), [`loss_and_gradient!`](@ref), [`vjp!`](@ref) and [`jvp!`](@ref), with arrays of the host or of the device, and
to a [`Trainer`](@ref). Tasks that compute at once need a workspace each: a call throws an `ErrorException` while another task is at
work in it.
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
function rows_of(net::Network, of)
    of in (:outputs, :state) || throw(ArgumentError("of must be :outputs or :state, got $(repr(of))"))
    return of === :outputs ? output_size(net) : neurons(net)
end

# The interface between problems and the hardware: a workspace computes batches.

"""
    AbstractWorkspace{T}

Computes batches of a network on some hardware, with all buffers of its passes. It is made for a network, and each
call is given the [`Problem`](@ref) with the current options. A subtype has the network as its field `net`, an [`Owner`](@ref) as
its field `owner` if its methods are to work [`exclusively`](@ref), and the methods

- `solve_batch!(solution, ws, problem, p, X, start)`, which [`equilibrium!`](@ref) calls
- `pull_back!(g, ws, problem, p, X, seed; dX, start, probe, report, states)`, which [`loss_and_gradient!`](@ref) and [`vjp!`](@ref)
  call: the [`Summary`](@ref), from one of the seeds below
- `push_forward!(tangent, ws, problem, p, X, dp, dX, of, start, report)`, which [`jvp!`](@ref) calls
- `hessian_vector_product!(h, ws, problem, p, X, Y, v, weights = nothing)`
- [`allocate`](@ref)`(ws, dimensions...)`

Everything else, including training, is written in terms of these, for any type of array. [`CPUWorkspace`](@ref) is the workspace of
this package; that of devices is in the extension for GPU arrays.

Only one call may use a workspace at a time: concurrent tasks need one each.
"""
abstract type AbstractWorkspace{T} end

"The task that is using a workspace, or nothing."
mutable struct Owner
    @atomic task::Union{Nothing, Task}
end
Owner() = Owner(nothing)

"""
    exclusively(work, ws)

`work()`, during which no other task may use the workspace, if that has an `owner`. Throws an `ErrorException` if another task
is using it; the same task may call it again within `work`.
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

Fill in the [`Solution`](@ref) for the samples `X` (features × samples) and the parameters `p`, from the initial guess `start` (neurons ×
samples) or zero.
"""
function equilibrium!(solution::Solution, ws::AbstractWorkspace, problem::Problem, p, X, start = nothing)
    check_workspace(ws, problem.net)
    check_features(problem.net, X)
    check_start(problem.net, X, start)
    check_size("states of the solution", solution.state, neurons(problem.net), size(X, 2))
    (; status, iterations, residual, rate) = solution.outcome
    lengths = map(length, (status, iterations, residual, rate, solution.bound))
    all(==(size(X, 2)), lengths) ||
        throw(DimensionMismatch("the vectors of the solution have the lengths $lengths, but there are $(size(X, 2)) samples"))
    return exclusively(() -> solve_batch!(solution, ws, problem, p, X, start), ws)
end

"""
    loss_and_gradient!(g, ws, problem, p, X, Y; probe = 0, weights = nothing, report = nothing, states = nothing)

The loss and its [`Quality`](@ref); the gradient goes to `g`. A `report` (status, residual, adjoint residual) of vectors is filled
in per sample. If `states` (neurons × samples) are given, they are the initial guesses, and are overwritten with the equilibria; zero
for a sample that has not converged.
"""
function loss_and_gradient!(
        g, ws::AbstractWorkspace{T}, problem::Problem, p, X, Y; probe = 0, weights = nothing, report = nothing, states = nothing
    ) where {T}
    check_workspace(ws, problem.net)
    check_supervised(problem.net, X, Y, weights)
    check_length(problem.net, g, "gradient")
    check_start(problem.net, X, states)
    seed = LossSeed(problem.loss, Y, weights, T(1 / size(X, 2)))
    summary = exclusively(() -> pull_back!(g, ws, problem, p, X, seed; start = states, probe, report = Report(report), states), ws)
    return summary.loss, summary.quality
end

"""
    vjp!(g, dX, ws, problem, p, X, V; of = :outputs, start = nothing, probe = 0, report = nothing)

The derivative of Σ ⟨V, outputs⟩, or with `of = :state` of Σ ⟨V, state⟩, with respect to the parameters goes to `g`, that with
respect to the samples to `dX` (features × samples). If `start` (neurons × samples) holds the equilibria, one evaluation of f confirms
it. The loss of the problem is not used; its Jacobian penalty is added. Returns the penalty and the [`Quality`](@ref); `report` is as
for [`loss_and_gradient!`](@ref).
"""
function vjp!(
        g, dX, ws::AbstractWorkspace, problem::Problem, p, X, V; of = :outputs, start = nothing, probe = 0, report = nothing
    )
    check_workspace(ws, problem.net)
    check_pullback(problem.net, dX, X, V, of, start)
    check_length(problem.net, g, "gradient")
    samples = Base.unalias(dX, X)             # the gradient still needs them after the derivatives are written
    back!(seed) = pull_back!(g, ws, problem, p, samples, seed; dX, start, probe, report = Report(report))
    summary = exclusively(() -> of === :outputs ? back!(OutputSeed(V)) : back!(StateSeed(V)), ws)
    return summary.loss, summary.quality
end

"""
    jvp!(tangent, ws, problem, p, X, dp, dX; of = :outputs, start = nothing, report = nothing)

The derivative of the outputs, or with `of = :state` of the states, along the direction `dp` of the parameters and `dX` of the
samples goes to `tangent`: the transpose of [`vjp!`](@ref). Returns the [`Quality`](@ref), whose adjoint residuals are those
of the systems of the tangents.
"""
function jvp!(
        tangent, ws::AbstractWorkspace, problem::Problem, p, X, dp, dX; of = :outputs, start = nothing, report = nothing
    )
    check_workspace(ws, problem.net)
    check_pushforward(problem.net, tangent, X, dp, dX, of, start)
    return exclusively(() -> push_forward!(tangent, ws, problem, p, X, dp, dX, of, start, Report(report)), ws)
end

# Where the backward pass begins.

"∂L/∂z of the [`Loss`](@ref) of the outputs against targets."
struct LossSeed{A, W, T}
    loss::Loss                   # left abstract, as in a problem
    targets::A
    weights::Union{Nothing, W}   # so that calls with and without weights share their code
    scale::T
    LossSeed(loss, targets::A, weights, scale::T) where {A, T} =
        new{A, weights === nothing ? Vector{T} : typeof(weights), T}(loss, targets, weights, scale)
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

"    allocate(ws, dimensions...)\n\nAn array of zeros in the memory in which the workspace computes."
function allocate end

"""
    Workspace(net)
    Workspace(net, backend)

The [`AbstractWorkspace`](@ref) for a network on this machine's CPU, or on a device: `backend` is one of KernelAbstractions.jl, such as
`CUDABackend()`, or a type of GPU arrays, such as `CuArray`. Needs the package of the device to be loaded. Pass it to
[`equilibrium!`](@ref), [`loss_and_gradient!`](@ref), [`vjp!`](@ref) and [`jvp!`](@ref), with host or device arrays, and
to a [`Trainer`](@ref). Concurrent tasks need a workspace each: a call throws an `ErrorException` while another task is using the
workspace.
"""
Workspace(net::Network) = CPUWorkspace(net)

# --- with a workspace of their own ----------------------------------------------------------------------------

"""
    equilibrium(net, p, X; solver = Auto(), start = nothing)

The [`Solution`](@ref) for the samples `X` (features × samples) and the parameters `p`; `start` (neurons ×
samples) is the initial guess, zero if absent. Nothing is thrown for unconverged samples: see `status`. Throws `ArgumentError` for
anything but vectors and matrices of real numbers, and `DimensionMismatch` for arrays of the wrong size.
"""
function equilibrium(net::Network, p, X; solver = Auto(), start = nothing)
    check_arrays(p, X; start)
    problem = Problem(net; solver)
    return equilibrium!(Solution(net, size(X, 2)), Workspace(net), problem, p, X, start)
end

"""
    loss_and_gradient(net, p, X, Y; loss = MSE(), weights = nothing, solver = Auto(), adjoint = Implicit(), jacobian_penalty = 0, probe = 0)

The [`Loss`](@ref) of the outputs for `X` (features × samples) against the targets `Y` (outputs × samples), and its
gradient with respect to the parameters `p`; with a [`JacobianPenalty`](@ref) if its weight is not zero, where
`probe` is the seed of its random vectors. Throws an `ErrorException` if a sample does not converge, unless the adjoint is `Unrolled`.
"""
function loss_and_gradient(
        net::Network{T}, p, X, Y; loss = MSE(), weights = nothing, solver = Auto(), adjoint = Implicit(), jacobian_penalty = 0.0, probe = 0
    ) where {T}
    check_arrays(p, X, "targets" => Y)
    check_number("probe", probe, _ -> true, "be a whole number", Integer)
    g = zeros(T, length(net))
    problem = Problem(net; solver, adjoint, loss, jacobian_penalty)
    value, quality = loss_and_gradient!(g, Workspace(net), problem, p, X, Y; probe, weights)
    check_converged(quality, size(X, 2))
    return value, g
end

"""
    vjp(net, p, X, V; of = :outputs, start = nothing, solver = Auto(), adjoint = Implicit())

The derivatives of Σ ⟨V, outputs⟩ with respect to the parameters `p` and to the samples `X` (features × samples), see
[`vjp!`](@ref): the gradients of any loss L for V = ∂L/∂outputs (outputs × samples). Throws like [`loss_and_gradient`](@ref).
"""
function vjp(net::Network{T}, p, X, V; of = :outputs, start = nothing, solver = Auto(), adjoint = Implicit()) where {T}
    check_arrays(p, X, "cotangents" => V; start)
    g, dX = zeros(T, length(net)), zeros(T, size(X))
    _, quality = vjp!(g, dX, Workspace(net), Problem(net; solver, adjoint), p, X, V; of, start)
    check_converged(quality, size(X, 2))
    return g, dX
end

"""
    jvp(net, p, X, dp, dX; of = :outputs, start = nothing, solver = Auto(), adjoint = Implicit())

The derivative of the outputs along the direction `dp` of the parameters and `dX` of the samples, see [`jvp!`](@ref). Throws like
[`loss_and_gradient`](@ref).
"""
function jvp(net::Network{T}, p, X, dp, dX; of = :outputs, start = nothing, solver = Auto(), adjoint = Implicit()) where {T}
    check_arrays(p, X, "directions" => dX; start)
    check_array("the direction of the parameters", dp, 1)
    tangent = zeros(T, rows_of(net, of), size(X, 2))
    check_converged(jvp!(tangent, Workspace(net), Problem(net; solver, adjoint), p, X, dp, dX; of, start), size(X, 2))
    return tangent
end

"The number of entries per sample of the differentiated result."
function rows_of(net::Network, of)
    of in (:outputs, :state) || throw(ArgumentError("of must be :outputs or :state, got $(repr(of))"))
    return of === :outputs ? output_size(net) : neurons(net)
end

# The buffers of a device: the weights in force, and the arrays of a batch.

"The weights that drive a stage, from the inputs, from the stages before that it hears of, and its own; and what reads it."
struct DeviceStage{T, M <: AbstractMatrix{T}, V <: AbstractVector{T}}
    input::M
    feeds::Vector{Pair{Int, M}}           # stage before => block
    recurrent::M
    bias::V
    readout::M                            # outputs × neurons of the stage; no rows where nothing reads it
    slopes::V                             # bounds on |f′|
end

"The arrays of a stage for a batch: drive, argument, state, slopes, ∂L/∂z and ∂L/∂s."
struct StageArrays{M}
    U::M
    S::M
    Z::M
    D::M
    G::M
    E::M
end

"""
    DeviceWorkspace(net, backend)

The [`AbstractWorkspace`](@ref ImplicitRNN.AbstractWorkspace) of a device: of any backend of KernelAbstractions.jl. Solvers are
`Auto` and `Picard`, adjoints `Implicit` (`:auto`, `:neumann`) and `JacobianFree`; others are refused.
"""
struct DeviceWorkspace{T, B <: Backend, M <: AbstractMatrix{T}, V <: AbstractVector{T}} <: AbstractWorkspace{T}
    net::Network{T}
    backend::B
    cpu::CPUWorkspace{T}                  # constrains the weights, and solves what is left
    gradient::Weights{T}                  # on the host, with respect to the weights in force
    stages::Vector{DeviceStage{T, M, V}}
    offset::V                             # of the readout
    buffers::Vector{StageArrays{M}}       # for as many samples as any batch had
    arrays::Vector{StageArrays{M}}        # their first columns, for the present batch
end

function DeviceWorkspace(net::Network{T}, backend::Backend) where {T}
    check_device(backend)
    make(dimensions...) = KernelAbstractions.zeros(backend, T, dimensions...)
    M, V = typeof(make(0, 0)), typeof(make(0))
    return DeviceWorkspace{T, typeof(backend), M, V}(
        net, backend, CPUWorkspace(net), Weights(net), device_stages(net, make), make(net.outputs), StageArrays{M}[], StageArrays{M}[]
    )
end

"Room for the weights of all stages, in arrays that `make` returns."
function device_stages(net::Network{T}, make) where {T}
    M, V = typeof(make(0, 0)), typeof(make(0))
    return map(net.stages) do stage
        n = length(stage.rows)
        m, outputs = stage.recurrent ? n : 0, reads(net, stage) ? output_size(net) : 0
        feeds = Pair{Int, M}[l => make(n, length(net.stages[l].rows)) for l in sources(net, stage)]
        slopes = copyto!(make(n), T.(stage.slopes))
        return DeviceStage{T, M, V}(make(n, stage.has_input ? net.inputs : 0), feeds, make(m, m), make(n), make(outputs, n), slopes)
    end
end

"The stages before a stage that are connected to it."
function sources(net, stage::Stage)
    feeds(s) = s !== stage && any(c -> c.from > 0 && c.cols ⊆ s.rows, stage.connections)
    return findall(feeds, net.stages)
end

"Whether the outputs read the stage."
reads(net, stage::Stage) = any(in(stage.rows), net.readout)

ImplicitRNN.Workspace(net::Network, backend::Backend) = DeviceWorkspace(net, backend)
function ImplicitRNN.Workspace(net::Network{T}, ::Type{A}) where {T, A <: AbstractGPUArray}
    return DeviceWorkspace(net, get_backend(A(zeros(T, 0))))
end

# The parameters, their optimiser and the constraint are on the host; a batch goes to the device when it is computed.
ImplicitRNN.allocate(::DeviceWorkspace{T}, dimensions::Int...) where {T} = zeros(T, dimensions)

# --- between host and device ------------------------------------------------------------------------------------------

on_host(A::Array) = A
on_host(A::AbstractArray) = Array(A)

"An array on the device, itself where it is there."
on_device(::DeviceWorkspace, A::AbstractGPUArray) = A
on_device(ws::DeviceWorkspace{T}, A::AbstractArray) where {T} =
    copyto!(KernelAbstractions.allocate(ws.backend, T, size(A)...), convert(Array{T}, A))

"Rows of `A` become `B`, wherever the two are."
put_rows!(A::AbstractGPUArray, rows, B) = (view(A, rows, :) .= B; A)
put_rows!(A::AbstractArray, rows, B) = (view(A, rows, :) .= Array(B); A)

"Put the parameters into force: constrained on the host, then on the device."
function ImplicitRNN.unpack!(ws::DeviceWorkspace, p)
    w = unpack!(ws.cpu, on_host(p)).weights
    upload!(ws.stages, ws.net, w)
    copyto!(ws.offset, w.d)
    return ws
end

function upload!(stages, net, w::Weights)
    for (stage, host, device) in zip(net.stages, w.stages, stages)
        copyto!(device.input, host.input)
        copyto!(device.recurrent, host.recurrent)
        copyto!(device.bias, host.bias)
        for (l, block) in device.feeds
            copyto!(block, host.feed[:, net.stages[l].rows])
        end
        isempty(device.readout) || copyto!(device.readout, readout_of(net, w, stage))
    end
    return stages
end

"The readout as a matrix for the neurons of a stage; where the outputs are neurons, of ones at those."
function readout_of(net::Network{T}, w, stage::Stage) where {T}
    C = zeros(T, output_size(net), length(stage.rows))
    for (k, neuron) in enumerate(net.readout)
        neuron in stage.rows || continue
        column = neuron - first(stage.rows) + 1
        net.outputs > 0 ? copyto!(view(C, :, column), view(w.C, :, k)) : (C[k, column] = 1)
    end
    return C
end

"Arrays for a batch of so many samples."
function arrays!(ws::DeviceWorkspace{T}, samples::Int) where {T}
    if isempty(ws.buffers) || size(first(ws.buffers).Z, 2) < samples
        empty!(ws.buffers)
        for stage in ws.net.stages
            arrays = (KernelAbstractions.zeros(ws.backend, T, length(stage.rows), samples) for _ in 1:6)
            push!(ws.buffers, StageArrays(arrays...))
        end
    end
    empty!(ws.arrays)
    for buffers in ws.buffers
        push!(ws.arrays, StageArrays((view(getfield(buffers, k), :, 1:samples) for k in 1:fieldcount(StageArrays))...))
    end
    return ws.arrays
end

"Per column, how its solve stands: see [`step!`](@ref)."
function progress_of(ws::DeviceWorkspace{T}, samples::Int) where {T}
    filled(value) = fill!(KernelAbstractions.allocate(ws.backend, typeof(value), samples), value)
    return (;
        running = filled(true), abandoned = filled(false), count = filled(Int32(0)), change = filled(T(Inf)), rate = filled(T(0)),
    )
end

"Per column, how it went: an [`Outcome`](@ref ImplicitRNN.Outcome) on the device."
function record_of(ws::DeviceWorkspace{T}, samples::Int) where {T}
    filled(value) = fill!(KernelAbstractions.allocate(ws.backend, typeof(value), samples), value)
    return (; status = filled(CONVERGED), iterations = filled(Int32(0)), residual = filled(T(0)), rate = filled(T(0)))
end

# --- what is offered ----------------------------------------------------------------------------------------------------

refused(what) = throw(ArgumentError("a device does not offer $what; use the CPU"))
refused(what, offered) = throw(ArgumentError("a device does not offer $what; choose $offered, or use the CPU"))

check_solver(::Union{Auto, Picard}) = nothing
check_solver(s::Solver) = refused("the solver $(nameof(typeof(s)))", "Auto or Picard")

check_adjoint(::JacobianFree) = nothing
check_adjoint(s::Implicit) = s.linear_solver in (:auto, :neumann) ||
    refused("the linear solver :$(s.linear_solver) of the adjoint Implicit", ":auto or :neumann")
check_adjoint(s::Adjoint) = refused("the adjoint $(nameof(typeof(s)))", "Implicit or JacobianFree")

function check_gradient(problem::Problem)
    check_solver(problem.solver)
    check_adjoint(problem.adjoint)
    problem.jacobian_penalty > 0 && refused("the Jacobian penalty")
    return
end

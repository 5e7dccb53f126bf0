# The buffers of a device: the weights in force, and the arrays of a batch.

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
    DeviceWorkspace(net, backend; budget = 3 / 4 of the free memory, coarse_first = 2^26)

The [`AbstractWorkspace`](@ref ImplicitRNN.AbstractWorkspace) of a device: of any backend of KernelAbstractions.jl. The solver
`NLsolver`, the linear solver `:gmres` and Hessian-vector products are refused. A batch whose arrays would take more than `budget`
bytes is computed piece by piece. Where an iteration takes `coarse_first` multiplications or more, it is done in lower precision first,
see [`approach!`](@ref).
"""
mutable struct DeviceWorkspace{T, B <: Backend, M <: AbstractMatrix{T}, V <: AbstractVector{T}} <: AbstractWorkspace{T}
    const net::Network{T}
    const backend::B
    const cpu::CPUWorkspace{T}                  # solves what is left, see `host!`
    const parameters::V                         # in force
    const gradient::V
    const stages::Vector{DeviceStage{T, M, V}}
    const offset::V                             # of the readout
    const buffers::Vector{StageArrays{M}}       # for as many samples as any batch had
    const arrays::Vector{StageArrays{M}}        # their first columns, for the present batch
    const chains::Vector{Vector{M}}             # per stage: Z₀, S₁, Z₁, S₂, … of unrolled steps
    on_host::Bool                               # whether the parameters are in force on the CPU as well
    budget::Int                                 # bytes that a batch may take
    coarse_first::Int                           # multiplications from which lower precision comes first
    const owner::Owner
end

function DeviceWorkspace(net::Network{T}, backend::Backend; budget::Int = free_memory(backend) ÷ 4 * 3, coarse_first::Int = 2^26) where {T}
    check_device(backend)
    make(dimensions...) = KernelAbstractions.zeros(backend, T, dimensions...)
    M, V = typeof(make(0, 0)), typeof(make(0))
    return DeviceWorkspace{T, typeof(backend), M, V}(
        net, backend, CPUWorkspace(net), make(length(net)), make(length(net)), device_stages(net, make), make(net.outputs),
        StageArrays{M}[], StageArrays{M}[], [M[] for _ in net.stages], false, budget, coarse_first, Owner(),
    )
end

ImplicitRNN.Workspace(net::Network, backend::Backend; options...) = DeviceWorkspace(net, backend; options...)
function ImplicitRNN.Workspace(net::Network{T}, ::Type{A}) where {T, A <: AbstractGPUArray}
    return DeviceWorkspace(net, get_backend(A(zeros(T, 0))))
end

ImplicitRNN.allocate(ws::DeviceWorkspace{T}, dimensions::Int...) where {T} = KernelAbstractions.zeros(ws.backend, T, dimensions...)

ImplicitRNN.backend_of(ws::DeviceWorkspace) = ws.backend
ImplicitRNN.device_vector(backend::Backend, ::Type{T}, n::Int) where {T} = KernelAbstractions.allocate(backend, T, n)

# --- between host and device ------------------------------------------------------------------------------------------

"An array on the device, itself where it is there and has the numbers of the network; nothing where there is none."
on_device(::DeviceWorkspace, ::Nothing) = nothing
on_device(::DeviceWorkspace{T}, A::AbstractGPUArray{T}) where {T} = A
on_device(::DeviceWorkspace{T}, A::AbstractGPUArray) where {T} = T.(A)
on_device(ws::DeviceWorkspace{T}, A::AbstractArray) where {T} =
    copyto!(KernelAbstractions.allocate(ws.backend, T, size(A)...), convert(Array{T}, A))

"Rows and columns of `A` become `B`, wherever the two are."
put_block!(A::AbstractGPUArray, rows, columns, B) = (A[rows, columns] = B; A)
put_block!(A::AbstractArray, rows, columns, B) = (view(A, rows, columns) .= on_host(B); A)

"Put the parameters into force."
function ImplicitRNN.unpack!(ws::DeviceWorkspace, p)
    check_length(ws.net, p)
    copyto!(ws.parameters, p)
    ws.on_host = false
    unpack_stages!(ws.stages, ws.offset, ws.net, ws.parameters)
    return ws
end

"The workspace of the CPU with the same parameters in force."
function host!(ws::DeviceWorkspace)
    ws.on_host || unpack!(ws.cpu, on_host(ws.parameters))
    ws.on_host = true
    return ws.cpu
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

# Per column, how its solve stands (see `step!`) and how it went, an `Outcome` on the device, before it begins.
initial_progress(::Type{T}) where {T} =
    (; running = true, started = true, abandoned = false, count = Int32(0), change = T(Inf), rate = T(0))
initial_record(::Type{T}) where {T} = (; status = CONVERGED, iterations = Int32(0), residual = T(0), rate = T(0))

progress_of(ws::DeviceWorkspace{T}, samples::Int, ::Type{S} = T) where {T, S} = map(fill!, room_for(initial_progress(S), ws, samples), initial_progress(S))
record_of(ws::DeviceWorkspace{T}, samples::Int, ::Type{S} = T) where {T, S} = map(fill!, room_for(initial_record(S), ws, samples), initial_record(S))
room_for(values::NamedTuple, ws::DeviceWorkspace, samples::Int) =
    map(value -> KernelAbstractions.allocate(ws.backend, typeof(value), samples), values)

# --- what is offered ----------------------------------------------------------------------------------------------------

refused(what) = throw(ArgumentError("a device does not offer $what; use the CPU"))
refused(what, offered) = throw(ArgumentError("a device does not offer $what; choose $offered, or use the CPU"))

check_solver(::Solver) = nothing
check_solver(::NLsolver) = refused("the solver NLsolve", "Auto, Picard, Anderson, Newton or Chord")

check_adjoint(::Adjoint) = nothing
check_adjoint(s::Implicit) = s.linear_solver !== :gmres ||
    refused("the linear solver :gmres of the adjoint Implicit", ":auto, :lu, :neumann or :anderson")

check_options(problem::Problem) = (check_solver(problem.solver); check_adjoint(problem.adjoint))

# --- pieces of a batch --------------------------------------------------------------------------------------------------

"The pieces in which some columns are computed, so that their arrays fit the workspace's budget."
function pieces(ws::DeviceWorkspace{T}, problem::Problem, columns) where {T}
    # Besides states: samples, targets and outputs, and what is computed of them.
    bytes = (arrays_per_sample(problem) * neurons(ws.net) + 2 * ws.net.inputs + 4 * output_size(ws.net)) * sizeof(T)
    width = clamp(ws.budget ÷ bytes, 1, max(length(columns), 1))
    return [columns[first:min(first + width - 1, end)] for first in 1:width:length(columns)]
end

# Those of a stage, what the methods keep, and room for intermediate results.
arrays_per_sample(problem::Problem) = 12 + kept(problem.solver) + kept(problem.adjoint)
kept(::Solver) = 4
kept(s::Anderson) = 2 * s.memory + 3
kept(::Adjoint) = 0
kept(s::Implicit) = s.linear_solver === :anderson ? kept(Anderson()) : 0
kept(s::Unrolled) = 2 * s.steps + 1

"The columns of an array, the array itself where they are all of them."
columns_of(A::AbstractMatrix, columns) = length(columns) == size(A, 2) ? A : A[:, columns]
columns_of(x::AbstractVector, columns) = length(columns) == length(x) ? x : x[columns]
columns_of(::Nothing, columns) = nothing

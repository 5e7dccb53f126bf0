# Training with all its arrays on the device: one upload and one download for each call of `train!`.

"A trainer whose workspace is that of a device."
const DeviceTrainer{T, R, O} = Trainer{T, R, O, <:StepBuffers{T, <:Any, <:DeviceWorkspace}}

function ImplicitRNN.train!(
        trainer::DeviceTrainer, nets::Replicas{<:Array}, X, Y, order, batch_size::Int, rates, losses, unconverged; weights = nothing
    )
    (; whole) = checked_batches(trainer, nets, X, Y, weights, order, batch_size, rates, losses, unconverged)
    ws = first(trainer.buffers).workspace
    there = Replicas(on_device(ws, nets.parameters), on_device(ws, nets.good), nets.halted)
    places = copyto!(KernelAbstractions.allocate(ws.backend, Int, size(order)), on_host(order))
    train!(trainer, there, Batches(on_device(ws, X), on_device(ws, Y), on_device(ws, weights), places, batch_size, rates, whole), losses, unconverged)
    copyto!(nets.parameters, there.parameters)
    copyto!(nets.good, there.good)
    return losses
end

ImplicitRNN.euclidean_norm(x::AbstractGPUArray{T, 1}) where {T <: BlasFloat} = norm(x)

ImplicitRNN.flatten!(numbers, x::AbstractGPUArray) = append!(numbers, on_host(x))
function ImplicitRNN.refill(x::AbstractGPUArray, numbers, position)
    copyto!(x, convert(Array{eltype(x)}, numbers[position[] .+ (1:length(x))]))
    position[] += length(x)
    return x
end

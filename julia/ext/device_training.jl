# Training with all its arrays on the device: one upload and one download for each call of `train!`.

"A trainer whose workspace is that of a device."
const DeviceTrainer{T} = Trainer{T, <:Any, <:Any, <:DeviceWorkspace{T}}

function ImplicitRNN.train!(
        trainer::DeviceTrainer, nets::Replicas{<:Array}, X, Y, order, batch_size::Int, rates, losses, unconverged; weights = nothing
    )
    ws = trainer.workspace
    there = Replicas(on_device(ws, nets.parameters), on_device(ws, nets.good), nets.halted)
    places = copyto!(KernelAbstractions.allocate(ws.backend, Int, size(order)), order)
    x, y, w = on_device(ws, X), on_device(ws, Y), weights === nothing ? nothing : on_device(ws, weights)
    train!(trainer, there, x, y, places, batch_size, rates, losses, unconverged; weights = w)
    copyto!(nets.parameters, there.parameters)
    copyto!(nets.good, there.good)
    return losses
end

function ImplicitRNN.gather!(trainer::DeviceTrainer, X, Y, weights, selected)
    m = length(selected)
    copyto!(view(trainer.batch_X, :, 1:m), X[:, selected])
    copyto!(view(trainer.batch_Y, :, 1:m), Y[:, selected])
    weights === nothing || copyto!(view(trainer.batch_weights, 1:m), weights[selected])
    return m
end

ImplicitRNN.flatten!(numbers, x::AbstractGPUArray) = append!(numbers, on_host(x))
function ImplicitRNN.refill(x::AbstractGPUArray, numbers, position)
    copyto!(x, convert(Array{eltype(x)}, numbers[position[] .+ (1:length(x))]))
    position[] += length(x)
    return x
end

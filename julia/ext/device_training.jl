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

# As on the CPU.
function ImplicitRNN.adam_step!(step, rule, (m, v, powers)::AdamState{T, <:AbstractGPUArray{T}}, p, g) where {T}
    η, ε, (β1, β2), (c1, c2), largest = T(rule.eta), T(rule.epsilon), T.(rule.beta), 1 .- powers, largest_slope(T)
    g .= clamp.(g, -largest, largest)
    m .= without_subnormals.(β1 .* m .+ (1 - β1) .* g)
    v .= without_subnormals.(β2 .* v .+ (1 - β2) .* abs2.(g))
    p .= step.(p, m ./ c1 ./ (sqrt.(v ./ c2) .+ ε), η)
    return m, v, without_subnormals.(powers .* (β1, β2))
end

ImplicitRNN.flatten!(numbers, x::AbstractGPUArray) = append!(numbers, on_host(x))
function ImplicitRNN.refill(x::AbstractGPUArray, numbers, position)
    copyto!(x, convert(Array{eltype(x)}, numbers[position[] .+ (1:length(x))]))
    position[] += length(x)
    return x
end

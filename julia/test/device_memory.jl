# Memory of the reference device arrays is that of the machine, which stands for a card's in tests.

using ImplicitRNN: ImplicitRNN
using JLArrays: JLArrays

function ImplicitRNN.wrap_memory(::JLArrays.JLBackend, ::Type{T}, address::UInt, n::Int) where {T}
    bytes = unsafe_wrap(Array, Ptr{UInt8}(address), n * sizeof(T))
    return JLArrays.JLArray{T, 1}(JLArrays.GPUArrays.DataRef(Returns(nothing), bytes), (n,))
end

"The streams that were waited for, 0 for the whole device."
const AWAITED = Int[]
ImplicitRNN.await_stream(::JLArrays.JLBackend, stream::Int) = (push!(AWAITED, stream); nothing)

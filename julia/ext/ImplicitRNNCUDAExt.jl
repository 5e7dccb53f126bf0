"""
The parts specific to CUDA.jl: whether there is a working card, its description, and sharing of its memory. All computation is in
ImplicitRNNGPUArraysExt. This has not run on a card yet.
"""
module ImplicitRNNCUDAExt

using CUDA: CUDA, CuArray, CUDABackend, CuPtr
using ImplicitRNN

ImplicitRNN.check_device(::CUDABackend) = CUDA.functional() ||
    throw(
    ArgumentError(
        "CUDA.jl finds no NVIDIA card with a driver that works; `using CUDA; CUDA.versioninfo()` says what is missing"
    )
)

ImplicitRNN.free_memory(::CUDABackend) = Int(CUDA.free_memory())

function ImplicitRNN.with_coarse_products(work, ::CUDABackend)
    CUDA.capability(CUDA.device()) >= v"8.0" || return
    mode, precision = CUDA.math_mode(), CUDA.math_precision()
    CUDA.math_mode!(CUDA.FAST_MATH; precision = :TensorFloat32)
    try
        work()
    finally
        CUDA.math_mode!(mode; precision)
    end
    return
end

function ImplicitRNN.wrap_memory(::CUDABackend, ::Type{T}, address::UInt, n::Int) where {T}
    return n == 0 ? CuArray{T}(undef, 0) : unsafe_wrap(CuArray, CuPtr{T}(address), n)
end
ImplicitRNN.await_stream(::CUDABackend, stream::Int) =
    stream == 0 ? CUDA.device_synchronize() : CUDA.cuStreamSynchronize(CUDA.CUstream(UInt(stream)))
ImplicitRNN.finish_work(::CUDABackend) = CUDA.synchronize()

function ImplicitRNN.describe_device(::CUDABackend)
    card = CUDA.device()
    gib(bytes) = round(bytes / 2^30; digits = 1)
    return "$(CUDA.name(card)), compute capability $(CUDA.capability(card)), $(gib(CUDA.free_memory())) of \
        $(gib(CUDA.total_memory())) GiB of memory free, driver $(CUDA.driver_version())"
end

end

# The interface to a device, a backend of KernelAbstractions.jl; the extensions for the packages of devices add methods.

"    check_device(backend)\n\nThrows an error with the reason if the device of a backend cannot be used."
check_device(backend) = nothing

"    free_memory(backend)\n\nFree memory of the device in bytes, as far as its package reports it; a batch that needs more is computed in pieces."
free_memory(backend) = typemax(Int)

"    describe_device(backend)\n\nThe device of a backend in words: its name, driver and memory."
describe_device(backend) = string(nameof(typeof(backend)))

"""
    with_coarse_products(work, backend)

Call `work()` with matrix products in single precision whose factors are rounded to 11 bits (TF32), which tensor cores multiply many
times faster; `work` is not called where a device does not support that.
"""
with_coarse_products(work, backend) = nothing

"The unit round-off of a factor in [`with_coarse_products`](@ref)."
const COARSE_ROUNDING = 2.0^-11

# --- memory that is shared with other libraries -----------------------------------------------------------------

"    backend_of(x)\n\nThe backend of the device that a workspace or an array is on, `nothing` for the CPU."
backend_of(::Union{AbstractWorkspace, AbstractArray}) = nothing

"    device_vector(backend, T, n)\n\nA vector of n numbers in the memory of a device, to be filled in."
function device_vector end

"    wrap_memory(backend, T, address, n)\n\nA vector on device memory that belongs to another owner."
function wrap_memory end

"    address_of(array)\n\nWhere the memory of a device array begins."
address_of(array) = UInt(pointer(array))

"""
    await_stream(backend, stream)

Wait until the work in a stream is done; `stream` is the handle of a stream of another library, 0 stands for the whole device.
"""
await_stream(backend, stream::Int) = nothing

"    finish_work(backend)\n\nWait until all work on the device is done, so that others may read the results."
finish_work(backend) = nothing

"    on_device(problem, backend)\n\nAn [`EquationProblem`](@ref) whose arguments are on a device."
function on_device end

"    read_out!(outputs, workspace, p, Z)\n\nThe outputs (outputs × samples) of the states `Z` (neurons × samples) on the device of a workspace."
function read_out! end

"    on_host(A)\n\nAn array in host memory, the array itself if it is there already."
on_host(A::Array) = A
on_host(A::AbstractArray) = Array(A)

"    find_nonfinite(X) -> (count, first)\n\nThe number of columns of `X` with an entry that is not finite, and the index of the first of them, 0 if there is none."
function find_nonfinite(X::AbstractMatrix)
    bad = findall(Array(.!vec(all(isfinite, X; dims = 1))))
    return length(bad), isempty(bad) ? 0 : first(bad)
end

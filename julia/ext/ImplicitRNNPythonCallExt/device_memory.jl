# Memory of a device: arrays of other libraries, and arrays for results. In Python they are `DeviceArray`s.

"A device vector with element type T, whose address Python knows."
struct OnDevice{T}
    address::UInt
    length::Int
    stream::Int          # what is to be waited for before it is read, nothing if it is negative
end
OnDevice(x::NumPy{T}) where {T} = OnDevice{T}(
    pyconvert(UInt, x.array.address), pyconvert(Int, x.array.size), pyconvert(Int, x.array.stream)
)

is_on_device(x::NumPy) = pyhasattr(x.array, "address")

function borrow(f, backend, arrays::NumPy...)
    any(is_on_device, arrays) || return borrow(f, nothing, arrays...)
    try
        return GC.@preserve arrays begin
            views = map(x -> is_on_device(x) ? OnDevice(x) : memory_of(x), arrays)
            GIL.@unlock begin
                result = f(map(v -> vector_of(backend, v), views)...)
                ImplicitRNN.finish_work(backend)
                result
            end
        end
    finally
        foreach(x -> pydel!(x.array), arrays)
    end
end
function vector_of(backend, v::OnDevice{T}) where {T}
    v.stream < 0 || ImplicitRNN.await_stream(backend, v.stream)
    return ImplicitRNN.wrap_memory(backend, T, v.address, v.length)
end
vector_of(backend, v::Vector) = v

"Memory that a result is in, which Python and who it gave it to may read until it is released."
struct Memory{B, V}
    backend::B
    vector::V
end
# Others may still be at work with it, in streams of their own.
give_up(m::Memory) = ImplicitRNN.await_stream(m.backend, 0)

"`device_memory(device, dtype, n) -> (handle, address)`."
function device_memory(device::Py, dtype::Py, n::Py)
    T, count = named(DTYPES, dtype), pyconvert(Int, n)
    return on_backend(pyconvert(String, device)) do backend
        ImplicitRNN.check_device(backend)
        vector = ImplicitRNN.device_vector(backend, T, count)
        keep(Memory(backend, vector)), ImplicitRNN.address_of(vector)
    end
end

"`copy_memory(device, from, to)`, of which one at least is on the device."
function copy_memory(device::Py, from::Py, to::Py)
    return on_backend(pyconvert(String, device)) do backend
        T = dtype_of(from)
        borrow((to, from) -> (copyto!(to, from); nothing), backend, NumPy{T}(to), NumPy{T}(from))
    end
end

"`find_nonfinite(device, array, columns) -> (samples with entries that are not finite, the first of them)`."
function find_nonfinite(device::Py, array::Py, rows::Py)
    n = pyconvert(Int, rows)
    return on_backend(pyconvert(String, device)) do backend
        borrow(x -> ImplicitRNN.find_nonfinite(columns(x, n)) .- (0, 1), backend, NumPy{dtype_of(array)}(array))
    end
end

dtype_of(array::Py) = named(DTYPES, array.dtype.name)

# The bridge to Python: entry points that take NumPy arrays without a copy. Only flat vectors cross; NumPy's
# C-ordered (samples, features) is Julia's (features, samples), so nothing is transposed and nothing copied.
module ImplicitRNNPythonCallExt

using ImplicitRNN
using ImplicitRNN: AbstractWorkspace, Optimisers, Outcome, PrecompileTools, Quality, Solver, Workspace, backend_of, equilibrium!,
    hessian_vector_product!, interrupt_address, jvp!, loss_and_gradient!, on_host, optimizer_state, output_size, restore_optimizer_state!, rows_of, vjp!
using PythonCall: PythonCall, GIL, Py, getptr, pybytes, pyconvert, pydel!, pydict, pyfunc, pyhasattr, pyimport, pyis, pyisinstance,
    pylist, pybuiltins

# --- entry points -----------------------------------------------------------------------------------------------

"""
What a call is given lies in this list of Python's, which it replaces each time, and behind it the handles that are to be released.
What PythonCall does to convert the arguments of a function takes a second to compile, and a microsecond in each call.
"""
const ARGUMENTS = PythonCall.pynew()

"A function of N Python objects, as Python calls it; of one type for all functions, as PythonCall compiles much for each."
struct EntryPoint{N}
    f::Function
end
EntryPoint(f) = EntryPoint{findfirst(n -> hasmethod(f, NTuple{n, Py}), 0:5) - 1}(f)

function (e::EntryPoint{N})() where {N}
    foreach(i -> release(ARGUMENTS[i]), N:(length(ARGUMENTS) - 1))
    return e.f(ntuple(i -> ARGUMENTS[i - 1], Val(N))...)
end
in_python(e::EntryPoint, name::String) = pyfunc(e; name)

"""
    hand_over()

Give Python the whole of what it calls: a dictionary of functions, and the list that their arguments are put in. Handles are
integers.
"""
function hand_over()
    HEAD[] = pyconvert(Int, pybuiltins.object.__basicsize__)
    NDARRAY[] = getptr(pyimport("numpy").ndarray)
    PythonCall.pycopy!(ARGUMENTS, pylist())
    points = pydict()
    for f in ENTRY_POINTS
        points[string(nameof(f))] = in_python(EntryPoint(f), string(nameof(f)))
    end
    pyimport("implicit_rnn.runtime.start").receive(points, ARGUMENTS)
    return nothing
end

# --- handles --------------------------------------------------------------------------------------------------

const HANDLES = Dict{Int, Any}()
const LAST_HANDLE = Ref(0)

function keep(object)
    HANDLES[LAST_HANDLE[] += 1] = object
    return LAST_HANDLE[]
end
lookup(handle::Py) = HANDLES[pyconvert(Int, handle)]

function release(handle::Py)
    give_up(pop!(HANDLES, pyconvert(Int, handle), nothing))
    return nothing
end
give_up(object) = nothing

alive() = length(HANDLES)

# --- arrays ---------------------------------------------------------------------------------------------------

"A one-dimensional contiguous NumPy array of element type T, writeable or not."
struct NumPy{T}
    array::Py
end
vectors(::Type{T}, arrays::Py, ::Val{N}) where {T, N} = ntuple(k -> NumPy{T}(arrays[k - 1]), Val(N))

# The small objects of a call pile up for long before Julia's collector thinks them worth its while.
const CALLS = Ref(0)
const COLLECT_EVERY = 1000

"""
    borrow(f, backend, arrays::NumPy...)

Call `f` with vectors on the memory of the arrays, with the GIL released: plain ones, or those of the device of a `backend` where the
arrays are there. The vectors are valid within `f` only. References are dropped at once, since Julia's garbage collector does not
see how much memory they keep alive.
"""
function borrow(f::F, ::Nothing, arrays::Vararg{NumPy, N}) where {F, N}
    (CALLS[] += 1) % COLLECT_EVERY == 0 && GC.gc(false)
    try
        return GC.@preserve arrays begin
            vectors = map(memory_of, arrays)
            GIL.@unlock f(vectors...)
        end
    finally
        foreach(x -> pydel!(x.array), arrays)
    end
end

"""
What NumPy keeps of an array, behind the head of its Python object: the first of `PyArrayObject_fields` in NumPy's C interface.
Read in place, as a `PyArray` costs more than all else in a small call.
"""
struct ArrayFields
    data::Ptr{Cvoid}
    axes::Cint
    shape::Ptr{Int}
    strides::Ptr{Int}
    base::Ptr{Cvoid}
    dtype::Ptr{Cvoid}
end

"The size of that head, which ends with the type of the object, and the type of arrays."
const HEAD, NDARRAY = Ref(0), Ref{Ptr{Cvoid}}(C_NULL)

"The letter for a kind of numbers, which NumPy keeps behind the Python type in its record of a dtype."
kind(::Type{Bool}) = 'b'
kind(::Type{<:Integer}) = 'i'
kind(::Type{<:AbstractFloat}) = 'f'

"A vector on the memory of an array, valid as long as that is kept."
function memory_of(x::NumPy{T}) where {T}
    object = Ptr{Cvoid}(getptr(x.array)) + HEAD[]
    unsafe_load(Ptr{Ptr{Cvoid}}(object), 0) == NDARRAY[] || error("the bridge takes NumPy arrays only")
    fields = unsafe_load(Ptr{ArrayFields}(object))
    found = Char(unsafe_load(Ptr{UInt8}(fields.dtype + HEAD[] + sizeof(Ptr))))
    found == kind(T) && fields.axes == 1 || error("the bridge takes vectors of $T, not kind $found with $(fields.axes) axes")
    entries = unsafe_load(fields.shape)
    entries < 2 || unsafe_load(fields.strides) == sizeof(T) || error("the bridge takes contiguous arrays of $T only")
    return unsafe_wrap(Array, Ptr{T}(fields.data), entries)
end

columns(x::Vector, rows::Int) = unsafe_wrap(Array, pointer(x), (rows, length(x) ÷ rows))
columns(x::AbstractVector, rows::Int) = reshape(x, rows, :)

include("device_memory.jl")

# --- problems -------------------------------------------------------------------------------------------------

# A network's workspace with the options of its calls.
struct Session{T, W <: AbstractWorkspace{T}}
    problem::Problem{T}
    workspace::W
end

const DTYPES = (; float64 = Float64, float32 = Float32, int64 = Int64, bool = Bool)

# Entry by entry, as the conversions of containers take as long to compile.
integers(x::Py) = Int[pyconvert(Int, n) for n in x]
numbers(x::Py) = Float64[pyconvert(Float64, n) for n in x]
pairs_of(x::Py) = Pair{Int, Int}[pyconvert(Int, p[0]) => pyconvert(Int, p[1]) for p in x]
options(x::Py) = Dict{Symbol, Any}(pyconvert(Symbol, name) => plain(x[name]) for name in x)
make(kinds::NamedTuple, d::Py) = named(kinds, d["name"])(; options(d["options"])...)
named(kinds::NamedTuple, name::Py) = getproperty(kinds, Symbol(pyconvert(String, name)))

"An option: nothing, a truth value, a number or a word."
function plain(x::Py)
    pyis(x, pybuiltins.None) && return nothing
    for (kind, T) in ((pybuiltins.bool, Bool), (pybuiltins.int, Int), (pybuiltins.float, Float64), (pybuiltins.str, String))
        pyisinstance(x, kind) && return pyconvert(T, x)
    end
    return pyconvert(Any, x)
end

"""
`compile(description) -> (handle, number of parameters)`: a workspace for the network that a Python dictionary describes. Only
`program` takes the handle.
"""
function compile(d::Py)
    T = pyconvert(String, d["dtype"]) == "float32" ? Float32 : Float64          # two types, for which all below is compiled
    layers = [
        Layer(pyconvert(Int, l["neurons"]), pyconvert(String, l["activation"]); lateral = pyconvert(Bool, l["lateral"]))
            for l in d["layers"]
    ]
    net = Network{T}(
        pyconvert(Int, d["inputs"]), layers;
        feedback = pairs_of(d["feedback"]), skips = pairs_of(d["skips"]),
        input_skips = integers(d["input_skips"]),
        outputs = pyisinstance(d["outputs"], pybuiltins.int) ? pyconvert(Int, d["outputs"]) : integers(d["outputs"]),
        constraint = named(ImplicitRNN.CONSTRAINTS, d["constraint"]["name"])(numbers(d["constraint"]["values"])...),
    )
    device = pyconvert(String, d["device"])
    return keep(device == "cpu" ? Workspace(net) : on_backend(backend -> Workspace(net, backend), device)), length(net)
end

"The package of a device, and its backend. The reference device arrays, which are in the machine's memory, are for tests."
const DEVICES = Dict(
    "cuda" => (Base.PkgId(Base.UUID("052768ef-5323-5732-b1bb-66c8b64840ba"), "CUDA"), :CUDABackend),
    "jl" => (Base.PkgId(Base.UUID("27aeb0d3-9eb9-45fb-866b-73c2ecf80fcb"), "JLArrays"), :JLBackend),
)

"`describe_device(device)`: the device in words, an error where there is none that works."
function describe_device(device::Py)
    return on_backend(pyconvert(String, device)) do backend
        library = parentmodule(typeof(backend))
        ImplicitRNN.check_device(backend)
        string(ImplicitRNN.describe_device(backend), ", ", library, ".jl ", pkgversion(library))
    end
end

"`f` of the backend of a device, whose package is loaded."
function on_backend(f, device::String)
    package, backend = DEVICES[device]
    Base.locate_package(package) === nothing && throw(
        ArgumentError(
            "device = \"$device\" needs $(package.name).jl, which is not in Julia's environment $(dirname(Base.active_project())); \
            add it by `implicit-rnn setup --cuda`, or there by `import Pkg; Pkg.add(\"$(package.name)\")`, or use device = \"cpu\""
        )
    )
    library = Base.require(package)
    # Late, as the methods of the package are younger than this call.
    return Base.invokelatest(() -> f(getproperty(library, backend)()))
end

"`program(handle, options) -> handle`: the network with the options that a Python dictionary describes, in the same workspace."
program(handle::Py, d::Py) = program(lookup(handle)::AbstractWorkspace, d)
function program(workspace::AbstractWorkspace, d::Py)
    solver, adjoint = make(ImplicitRNN.SOLVERS, d["solver"]), make(ImplicitRNN.ADJOINTS, d["adjoint"])
    loss, jacobian_penalty = make(ImplicitRNN.LOSSES, d["loss"]), pyconvert(Float64, d["jacobian_penalty"])
    return keep(Session(Problem(workspace.net; solver, adjoint, loss, jacobian_penalty), workspace))
end

"""
`solve(handle, p, X, start, outs)` with `outs = (state, status, iterations, residual, rate, bound)` filled in; `start`
may be None.
"""
solve(handle::Py, p::Py, X::Py, start::Py, outs::Py) = solve(lookup(handle)::Session, p, X, start, outs)
function solve(s::Session{T}, p::Py, X::Py, start::Py, outs::Py) where {T}
    net = s.problem.net
    results = NumPy{T}(outs[0]), NumPy{Int8}(outs[1]), NumPy{Int32}(outs[2]), ntuple(k -> NumPy{Float64}(outs[k + 2]), Val(3))...
    given_start = pyis(start, pybuiltins.None) ? () : (NumPy{T}(start),)
    borrow(backend_of(s.workspace), NumPy{T}(p), NumPy{T}(X), results..., given_start...) do p, X, state, status, iterations, residual, rate, bound, start...
        N = neurons(net)
        solution = Solution(columns(state, N), Outcome(reinterpret_status(status), iterations, residual, rate), bound)
        equilibrium!(solution, s.workspace, s.problem, p, columns(X, net.inputs), map(z -> columns(z, N), start)...)
    end
    pydel!(outs)          # a tuple keeps its arrays alive
    return nothing
end

"`read_out(handle, (p, state, out))`: the outputs of states on the device."
read_out(handle::Py, arrays::Py) = read_out(lookup(handle)::Session, arrays)
function read_out(s::Session{T}, arrays::Py) where {T}
    net = s.problem.net
    borrow(backend_of(s.workspace), vectors(T, arrays, Val(3))...) do p, state, out
        ImplicitRNN.read_out!(columns(out, output_size(net)), s.workspace, p, columns(state, neurons(net)))
    end
    pydel!(arrays)
    return nothing
end

reinterpret_status(x::Vector{Int8}) = unsafe_wrap(Array, Ptr{Status}(pointer(x)), length(x))

"""
`gradient(handle, (p, X, Y, weights, g), probe) -> (loss, unconverged, residual, adjoint residual)`; the gradient is written
to `g`. An empty `weights` stands for none, here and below. Three more arrays (status, residual, adjoint residual) are
filled in per sample.
"""
gradient(handle::Py, arrays::Py, probe::Py) = gradient(lookup(handle)::Session, arrays, pyconvert(Int, probe))
function gradient(s::Session{T}, arrays::Py, probe::Int) where {T}
    net = s.problem.net
    loss, quality = borrow(backend_of(s.workspace), vectors(T, arrays, Val(5))..., per_sample(arrays, 5)...) do p, X, Y, weights, g, rest...
        x, y, report = columns(X, net.inputs), columns(Y, output_size(net)), report_of(rest...)
        step!(weights) = loss_and_gradient!(g, s.workspace, s.problem, p, x, y; probe, weights, report)
        isempty(weights) ? step!(nothing) : step!(weights)         # of known types
    end
    pydel!(arrays)
    return loss, numbers(quality)...
end

numbers(q::Quality) = (q.unconverged, q.residual, q.adjoint_residual)

given(x::AbstractVector) = isempty(x) ? nothing : x
given(x::AbstractVector, rows::Int) = isempty(x) ? nothing : columns(x, rows)

# Three more arrays than `count`: status, residual and adjoint residual per sample.
per_sample(arrays::Py, count::Int) = length(arrays) == count ? () :
    (NumPy{Int8}(arrays[count]), NumPy{Float64}(arrays[count + 1]), NumPy{Float64}(arrays[count + 2]))
report_of() = nothing
report_of(status, residual, adjoint_residual) = (reinterpret_status(status), residual, adjoint_residual)

"""
`vjp(handle, (p, X, start, V, g, dX), of_state, probe) -> (penalty, unconverged, residual, adjoint residual)`, see [`vjp!`](@ref);
`start` may be empty, and three more arrays are filled in as by [`gradient`](@ref).
"""
vjp(handle::Py, arrays::Py, of_state::Py, probe::Py) =
    vjp(lookup(handle)::Session, arrays, pyconvert(Bool, of_state), pyconvert(Int, probe))
function vjp(s::Session{T}, arrays::Py, of_state::Bool, probe::Int) where {T}
    net, of = s.problem.net, of_state ? :state : :outputs
    penalty, quality = borrow(backend_of(s.workspace), vectors(T, arrays, Val(6))..., per_sample(arrays, 6)...) do p, X, start, V, g, dX, report...
        vjp!(
            g, columns(dX, net.inputs), s.workspace, s.problem, p, columns(X, net.inputs), columns(V, rows_of(net, of)); of,
            start = given(start, neurons(net)), probe, report = report_of(report...),
        )
    end
    pydel!(arrays)
    return penalty, numbers(quality)...
end

"`jvp(handle, (p, X, start, dp, dX, tangent), of_state) -> (unconverged, residual, adjoint residual)`, see [`jvp!`](@ref)."
jvp(handle::Py, arrays::Py, of_state::Py) = jvp(lookup(handle)::Session, arrays, pyconvert(Bool, of_state))
function jvp(s::Session{T}, arrays::Py, of_state::Bool) where {T}
    net, of = s.problem.net, of_state ? :state : :outputs
    quality = borrow(backend_of(s.workspace), vectors(T, arrays, Val(6))..., per_sample(arrays, 6)...) do p, X, start, dp, dX, tangent, report...
        jvp!(
            columns(tangent, rows_of(net, of)), s.workspace, s.problem, p, columns(X, net.inputs), dp, columns(dX, net.inputs); of,
            start = given(start, neurons(net)), report = report_of(report...),
        )
    end
    pydel!(arrays)
    return numbers(quality)
end

"`hessian_vector_product(handle, (p, X, Y, weights, v, h))`: H v is written to `h`."
hessian_vector_product(handle::Py, arrays::Py) = hessian_vector_product(lookup(handle)::Session, arrays)
function hessian_vector_product(s::Session{T}, arrays::Py) where {T}
    net = s.problem.net
    borrow(backend_of(s.workspace), vectors(T, arrays, Val(6))...) do p, X, Y, weights, v, h
        hessian_vector_product!(
            h, s.workspace, s.problem, p, columns(X, net.inputs), columns(Y, output_size(net)), v, given(weights)
        )
    end
    pydel!(arrays)
    return nothing
end

"`spectral_radius(handle, (p, X, state, out))`: that of the Jacobian at each state is written to `out`."
spectral_radius(handle::Py, arrays::Py) = spectral_radius(lookup(handle)::Session, arrays)
function spectral_radius(s::Session{T}, arrays::Py) where {T}
    net = s.problem.net
    borrow(backend_of(s.workspace), vectors(T, arrays, Val(3))..., NumPy{Float64}(arrays[3])) do p, X, state, out
        x, z = on_host(columns(X, net.inputs)), on_host(columns(state, neurons(net)))      # where eigenvalues are found
        copyto!(out, ImplicitRNN.spectral_radius(net, p, x, z))
    end
    pydel!(arrays)
    return nothing
end

# --- training -------------------------------------------------------------------------------------------------

"`trainer(handle, description) -> handle`: it trains in the workspace of the program."
function trainer(handle::Py, d::Py)
    s = lookup(handle)::Session
    rule = named(ImplicitRNN.OPTIMIZERS, d["name"])(options(d["options"]))
    guard = Guard(pyconvert(Float64, d["unconverged"]), pyconvert(Float64, d["parameter_norm"]))
    return keep(
        Trainer(
            s.problem, rule; workspace = s.workspace, guard, clip = pyconvert(Float64, d["clip"]),
            nets = pyconvert(Int, d["nets"]), batch_size = pyconvert(Int, d["batch_size"]),
            warm_start = pyconvert(Bool, d["warm_start"]),
        )
    )
end

"""
`train(handle, batch_size, arrays)` with arrays = (parameters, good, halted, X, Y, weights, order, rates, losses,
unconverged), see `train!`.
"""
train(handle::Py, batch_size::Py, arrays::Py) = train(lookup(handle)::Trainer, pyconvert(Int, batch_size), arrays)
function train(t::Trainer{T}, batch_size::Int, arrays::Py) where {T}
    net = t.problem.net
    types = (
        NumPy{T}, NumPy{T}, NumPy{Int8}, NumPy{T}, NumPy{T}, NumPy{T}, NumPy{Int64}, NumPy{Float64}, NumPy{Float64},
        NumPy{Int64},
    )
    vectors = map((type, k) -> type(arrays[k]), types, ntuple(k -> k - 1, Val(10)))
    borrow(backend_of(first(t.buffers).workspace), vectors...) do P, good, halted, X, Y, weights, order, rates, losses, unconverged
        nets = Replicas(columns(P, length(net)), columns(good, length(net)), halted)
        samples = length(X) ÷ net.inputs
        epochs = length(losses) ÷ length(halted)
        train!(
            t, nets, columns(X, net.inputs), columns(Y, output_size(net)), columns(order, samples), batch_size, rates,
            columns(losses, epochs), columns(unconverged, epochs); weights = given(weights),
        )
    end
    pydel!(arrays)
    return nothing
end

"`state(handle)`: the optimiser's state, the bytes of its numbers in Float64."
state(handle::Py) = pybytes(collect(reinterpret(UInt8, optimizer_state(lookup(handle)::Trainer))))

"`restore(handle, numbers)`: the inverse of `state`."
function restore(handle::Py, numbers::Py)
    t = lookup(handle)::Trainer          # with the GIL, which `borrow` releases
    borrow(v -> restore_optimizer_state!(t, v), nothing, NumPy{Float64}(numbers))
    return nothing
end

include("equations.jl")

const ENTRY_POINTS = (
    compile, program, solve, read_out, gradient, vjp, jvp, hessian_vector_product, spectral_radius, trainer, train, state, restore,
    alive, describe_device, device_memory, find_nonfinite, copy_memory, interrupt_address, EQUATION_ENTRY_POINTS...,
)

# --- compiled ahead -------------------------------------------------------------------------------------------

if PrecompileTools.workload_enabled(ImplicitRNN)
    for f in ENTRY_POINTS, E in (typeof(EntryPoint(f)),)
        precompile(f, ntuple(_ -> Py, first(E.parameters)))
        precompile(in_python, (E, String))
        # What PythonCall calls them by, which is no part of its interface.
        isdefined(PythonCall.JlWrap, :pyjlcallback_call) && precompile(PythonCall.JlWrap.pyjlcallback_call, (E, Py, Py))
    end
    precompile(hand_over, ())
    for T in (Float64, Float32)
        net = Network{T}(1, [Layer(1)]; outputs = 1)
        S = typeof(Session(Problem(net), Workspace(net)))
        precompile(program, (typeof(Workspace(net)), Py))
        precompile(solve, (S, Py, Py, Py, Py))
        precompile(gradient, (S, Py, Int))
        precompile(vjp, (S, Py, Bool, Int))
        precompile(jvp, (S, Py, Bool))
        precompile(train, (typeof(Trainer(Problem(net), Optimisers.Adam(0.01, (0.9, 0.999), 1.0e-8))), Int, Py))
    end
    precompile(equation_session, (Type{Float64}, EquationForm, Py, Py))
    E = EquationSession{Float64, Matrix{Float64}, Matrix{Float64}}
    precompile(solve_session!, (E, ImplicitRNN.Auto, Tuple{NumPy{Int8}, NumPy{Int32}, NumPy{Float64}, NumPy{Float64}}))
    precompile(borrow_for_vjp, (E, Py, Py))
    precompile(borrow_for_jacobian, (E, Int, Py, Py))
end

end

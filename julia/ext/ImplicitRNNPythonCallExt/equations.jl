# --- equations ------------------------------------------------------------------------------------------------
# The entry points of `implicit_rnn.equations`. Each returns None or a number, or where the user's function is at fault what is
# wrong, as (kind, text) for Python to say with the names it knows.

using ImplicitRNN: EquationProblem, compiled_function, inverses_at, solve!, vjp!

"""
An equation on the memory of Python's arrays, which their owner keeps alive as long as the handle: the arguments, and `Z`, which
holds the start and then the solution, at which `inverses` are found when they are first needed. On a device there are copies of
those that are not there, and `given` is what `Z` is a copy of, or `Z` itself.
"""
mutable struct EquationSession{T, M <: AbstractMatrix{T}, G <: AbstractMatrix{T}}
    const problem::EquationProblem{T}
    const Z::M
    const given::G
    inverses::Any
end
EquationSession(problem::EquationProblem{T}, Z::AbstractMatrix{T}, given::AbstractMatrix{T}) where {T} =
    EquationSession{T, typeof(Z), typeof(given)}(problem, Z, given, nothing)

inverses!(s::EquationSession) = s.inverses === nothing ? (s.inverses = inverses_at(s.problem, s.Z)) : s.inverses

dtype(d::Py) = named(DTYPES, d["dtype"])
shape(d::Py) = (integers(d["shape"])...,)

fault(::Exception) = nothing
fault(e::ImplicitRNN.WrongShape) = "shape", sprint(showerror, e)
fault(e::ImplicitRNN.SingularSolution) = "singular", join(e.samples .- 1, " ")
fault(e::ImplicitRNN.InvalidCode) = "code", e.text

"The value of `work()`; what the user's function did wrong is returned, other errors are thrown."
function answer(@nospecialize(work))
    try
        return work()
    catch error
        found = fault(error)
        found === nothing && rethrow()
        return found
    end
end

"What an equation is but for its numbers, which many have in common: equations in a loop differ in no more."
struct EquationForm
    type::DataType
    f::Any
    root::Bool
    n::Int
    samples::Int
    types::Vector{DataType}          # of the arguments
    shapes::Vector{Tuple{Vararg{Int}}}
    batched::Vector{Bool}
    weights::Vector{Float64}
    device::String
end

"`equation_form(description) -> handle`."
equation_form(d::Py) = answer(() -> keep(form_of(d)))
function form_of(d::Py)
    f = compiled_function(pyconvert(String, d["code"]))
    pyconvert(Bool, d["number"]) && (f = ImplicitRNN.OfNumber(f))
    args, device = collect(d["args"]), pyconvert(String, d["device"])
    device == "cpu" || on_backend(ImplicitRNN.check_device, device)           # which loads its package, for the calls to come
    return EquationForm(
        dtype(d), f, pyconvert(Bool, d["root"]), pyconvert(Int, d["n"]), pyconvert(Int, d["samples"]), dtype.(args), shape.(args),
        Bool[pyconvert(Bool, a["batched"]) for a in args], inv.(numbers(d["scale"])), device,
    )
end

"`equation_solver(name, options) -> handle`."
equation_solver(name::Py, d::Py) = keep(named(ImplicitRNN.SOLVERS, name)(; options(d)...))

"`equation_at(form, Z, args) -> handle`: of the equation with the solution Z."
function equation_at(form::Py, Z::Py, args::Py)
    d = lookup(form)::EquationForm
    return keep(equation_session(d.type, d, Z, args))
end

function equation_session(::Type{T}, d::EquationForm, Z::Py, args::Py) where {T}
    if d.device == "cpu"
        problem, given = equation_on(T, d, Z, args, nothing)
        return EquationSession(problem, given, given)
    end
    return on_backend(d.device) do backend
        problem, given = equation_on(T, d, Z, args, backend)
        EquationSession(ImplicitRNN.on_device(problem, backend), uploaded(given, backend), given)
    end
end

function equation_on(::Type{T}, d::EquationForm, Z::Py, args::Py, backend) where {T}
    arguments = AbstractArray[reshape(lasting(NumPy{d.types[k]}(args[k - 1]), backend), d.shapes[k]) for k in eachindex(d.types)]
    pydel!(args)          # a tuple keeps its arrays alive
    problem = EquationProblem{T}(d.f, d.root, d.n, d.samples, arguments, d.batched, d.weights)
    return problem, reshape(lasting(NumPy{T}(Z), backend), d.n, d.samples)
end

uploaded(A::AbstractMatrix, _) = A
uploaded(A::Matrix{T}, backend) where {T} =
    copyto!(reshape(ImplicitRNN.device_vector(backend, T, length(A)), size(A)), A)

"A vector on the memory of an array that its owner keeps."
function lasting(x::NumPy, backend)
    v = backend !== nothing && is_on_device(x) ? OnDevice(x) : memory_of(x)
    pydel!(x.array)
    return vector_of(backend, v)
end

"`equation_solve(form, Z, args, solver, outs) -> handle`: from the start Z to the solution; outs = (status, iterations, residual, rate)."
function equation_solve(form::Py, Z::Py, args::Py, solver::Py, outs::Py)
    d = lookup(form)::EquationForm
    s = equation_session(d.type, d, Z, args)
    arrays = NumPy{Int8}(outs[0]), NumPy{Int32}(outs[1]), NumPy{Float64}(outs[2]), NumPy{Float64}(outs[3])
    pydel!(outs)
    return answer(() -> (solve_session!(s, lookup(solver)::Solver, arrays); keep(s)))
end
solve_session!(s::EquationSession, method::Solver, arrays) =
    borrow(nothing, arrays...) do status, iterations, residual, rate
    regular = solve!(s.Z, Outcome(reinterpret_status(status), iterations, residual, rate), s.problem, method)
    s.inverses = inverses_at(s.problem, s.Z, regular)
    s.Z === s.given || copyto!(s.given, s.Z)
    ImplicitRNN.finish_work(backend_of(s.Z))
    nothing
end

"`equation_vjp(handle, v, gradients)`; arguments that are not floating-point numbers stand in for their gradients."
function equation_vjp(handle::Py, v::Py, gradients::Py)
    s = lookup(handle)::EquationSession
    found = answer(() -> borrow_for_vjp(s, v, gradients))
    pydel!(gradients)
    return found
end
function borrow_for_vjp(s::EquationSession{T}, v::Py, gradients::Py) where {T}
    arrays = [NumPy{eltype(x)}(gradients[k - 1]) for (k, x) in enumerate(s.problem.args)]
    return borrow(backend_of(s.Z), NumPy{T}(v), arrays...) do v, gradients...
        shaped = [reshape(g, size(x)) for (g, x) in zip(gradients, s.problem.args)]
        vjp!(shaped, s.problem, inverses!(s), reshape(v, size(s.Z)))
        nothing
    end
end

"""
`equation_jacobian(handle, index, wanted, J)` with J (n × entries × samples), on a device (entries × n × samples), as Python has it, and
`wanted` (samples) of booleans.
"""
function equation_jacobian(handle::Py, index::Py, wanted::Py, J::Py)
    s, k = lookup(handle)::EquationSession, pyconvert(Int, index) + 1
    return answer(() -> borrow_for_jacobian(s, k, wanted, J))
end
function borrow_for_jacobian(s::EquationSession{T}, k::Int, wanted::Py, J::Py) where {T}
    return borrow(backend_of(s.Z), NumPy{Bool}(wanted), NumPy{T}(J)) do wanted, J
        put_jacobian!(J, s, k, wanted)
        nothing
    end
end
put_jacobian!(J::Vector, s::EquationSession, k, wanted) =
    ImplicitRNN.jacobian!(reshape(J, s.problem.n, :, s.problem.samples), s.problem, inverses!(s), k, wanted)
function put_jacobian!(J::AbstractVector, s::EquationSession, k, wanted)
    n, samples = s.problem.n, s.problem.samples
    found = ImplicitRNN.jacobian!(similar(J, n, length(J) ÷ (n * samples), samples), s.problem, inverses!(s), k, wanted)
    return permutedims!(reshape(J, :, n, samples), found, (2, 1, 3))
end

const EQUATION_ENTRY_POINTS = (equation_form, equation_solver, equation_at, equation_solve, equation_vjp, equation_jacobian)

# --- equations ------------------------------------------------------------------------------------------------
# The entry points of `implicit_rnn.equations`. Each returns None or a number, or where the user's function is at fault what is
# wrong, as (kind, text) for Python to say with the names it knows.

using ImplicitRNN: EquationProblem, Inverses, compiled_function, solve!, vjp!

"""
An equation on the memory of Python's arrays, which their owner keeps alive as long as the handle: the arguments, and `Z`, which
holds the start and then the solution, at which `inverses` are found when they are first needed.
"""
mutable struct EquationSession{T}
    const problem::EquationProblem{T}
    const Z::Matrix{T}
    inverses::Union{Nothing, Inverses{T}}
end

function inverses!(s::EquationSession{T}) where {T}
    s.inverses === nothing && (s.inverses = Inverses(s.problem, s.Z))
    return s.inverses::Inverses{T}
end

const DTYPES = (; float64 = Float64, float32 = Float32, int64 = Int64, bool = Bool)

dtype(d::Py) = getproperty(DTYPES, Symbol(pyconvert(String, d["dtype"])))
shape(d::Py) = (pyconvert(Vector{Int}, d["shape"])...,)

fault(::Exception) = nothing
fault(e::ImplicitRNN.WrongShape) = "shape", sprint(showerror, e)
fault(e::ImplicitRNN.SingularSolution) = "singular", string(e.sample - 1)
fault(e::ImplicitRNN.InvalidCode) = "code", e.text

"The value of `work()`; what the user's function did wrong is returned, other errors are thrown."
function answer(work)
    try
        return work()
    catch error
        found = fault(error)
        found === nothing && rethrow()
        return found
    end
end

"`equation_compile(description, Z, args) -> handle`."
equation_compile(d::Py, Z::Py, args::Py) = answer(() -> keep(equation_session(dtype(d), d, Z, args)))

function equation_session(::Type{T}, d::Py, Z::Py, args::Py) where {T}
    f = compiled_function(pyconvert(String, d["code"]))
    pyconvert(Bool, d["number"]) && (f = ImplicitRNN.OfNumber(f))
    n, samples = pyconvert(Int, d["n"]), pyconvert(Int, d["samples"])
    arguments = Array[reshape(lasting(NumPy{dtype(a)}(args[k - 1])), shape(a)) for (k, a) in enumerate(d["args"])]
    batched = Bool[pyconvert(Bool, a["batched"]) for a in d["args"]]
    weights = inv.(pyconvert(Vector{Float64}, d["scale"]))
    problem = EquationProblem{T}(f, pyconvert(Bool, d["root"]), n, samples, arguments, batched, weights)
    pydel!(args)          # a tuple keeps its arrays alive
    return EquationSession{T}(problem, reshape(lasting(NumPy{T}(Z)), n, samples), nothing)
end

"A vector on the memory of an array that its owner keeps."
function lasting(x::NumPy{T}) where {T}
    v = view_of(x)
    vector = unsafe_wrap(Array, v.ptr, length(v))
    pydel!(v.handle)
    pydel!(v.py)
    return vector
end

"`equation_solve(handle, solver, outs)` with outs = (status, iterations, residual, rate)."
function equation_solve(handle::Py, solver::Py, outs::Py)
    s = lookup(handle)::EquationSession
    method = getproperty(ImplicitRNN.SOLVERS, Symbol(pyconvert(String, solver["name"])))(; options(solver["options"])...)
    s.inverses = nothing
    arrays = NumPy{Int8}(outs[0]), NumPy{Int32}(outs[1]), NumPy{Float64}(outs[2]), NumPy{Float64}(outs[3])
    found = answer() do
        borrow(arrays...) do status, iterations, residual, rate
            regular = solve!(s.Z, Outcome(reinterpret_status(status), iterations, residual, rate), s.problem, method)
            s.inverses = Inverses(s.problem, s.Z, regular)
            nothing
        end
    end
    pydel!(outs)
    return found
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
    return borrow(NumPy{T}(v), arrays...) do v, gradients...
        shaped = [reshape(g, size(x)) for (g, x) in zip(gradients, s.problem.args)]
        vjp!(shaped, s.problem, inverses!(s), reshape(v, size(s.Z)))
        nothing
    end
end

"`equation_jacobian(handle, index, wanted, J)` with J (n × entries × samples) and `wanted` (samples) of booleans."
function equation_jacobian(handle::Py, index::Py, wanted::Py, J::Py)
    s, k = lookup(handle)::EquationSession, pyconvert(Int, index) + 1
    return answer(() -> borrow_for_jacobian(s, k, wanted, J))
end
function borrow_for_jacobian(s::EquationSession{T}, k::Int, wanted::Py, J::Py) where {T}
    return borrow(NumPy{Bool}(wanted), NumPy{T}(J)) do wanted, J
        ImplicitRNN.jacobian!(reshape(J, s.problem.n, :, s.problem.samples), s.problem, inverses!(s), k, wanted)
        nothing
    end
end

const EQUATION_ENTRY_POINTS = (equation_compile, equation_solve, equation_vjp, equation_jacobian)

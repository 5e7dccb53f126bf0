# --- generic solving ------------------------------------------------------------------------------------------
# The entry points of `implicit_rnn.equations`. Each returns None, or where the user's function is at fault what is wrong, as
# (kind, text) for Python to say with the names it knows.

using ImplicitRNN: GenericProblem, compiled_function, solve!, vjp!

const DTYPES = (; float64 = Float64, float32 = Float32, int64 = Int64, bool = Bool)

dtype(d::Py) = getproperty(DTYPES, Symbol(pyconvert(String, d["dtype"])))
shape(d::Py) = (pyconvert(Vector{Int}, d["shape"])...,)
lent(arrays::Py, types) = [NumPy{T}(arrays[k - 1]) for (k, T) in enumerate(types)]

complaint(::Exception) = nothing
complaint(e::ImplicitRNN.WrongShape) = "shape", sprint(showerror, e)
complaint(e::ImplicitRNN.SingularSolution) = "singular", string(e.sample - 1)
complaint(e::ImplicitRNN.InvalidCode) = "code", e.text

"Call `work`; what the user's function did wrong is returned, other errors are thrown."
function answer(work)
    try
        work()
        return nothing
    catch error
        said = complaint(error)
        said === nothing && rethrow()
        return said
    end
end

"`generic_check(code)`: whether a text defines a function."
generic_check(code::Py) = answer(() -> compiled_function(pyconvert(String, code)))

# `use(problem, Z, others...)` for the problem that a dictionary describes, on the memory of `Z`, `args` and `others`.
with_problem(use, d::Py, Z::Py, args::Py, others::Vector) = answer(() -> lend_problem(use, dtype(d), d, Z, args, others))

function lend_problem(use, ::Type{T}, d::Py, Z::Py, args::Py, others::Vector) where {T}
    f = compiled_function(pyconvert(String, d["code"]))
    n, samples, isroot = pyconvert(Int, d["n"]), pyconvert(Int, d["samples"]), pyconvert(Bool, d["root"])
    shapes = [shape(a) for a in d["args"]]
    batched = Bool[pyconvert(Bool, a["batched"]) for a in d["args"]]
    inputs = lent(args, [dtype(a) for a in d["args"]])
    borrow(NumPy{T}(Z), inputs..., others...) do z, vectors...
        arguments = Array[reshape(x, s) for (x, s) in zip(vectors, shapes)]
        problem = GenericProblem{T}(f, isroot, n, samples, arguments, batched)
        use(problem, reshape(z, n, samples), vectors[(length(shapes) + 1):end]...)
        return
    end
    pydel!(args)          # a tuple keeps its arrays alive
    return
end

"`generic_solve(description, Z, args, outs)`: `Z` holds the start and takes the solution, outs = (status, iterations, residual, rate)."
function generic_solve(d::Py, Z::Py, args::Py, outs::Py)
    solver = getproperty(ImplicitRNN.SOLVERS, Symbol(pyconvert(String, d["solver"]["name"])))(; options(d["solver"]["options"])...)
    said = with_problem(d, Z, args, lent(outs, (Int8, Int32, Float64, Float64))) do problem, Z, status, iterations, residual, rate
        solve!(Z, Outcome(reinterpret_status(status), iterations, residual, rate), problem, solver)
    end
    pydel!(outs)
    return said
end

"`generic_vjp(description, Z, args, v, gradients)`; arguments that are not floating-point numbers stand in for their gradients."
function generic_vjp(d::Py, Z::Py, args::Py, v::Py, gradients::Py)
    types = [dtype(a) for a in d["args"]]
    said = with_problem(d, Z, args, [NumPy{dtype(d)}(v); lent(gradients, types)]) do problem, Z, v, gradients...
        shaped = [reshape(g, size(x)) for (g, x) in zip(gradients, problem.args)]
        vjp!(shaped, problem, Z, reshape(v, size(Z)))
    end
    pydel!(gradients)
    return said
end

"`generic_jacobian(description, Z, args, index, wanted, J)` with J (n × entries × samples) and `wanted` (samples) of booleans."
function generic_jacobian(d::Py, Z::Py, args::Py, index::Py, wanted::Py, J::Py)
    k = pyconvert(Int, index) + 1
    return with_problem(d, Z, args, [NumPy{Bool}(wanted), NumPy{dtype(d)}(J)]) do problem, Z, wanted, J
        ImplicitRNN.jacobian!(reshape(J, problem.n, :, problem.samples), problem, Z, k, wanted)
    end
end

const GENERIC_ENTRY_POINTS = (generic_check, generic_solve, generic_vjp, generic_jacobian)

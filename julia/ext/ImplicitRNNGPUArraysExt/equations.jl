# From an equation to its solution on a device; samples left unsolved are passed to the CPU in one batch.

"The solution of an equation on a device; derivatives that are left to the CPU are computed there when needed."
struct DeviceInverses{T, M <: AbstractMatrix{T}}
    Z::M
end
ImplicitRNN.inverses_at(::EquationProblem{T}, Z::AbstractGPUArray{T, 2}, regular = nothing) where {T} = DeviceInverses{T, typeof(Z)}(Z)

ImplicitRNN.as_argument(::Type{T}, x::AbstractGPUArray) where {T} = eltype(x) <: AbstractFloat ? convert_entries(T, x) : x
convert_entries(::Type{T}, x::AbstractArray{T}) where {T} = x
convert_entries(::Type{T}, x::AbstractArray) where {T} = T.(x)

"The equation with what each sample has of its own on a device, and what they share on the host."
function ImplicitRNN.on_device(problem::EquationProblem{T}, backend::Backend) where {T}
    args = map(problem.args, problem.batched) do x, own
        own ? (x isa AbstractGPUArray ? x : copyto!(KernelAbstractions.allocate(backend, eltype(x), size(x)...), x)) : on_host(x)
    end
    return EquationProblem{T}(problem.f, problem.root, problem.n, problem.samples, args, problem.batched, problem.weights)
end

ImplicitRNN.backend_of(x::AbstractGPUArray) = get_backend(x)
ImplicitRNN.beside(value::AbstractGPUArray, problem::EquationProblem) = ImplicitRNN.on_device(problem, get_backend(value))
ImplicitRNN.beside(value::AbstractGPUArray{T}, x::AbstractArray) where {T} =
    x isa AbstractGPUArray ? convert_entries(T, x) : copyto!(similar(value), x)
ImplicitRNN.solve_equation(f, z0::AbstractGPUArray{<:Real}, args; options...) = ImplicitRNN.solve_from!(float.(z0), f, args; options...)

"The equation of some of the samples, on the host."
function part_of(problem::EquationProblem{T}, columns) where {T}
    args = map((x, own) -> own ? on_host(columns_of(x, columns)) : x, problem.args, problem.batched)
    return EquationProblem{T}(problem.f, problem.root, problem.n, length(columns), args, problem.batched, problem.weights)
end

# What f is given: an argument of each sample, or one that they share.
argument_of(x::AbstractArray, own::Bool) = own ? ImplicitRNN.per_sample(x) : ImplicitRNN.shared(x)
arguments_of(problem::EquationProblem) = (map(argument_of, problem.args, problem.batched)...,)

"Options of an equation that a device does not support are refused by name."
function check_offered(problem::EquationProblem{T}, solver) where {T}
    problem.n <= MAX_SHORT || refused("equations of more than $MAX_SHORT unknowns ($(problem.n) came)")
    solver isa Union{Auto, Newton} || solver isa Picard && !problem.root ||
        refused("the solver $(nameof(typeof(solver))) for equations", problem.root ? "Auto or Newton" : "Auto, Picard or Newton")
    check_arguments(problem)
    isbits(problem.f) || refused("functions that refer to variables outside, as $(problem.f) does")
    return
end
"The entries of an argument that a sample is given; of those of each sample's own, the last axis is that of the samples."
entries_of(x, own::Bool) = own ? prod(Base.front(size(x))) : length(x)
function check_arguments(problem::EquationProblem)
    for (i, (x, own)) in enumerate(zip(problem.args, problem.batched))
        entries, axes = entries_of(x, own), ndims(x) - own
        axes <= 1 && entries <= MAX_SHORT ||
            refused("arguments but numbers and vectors of up to $MAX_SHORT entries (number $i is an array of $entries entries, $axes axes)")
    end
    return
end

# As far as that can be known without the device: what f gives for dual numbers has to need no memory.
function check_function(problem::EquationProblem{T}, args, ::Val{K}) where {T, K}
    z = seeded(Short(unroll(_ -> zero(T), Val(K))), 1, Val(width_of(K)))
    one = part_of(problem, 1:1)
    given = map(x -> seeded(at(x, 1), 0, Val(width_of(K))), arguments_of(one))
    returned = Base.promote_op(problem.f, typeof(z), map(typeof, given)...)
    returned <: Union{Short{K}, Number} && isbitstype(returned) && return
    # If it is no vector like z at all, that is to be said as it is on the CPU.
    call!(zeros(T, K), ImplicitRNN.Equation(one), zeros(T, K), 1)
    kind = returned isa DataType ? nameof(returned) : returned
    return refused("this function, which gives values of type $kind; it takes formulas of numbers, broadcast formulas, and [a, b] of those")
end

rule_of(problem::EquationProblem{T}, solver, ::Val{K}) where {T, K} = SampleRule{K}(
    Float64(tolerance(solver, T)), Float64(eps(T)), isempty(problem.weights) ? 0.0 : sqrt(K), min(solver.max_iterations, typemax(Int32)),
    newton_limit(solver, problem.root), solver isa Auto ? picard_patience(K) : Inf, solver isa Picard ? solver.damping : 1.0,
    Short(unroll(i -> isempty(problem.weights) ? 1.0 : problem.weights[i], Val(K))), Short(unroll(_ -> 1.0, Val(K))),
)
newton_limit(s, root) = min(s.max_iterations, typemax(Int32))
function newton_limit(s::Auto, root)
    share = root ? first(ATTEMPT_SHARES) : FIXED_POINT_SHARE
    return min(s.max_iterations, max(ceil(Int, share * s.max_iterations), LEAST_ATTEMPT))
end

function ImplicitRNN.solve!(Z::AbstractGPUArray{T, 2}, outcome::Outcome, problem::EquationProblem{T}, solver::Solver) where {T}
    check_offered(problem, solver)
    # `f` may be newer than this code.
    Base.invokelatest(solve_samples_on_device!, Z, outcome, problem, solver, Val(problem.n))
    return zeros(Bool, problem.samples)
end

function solve_samples_on_device!(Z::AbstractGPUArray{T, 2}, outcome, problem, solver, unknowns::Val{K}) where {T, K}
    isempty(Z) && return
    args, samples = arguments_of(problem), size(Z, 2)
    check_function(problem, args, unknowns)
    fresh(value) = fill!(similar(Z, typeof(value), samples), value)
    ends = (; solved = fresh(false), iterations = fresh(Int32(0)), residual = fresh(0.0), rate = fresh(0.0))
    each_sample(Z) do range, group
        solve_samples!(get_backend(Z), group)(
            Z, ends, problem.f, args, rule_of(problem, solver, unknowns), Val(typeof(solver)), Val(problem.root), Val(group); ndrange = range
        )
    end
    left = findall(on_host(.!ends.solved))
    fill!(outcome.status, CONVERGED)
    foreach(name -> copyto!(getfield(outcome, name), getfield(ends, name)), (:iterations, :residual, :rate))
    isempty(left) || solve_left!(Z, outcome, problem, solver, left)
    return
end

function solve_left!(Z, outcome, problem, solver, left)
    z, found = on_host(Z[:, left]), Outcome(length(left))
    solve!(z, found, part_of(problem, left), solver)
    copy_outcome!(outcome, left, found)
    Z[:, left] = copyto!(similar(Z, size(z)), z)
    return
end

# That a function cannot be compiled for the device; on one that is the CPU, it finds no method instead.
is_of_compilation(error) = error isa MethodError || nameof(typeof(error)) in (:InvalidIRError, :KernelError)

"`launch(range, group)` for all columns of Z. What the function cannot do on the device is refused."
function each_sample(launch, Z)
    check_interrupt()
    group = group_of(size(Z, 1))
    try
        launch(group * cld(size(Z, 2), group), group)
        ImplicitRNN.finish_work(get_backend(Z))
    catch error
        # Only where the device is the CPU; elsewhere what is outside a domain is NaN.
        cause(error) isa DomainError && return
        is_of_compilation(cause(error)) || rethrow()
        refused("this function: $(first(eachline(IOBuffer(sprint(showerror, error)))))")
    end
    return
end

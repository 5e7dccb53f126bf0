# Posing equations: a function, its arguments, those of each sample, and the sizes to which errors are relative.

"""
    EquationProblem{T}(f, z0, args, batched; root, scale = nothing)

`z = f(z, args...)`, or `f(z, args...) = 0` if `root`, for as many vectors z as `z0` has columns. Arguments are arrays (a
zero-dimensional one stands for a number); the last axis of a `batched` one is that of the samples. `scale`, a number or a vector
like z, is the typical size of each entry, in units of which entries are compared. Throws an `ArgumentError` for arguments of
another type and for positions in `batched` that are not those of arrays.
"""
struct EquationProblem{T}
    # Of abstract types: the loops over the samples are compiled for `f` behind a function barrier, see `Equation`.
    f::Any
    root::Bool
    n::Int
    samples::Int
    args::Vector{AbstractArray}
    batched::Vector{Bool}
    weights::Vector{Float64}         # 1 / scale; none where all entries count alike
end

function EquationProblem{T}(f, z0::AbstractVecOrMat, args, batched; root, scale = nothing) where {T}
    n = size(z0, 1)
    check_batched(batched, args)
    problem = EquationProblem{T}(
        f, root, n, size(z0, 2), AbstractArray[as_argument(T, x) for x in args], [i in batched for i in eachindex(args)],
        inverse_scale(scale, n),
    )
    for (i, x) in enumerate(problem.args)
        problem.batched[i] && size(x)[end] != problem.samples &&
            throw(DimensionMismatch("argument $i has $(size(x)[end]) samples, z has $(problem.samples)"))
    end
    return problem
end

as_argument(::Type{T}, x::Number) where {T} = as_argument(T, fill(x))
as_argument(::Type{T}, x::AbstractFloat) where {T} = fill(T(x))
function as_argument(::Type{T}, x::AbstractArray) where {T}
    eltype(x) <: Dual && refuse_duals("an argument")
    return eltype(x) <: AbstractFloat ? Array{T}(x) : Array(x)
end
as_argument(::Type, x) = throw(
    ArgumentError(
        "an argument is $(described(x)); expected numbers and arrays: give the entries of a tuple one by one, and let f close over what \
        is no number"
    )
)

@noinline refuse_duals(what) = throw(
    ArgumentError("$what has dual numbers of ForwardDiff.jl; a solution is differentiated by vjp(solution, v), not through the solver")
)

function check_batched(batched, args)
    batched isa Union{Nothing, Symbol} && throw(ArgumentError("batched is $(repr(batched)); expected positions of arguments, such as (1,)"))
    for i in batched
        i isa Integer && !(i isa Bool) && i in eachindex(args) || throw(
            ArgumentError("batched has $(repr(i)); expected positions of the $(length(args)) arguments behind z, from 1 on, such as (1,)")
        )
        is_single(args[i]) && throw(ArgumentError("argument $i is a number, which all samples share; take it out of batched"))
    end
    return
end
is_single(x) = x isa Union{Number, AbstractArray{<:Any, 0}}

"A copy of the start of z in floating-point numbers; an `ArgumentError` if it cannot be converted."
function as_start(z0::AbstractVecOrMat)
    eltype(z0) <: Dual && refuse_duals("the start z0")
    eltype(z0) <: Real || throw(
        ArgumentError("the start z0 has entries of type $(eltype(z0)); expected real numbers of one type; a complex one is two of them, real(z) and imag(z)")
    )
    size(z0, 1) > 0 || throw(ArgumentError("the start z0 has no entries; there is nothing to solve for"))
    return float(Array(z0))
end
refuse_start(z0) = throw(
    ArgumentError("the start z0 is $(described(z0)); expected a vector, a matrix whose columns are samples, or a real number")
)

inverse_scale(::Nothing, n) = Float64[]
inverse_scale(scale, n) = inverse_scale(fill(scale, n), n)
function inverse_scale(scale::AbstractVector, n)
    length(scale) == n || throw(DimensionMismatch("scale has $(length(scale)) entries, z has $n"))
    all(s -> s isa Real && 0 < s < Inf, scale) || throw(ArgumentError("scale is $scale; expected numbers, positive and finite"))
    return inv.(Float64.(scale))
end

is_differentiable(x::AbstractArray) = eltype(x) <: AbstractFloat

"What `f` is given as an argument: `Shared` by all samples, or `PerSample`, where K is 0 for a number, the length of a [`Short`](@ref) vector,
or -1 for another array."
struct Shared{X}
    value::X
end
struct PerSample{K, A}
    array::A
end

shared(x::Array) = Shared(x)
shared(x::Array{<:Any, 0}) = Shared(x[])
shared(x::Vector) = Shared(length(x) <= MAX_SHORT ? Short(Tuple(x)) : x)
per_sample(x::AbstractArray) = PerSample{-1, typeof(x)}(x)
per_sample(x::AbstractVector) = PerSample{0, typeof(x)}(x)
per_sample(x::AbstractMatrix) = PerSample{size(x, 1) <= MAX_SHORT ? size(x, 1) : -1, typeof(x)}(x)

@inline at(x::Shared, j) = x.value
@inline at(x::PerSample{0}, j) = @inbounds x.array[j]
@inline at(x::PerSample{K}, j) where {K} = Short(ntuple(i -> (@inbounds x.array[i, j]), Val(K)))
@inline at(x::PerSample{-1}, j) = view(x.array, ntuple(_ -> :, Val(ndims(x.array) - 1))..., j)

"The arguments of a sample as arrays, and numbers for those without dimensions."
as_arrays(args, batched, sample::Int) =
    Any[number_or_array(b ? copy(selectdim(x, ndims(x), sample)) : x) for (x, b) in zip(args, batched)]
number_or_array(x) = ndims(x) == 0 ? x[] : x

"""
    Equation{T, K}(problem)

An [`EquationProblem`](@ref) with its types known, for loops over many samples. `f`, `args` and K, the length of a
[`Short`](@ref) z or -1, fix the compiled code.
"""
struct Equation{T, K, F, A <: Tuple} <: AbstractEquation{T}
    f::F
    root::Bool
    n::Int
    args::A
    weights::Vector{Float64}
end

"Whether the equation is a root or a fixed point, as a type, for code that is compiled for it."
is_root(p::Equation) = p.root ? Val(true) : Val(false)

function Equation(problem::EquationProblem{T}) where {T}
    args = ((b ? per_sample(x) : shared(x) for (x, b) in zip(problem.args, problem.batched))...,)
    K = problem.n <= MAX_SHORT ? problem.n : -1
    return Equation{T, K, typeof(problem.f), typeof(args)}(problem.f, problem.root, problem.n, args, problem.weights)
end

"""
    ErasedEquation(equation)

The same for solvers that are compiled once for all functions, at the price of a dispatch per evaluation: for few
samples, compilation would otherwise take longer than the run.
"""
struct ErasedEquation{T} <: AbstractEquation{T}
    equation::Any
    root::Bool
    n::Int
    weights::Vector{Float64}
end
erased(p::AbstractEquation) = p
erased(p::Equation{T}) where {T} = ErasedEquation{T}(p, p.root, p.n, p.weights)

"The form of the equation that is best for the number of samples."
suited(problem::EquationProblem) = problem.samples < MANY ? erased(Equation(problem)) : Equation(problem)

@inline arguments(p::Equation, sample::Int) = map(x -> at(x, sample), p.args)

# The z that f is given: its own copy, which it may write to.
@inline as_point(::Equation{T, K}, z::AbstractVector) where {T, K} = Short(ntuple(i -> (@inbounds z[i]), Val(K)))
@inline as_point(::Equation{T, -1}, z::AbstractVector) where {T} = Array(z)

"`f` returned something other than a vector of `expected` entries."
struct WrongShape <: Exception
    expected::Int
    came::String
end
Base.showerror(io::IO, e::WrongShape) =
    print(io, "f returned $(e.came); expected $(e.expected == 1 ? "a vector of 1 entry, or a number" : "a vector of $(e.expected) entries"), like z")

# For one unknown f may return a number.
@inline function checked(y::AbstractVector, n::Int)
    axes(y, 1) == Base.OneTo(n) && return y
    throw(WrongShape(n, described(y)))
end
@inline function checked(y::Number, n::Int)
    n == 1 && return (y,)
    throw(WrongShape(n, described(y)))
end
checked(y, n::Int) = throw(WrongShape(n, described(y)))
checked(::Union{Complex, AbstractVector{<:Complex}}, n::Int) = throw(WrongShape(n, "complex numbers"))

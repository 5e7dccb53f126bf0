# Generic problems: a function, its arguments, and how a sample gets its own.

"""
    GenericProblem{T}

`z = f(z, args...)`, or `f(z, args...) = 0` if `root`, for `samples` vectors z of `n` entries. Arguments are arrays (a
zero-dimensional one stands for a number); the last axis of a `batched` one counts the samples.
"""
struct GenericProblem{T}
    # Left abstract: the loops over the samples are compiled for `f` behind a function barrier, see `pointwise`.
    f::Any
    root::Bool
    n::Int
    samples::Int
    args::Vector{Array}
    batched::Vector{Bool}
end

function GenericProblem{T}(f, z0::AbstractVecOrMat, args, batched; root) where {T}
    problem = GenericProblem{T}(
        f, root, size(z0, 1), size(z0, 2), Array[as_argument(T, x) for x in args], [i in batched for i in eachindex(args)],
    )
    for (i, x) in enumerate(problem.args)
        problem.batched[i] && size(x)[end] != problem.samples &&
            throw(DimensionMismatch("argument $i has $(size(x)[end]) samples, z has $(problem.samples)"))
    end
    return problem
end

as_argument(::Type{T}, x::Number) where {T} = as_argument(T, fill(x))
as_argument(::Type{T}, x::AbstractArray) where {T} = eltype(x) <: AbstractFloat ? Array{T}(x) : Array(x)

is_differentiable(x::Array) = eltype(x) <: AbstractFloat

"What `f` is given as an argument: `Shared` by all samples, or `PerSample`, where K tells a number (0), the length of a [`Short`](@ref) vector, or another array (-1)."
struct Shared{X}
    value::X
end
struct PerSample{K, A}
    array::A
end

shared(x::Array) = Shared(x)
shared(x::Array{<:Any, 0}) = Shared(x[])
shared(x::Vector) = Shared(length(x) <= MAX_SHORT ? Short(Tuple(x)) : x)
per_sample(x::Array) = PerSample{-1, typeof(x)}(x)
per_sample(x::Vector) = PerSample{0, typeof(x)}(x)
per_sample(x::Matrix) = PerSample{size(x, 1) <= MAX_SHORT ? size(x, 1) : -1, typeof(x)}(x)

@inline at(x::Shared, j) = x.value
@inline at(x::PerSample{0}, j) = @inbounds x.array[j]
@inline at(x::PerSample{K}, j) where {K} = Short(ntuple(i -> (@inbounds x.array[i, j]), Val(K)))
@inline at(x::PerSample{-1}, j) = view(x.array, ntuple(_ -> :, Val(ndims(x.array) - 1))..., j)

"""
    Pointwise{T}

A [`GenericProblem`](@ref) with its types known, for the loops over the samples. `f`, `args` and K (as for the vector z) fix
the compiled code; `Z` and `outcome` take the results.
"""
struct Pointwise{T, K, F, A <: Tuple} <: FixedPoint{T}
    f::F
    root::Bool
    args::A
    tol::T
    floor::T
    Z::Matrix{T}
    outcome::Outcome
end

function pointwise(problem::GenericProblem{T}, Z::Matrix{T}, tol::T, outcome::Outcome) where {T}
    args = ((b ? per_sample(x) : shared(x) for (x, b) in zip(problem.args, problem.batched))...,)
    K = problem.n <= MAX_SHORT ? problem.n : -1
    return Pointwise{T, K, typeof(problem.f), typeof(args)}(
        problem.f, problem.root, args, tol, scale_floor(T, problem.n), Z, outcome
    )
end

@inline point(::Pointwise{T, K}, Z::Matrix{T}, j::Int) where {T, K} = at(PerSample{K, Matrix{T}}(Z), j)
@inline arguments(p::Pointwise, sample::Int) = map(x -> at(x, sample), p.args)

"`f` returned something other than a vector of `expected` entries."
struct WrongShape <: Exception
    expected::Int
    came::String
end
Base.showerror(io::IO, e::WrongShape) =
    print(io, "f returned $(e.came); expected a vector of $(e.expected) $(e.expected == 1 ? "entry" : "entries"), like z")

@inline function checked(y, n::Int)
    y isa AbstractVector && length(y) == n && return y
    throw(WrongShape(n, y isa AbstractArray ? "an array of shape $(size(y))" : "a $(typeof(y))"))
end

# F[:, j] = f(Z[:, j], ...). Outside the domain of a function such as sqrt, where Julia throws, the value is NaN: it concerns
# that sample, or that trial step, only.
@inline function apply!(F::Matrix{T}, p::Pointwise{T}, Z::Matrix{T}, j::Int, sample::Int) where {T}
    check_interrupt()
    n = size(F, 1)
    try
        y = checked(p.f(point(p, Z, j), arguments(p, sample)...), n)
        for i in 1:n
            @inbounds F[i, j] = y[i]
        end
    catch error
        error isa DomainError || rethrow()
        fill!(view(F, :, j), T(NaN))
    end
    return
end

# Reverse mode for arguments of many entries: numbers that write every operation and its partial derivatives to a tape, which is
# then read backwards. This is our own implementation, so that only f itself must be compiled: with ReverseDiff.jl the first derivative
# of a session took 19 s, that of each further function 1 s, and loading it took longer than loading everything else.

"One operation: the positions of its operands on the tape, 0 for constants, and the derivatives with respect to them."
struct Operation
    first::Int
    second::Int
    by_first::Float64
    by_second::Float64
end

"The operations being recorded. Guarded by `RECORDING`."
const TAPE = Operation[]
const RECORDING = ReentrantLock()

"The task that records, if any."
const RECORDER = Ref{Union{Nothing, Task}}(nothing)

"The largest number of operations on a tape: 512 MiB."
const LONGEST_TAPE = 2^24

"f cannot be recorded."
struct NotRecorded <: Exception end

"A number whose operations are recorded; `place` is the position of its own operation on the tape, 0 for a constant."
struct Traced <: Real
    value::Float64
    place::Int
end

function record(value, first::Int, by_first, second::Int = 0, by_second = 0.0)
    first == second == 0 && return Traced(value, 0)
    RECORDER[] === current_task() && length(TAPE) < LONGEST_TAPE || throw(NotRecorded())
    push!(TAPE, Operation(first, second, by_first, by_second))
    return Traced(value, length(TAPE))
end

Traced(x::Traced) = x
Traced(x::Real) = Traced(Float64(x), 0)
Base.promote_rule(::Type{Traced}, ::Type{<:Real}) = Traced
Base.promote_rule(::Type{BigFloat}, ::Type{Traced}) = Traced          # which also has a rule for any real number
Base.promote_rule(::Type{Traced}, ::Type{ForwardDiff.Dual{T, V, N}}) where {T, V, N} = ForwardDiff.Dual{T, promote_type(Traced, V), N}
Base.float(x::Traced) = x
Base.float(::Type{Traced}) = Traced
Base.zero(::Type{Traced}) = Traced(0.0, 0)
Base.one(::Type{Traced}) = Traced(1.0, 0)
for f in (:eps, :floatmin, :floatmax, :typemin, :typemax)
    @eval Base.$f(::Type{Traced}) = Traced($f(Float64))
end
TotalFunctions.primal(x::Traced) = x.value
TotalFunctions.undefined(::Traced) = Traced(NaN, 0)
Base.hash(x::Traced, h::UInt) = hash(x.value, h)

Base.:+(x::Traced, y::Traced) = record(x.value + y.value, x.place, 1.0, y.place, 1.0)
Base.:-(x::Traced, y::Traced) = record(x.value - y.value, x.place, 1.0, y.place, -1.0)
Base.:*(x::Traced, y::Traced) = record(x.value * y.value, x.place, y.value, y.place, x.value)
Base.:/(x::Traced, y::Traced) = record(x.value / y.value, x.place, 1 / y.value, y.place, -x.value / y.value^2)
Base.:-(x::Traced) = record(-x.value, x.place, -1.0)
# Constants of another type need not become Traced first.
Base.:*(x::Traced, y::Union{Float64, Float32, Int}) = record(x.value * y, x.place, y)
Base.:*(x::Union{Float64, Float32, Int}, y::Traced) = y * x
Base.fma(x::Traced, y::Traced, z::Traced) = x * y + z

# All other derivatives come from ForwardDiff's rules.
for f in (
        :abs, :abs2, :inv, :sqrt, :cbrt, :exp, :exp2, :exp10, :expm1, :log, :log2, :log10, :log1p, :sin, :cos, :tan, :sec, :csc,
        :cot, :asin, :acos, :atan, :sinh, :cosh, :tanh, :sech, :csch, :coth, :asinh, :acosh, :atanh, :sind, :cosd, :tand, :sinpi,
        :cospi, :sinc, :deg2rad, :rad2deg,
    )
    @eval function Base.$f(x::Traced)
        y = $f(Seeded{Float64, 1}(x.value, ForwardDiff.Partials((1.0,))))
        return record(plain(y), x.place, partial(y, 1))
    end
end
Base.sincos(x::Traced) = (sin(x), cos(x))
Base.sincospi(x::Traced) = (sinpi(x), cospi(x))
for f in (:^, :atan, :hypot, :log, :max, :min, :mod, :rem)
    @eval function Base.$f(x::Traced, y::Traced)
        r = $f(Seeded{Float64, 2}(x.value, ForwardDiff.Partials((1.0, 0.0))), Seeded{Float64, 2}(y.value, ForwardDiff.Partials((0.0, 1.0))))
        return record(plain(r), x.place, partial(r, 1), y.place, partial(r, 2))
    end
end
# ForwardDiff.jl's methods for any real number would be equally specific.
Base.hypot(x::Traced, y::Union{AbstractFloat, Integer}) = hypot(x, Traced(y))
Base.hypot(x::Union{AbstractFloat, Integer}, y::Traced) = hypot(Traced(x), y)
function power(x::Traced, n)
    y = Seeded{Float64, 1}(x.value, ForwardDiff.Partials((1.0,)))^n
    return record(plain(y), x.place, partial(y, 1))
end
Base.:^(x::Traced, n::Integer) = power(x, n)
Base.:^(x::Traced, n::Rational) = power(x, n)
Base.:^(x::Traced, n::Union{Float64, Float32}) = power(x, n)
Base.literal_pow(::typeof(^), x::Traced, ::Val{n}) where {n} = power(x, n)

# Functions without a derivative.
for f in (:isnan, :isinf, :isfinite, :signbit, :iszero, :isinteger)
    @eval Base.$f(x::Traced) = $f(x.value)
end
for f in (:floor, :ceil, :trunc, :round)
    @eval Base.$f(x::Traced, mode::RoundingMode...) = $f(x.value, mode...)
    @eval Base.$f(::Type{I}, x::Traced) where {I <: Integer} = $f(I, x.value)
end
Base.sign(x::Traced) = sign(x.value)
for f in (:<, :<=, :(==), :isless, :isequal)
    @eval Base.$f(x::Traced, y::Traced) = $f(x.value, y.value)
end

"A recording: the operations, of which the `inputs` come first, and the positions of the results."
struct Recorded
    operations::Vector{Operation}
    inputs::Int
    results::Vector{Int}
end

"""
    recorded(g, x, n)

`y = g(x)` of n entries, recorded for the array x: a function that takes λ to λᵀ ∂g/∂x. `nothing` if g cannot be recorded, for
example because it computes in several tasks or is called within a recording, or because x has more digits than the tape.
"""
recorded(g, x::AbstractArray, n::Int) = nothing
function recorded(g, x::AbstractArray{<:Base.IEEEFloat}, n::Int)
    RECORDER[] === current_task() && return nothing
    @lock RECORDING try
        RECORDER[] = current_task()
        empty!(TAPE)
        append!(TAPE, Iterators.repeated(Operation(0, 0, 0.0, 0.0), length(x)))
        y = checked(g(reshape([Traced(value, place) for (place, value) in enumerate(x)], size(x))), n)
        return Recorded(copy(TAPE), length(x), Int[place(y[i]) for i in 1:n])
    catch error
        cause(error) isa Union{MethodError, NotRecorded, InexactError, DomainError} || rethrow()
        return nothing
    finally
        RECORDER[] = nothing
        length(TAPE) > 2^20 && sizehint!(empty!(TAPE), 2^16)
    end
end

place(y::Traced) = y.place
place(y) = 0

function (r::Recorded)(λ)
    adjoint = zeros(length(r.operations))
    for (i, place) in enumerate(r.results)
        place > 0 && (adjoint[place] += λ[i])
    end
    @inbounds for place in length(adjoint):-1:(r.inputs + 1)
        a = adjoint[place]
        a == 0 && continue
        o = r.operations[place]
        o.first > 0 && (adjoint[o.first] += a * o.by_first)
        o.second > 0 && (adjoint[o.second] += a * o.by_second)
    end
    return resize!(adjoint, r.inputs)
end

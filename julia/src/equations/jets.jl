# Derivatives of the user's function for samples side by side.

"""
    Jet{N}

A number with its first derivatives by N independent variables, for samples side by side.
"""
struct Jet{N} <: LaneNumber
    value::Vec
    partials::NTuple{N, Vec}
end

@inline Jet{N}(x::Union{Vec, Plain}) where {N} = Jet{N}(Vec(x), ntuple(_ -> zero(Vec), Val(N)))
Base.promote_rule(::Type{Jet{N}}, ::Type{Vec}) where {N} = Jet{N}

"Variable number k of N."
@inline variable(x::Vec, k::Int, ::Val{N}) where {N} = Jet{N}(x, ntuple(i -> Vec(i == k), Val(N)))

"The jet of g(x), where y = g(x) and d = g′(x)."
@inline chain(x::Jet{N}, y::Vec, d::Vec) where {N} = Jet{N}(y, map(p -> d * p, x.partials))
"The jet of g(a, b), with the derivatives dₐ and d_b."
@inline chain(a::Jet{N}, b::Jet{N}, y::Vec, da::Vec, db::Vec) where {N} =
    Jet{N}(y, map((p, q) -> muladd(da, p, db * q), a.partials, b.partials))

@inline Base.:+(a::Jet{N}, b::Jet{N}) where {N} = Jet{N}(a.value + b.value, map(+, a.partials, b.partials))
@inline Base.:-(a::Jet{N}, b::Jet{N}) where {N} = Jet{N}(a.value - b.value, map(-, a.partials, b.partials))
@inline Base.:*(a::Jet{N}, b::Jet{N}) where {N} = chain(a, b, a.value * b.value, b.value, a.value)
@inline function Base.:/(a::Jet{N}, b::Jet{N}) where {N}
    y, d = a.value / b.value, inv(b.value)
    return chain(a, b, y, d, -y * d)
end
@inline Base.:-(x::Jet{N}) where {N} = Jet{N}(-x.value, map(-, x.partials))

# Constants have no derivatives to compute with.
const Constant = Union{Vec, Plain}
@inline Base.:+(a::Jet, c::Constant) = with_partials(a.value + c, a.partials)
@inline Base.:+(c::Constant, a::Jet) = a + c
@inline Base.:-(a::Jet, c::Constant) = with_partials(a.value - c, a.partials)
@inline Base.:-(c::Constant, a::Jet) = with_partials(c - a.value, map(-, a.partials))
@inline Base.:*(a::Jet, c::Constant) = with_partials(a.value * c, map(p -> p * c, a.partials))
@inline Base.:*(c::Constant, a::Jet) = a * c
@inline Base.:/(a::Jet, c::Constant) = (y = a.value / c; with_partials(y, map(p -> p * (1.0 / Vec(c)), a.partials)))
@inline Base.:/(c::Constant, b::Jet) = (y = c / b.value; with_partials(y, map(p -> -(y / b.value) * p, b.partials)))
@inline with_partials(y::Vec, partials::NTuple{N, Vec}) where {N} = Jet{N}(y, partials)

# --- functions -------------------------------------------------------------------------------------------------

# Functions of one number, with the derivative with respect to x, where y = f(x).
for (f, derivative) in (
        (:sqrt, :(inv(y + y))), (:cbrt, :(inv(3 * y * y))), (:inv, :(-(y * y))), (:abs, :(copysign(one(x), x))), (:abs2, :(x + x)),
        (:exp, :y), (:exp2, :(log(2) * y)), (:exp10, :(log(10) * y)), (:expm1, :(y + 1)),
        (:log, :(inv(x))), (:log2, :(inv(log(2) * x))), (:log10, :(inv(log(10) * x))), (:log1p, :(inv(x + 1))),
        (:tan, :(y * y + 1)), (:asin, :(inv(sqrt(1 - x * x)))), (:acos, :(-inv(sqrt(1 - x * x)))), (:atan, :(inv(1 + x * x))),
        (:sinh, :(cosh(x))), (:cosh, :(sinh(x))), (:tanh, :(1 - y * y)),
        (:asinh, :(inv(sqrt(x * x + 1)))), (:acosh, :(inv(sqrt(x * x - 1)))), (:atanh, :(inv(1 - x * x))),
        (:sinpi, :(π * cospi(x))), (:cospi, :(-π * sinpi(x))), (:deg2rad, :(deg2rad(one(x)))), (:rad2deg, :(rad2deg(one(x)))),
    )
    @eval @inline function Base.$f(jet::Jet)
        x = jet.value
        y = $f(x)
        return chain(jet, y, $derivative)
    end
end
@inline Base.sincos(x::Jet) = ((s, c) = sincos(x.value); (chain(x, s, c), chain(x, c, -s)))
@inline Base.sin(x::Jet) = sincos(x)[1]
@inline Base.cos(x::Jet) = sincos(x)[2]

# Functions of two numbers, with the derivatives with respect to a and b, where y = f(a, b).
for (f, by_a, by_b) in (
        (:^, :(b * a^(b - 1)), :(ifelse(y == 0, zero(y), y * log(a)))), (:hypot, :(a / y), :(b / y)),
        (:atan, :(b / (a * a + b * b)), :(-a / (a * a + b * b))), (:mod, :(one(y)), :(-floor(a / b))), (:rem, :(one(y)), :(-trunc(a / b))),
    )
    @eval @inline function Base.$f(x::Jet{N}, z::Jet{N}) where {N}
        a, b = x.value, z.value
        y = $f(a, b)
        return chain(x, z, y, $by_a, $by_b)
    end
end
@inline Base.:^(x::Jet, n::Integer) = n == 0 ? one(x) : chain(x, x.value^n, n * x.value^(n - 1))
@inline Base.:^(x::Jet, c::AbstractFloat) = (y = x.value^c; with_partials(y, map(p -> (c * x.value^(c - 1)) * p, x.partials)))
@inline Base.literal_pow(::typeof(^), x::Jet, ::Val{2}) = abs2(x)
@inline Base.literal_pow(::typeof(^), x::Jet, ::Val{3}) = (y = x.value * x.value; chain(x, y * x.value, 3 * y))
@inline Base.literal_pow(::typeof(^), x::LaneNumber, ::Val{n}) where {n} = x^n

# Julia's own method for any numbers branches.
@inline Base.hypot(x::LaneNumber, y::Plain) = hypot(promote(x, y)...)
@inline Base.hypot(x::Plain, y::LaneNumber) = hypot(promote(x, y)...)

# Functions without a derivative, or with that of one of their arguments.
for f in (:isnan, :isinf, :isfinite, :signbit, :sign, :floor, :ceil, :trunc, :round)
    @eval @inline Base.$f(x::Jet) = $f(x.value)
end
for f in (:<, :<=)
    @eval @inline Base.$f(a::J, b::J) where {J <: Jet} = $f(a.value, b.value)
end
# Where two are equal, the derivative is that of ForwardDiff.jl.
@inline Base.min(a::J, b::J) where {J <: Jet} = ifelse((a <= b) | isnan(a), a, b)
@inline Base.clamp(x::Jet, low::Real, high::Real) = ifelse(x >= high, high, ifelse(x < low, low, x))

"How often values were equal and derivatives were not, as where `x == 0` guards a quotient: the derivative may be NaN there."
const MISSED_GUARDS = Threads.Atomic{Int}(0)

# As for dual numbers: a branch of `x == 0` has no derivative by x, see `derivative_at_guard`.
@inline function Base.:(==)(a::J, b::J) where {J <: Jet}
    values = a.value == b.value
    equal = reduce(&, map(==, a.partials, b.partials); init = values)
    any(xor(values, equal)) && Threads.atomic_add!(MISSED_GUARDS, 1)
    return equal
end
@inline Base.ifelse(m::Mask, a::J, b::J) where {J <: Jet} =
    J(ifelse(m, a.value, b.value), map((p, q) -> ifelse(m, p, q), a.partials, b.partials))
@inline Base.ifelse(m::Mask, a::Jet, b::Constant) = ifelse(m, promote(a, b)...)
@inline Base.ifelse(m::Mask, a::Constant, b::Jet) = ifelse(m, promote(a, b)...)
@inline Base.copysign(x::J, y::J) where {J <: Jet} = ifelse(xor(signbit(x), signbit(y)), -x, x)

# The short vector `[a, b]` of them needs no memory.
@inline Base.vect(x::LaneNumber, rest::Vararg{Union{LaneNumber, Plain}}) = Short(x, rest...)
@inline Base.map(f, x::Short{N, <:LaneNumber}) where {N} = Short(map(f, x.entries))

"The value of a result of f, and its derivative number k."
@inline value_of(y::Jet) = y.value
@inline value_of(y::Real) = Vec(y)
@inline partial_of(y::Jet, k::Int) = @inbounds y.partials[k]
@inline partial_of(y::Real, k::Int) = zero(Vec)             # a constant

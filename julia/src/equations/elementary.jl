# Elementary functions of numbers side by side. Polynomials are the best approximations in the sense of Chebyshev, by Remez'
# algorithm in 300 bits, of the functions in the comments beside them; arguments are reduced as by Cody and Waite, Software manual for the
# elementary functions (1980). Arguments for which that is not accurate enough go to Julia's own functions, lane by lane.

"Adding it rounds to an integer, which is then in the lowest bits."
const MAGIC = 6755399441055744.0

# Functions without a kernel.
for f in (
        :cbrt, :exp10, :log2, :log10, :sec, :csc, :cot, :asin, :acos, :atan, :sech, :csch, :coth, :asinh, :acosh, :atanh, :sind, :cosd,
        :tand, :sinpi, :cospi, :sinc, :cosc, :deg2rad, :rad2deg,
    )
    @eval Base.$f(x::Vec) = each_lane($f, x)
end
for f in (:atan, :hypot, :mod, :rem)
    @eval Base.$f(x::Vec, y::Vec) = each_lane($f, x, y)
end

# --- exponential -----------------------------------------------------------------------------------------------

const LN2_HIGH, LN2_LOW = 0x1.62e42feep-1, 0x1.a39ef35793c76p-33

# (exp(r) - 1 - r) / r² on |r| <= ln(2) / 2
const EXP_SERIES = (
    0.5000000000000001, 0.16666666666666674, 0.04166666666662416, 0.008333333333322215, 0.0013888888917199906,
    0.00019841269886565022, 2.480152131797704e-5, 2.7557242366391905e-6, 2.7620077751609306e-7, 2.511003862643431e-8,
)
@inline expm1_reduced(r::Vec) = muladd(r * r, polynomial(r, EXP_SERIES), r)

"2^k for an integer k within the range of normal numbers."
@inline power_of_two(k::Vec) =
    reinterpret(Vec, (reinterpret(Integers, k + MAGIC) << 52) + reinterpret(Int64, 1.0))

"The polynomial with these coefficients, with as few sequential steps as possible (Estrin)."
@inline polynomial(x::Vec, c::Tuple{Vararg{Float64}}) = estrin(x, map(Vec, c))
@inline estrin(x::Vec, c::Tuple{Vec}) = c[1]
@inline estrin(x::Vec, c::Tuple{Vec, Vec, Vararg{Vec}}) = estrin(x * x, in_pairs(x, c...))
@inline in_pairs(x) = ()
@inline in_pairs(x, a) = (a,)
@inline in_pairs(x, a, b, rest...) = (muladd(b, x, a), in_pairs(x, rest...)...)

@inline function split_exponent(x::Vec)
    k = muladd(x, 1.4426950408889634, MAGIC) - MAGIC
    return k, muladd(-k, LN2_LOW, muladd(-k, LN2_HIGH, x))
end

# 2^k (1 + m), also where 2^k alone is out of range.
@inline function scaled(k::Vec, m::Vec)
    half = trunc(0.5 * k)
    return (muladd(m, power_of_two(half), power_of_two(half))) * power_of_two(k - half)
end

@inline function Base.exp(x::Vec)
    k, r = split_exponent(x)
    m, power = expm1_reduced(r), power_of_two(k)
    return Vec(all(abs(x) < 708.0) ? in_registers(muladd(m, power, power)) : in_registers(exp_of_any(x)))
end
# Also where the result is not a normal number; the same for those lanes where it is.
@noinline function exp_of_any(x::Vec)
    k, r = split_exponent(clamp(x, -746.0, 710.0))
    return scaled(k, expm1_reduced(r))
end

@inline function Base.exp2(x::Vec)
    y = clamp(x, -1076.0, 1025.0)
    k = round(y)
    return scaled(k, expm1_reduced((y - k) * 0.6931471805599453))
end

@inline function Base.expm1(x::Vec)
    k, r = split_exponent(x)
    power = power_of_two(k)
    return replaced_lanes(expm1, muladd(power, expm1_reduced(r), power - 1.0), abs(x) > 700.0, x)
end

# tanh(x) = e / (e + 2) with e = exp(2|x|) - 1
@inline function Base.tanh(x::Vec)
    e = expm1(ifelse(abs(x) > 20.0, 40.0, 2.0 * abs(x)))
    return copysign(e / (e + 2.0), x)
end

# With e = exp(|x|) - 1.
@inline function Base.sinh(x::Vec)
    e = expm1(abs(x))
    return replaced_lanes(sinh, copysign(0.5 * (e + e / (e + 1.0)), x), abs(x) > 700.0, x)
end
@inline function Base.cosh(x::Vec)
    y = exp(abs(x))
    return replaced_lanes(cosh, 0.5 * y + 0.5 / y, abs(x) > 700.0, x)
end

# --- logarithm -------------------------------------------------------------------------------------------------

# (log((1 + s) / (1 - s)) - 2s) / s³ for s², where (1 + s) / (1 - s) goes from √½ to √2
const LOG_SERIES = (
    0.666666666666667, 0.3999999999989851, 0.28571428626370865, 0.2222221107743742, 0.18182892885342403, 0.15331608006057235,
    0.14617736492386166,
)

# log(2^k (1 + f)) = k ln 2 + f - (f²/2 - s (f²/2 + R)), s = f / (2 + f): what is large is added last.
@inline function log_parts(x::Vec)
    tiny = x < 0x1p-1022
    bits = reinterpret(Integers, ifelse(tiny, x * 0x1p54, x))
    exponent = (bits - reinterpret(Int64, 0.7071067811865476)) >> 52
    k = Vec(exponent)
    return ifelse(tiny, k - 54.0, k), reinterpret(Vec, bits - (exponent << 52)) - 1.0
end

@inline function log_of(k::Vec, f::Vec, more)
    s = f / (f + 2.0)
    half = 0.5 * f * f
    s2 = s * s
    tail = muladd(s, muladd(s2, polynomial(s2, LOG_SERIES), half), muladd(k, LN2_LOW, more))
    return muladd(k, LN2_HIGH, f - (half - tail))
end

@inline function Base.log(x::Vec)
    k, f = log_parts(x)
    usual = (x > 0.0) & (x < Inf)
    y = log_of(k, f, 0.0)
    return ifelse(usual, y, ifelse(x == 0.0, -Inf, ifelse(x == Inf, Inf, NaN)))
end

# 1 + x is rounded; the error is compensated.
@inline function Base.log1p(x::Vec)
    u = 1.0 + x
    k, f = log_parts(u)
    rounding = ifelse(x < 1.0, x - (u - 1.0), 1.0 - (u - x))
    y = log_of(k, f, rounding / u)
    return replaced_lanes(log1p, ifelse(abs(x) < 0x1p-54, x, y), !((u > 0.0) & (x < 0x1p1000)), x)
end

# --- circular functions ----------------------------------------------------------------------------------------

# π/2 in three parts, whose products with integers up to 2^20 are exact.
const HALF_PI = (0x1.921fb544p+0, 0x1.0b4611a6p-34, 0x1.3198a2e037073p-69)

"Beyond this size arguments are reduced by Julia."
const CIRCULAR_LIMIT = 1.0e6

# (sin(r) - r) / r³ and (cos(r) - 1 + r²/2) / r⁴ for r² on |r| <= π/4
const SIN_SERIES = (
    -0.16666666666666666, 0.00833333333333095, -0.00019841269836760975, 2.755731610363977e-6, -2.5051132046032e-8,
    1.591814230329162e-10,
)
const COS_SERIES = (
    0.041666666666666664, -0.0013888888888887398, 2.480158729876702e-5, -2.7557317272333055e-7, 2.08761463799071e-9,
    -1.1382639639006363e-11,
)

# x = q π/2 + r + low; q in the lowest bits of an integer.
@inline function quadrant(x::Vec)
    t = muladd(x, 0.6366197723675814, MAGIC)
    q = t - MAGIC
    a = muladd(-q, HALF_PI[1], x)
    b = q * HALF_PI[2]
    r = a - b
    low = muladd(-q, HALF_PI[3], (a - r) - b)
    return reinterpret(Integers, t), r, low
end

@inline function sin_reduced(r, low)
    u = r * r
    return r + muladd(r * u, polynomial(u, SIN_SERIES), low * muladd(-0.5, u, 1.0))
end
@inline function cos_reduced(r, low)
    u = r * r
    half = 0.5 * u
    w = 1.0 - half
    return w + muladd(u * u, polynomial(u, COS_SERIES), ((1.0 - w) - half) - r * low)
end

# Bit 2 of q as the sign of y.
@inline signed_by(y::Vec, q::Integers) = reinterpret(Vec, xor(reinterpret(Integers, y), (q & 2) << 62))

@inline function sincos_usual(x::Vec)
    q, r, low = quadrant(x)
    s, c, odd = sin_reduced(r, low), cos_reduced(r, low), is_odd(q)
    return signed_by(ifelse(odd, c, s), q), signed_by(ifelse(odd, s, c), q + 1)
end
@inline function Base.sincos(x::Vec)
    s, c = sincos_usual(x)
    far = abs(x) > CIRCULAR_LIMIT
    return replaced_lanes(sin, s, far, x), replaced_lanes(cos, c, far, x)
end
@inline Base.sin(x::Vec) = replaced_lanes(sin, sincos_usual(x)[1], abs(x) > CIRCULAR_LIMIT, x)
@inline Base.cos(x::Vec) = replaced_lanes(cos, sincos_usual(x)[2], abs(x) > CIRCULAR_LIMIT, x)
@inline function Base.tan(x::Vec)
    s, c = sincos_usual(x)
    return replaced_lanes(tan, s / c, abs(x) > CIRCULAR_LIMIT, x)
end

# --- powers ----------------------------------------------------------------------------------------------------

@inline Base.literal_pow(::typeof(^), x::LaneNumber, ::Val{0}) = one(x)
@inline Base.literal_pow(::typeof(^), x::LaneNumber, ::Val{1}) = x
@inline Base.literal_pow(::typeof(^), x::Vec, ::Val{2}) = x * x
@inline Base.literal_pow(::typeof(^), x::Vec, ::Val{3}) = x * x * x
@inline Base.literal_pow(::typeof(^), x::LaneNumber, ::Val{-1}) = inv(x)
@inline Base.literal_pow(::typeof(^), x::Vec, ::Val{-2}) = (y = inv(x); y * y)

# A product of sums of two numbers, of which the second is small.
@inline function times(a::Vec, a_low::Vec, b::Vec, b_low::Vec)
    product = a * b
    return product, fma(a, b, -product) + muladd(a, b_low, a_low * b)
end

@inline function Base.:^(x::Vec, n::Integer)
    y, low = one(x), zero(x)
    factor = n < 0 ? inv(x) : x
    factor_low = n < 0 ? -fma(x, factor, -one(x)) * factor : zero(x)
    n = abs(n)
    while n > 0
        isodd(n) && ((y, low) = times(y, low, factor, factor_low))
        n >>= 1
        n > 0 && ((factor, factor_low) = times(factor, factor_low, factor, factor_low))
    end
    size = abs(low)
    return ifelse((size > 0.0) & (size < Inf), y + low, y)
end

# (log((1 + s) / (1 - s)) - 2s - 2s³/3) / s⁵ for s² as in LOG_SERIES, and 2/3 as the sum of two numbers
const LOG_REST = (
    0.4000000000000003, 0.2857142857133766, 0.22222222271435582, 0.1818180819965268, 0.15385577906360812, 0.13285864379294157,
    0.12914661664240096,
)
const TWO_THIRDS = (0.6666666666666666, 3.700743415417188e-17)

# x^y = exp(y log(x)) with the logarithm to 2^-65 of itself.
@inline function Base.:^(x::Vec, y::Vec)
    usual = (x > 0.0) & (x < Inf) & (abs(y) < Inf)
    k, f = log_parts(x)
    d = 2.0 + f
    s = f / d
    s_low = (fma(-s, d, f) - s * (f - (d - 2.0))) / d
    s2, s2_low = times(s, s_low, s, s_low)
    cube, cube_low = times(s2, s2_low, s, s_low)
    cubic, cubic_low = times(cube, cube_low, map(Vec, TWO_THIRDS)...)
    rest = cube * s2 * polynomial(s2, LOG_REST)
    # k ln 2 + 2s + 2s³/3 + …
    high, low = two_sum(k * LN2_HIGH, 2.0 * s)
    high, more = two_sum(high, cubic)
    low += more + (muladd(k, LN2_LOW, 2.0 * s_low) + (cubic_low + rest))
    product = y * high
    error = muladd(y, low, fma(y, high, -product))
    k, r = split_exponent(clamp(product, -746.0, 710.0))
    power = scaled(k, expm1_reduced(r + ifelse(abs(product) < 746.0, error, 0.0)))
    return replaced_lanes(^, power, !usual, x, y)
end
@inline two_sum(a, b) = (s = a + b; c = s - a; (s, (a - (s - c)) + (b - c)))

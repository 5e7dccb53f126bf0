# The elementwise activations f: value, slope f′, curvature f″ and the bound on the slope which the
# constraints use. The kernels for Float32 and Float64 are branch-free, so that the loops over them vectorise.

"""
    Activation

An elementwise activation `f`. It has four methods, each for a pre-activation `s` and `z = f(s)`:
[`value`](@ref)`(f, s)`, [`slope`](@ref)`(f, s, z)` = f′(s), [`curvature`](@ref)`(f, s, z)` = f″(s) and
[`slope_bound`](@ref)`(f)` = sup |f′|.
"""
abstract type Activation end

"Hyperbolic tangent; slope in (0, 1]."
struct Tanh <: Activation end
"Logistic function 1/(1 + exp(-s)); slope in (0, 1/4]."
struct Sigmoid <: Activation end
"log(1 + exp(s)); slope in (0, 1)."
struct Softplus <: Activation end
"max(s, 0); slope in {0, 1}, taken as 0 at s = 0."
struct Relu <: Activation end
"s for s > 0, exp(s) - 1 otherwise; slope in (0, 1]."
struct Elu <: Activation end
"Gaussian error linear unit in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415)."
struct Gelu <: Activation end
"s⋅sigmoid(s), also called swish."
struct Silu <: Activation end
"f(s) = s, for linear layers."
struct Identity <: Activation end

const ACTIVATIONS = (;
    tanh = Tanh(), sigmoid = Sigmoid(), softplus = Softplus(), relu = Relu(),
    elu = Elu(), gelu = Gelu(), silu = Silu(), identity = Identity(),
)

"""
    activation(name::Symbol)

The activation of that name; an `ArgumentError` lists the valid names.
"""
activation(f::Activation) = f
function activation(name::Symbol)
    haskey(ACTIVATIONS, name) ||
        throw(ArgumentError("unknown activation :$name; choose one of $(join(keys(ACTIVATIONS), ", "))"))
    return ACTIVATIONS[name]
end
activation(name::AbstractString) = activation(Symbol(name))
activation(f) = throw(ArgumentError("an activation is $(repr(f)); expected its name, such as :tanh"))

name_of(f::Activation) = something(findfirst(==(f), ACTIVATIONS), f)

# --- exponential and tanh without branches ------------------------------------------------------------

# a b + c, rounded once where the processor can. `muladd` leaves that to the optimisation, which also chooses where two products are added:
# so that code compiled in other places, or with other options, would give other bits.
@inline multiply_add(a::Float64, b::Float64, c::Float64) = ccall("llvm.fmuladd.f64", llvmcall, Float64, (Float64, Float64, Float64), a, b, c)
@inline multiply_add(a::Float32, b::Float32, c::Float32) = ccall("llvm.fmuladd.f32", llvmcall, Float32, (Float32, Float32, Float32), a, b, c)

"The polynomial with these coefficients, the constant one first."
@generated horner(x::T, c::NTuple{N, T}) where {N, T} =
    :($(Expr(:meta, :inline)); $(foldl((p, k) -> :(multiply_add(x, $p, c[$k])), (N - 1):-1:1; init = :(c[$N]))))

"Constants of the exponential: magic rounding number, mantissa bits, ln 2 in two parts, largest tanh argument."
@inline constants(::Type{Float64}) = (6.755399441055744e15, 52, 0.6931471803691238, 1.9082149292705877e-10, 20.0)
@inline constants(::Type{Float32}) = (1.2582912f7, 23, 0.693145752f0, 1.42860677f-6, 10.0f0)

# exp(r) - 1 on |r| <= ln(2)/2 by its Taylor polynomial, to half an ulp. Even and odd powers are summed side by side, which takes half as
# long where nothing else is to be done meanwhile.
@inline expm1_taylor(r::Float64) = by_parity(
    r, (1 / 2, 1 / 24, 1 / 720, 1 / 40320, 1 / 3628800, 1 / 479001600),
    (1 / 6, 1 / 120, 1 / 5040, 1 / 362880, 1 / 39916800, 1 / 6227020800),
)
@inline expm1_taylor(r::Float32) = by_parity(r, (0.5f0, 0.041666668f0, 0.0013888889f0), (0.16666667f0, 0.008333334f0, 0.0001984127f0))
@inline function by_parity(r, even::Tuple, odd::Tuple)
    r2 = r * r
    return multiply_add(r2, multiply_add(r, horner(r2, odd), horner(r2, even)), r)
end

# (2^k, exp(r) - 1) with y = k ln 2 + r; y must be within the exponent range of T.
@inline function reduce_exponent(y::T) where {T <: Union{Float32, Float64}}
    magic, bits, ln2_high, ln2_low, _ = constants(T)
    t = multiply_add(y, T(1.4426950408889634), magic)
    k = t - magic
    r = multiply_add(-k, ln2_low, multiply_add(-k, ln2_high, y))
    I = T === Float64 ? Int64 : Int32
    power = reinterpret(T, (reinterpret(I, t) << bits) + reinterpret(I, one(T)))
    return power, expm1_taylor(r)
end

# What `reduce_exponent` takes.
@inline largest_exponent(::Type{Float64}) = 700.0
@inline largest_exponent(::Type{Float32}) = 86.0f0

# exp(y), which beyond e^±700 (e^±86 in Float32) stays as it is there; NaN stays NaN.
@inline function exp_bounded(y::T) where {T <: Union{Float32, Float64}}
    largest = largest_exponent(T)
    power, m = reduce_exponent(clamp(y, -largest, largest))
    return multiply_add(power, m, power)
end
@inline exp_bounded(y::Real) = exp(y)

# The same for y <= 0.
@inline function exp_nonpositive(y::T) where {T <: Union{Float32, Float64}}
    lowest = -largest_exponent(T)
    power, m = reduce_exponent(ifelse(y < lowest, lowest, y))
    return multiply_add(power, m, power)
end
@inline exp_nonpositive(y::Real) = exp(y)

# exp(y) - 1 for y <= 0.
@inline function expm1_nonpositive(y::T) where {T <: Union{Float32, Float64}}
    lowest = -largest_exponent(T)
    power, m = reduce_exponent(ifelse(y < lowest, lowest, y))
    return multiply_add(power, m, power - one(T))
end
@inline expm1_nonpositive(y::Real) = expm1(y)

# log(1 + e) = 2 artanh(t), t = e/(2 + e), for 0 <= e <= 1, by the series of artanh up to full precision. Such a long polynomial is
# inlined only on request; loops that call it otherwise are not vectorised.
@inline function log1p_unit(e::T) where {T <: Union{Float32, Float64}}
    t = e / (2 + e)
    return 2 * t * @inline horner(t * t, artanh_series(T))
end
@inline log1p_unit(e::Real) = log1p(e)
const ARTANH = Tuple(1 ./ (1:2:33))
const ARTANH_32 = Tuple(1.0f0 ./ (1:2:15))
@inline artanh_series(::Type{Float32}) = ARTANH_32
@inline artanh_series(::Type{Float64}) = ARTANH

# tanh(x) = e/(e + 2) with e = exp(2|x|) - 1; NaN stays NaN.
@inline function fast_tanh(x::T) where {T <: Union{Float32, Float64}}
    a = abs(x)
    largest = constants(T)[5]
    power, m = reduce_exponent(2 * ifelse(a > largest, largest, a))
    e = multiply_add(power, m, power - one(T))
    return copysign(e / (e + 2), x)
end
@inline fast_tanh(x::Real) = tanh(x)

@inline function logistic(s)
    e = exp_nonpositive(-abs(s))
    return ifelse(s < 0, e, one(e)) / (1 + e)
end

# --- value, slope, curvature, bound -----------------------------------------------------------------------

"    value(f, s)\n\nThe activation `f(s)`."
function value end
"    slope(f, s, z)\n\nf′(s), given `z = f(s)`."
function slope end
"    curvature(f, s, z)\n\nf″(s), given `z = f(s)`."
function curvature end
"    slope_bound(f)\n\nThe supremum of |f′|."
function slope_bound end

@inline value(::Tanh, s) = fast_tanh(s)
@inline slope(::Tanh, s, z) = 1 - z * z
@inline curvature(::Tanh, s, z) = -2 * z * (1 - z * z)
slope_bound(::Tanh) = 1.0

@inline value(::Sigmoid, s) = logistic(s)
@inline slope(::Sigmoid, s, z) = z * (1 - z)
@inline curvature(::Sigmoid, s, z) = z * (1 - z) * (1 - 2z)
slope_bound(::Sigmoid) = 0.25

@inline value(::Softplus, s) = max(s, zero(s)) + log1p_unit(exp_nonpositive(-abs(s)))
@inline slope(::Softplus, s, z) = logistic(s)
@inline curvature(::Softplus, s, z) = (p = logistic(s); p * (1 - p))
slope_bound(::Softplus) = 1.0

# `ifelse(s > 0, …)` would hide a NaN, which must reach the status of its sample.
@inline value(::Relu, s) = ifelse(s < 0, zero(s), s)
@inline slope(::Relu, s, z) = ifelse(s > 0, one(s), zero(s))
@inline curvature(::Relu, s, z) = zero(s)
slope_bound(::Relu) = 1.0

@inline value(::Elu, s) = ifelse(s > 0, s, expm1_nonpositive(min(s, zero(s))))
@inline slope(::Elu, s, z) = ifelse(s > 0, one(s), z + 1)
@inline curvature(::Elu, s, z) = ifelse(s > 0, zero(s), z + 1)
slope_bound(::Elu) = 1.0

@inline value(::Identity, s) = s
@inline slope(::Identity, s, z) = one(s)
@inline curvature(::Identity, s, z) = zero(s)
slope_bound(::Identity) = 1.0

@inline value(::Silu, s) = s * logistic(s)
@inline slope(::Silu, s, z) = (p = logistic(s); p + z * (1 - p))
@inline curvature(::Silu, s, z) = (p = logistic(s); p * (1 - p) * (2 + s * (1 - 2p)))
slope_bound(::Silu) = 1.0998393202   # at s = 2.3994

# gelu(s) = s/2 (1 + tanh u), u = √(2/π)(s + 0.044715 s³). Far from 0, where s³ overflows early, tanh u has long reached ±1.
@inline function gelu_parts(s)
    T = float(typeof(s))
    s = clamp(s, T(-20), T(20))
    c, q = T(0.7978845608028654), T(0.044715)
    t = fast_tanh(c * s * (1 + q * s * s))
    return t, c * (1 + 3 * q * s * s), 6 * c * q * s          # tanh u, u′, u″
end
@inline value(::Gelu, s) = s / 2 * (1 + gelu_parts(s)[1])
@inline function slope(::Gelu, s, z)
    t, du, _ = gelu_parts(s)
    return (1 + t) / 2 + s / 2 * (1 - t * t) * du
end
@inline function curvature(::Gelu, s, z)
    t, du, d2u = gelu_parts(s)
    w = 1 - t * t
    return w * du + s / 2 * w * (d2u - 2 * t * du * du)
end
slope_bound(::Gelu) = 1.1289930687     # near s = 1.43

"Whether the slope is never negative, as [`Monotone`](@ref) needs."
is_monotone(::Activation) = true
is_monotone(::Union{Gelu, Silu}) = false

# --- whole columns -----------------------------------------------------------------------------------------

"""
    Piecewise(ranges, activations)

The activation of a stage whose layers differ: `activations[i]` acts on the rows `ranges[i]`.
"""
struct Piecewise{K, A <: NTuple{K, Activation}} <: Activation
    ranges::NTuple{K, UnitRange{Int}}
    activations::A
end

"The pairs (rows, elementwise activation) which make up `f` on `n` rows."
@inline pieces(f::Activation, n::Int) = ((1:n, f),)
@inline pieces(f::Piecewise, ::Int) = map(tuple, f.ranges, f.activations)

"""
    fill_column!(evaluate, put!, F, Z, j, rows)

`put!(F, Z, i, j, t)` with `t, z = evaluate(i)` for the rows i; returns Σ (t - Z[i, j])² and Σ z².
"""
@inline function fill_column!(evaluate::R, put!::P, F, Z, j::Int, rows) where {P, R}
    change = zero(eltype(F))
    size2 = zero(eltype(F))
    @inbounds @vectors for i in rows
        t, z = @inline evaluate(i)
        d = t - Z[i, j]
        put!(F, Z, i, j, t)
        change = muladd(d, d, change)
        size2 = muladd(z, z, size2)
    end
    return change, size2
end

"`F` takes the value."
@inline put_value!(F, Z, i, j, t) = @inbounds F[i, j] = t
"`Z` takes the value, and `F` its change."
@inline put_change!(F, Z, i, j, t) = @inbounds (F[i, j] = t - Z[i, j]; Z[i, j] = t)

# The same for each piece of f: `evaluate(g)` is the function of the rows on which g acts.
@inline function fill_pieces!(evaluate::R, put!::P, F, f::Activation, Z, j::Int) where {P, R}
    changes = map(piece -> fill_column!(evaluate(piece[2]), put!, F, Z, j, piece[1]), pieces(f, size(F, 1)))
    return sum(first, changes), sum(last, changes)
end

# F[:, j] = f(S[:, j]); returns ‖F[:, j] - Z[:, j]‖² and ‖F[:, j]‖².
@inline function activate!(F, f::Activation, S, Z, j::Int)
    evaluate(g) = function (i)
        z = @inbounds value(g, S[i, j])
        return z, z
    end
    return fill_pieces!(evaluate, put_value!, F, f, Z, j)
end

"    slopes!(D, f, S, Z)\n\n`D = f′(S)` for all columns, given `Z = f(S)`."
function slopes!(D, f::Activation, S, Z)
    foreach(pieces(f, size(S, 1))) do (rows, g)
        for j in axes(D, 2)
            @inbounds @vectors for i in rows
                D[i, j] = slope(g, S[i, j], Z[i, j])
            end
        end
    end
    return D
end

"    curvatures(f, S, Z)\n\n`f″(S)` for all columns, given `Z = f(S)`."
function curvatures(f, S, Z)
    C = similar(S)
    for (rows, piece) in pieces(f, size(S, 1))
        C[rows, :] .= curvature.(Ref(piece), S[rows, :], Z[rows, :])
    end
    return C
end

"""
    change_deviation!(F, f, slope, S, Z, j)

`Z[:, j]` becomes t = f(S[:, j]) - slope S[:, j], and `F[:, j]` its change; returns ‖F[:, j]‖² and ‖f(S[:, j])‖².
"""
@inline function change_deviation!(F, f::Activation, slope, S, Z, j::Int)
    evaluate(g) = function (i)
        s = @inbounds S[i, j]
        z = value(g, s)
        return z - @inbounds(slope[i]) * s, z
    end
    return fill_pieces!(evaluate, put_change!, F, f, Z, j)
end

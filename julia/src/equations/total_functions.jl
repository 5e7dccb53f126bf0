"""
Julia's functions of these names for all real numbers: NaN outside their domains, where Julia's own throw a `DomainError`, which takes
0.2 ms and more. The code of texts sees them in place of Julia's, since an iteration leaves the domain again and again.
"""
module TotalFunctions

using ForwardDiff: Dual, ForwardDiff
using ..ImplicitRNN: LaneNumber

"What decides whether x is in a domain: its value without derivatives. Lanes decide for themselves."
primal(x::Real) = x
primal(x::Dual) = primal(ForwardDiff.value(x))
primal(::LaneNumber) = NaN

"NaN like x, with derivatives that are NaN."
undefined(x::Real) = (y = float(x); (y - y) / (y - y))

const DOMAINS = (
    (:sqrt, :log, :log2, :log10) => x -> !(x < 0),
    (:log1p,) => x -> !(x < -1),
    (:asin, :acos, :atanh) => x -> !(abs(x) > 1),
    (:acosh,) => x -> !(x < 1),
    (:sin, :cos, :tan, :sec, :csc, :cot, :sind, :cosd, :tand, :sinpi, :cospi) => x -> !isinf(x),
)

for (names, domain) in DOMAINS, f in names
    @eval begin
        @inline $f(x::Real) = $domain(primal(x)) ? Base.$f(x) : undefined(x)
        $f(x...) = Base.$f(x...)        # as of matrices
        total(::typeof(Base.$f)) = $f
    end
end

log(base::Real, x::Real) = primal(base) < 0 || primal(x) < 0 ? undefined(base + x) : Base.log(base, x)
@inline sincos(x::Real) = isinf(primal(x)) ? (undefined(x), undefined(x)) : Base.sincos(x)
sincos(x) = Base.sincos(x)

@inline ^(x::Real, y::Real) = has_power(x, y) ? Base.:^(x, y) : undefined(x + y)
^(x, y) = Base.:^(x, y)
has_power(x::Real, y::Real) = (p = primal(y); !(primal(x) < 0) || isinteger(p) || isinf(p))
has_power(x::Real, y::Union{Integer, LaneNumber}) = true
@inline Base.literal_pow(::typeof(^), x, n::Val) = Base.literal_pow(Base.:^, x, n)
total(::typeof(Base.:^)) = ^

"The function of all numbers that stands for f, or f."
total(f) = f

const NAMES = (:sincos, :^, Iterators.flatten(first.(DOMAINS))...)

end

# Numbers of several samples side by side in vector registers, on which the user's function is evaluated as if they were one number.

"Samples side by side, one in each lane of the widest vector registers."
const LANES = 16

"Numbers of samples side by side: plain ([`Vec`](@ref)) or with derivatives ([`Jet`](@ref))."
abstract type LaneNumber <: Real end

@eval primitive type Vec <: LaneNumber $(64LANES) end
"""
    Vec

One number for each of $(LANES) samples, in double precision. It behaves as a real number in arithmetic, and every operation is done for
all samples. Comparisons return a [`Mask`](@ref); code that branches on one fails, and is run for one sample at a time.
"""
Vec
# Not a tuple of `VecElement`: code for arrays of those relies on an alignment to 64 bytes, which Julia does not see to. So not the
# `Vec` of SIMD.jl, which holds such a tuple; nor is that a `Real`, as functions declared for numbers and the duals of ForwardDiff.jl ask.

# An integer for each sample.
@eval primitive type Integers $(64LANES) end

# A truth value for each of the samples, one bit each.
@eval primitive type Mask $LANES end
const Bits = LANES == 16 ? UInt16 : UInt8
@inline Mask(bits::Bits) = reinterpret(Mask, bits)
@inline bits(m::Mask) = reinterpret(Bits, m)
const ALL, NONE = Mask(typemax(Bits)), Mask(zero(Bits))

"Numbers that all samples may share."
const Plain = Union{AbstractFloat, Integer, Rational, AbstractIrrational}

# LLVM code from `inputs`, each a pair of its type and the name of its vector, and `code`, which gives the vector %r of type `result`.
const LLVM_TYPES = Dict(Vec => "<$LANES x double>", Integers => "<$LANES x i64>", Mask => "<$LANES x i1>")
const LLVM_BITS = Dict(Vec => "i$(64LANES)", Integers => "i$(64LANES)", Mask => "i$LANES")
function instruction(code, result, inputs...)
    unpack = join("%$name = bitcast $(LLVM_BITS[type]) %$(k - 1) to $(LLVM_TYPES[type])\n" for (k, (type, name)) in enumerate(inputs))
    return "$unpack$code\n%bits = bitcast $(LLVM_TYPES[result]) %r to $(LLVM_BITS[result])\nret $(LLVM_BITS[result]) %bits"
end

@eval @inline Vec(x::Float64) = Base.llvmcall(
    $(instruction("%v = insertelement <$LANES x double> poison, double %0, i32 0\n%r = shufflevector <$LANES x double> %v, <$LANES x double> poison, <$LANES x i32> zeroinitializer", Vec)),
    Vec, Tuple{Float64}, x
)
@eval @inline Integers(x::Int64) = Base.llvmcall(
    $(instruction("%v = insertelement <$LANES x i64> poison, i64 %0, i32 0\n%r = shufflevector <$LANES x i64> %v, <$LANES x i64> poison, <$LANES x i32> zeroinitializer", Integers)),
    Integers, Tuple{Int64}, x
)
@eval @inline lane(x::Vec, l::Int) =
    Base.llvmcall($("%a = bitcast i$(64LANES) %0 to <$LANES x double>\n%r = extractelement <$LANES x double> %a, i64 %1\nret double %r"), Float64, Tuple{Vec, Int64}, x, l - 1)
@inline lane(m::Mask, l::Int) = isodd(bits(m) >> (l - 1))
const Register = NTuple{LANES, VecElement{Float64}}
# As what LLVM keeps in registers from one round of a loop to the next, and where two branches meet. To LLVM a `Vec` is one wide
# integer; where it loses sight of the bitcasts, it keeps that in general-purpose registers.
@eval @inline in_registers(x::Vec) = Base.llvmcall($("%r = bitcast i$(64LANES) %0 to <$LANES x double>\nret <$LANES x double> %r"), Register, Tuple{Vec}, x)
@eval @inline Vec(x::Register) = Base.llvmcall($("%r = bitcast <$LANES x double> %0 to i$(64LANES)\nret i$(64LANES) %r"), Vec, Tuple{Register}, x)
"The lanes f(1), f(2), …"
@inline from_lanes(f::F) where {F} = Vec(ntuple(l -> VecElement(f(l)), Val(LANES)))
@inline function mask_from_lanes(f::F) where {F}
    found = zero(Bits)
    for l in 1:LANES
        found |= Bits(f(l)::Bool) << (l - 1)
    end
    return Mask(found)
end

@inline Vec(x::Plain) = Vec(Float64(x))
Base.promote_rule(::Type{S}, ::Type{<:Union{Float64, Float32, Float16, Integer, Rational, AbstractIrrational}}) where {S <: LaneNumber} = S
Base.float(x::LaneNumber) = x
Base.float(::Type{S}) where {S <: LaneNumber} = S
Base.broadcastable(m::Mask) = Ref(m)
for f in (:zero, :one, :eps, :floatmin, :floatmax, :typemin, :typemax)
    @eval @inline Base.$f(::Type{S}) where {S <: LaneNumber} = S($f(Float64))
end
Base.show(io::IO, x::Vec) = print(io, "Vec(", join((lane(x, l) for l in 1:LANES), ", "), ")")

# --- masks -----------------------------------------------------------------------------------------------------

for f in (:&, :|, :xor)
    @eval @inline Base.$f(a::Mask, b::Mask) = Mask($f(bits(a), bits(b)))
    @eval @inline Base.$f(a::Mask, b::Bool) = $f(a, b ? ALL : NONE)
    @eval @inline Base.$f(a::Bool, b::Mask) = $f(b, a)
end
@inline Base.:!(m::Mask) = Mask(~bits(m))
# Without these, `==` of truths would be whether they are the same object.
@inline Base.:(==)(a::Mask, b::Union{Mask, Bool}) = !xor(a, b)
@inline Base.:(==)(a::Bool, b::Mask) = b == a
@inline Base.any(m::Mask) = bits(m) != zero(Bits)
@inline Base.all(m::Mask) = bits(m) == typemax(Bits)

@eval @inline Base.ifelse(m::Mask, a::Vec, b::Vec) = Base.llvmcall(
    $(instruction("%r = select <$LANES x i1> %m, <$LANES x double> %a, <$LANES x double> %b", Vec, Mask => "m", Vec => "a", Vec => "b")),
    Vec, Tuple{Mask, Vec, Vec}, m, a, b
)
@inline Base.ifelse(m::Mask, a::Union{Vec, Plain}, b::Union{Vec, Plain}) = ifelse(m, Vec(a), Vec(b))
@inline Base.ifelse(m::Mask, a::Mask, b::Mask) = (m & a) | (!m & b)

for (f, op) in ((:<, "olt"), (:<=, "ole"), (:(==), "oeq"), (:unordered, "uno"))
    name = f === :unordered ? f : :(Base.$f)
    @eval @inline $name(a::Vec, b::Vec) =
        Base.llvmcall($(instruction("%r = fcmp $op <$LANES x double> %a, %b", Mask, Vec => "a", Vec => "b")), Mask, Tuple{Vec, Vec}, a, b)
end
@inline Base.isnan(x::Vec) = unordered(x, x)
@inline Base.isinf(x::Vec) = abs(x) == Inf
@inline Base.isfinite(x::Vec) = abs(x) < Inf
@inline Base.signbit(x::Vec) = copysign(one(x), x) < 0.0

# --- arithmetic ------------------------------------------------------------------------------------------------

for (f, op) in ((:+, "fadd"), (:-, "fsub"), (:*, "fmul"), (:/, "fdiv"))
    @eval @inline Base.$f(a::Vec, b::Vec) =
        Base.llvmcall($(instruction("%r = $op <$LANES x double> %a, %b", Vec, Vec => "a", Vec => "b")), Vec, Tuple{Vec, Vec}, a, b)
end
for (f, op) in ((:+, "add"), (:-, "sub"), (:&, "and"), (:xor, "xor"), (:<<, "shl"), (:>>, "ashr"))
    code = instruction("%r = $op <$LANES x i64> %a, %b", Integers, Integers => "a", Integers => "b")
    @eval @inline Base.$f(a::Integers, b::Integers) = Base.llvmcall($code, Integers, Tuple{Integers, Integers}, a, b)
    @eval @inline Base.$f(a::Integers, b::Int64) = $f(a, Integers(b))
end
@eval @inline Base.:-(x::Vec) = Base.llvmcall($(instruction("%r = fneg <$LANES x double> %a", Vec, Vec => "a")), Vec, Tuple{Vec}, x)
@inline Base.inv(x::Vec) = 1.0 / x
@inline Base.abs2(x::Vec) = x * x

# Julia takes the declaration of an intrinsic with the code that calls it.
for (f, name, count) in (
        (:abs, "fabs", 1), (:sqrt, "sqrt", 1), (:floor, "floor", 1), (:ceil, "ceil", 1), (:trunc, "trunc", 1), (:round, "rint", 1),
        (:copysign, "copysign", 2), (:muladd, "fmuladd", 3), (:fma, "fma", 3),
    )
    given = [(:a, :b, :c)[1:count]...]
    entry = """
    declare <$LANES x double> @llvm.$name.v$(LANES)f64($(join(fill("<$LANES x double>", count), ", ")))
    define i$(64LANES) @entry($(join(fill("i$(64LANES)", count), ", "))) alwaysinline {
    $(instruction("%r = call <$LANES x double> @llvm.$name.v$(LANES)f64($(join(("<$LANES x double> %$v" for v in given), ", ")))", Vec, (Vec => "$v" for v in given)...))
    }"""
    @eval @inline Base.$f($((:($v::Vec) for v in given)...)) = Base.llvmcall(($entry, "entry"), Vec, $(Expr(:curly, :Tuple, fill(:Vec, count)...)), $(given...))
end
@inline Base.flipsign(x::S, y::S) where {S <: LaneNumber} = ifelse(signbit(y), -x, x)
@inline Base.sign(x::Vec) = ifelse(x > 0.0, 1.0, ifelse(x < 0.0, -1.0, x))
# NaN stays NaN.
@inline Base.max(a::S, b::S) where {S <: LaneNumber} = ifelse((a > b) | isnan(a), a, b)
@inline Base.min(a::S, b::S) where {S <: LaneNumber} = ifelse((a < b) | isnan(a), a, b)
@inline Base.clamp(x::LaneNumber, low::Real, high::Real) = ifelse(x > high, high, ifelse(x < low, low, x))

@eval @inline Base.reinterpret(::Type{Integers}, x::Vec) = Base.llvmcall($("ret i$(64LANES) %0"), Integers, Tuple{Vec}, x)
@eval @inline Base.reinterpret(::Type{Vec}, x::Integers) = Base.llvmcall($("ret i$(64LANES) %0"), Vec, Tuple{Integers}, x)
@eval @inline Vec(x::Integers) = Base.llvmcall($(instruction("%r = sitofp <$LANES x i64> %a to <$LANES x double>", Vec, Integers => "a")), Vec, Tuple{Integers}, x)
# Which are odd.
@eval @inline is_odd(x::Integers) = Base.llvmcall($(instruction("%r = trunc <$LANES x i64> %a to <$LANES x i1>", Mask, Integers => "a")), Mask, Tuple{Integers}, x)

# --- for one lane after the other ------------------------------------------------------------------------------

"`f` of each lane: NaN outside its domain."
@noinline each_lane(f::F, x::Vec...) where {F} = from_lanes(l -> of_lane(f, l, x...))
of_lane(f::F, l, x::Vec...) where {F} = Float64(TotalFunctions.total(f)(map(x -> lane(x, l), x)...))

"y with the lanes in question replaced by f(x)."
@inline replaced_lanes(f::F, y::Vec, which::Mask, x::Vec...) where {F} =
    Vec(any(which) ? in_registers(replace_lanes(f, y, which, x...)) : in_registers(y))
@noinline replace_lanes(f::F, y::Vec, which::Mask, x::Vec...) where {F} =
    from_lanes(l -> lane(which, l) ? of_lane(f, l, x...) : lane(y, l))

# --- in memory -------------------------------------------------------------------------------------------------

"""
    Block(first, last)

Samples side by side from number `first` on; where there are no more than `last` the other lanes repeat it.
"""
struct Block
    first::Int
    last::Int
end
@inline samples(b::Block) = b.first:min(b.first + LANES - 1, b.last)
@inline is_full(b::Block) = b.first + LANES - 1 <= b.last
@inline sample(b::Block, l::Int) = min(b.first + l - 1, b.last)

"Number i of the `stride` numbers that each sample has in the array."
@inline load(x::Array, b::Block, i::Int = 1, stride::Int = 1) =
    Vec(is_contiguous(x, b, stride) ? load_registers(x, b) : in_registers(gather(x, b, i, stride)))
@inline load_registers(x::Array, b::Block) = in_registers(GC.@preserve x unsafe_load(Ptr{Vec}(pointer(x, b.first))))
@inline is_contiguous(x::Array, b::Block, stride::Int) = stride == 1 && eltype(x) == Float64 && is_full(b)
@noinline gather(x::Array, b::Block, i::Int, stride::Int) =
    from_lanes(l -> Float64(@inbounds x[(sample(b, l) - 1) * stride + i]))

@inline function store!(x::Array, y::Vec, b::Block, i::Int = 1, stride::Int = 1)
    if is_contiguous(x, b, stride)
        GC.@preserve x unsafe_store!(Ptr{Vec}(pointer(x, b.first)), y)
    else
        scatter!(x, y, b, i, stride)
    end
    return
end
@noinline function scatter!(x::Array, y::Vec, b::Block, i::Int, stride::Int)
    for (l, j) in enumerate(samples(b))
        @inbounds x[(j - 1) * stride + i] = lane(y, l)
    end
    return
end

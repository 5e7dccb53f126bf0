# Numbers of several samples side by side in vector registers, on which the user's function is evaluated as if they were one number.

const Data{W, T} = NTuple{W, VecElement{T}}

"""
    Vec{W, T}

W numbers side by side, one for each of W samples: a real number as far as arithmetic goes, every operation being done for all of
them. What they are compared by gives a [`Mask`](@ref); code that branches on that fails, and is run for one sample at a time.
"""
struct Vec{W, T <: Union{Float64, Float32, Int64}} <: Real
    data::Data{W, T}
    Vec(data::Data{W, T}) where {W, T} = new{W, T}(data)
end

"Truth of something for each of W samples."
struct Mask{W}
    data::Data{W, Bool}
end

"What there may be one of for all samples."
const Plain = Union{AbstractFloat, Integer, Rational, AbstractIrrational}

@inline lane(x::Union{Vec, Mask}, l::Int) = @inbounds x.data[l].value
@inline (::Type{Vec{W, T}})(x::Plain) where {W, T} = (y = T(x); Vec(ntuple(_ -> VecElement(y), Val(W))))
@inline (::Type{Vec{W, T}})(x::Vec{W, T}) where {W, T} = x
@inline (::Type{Vec{W, T}})(x::Vec{W, S}) where {W, T, S} = converted(T, x)
@inline Mask{W}(x::Bool) where {W} = Mask{W}(ntuple(_ -> VecElement(x), Val(W)))

Base.promote_rule(::Type{Vec{W, T}}, ::Type{Vec{W, S}}) where {W, T, S} = Vec{W, promote_type(T, S)}
Base.promote_rule(::Type{Vec{W, T}}, ::Type{S}) where {W, T, S <: Plain} = Vec{W, promote_type(T, S)}
Base.float(x::Vec) = x
Base.float(::Type{V}) where {V <: Vec} = V
Base.broadcastable(m::Mask) = Ref(m)
for f in (:zero, :one)
    @eval @inline Base.$f(::Type{Vec{W, T}}) where {W, T} = Vec{W, T}($f(T))
    @eval @inline Base.$f(::V) where {V <: Vec} = $f(V)
end
for f in (:eps, :floatmin, :floatmax, :typemin, :typemax)
    @eval @inline Base.$f(::Type{Vec{W, T}}) where {W, T} = Vec{W, T}($f(T))
end

# --- instructions ----------------------------------------------------------------------------------------------

element(::Type{Float64}) = "double"
element(::Type{Float32}) = "float"
element(::Type{Int64}) = "i64"
element(::Type{Bool}) = "i8"
vector_type(W, T) = "<$W x $(element(T))>"

"LLVM code that gives data of type R as the value %r, of arguments %0, %1, …"
function instruction(code, W, R, arguments...)
    types = Tuple{(Data{W, T} for T in arguments)...}
    given = (:(x[$k]) for k in 1:length(arguments))
    return quote
        $(Expr(:meta, :inline))
        Base.llvmcall($(code * "\nret $(vector_type(W, R)) %r"), Data{$W, $R}, $types, $(given...))
    end
end

@generated operate(::Val{op}, x::Vararg{Data{W, T}, 2}) where {op, W, T} =
    instruction("%r = $op $(vector_type(W, T)) %0, %1", W, T, T, T)
@generated negated(x::Vararg{Data{W, T}, 1}) where {W, T} = instruction("%r = fneg $(vector_type(W, T)) %0", W, T, T)
@generated compare(::Val{op}, x::Vararg{Data{W, T}, 2}) where {op, W, T} = instruction(
    "%m = fcmp $op $(vector_type(W, T)) %0, %1\n%r = zext <$W x i1> %m to <$W x i8>", W, Bool, T, T
)
@generated function choose(m::Data{W, Bool}, x::Vararg{Data{W, T}, 2}) where {W, T}
    t = vector_type(W, T)
    return quote
        $(Expr(:meta, :inline))
        Base.llvmcall(
            $("%m = trunc <$W x i8> %0 to <$W x i1>\n%r = select <$W x i1> %m, $t %1, $t %2\nret $t %r"),
            Data{W, T}, Tuple{Data{W, Bool}, Data{W, T}, Data{W, T}}, m, x[1], x[2]
        )
    end
end
@generated conversion(::Val{op}, ::Type{R}, x::Vararg{Data{W, T}, 1}) where {op, R, W, T} =
    instruction("%r = $op $(vector_type(W, T)) %0 to $(vector_type(W, R))", W, R, T)
@generated function intrinsic(::Val{name}, x::Vararg{Data{W, T}, N}) where {name, W, T, N}
    V = Data{W, T}
    return quote
        $(Expr(:meta, :inline))
        ccall($("llvm.$name.v$W$(T == Float64 ? "f64" : "f32")"), llvmcall, $V, ($((V for _ in 1:N)...),), $((:(x[$k]) for k in 1:N)...))
    end
end
@generated function any_lane(m::Data{W, Bool}) where {W}
    code = "%m = trunc <$W x i8> %0 to <$W x i1>\n%b = bitcast <$W x i1> %m to i$W\n%c = icmp ne i$W %b, 0\n%r = zext i1 %c to i8\nret i8 %r"
    return quote
        $(Expr(:meta, :inline))
        Base.llvmcall($code, Bool, Tuple{Data{W, Bool}}, m)
    end
end

# --- masks -----------------------------------------------------------------------------------------------------

for (f, op) in ((:&, :and), (:|, :or), (:xor, :xor))
    @eval @inline Base.$f(a::Mask{W}, b::Mask{W}) where {W} = Mask{W}(operate(Val($(QuoteNode(op))), a.data, b.data))
    @eval @inline Base.$f(a::Mask{W}, b::Bool) where {W} = $f(a, Mask{W}(b))
    @eval @inline Base.$f(a::Bool, b::Mask{W}) where {W} = $f(Mask{W}(a), b)
end
@inline Base.:!(m::Mask) = xor(m, true)
@inline Base.any(m::Mask) = any_lane(m.data)
@inline Base.all(m::Mask) = !any(!m)

@inline Base.ifelse(m::Mask, a::V, b::V) where {V <: Vec} = Vec(choose(m.data, a.data, b.data))
@inline Base.ifelse(m::Mask, a::Real, b::Real) = ifelse(m, promote(a, b)...)
@inline Base.ifelse(m::Mask{W}, a::T, b::T) where {W, T <: Plain} = ifelse(m, Vec{W, float(T)}(a), Vec{W, float(T)}(b))
@inline Base.ifelse(m::Mask, a::Mask, b::Mask) = (m & a) | (!m & b)

for (f, op) in ((:<, :olt), (:<=, :ole), (:(==), :oeq))
    @eval @inline Base.$f(a::Vec{W, T}, b::Vec{W, T}) where {W, T <: AbstractFloat} = Mask{W}(compare(Val($(QuoteNode(op))), a.data, b.data))
end
@inline Base.isnan(x::Vec{W}) where {W} = Mask{W}(compare(Val(:uno), x.data, x.data))
@inline Base.isinf(x::Vec{W, T}) where {W, T} = abs(x) == T(Inf)
@inline Base.isfinite(x::Vec{W, T}) where {W, T} = abs(x) < T(Inf)
@inline Base.signbit(x::V) where {V <: Vec} = copysign(one(V), x) < zero(V)

# --- arithmetic ------------------------------------------------------------------------------------------------

for (f, op) in ((:+, :fadd), (:-, :fsub), (:*, :fmul), (:/, :fdiv))
    @eval @inline Base.$f(a::Vec{W, T}, b::Vec{W, T}) where {W, T <: AbstractFloat} = Vec(operate(Val($(QuoteNode(op))), a.data, b.data))
end
for (f, op) in ((:+, :add), (:-, :sub), (:&, :and), (:xor, :xor), (:<<, :shl), (:>>, :ashr))
    @eval @inline Base.$f(a::Vec{W, Int64}, b::Vec{W, Int64}) where {W} = Vec(operate(Val($(QuoteNode(op))), a.data, b.data))
end
@inline Base.:-(x::Vec) = Vec(negated(x.data))
@inline Base.:+(x::Vec) = x
@inline Base.inv(x::V) where {V <: Vec} = one(V) / x
@inline Base.muladd(a::V, b::V, c::V) where {V <: Vec} = Vec(intrinsic(Val(:fmuladd), a.data, b.data, c.data))
@inline Base.fma(a::V, b::V, c::V) where {V <: Vec} = Vec(intrinsic(Val(:fma), a.data, b.data, c.data))
for (f, name) in ((:abs, :fabs), (:sqrt, :sqrt), (:floor, :floor), (:ceil, :ceil), (:trunc, :trunc), (:round, :rint))
    @eval @inline Base.$f(x::Vec) = Vec(intrinsic(Val($(QuoteNode(name))), x.data))
end
@inline Base.copysign(x::V, y::V) where {V <: Vec} = Vec(intrinsic(Val(:copysign), x.data, y.data))
@inline Base.flipsign(x::V, y::V) where {V <: Vec} = ifelse(signbit(y), -x, x)
@inline Base.sign(x::V) where {V <: Vec} = ifelse(x > zero(V), one(V), ifelse(x < zero(V), -one(V), x))
@inline Base.abs2(x::Vec) = x * x
# NaN stays NaN.
@inline Base.max(a::V, b::V) where {V <: Vec} = ifelse((a > b) | isnan(a), a, b)
@inline Base.min(a::V, b::V) where {V <: Vec} = ifelse((a < b) | isnan(a), a, b)
@inline Base.clamp(x::Vec, low::Real, high::Real) = ifelse(x > high, high, ifelse(x < low, low, x))

@inline converted(::Type{Float64}, x::Vec{W, Float32}) where {W} = Vec(conversion(Val(:fpext), Float64, x.data))
@inline converted(::Type{Float32}, x::Vec{W, Float64}) where {W} = Vec(conversion(Val(:fptrunc), Float32, x.data))
@inline converted(::Type{Float64}, x::Vec{W, Int64}) where {W} = Vec(conversion(Val(:sitofp), Float64, x.data))
@inline Base.reinterpret(::Type{Int64}, x::Vec{W, Float64}) where {W} = Vec(conversion(Val(:bitcast), Int64, x.data))
@inline Base.reinterpret(::Type{Float64}, x::Vec{W, Int64}) where {W} = Vec(conversion(Val(:bitcast), Float64, x.data))
"In double precision."
@inline wide(x::Vec{W}) where {W} = Vec{W, Float64}(x)

# --- for one lane after the other ------------------------------------------------------------------------------

"`f` of each lane: NaN outside its domain."
@inline each_lane(f::F, x::Vec{W, T}...) where {F, W, T} =
    Vec(ntuple(l -> VecElement(in_domain(f, map(x -> lane(x, l), x)...)), Val(W)))
@noinline function in_domain(f::F, x::T...) where {F, T}
    try
        return T(f(x...))
    catch error
        outside_domain(error)
        return T(NaN)
    end
end

"y with the lanes in question replaced by f(x)."
@inline replaced_lanes(f::F, y::V, which::Mask, x::V...) where {F, V <: Vec} = any(which) ? replace_lanes(f, y, which, x...) : y
@noinline replace_lanes(f::F, y::Vec{W, T}, which::Mask{W}, x::Vec{W, T}...) where {F, W, T} = Vec(
    ntuple(l -> VecElement(lane(which, l) ? in_domain(f, map(x -> lane(x, l), x)...) : lane(y, l)), Val(W))
)

# --- in memory -------------------------------------------------------------------------------------------------

"""
    Block{W}(first, last)

W samples side by side from number `first` on; where there are no more than `last` the other lanes repeat it.
"""
struct Block{W}
    first::Int
    last::Int
end
@inline samples(b::Block{W}) where {W} = b.first:min(b.first + W - 1, b.last)
@inline is_full(b::Block{W}) where {W} = b.first + W - 1 <= b.last
@inline sample(b::Block, l::Int) = min(b.first + l - 1, b.last)

"Number i of the `stride` numbers that each sample has in the array."
@inline function load(x::Array{T}, b::Block{W}, i::Int = 1, stride::Int = 1) where {T <: Union{Float32, Float64}, W}
    if stride == 1 && is_full(b)
        return GC.@preserve x Vec(unsafe_load(Ptr{Data{W, T}}(pointer(x, b.first))))
    end
    return Vec(ntuple(l -> VecElement(@inbounds x[(sample(b, l) - 1) * stride + i]), Val(W)))
end

@inline function store!(x::Array{T}, y::Vec{W, T}, b::Block{W}, i::Int = 1, stride::Int = 1) where {T, W}
    if stride == 1 && is_full(b)
        GC.@preserve x unsafe_store!(Ptr{Data{W, T}}(pointer(x, b.first)), y.data)
    else
        for (l, j) in enumerate(samples(b))
            @inbounds x[(j - 1) * stride + i] = lane(y, l)
        end
    end
    return
end

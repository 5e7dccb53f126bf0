# Vector registers. The compiler cannot be relied on to vectorise these operations: whether it does depends on the surrounding
# loop. The `Vec` of SIMD.jl is the same tuple with all operations; only a few are needed here.

"Numbers side by side in vector registers."
const LaneVector{L, T} = NTuple{L, VecElement{T}}

"The number types with vector registers."
const Hardware = Union{Float32, Float64}

"Bytes of a vector register of this processor. A `LaneVector` of more is taken apart by the compiler."
const REGISTER = let CPU = Base.BinaryPlatforms.CPUID
    Sys.ARCH === :x86_64 && CPU.test_cpu_feature(CPU.JL_X86_avx512f) ? 64 : 32
end
register_lanes(::Type{T}) where {T} = REGISTER ÷ sizeof(T)

"The first n of L lanes: of a vector of fewer numbers, of which no others may be read or written."
struct FirstLanes{L}
    n::Int
end
const WhichLanes{L} = Union{Val{L}, FirstLanes{L}}
bits_up_to(n::Int) = (1 << n) - 1

for (T, name, type) in ((Float32, "f32", "float"), (Float64, "f64", "double")), L in (2, 4, 8, 16, 32)
    V, vector = LaneVector{L, T}, "<$L x $type>"
    @eval @inline muladd_lanes(a::$V, b::$V, c::$V) = ccall($("llvm.fmuladd.v$L$name"), llvmcall, $V, ($V, $V, $V), a, b, c)
    @eval @inline abs_lanes(a::$V) = ccall($("llvm.fabs.v$L$name"), llvmcall, $V, ($V,), a)
    for (f, operation) in ((:times_lanes, "fmul"), (:minus_lanes, "fsub"), (:over_lanes, "fdiv"))
        text = "%r = $operation $vector %0, %1\nret $vector %r"
        @eval @inline $f(a::$V, b::$V) = Base.llvmcall($text, $V, Tuple{$V, $V}, a, b)
    end
    text = "%r = fneg $vector %0\nret $vector %r"
    @eval @inline negative(a::$V) = Base.llvmcall($text, $V, Tuple{$V}, a)
    @eval @inline negative_inverse(a::$V) = over_lanes(same_in_all(-one($T), Val($L)), a)
    # Of a tuple of so many the compiler makes no vector, and of a shorter one a better one than this.
    text = "%one = insertelement $vector undef, $type %0, i32 0\n" *
        "%r = shufflevector $vector %one, $vector undef, <$L x i32> zeroinitializer\nret $vector %r"
    L == 32 && @eval @inline same_in_all(x::$T, ::Val{$L}) = Base.llvmcall($text, $V, Tuple{$T}, x)
    # Truth of something for each lane, in a bit each.
    for (f, condition) in ((:below, "olt"), (:at_most, "ole"))
        compare = """
        %found = fcmp $condition $vector %0, %1
        %bits = bitcast <$L x i1> %found to i$L
        %r = zext i$L %bits to i64
        ret i64 %r"""
        @eval @inline $f(a::$V, b::$V) = Base.llvmcall($compare, Int64, Tuple{$V, $V}, a, b)
    end
    choose = """
    %bits = trunc i64 %0 to i$L
    %mask = bitcast i$L %bits to <$L x i1>
    %r = select <$L x i1> %mask, $vector %1, $vector %2
    ret $vector %r"""
    @eval @inline select(bits::Int64, a::$V, b::$V) = Base.llvmcall($choose, $V, Tuple{Int64, $V, $V}, bits, a, b)
    # The lanes of a vector in memory whose bits are set, the others 0, and back again, without a look at the others.
    pointer_type, mangled = VERSION < v"1.12-" ? ("$vector*", "p0v$L$name") : ("ptr", "p0")
    place_and_mask = """
    %place = inttoptr i64 %0 to $pointer_type
    %bits = trunc i64 %1 to i$L
    %mask = bitcast i$L %bits to <$L x i1>"""
    load = """
    declare $vector @llvm.masked.load.v$L$name.$mangled($pointer_type, i32, <$L x i1>, $vector)
    define $vector @load(i64 %0, i64 %1) alwaysinline {
    $place_and_mask
    %r = call $vector @llvm.masked.load.v$L$name.$mangled($pointer_type %place, i32 $(sizeof(T)), <$L x i1> %mask, $vector zeroinitializer)
    ret $vector %r
    }"""
    store = """
    declare void @llvm.masked.store.v$L$name.$mangled($vector, $pointer_type, i32, <$L x i1>)
    define void @store(i64 %0, i64 %1, $vector %2) alwaysinline {
    $place_and_mask
    call void @llvm.masked.store.v$L$name.$mangled($vector %2, $pointer_type %place, i32 $(sizeof(T)), <$L x i1> %mask)
    ret void
    }"""
    @eval @inline load_lanes(p::Ptr{$T}, bits::Int64, ::Val{$L}) =
        Base.llvmcall(($load, "load"), $V, Tuple{Int64, Int64}, Int64(p), bits)
    @eval @inline store_lanes!(p::Ptr{$T}, v::$V, bits::Int64) =
        Base.llvmcall(($store, "store"), Cvoid, Tuple{Int64, Int64, $V}, Int64(p), bits, v)
end
@inline load_lanes(p::Ptr, lanes::FirstLanes{L}) where {L} = load_lanes(p, bits_up_to(lanes.n), Val(L))
@inline store_lanes!(p::Ptr, v, lanes::FirstLanes) = store_lanes!(p, v, bits_up_to(lanes.n))
@inline load_lanes(p::Ptr{T}, ::Val{L}) where {T, L} = unsafe_load(Ptr{LaneVector{L, T}}(p))
@inline store_lanes!(p::Ptr{T}, v::LaneVector{L, T}, ::Val{L}) where {T, L} = unsafe_store!(Ptr{LaneVector{L, T}}(p), v)

@inline same_in_all(x, ::Val{L}) where {L} = ntuple(_ -> VecElement(x), Val(L))

# One half of the lanes is added to the other until there is one.
@inline sum_lanes(v::LaneVector{1}) = v[1].value
@inline sum_lanes(v::LaneVector{L}) where {L} =
    sum_lanes(ntuple(i -> VecElement(v[i].value + v[i + L ÷ 2].value), Val(L ÷ 2)))

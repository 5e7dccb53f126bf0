# Vector registers. The compiler is not to be trusted with finding these vectors by itself: whether it does changes with the loop
# around them. The `Vec` of SIMD.jl is the same tuple with every operation there is; here a few are needed.

"Numbers side by side in vector registers."
const LaneVector{L, T} = NTuple{L, VecElement{T}}

"The number types there are registers for."
const Hardware = Union{Float32, Float64}

"Bytes of a vector register of this processor. A `LaneVector` of more is taken apart by the compiler."
const REGISTER = let CPU = Base.BinaryPlatforms.CPUID
    Sys.ARCH === :x86_64 && CPU.test_cpu_feature(CPU.JL_X86_avx512f) ? 64 : 32
end
register_lanes(::Type{T}) where {T} = REGISTER ÷ sizeof(T)

for (T, name, type) in ((Float32, "f32", "float"), (Float64, "f64", "double")), L in (4, 8, 16)
    V, vector = LaneVector{L, T}, "<$L x $type>"
    @eval @inline muladd_lanes(a::$V, b::$V, c::$V) = ccall($("llvm.fmuladd.v$L$name"), llvmcall, $V, ($V, $V, $V), a, b, c)
    keep = """
    %first = trunc i64 %2 to i$L
    %mask = bitcast i$L %first to <$L x i1>
    %r = select <$L x i1> %mask, $vector %0, $vector %1
    ret $vector %r"""
    # `a` in the lanes whose bits are set, `b` in the others.
    @eval @inline select_lanes(bits::Int64, a::$V, b::$V) = Base.llvmcall($keep, $V, Tuple{$V, $V, Int64}, a, b, bits)
end

@inline same_in_all(x, ::Val{L}) where {L} = ntuple(_ -> VecElement(x), Val(L))

# Products of bfloat16 numbers, which have 8 binary digits, by the matrix unit of Intel's server processors (AMX). Sums are of single
# precision. Five times as fast as products of single precision.

"""
    has_matrix_unit()

Whether this processor has the unit, and the operating system lets this process use it, which has to be asked for.
"""
function has_matrix_unit()
    CPU = Base.BinaryPlatforms.CPUID
    Sys.ARCH === :x86_64 && Sys.islinux() && CPU.test_cpu_feature(CPU.JL_X86_amx_bf16) || return false
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ccall(:syscall, Clong, (Clong, Clong, Clong), arch_prctl, request_permission, tile_data) == 0
end

# The eight registers of the unit, its tiles, hold 16 rows of 64 bytes each: of a factor 32 bfloat16 numbers a row, of a sum 16 numbers of
# single precision. Four sums are computed at a time, of 32 samples for 32 neurons.
const AMX_BLOCK = 32

# The palette, the bytes of a row of each tile from entry 17 on, and its rows from entry 49 on.
const AMX_TILES = let bytes = zeros(UInt8, 64)
    bytes[1], bytes[17:2:31], bytes[49:56] = 1, fill(64, 8), fill(16, 8)
    bytes
end

const AMX_CODE = let pointer = VERSION < v"1.12-" ? "i8*" : "ptr"
    place(name, address) = "%$name = inttoptr i64 $address to $pointer"
    zero(tile) = "call void @llvm.x86.tilezero(i8 $tile)"
    load(tile, name, stride) = "call void @llvm.x86.tileloadd64(i8 $tile, $pointer %$name, i64 $stride)"
    add_product(sum, samples, weights) = "call void @llvm.x86.tdpbf16ps(i8 $sum, i8 $samples, i8 $weights)"
    store(tile, offset) = """
    %sum$tile = add i64 %sums, $offset
    $(place("to$tile", "%sum$tile"))
    call void @llvm.x86.tilestored64(i8 $tile, $pointer %to$tile, i64 128)"""
    """
    declare void @llvm.x86.ldtilecfg($pointer)
    declare void @llvm.x86.tilerelease()
    declare void @llvm.x86.tilezero(i8)
    declare void @llvm.x86.tileloadd64(i8, $pointer, i64)
    declare void @llvm.x86.tilestored64(i8, $pointer, i64)
    declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
    attributes #0 = { noinline "target-features"="+amx-tile,+amx-bf16" }

    define void @configure(i64 %tiles) #0 {
    $(place("from", "%tiles"))
    call void @llvm.x86.ldtilecfg($pointer %from)
    ret void
    }

    define void @release() #0 {
    call void @llvm.x86.tilerelease()
    ret void
    }

    define void @multiply(i64 %sums, i64 %samples, i64 %stride, i64 %weights, i64 %steps) #0 {
    start:
    %half = mul i64 %stride, 16
    $(join(map(zero, 0:3), "\n"))
    br label %loop
    loop:
    %k = phi i64 [0, %start], [%next, %loop]
    %across = mul i64 %k, 64
    %s0 = add i64 %samples, %across
    %s1 = add i64 %s0, %half
    %down = mul i64 %k, 2048
    %w0 = add i64 %weights, %down
    %w1 = add i64 %w0, 1024
    $(place("upper", "%s0"))
    $(place("lower", "%s1"))
    $(place("left", "%w0"))
    $(place("right", "%w1"))
    $(load(4, "upper", "%stride"))
    $(load(6, "left", "64"))
    $(add_product(0, 4, 6))
    $(load(5, "lower", "%stride"))
    $(add_product(1, 5, 6))
    $(load(7, "right", "64"))
    $(add_product(2, 4, 7))
    $(add_product(3, 5, 7))
    %next = add i64 %k, 1
    %more = icmp slt i64 %next, %steps
    br i1 %more, label %loop, label %end
    end:
    $(join(map(store, 0:3, (0, 2048, 64, 2112)), "\n"))
    ret void
    }
    """
end

configure_tiles() = GC.@preserve AMX_TILES Base.llvmcall((AMX_CODE, "configure"), Cvoid, Tuple{Int64}, Int64(pointer(AMX_TILES)))
release_tiles() = Base.llvmcall((AMX_CODE, "release"), Cvoid, Tuple{})

# The sums (32 × 32, neurons in the columns of memory) over `steps` times 32 numbers of 32 samples, which lie `stride` bytes apart.
multiply_tiles!(sums::Ptr, samples::Ptr, stride::Int, weights::Ptr, steps::Int) = Base.llvmcall(
    (AMX_CODE, "multiply"), Cvoid, NTuple{5, Int64}, Int64(sums), Int64(samples), stride, Int64(weights), steps,
)

"""
    BFloats{T}(n)

An n × n matrix of bfloat16 numbers as the unit takes them, for columns of `T`: block by block, of 32 rows and columns, and of each
both halves of the rows, pairs of columns in 16 rows. Rows and columns beyond n repeat the last.
"""
struct BFloats{T} <: CoarseFactor{T}
    n::Int
    pairs::Array{UInt32, 5}        # 16 rows × 16 pairs of columns × halves × blocks of columns × blocks of rows
end
BFloats{T}(n::Int) where {T} = (blocks = cld(n, AMX_BLOCK); BFloats{T}(n, zeros(UInt32, 16, 16, 2, blocks, blocks)))

Base.size(A::BFloats, ::Int) = A.n
rounding_of(::BFloats) = 2.0^-8

"The nearest bfloat16 number, in the lower half of the bits; of two as near the one whose last digit is 0."
@inline function bfloat(x::Hardware)
    bits = reinterpret(UInt32, Float32(x))
    return (bits + 0x7fff + ((bits >> 16) & 0x01)) >> 16
end

function fill_coarse!(value::F, A::BFloats, threads::Int) where {F}
    (; n, pairs) = A
    in_parallel(size(pairs, 5), n > BLOCK ? threads : 1) do _, block
        for across in axes(pairs, 4), half in 1:2, pair in 1:16
            k, above = AMX_BLOCK * (across - 1) + 2 * pair - 1, AMX_BLOCK * (block - 1) + 16 * (half - 1)
            columns = min(k, n), min(k + 1, n)
            if above + 16 <= n
                fill_pairs!(row -> row, value, view(pairs, :, pair, half, across, block), above, columns)
            else
                fill_pairs!(row -> min(row, n), value, view(pairs, :, pair, half, across, block), above, columns)
            end
        end
    end
    return A
end

@inline function fill_pairs!(row::R, value::F, pairs, above::Int, (left, right)) where {R, F}
    @inbounds @simd ivdep for i in 1:16
        pairs[i] = bfloat(value(row(above + i), left)) | bfloat(value(row(above + i), right)) << 16
    end
    return
end

"Columns as bfloat16 numbers, and the sums of each thread."
struct BFloatBuffers <: CoarseBuffers
    columns::Matrix{UInt16}
    sums::Array{Float32, 3}
end

function coarse_buffers(A::BFloats, width::Int)
    padded(m) = AMX_BLOCK * cld(m, AMX_BLOCK)
    return BFloatBuffers(zeros(UInt16, padded(A.n), padded(width)), zeros(Float32, AMX_BLOCK, AMX_BLOCK, Threads.nthreads()))
end

function multiply_add_coarsely!(S::Matrix{T}, A::BFloats{T}, B::Matrix{T}, m::Int, threads::Int, buffers::BFloatBuffers) where {T}
    (; columns, sums) = buffers
    for j in 1:m
        @inbounds @simd ivdep for i in axes(B, 1)
            columns[i, j] = bfloat(B[i, j]) % UInt16
        end
    end
    GC.@preserve A columns sums in_parallel(size(A.pairs, 5), threads) do thread, block
        add_block!(S, A, columns, sums, m, thread, block)
    end
    return S
end

function add_block!(S::Matrix, A::BFloats, columns, sums, m::Int, thread::Int, block::Int)
    stride, first_row = sizeof(UInt16) * size(columns, 1), AMX_BLOCK * (block - 1)
    weights, to = pointer(A.pairs, 1 + 1024 ÷ 2 * size(A.pairs, 4) * (block - 1)), pointer(sums, 1 + AMX_BLOCK^2 * (thread - 1))
    configure_tiles()
    for j in 0:AMX_BLOCK:(m - 1)
        multiply_tiles!(to, pointer(columns) + stride * j, stride, weights, size(A.pairs, 4))
        for l in 1:min(AMX_BLOCK, m - j)
            @inbounds @simd ivdep for i in 1:min(AMX_BLOCK, A.n - first_row)
                S[first_row + i, j + l] += sums[i, l, thread]
            end
        end
    end
    release_tiles()
    return
end

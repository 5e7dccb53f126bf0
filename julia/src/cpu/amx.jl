# Products of bfloat16 numbers, which have 8 binary digits, by the matrix unit of Intel's server processors (AMX). Sums are in single
# precision. They are five times as fast as single-precision products.

"""
    has_matrix_unit()

Whether this processor has the unit, and the operating system lets this process use it, which has to be asked for. While a package is
compiled it has not: the code would go into an image, which may be one for several processors.
"""
function has_matrix_unit()
    ccall(:jl_generating_output, Cint, ()) == 0 || return false
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
    BFloats(n)

An n × n matrix of bfloat16 numbers as the unit takes them: block by block, of 32 rows and columns, and of each both halves of the
rows, pairs of columns in 16 rows. Rows and columns beyond n repeat the last.
"""
struct BFloats <: CoarseFactor
    n::Int
    pairs::Array{UInt32, 5}        # 16 rows × 16 pairs of columns × halves × blocks of columns × blocks of rows
end
BFloats(n::Int) = (blocks = cld(n, AMX_BLOCK); BFloats(n, zeros(UInt32, 16, 16, 2, blocks, blocks)))

accuracy_of(::BFloats) = 2.0f0^-5

"The nearest bfloat16 number, in the lower half of the bits; of two as near the larger one."
@inline bfloat(x::Hardware) = (reinterpret(UInt32, Float32(x)) + 0x8000) >> 16

function fill_factor!(value::F, A::BFloats, threads::Int) where {F}
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

"""
The iterates are bfloat16 numbers, two matrices of them by turns. What lies in rows beyond n and columns beyond the last is zero, but
for the sums, of which each thread has its own.
"""
struct BFloatBuffers <: CoarseBuffers
    iterates::NTuple{2, Matrix{UInt16}}
    sums::Array{Float32, 3}
end

function coarse_buffers(::BFloats, n::Int, width::Int)
    # An odd number of blocks, as the columns would fight for a few lines of the cache with a power of two for a stride.
    rows, columns = AMX_BLOCK * (cld(n, AMX_BLOCK) | 1), AMX_BLOCK * cld(width, AMX_BLOCK)
    return BFloatBuffers(ntuple(_ -> zeros(UInt16, rows, columns), 2), zeros(Float32, AMX_BLOCK, AMX_BLOCK, Threads.nthreads()))
end
size_of_columns(b::BFloatBuffers) = size(first(b.iterates))

function solve_corrections!(q::Corrections, A::BFloats, b::BFloatBuffers, m::Int, accuracy::Float32, threads::Int)
    (; residuals, slopes, changes), (; iterates, sums) = q, b
    last_column = AMX_BLOCK * cld(m, AMX_BLOCK)
    foreach(rest -> fill!(view(rest, :, (m + 1):last_column), 0), (residuals, slopes))
    # Where the matrix does not fit in the cache next to the core, more samples share each pass over it.
    width = A.n <= 512 ? AMX_BLOCK : 2 * AMX_BLOCK
    GC.@preserve A residuals slopes changes iterates sums in_parallel(cld(m, width), threads) do thread, k
        samples, place = piece(k, width, last_column), pointer(sums, 1 + AMX_BLOCK^2 * (thread - 1))
        configure_tiles()
        round_columns!(iterates[1], residuals, samples)
        sweep_to(accuracy^2 * length(samples)) do step, number
            sweep!(step, iterates[1 + isodd(number)], q, A, iterates[1 + iseven(number)], samples, place)
        end
        release_tiles()
    end
    return q
end

function round_columns!(to::Matrix{UInt16}, from::Matrix{Float32}, samples)
    rows = size(to, 1)
    for at in (rows * (first(samples) - 1)):16:(rows * last(samples) - 1)
        store_bfloats!(pointer(to) + sizeof(UInt16) * at, load_lanes(pointer(from) + sizeof(Float32) * at, Val(16)))
    end
    return
end

# One product, and what becomes of it while it is in the cache.
function sweep!(step::Val, to, q::Corrections, A::BFloats, from, samples, sums::Ptr{Float32})
    rows, blocks = size(from, 1), size(A.pairs, 4)
    residuals, slopes, changes = pointer(q.residuals), pointer(q.slopes), pointer(q.changes)
    change = same_in_all(0.0f0, Val(16))
    for block in 0:(blocks - 1), j in (first(samples) - 1):AMX_BLOCK:(last(samples) - 1)
        weights = pointer(A.pairs, 1 + 512 * blocks * block)
        multiply_tiles!(sums, pointer(from, 1 + rows * j), sizeof(UInt16) * rows, weights, blocks)
        for l in 0:(AMX_BLOCK - 1), half in (0, 16)
            at = rows * (j + l) + AMX_BLOCK * block + half
            sum = load_lanes(sums + 4 * (AMX_BLOCK * l + half), Val(16))
            next = muladd_lanes(load_lanes(slopes + 4 * at, Val(16)), sum, load_lanes(residuals + 4 * at, Val(16)))
            if step === LAST
                store_lanes!(changes + 4 * at, sum, Val(16))
                store_lanes!(residuals + 4 * at, next, Val(16))
            else
                rounded = store_bfloats!(pointer(to) + 2 * at, next)
                if step === CHECKED
                    difference = minus_lanes(rounded, load_bfloats(pointer(from) + 2 * at))
                    change = muladd_lanes(difference, difference, change)
                end
            end
        end
    end
    return sum_lanes(change)
end

const SixteenSingles = LaneVector{16, Float32}
const BFLOAT_CODE = let pointer = VERSION < v"1.12-" ? "<16 x i16>*" : "ptr", all16 = number -> "<" * join(fill("i32 $number", 16), ", ") * ">"
    """
    define <16 x float> @store(i64 %0, <16 x float> %1) alwaysinline {
    %place = inttoptr i64 %0 to $pointer
    %bits = bitcast <16 x float> %1 to <16 x i32>
    %up = add <16 x i32> %bits, $(all16(0x8000))
    %upper = lshr <16 x i32> %up, $(all16(16))
    %short = trunc <16 x i32> %upper to <16 x i16>
    store <16 x i16> %short, $pointer %place, align 2
    %rounded = shl <16 x i32> %upper, $(all16(16))
    %r = bitcast <16 x i32> %rounded to <16 x float>
    ret <16 x float> %r
    }

    define <16 x float> @load(i64 %0) alwaysinline {
    %place = inttoptr i64 %0 to $pointer
    %short = load <16 x i16>, $pointer %place, align 2
    %bits = zext <16 x i16> %short to <16 x i32>
    %upper = shl <16 x i32> %bits, $(all16(16))
    %r = bitcast <16 x i32> %upper to <16 x float>
    ret <16 x float> %r
    }
    """
end

# Rounded as by `bfloat`; returns what is stored.
@inline store_bfloats!(p::Ptr{UInt16}, x::SixteenSingles) =
    Base.llvmcall((BFLOAT_CODE, "store"), SixteenSingles, Tuple{Int64, SixteenSingles}, Int64(p), x)
@inline load_bfloats(p::Ptr{UInt16}) = Base.llvmcall((BFLOAT_CODE, "load"), SixteenSingles, Tuple{Int64}, Int64(p))

# Coarse products of bfloat16 numbers, which have 8 binary digits. Sums are in single precision.

"""
    BFloatUnit

What multiplies bfloat16 numbers in this processor. Between `prepare` and `release` there is

    multiply_block!(unit, sums, weights, halves, samples, stride, columns, pairs)

for a block of sums (32 neurons × 32 samples): those of one or both halves of the neurons, for `columns` samples, which lie `stride` bytes
apart, over `pairs` pairs of numbers. Others in the block may be written as well.
"""
abstract type BFloatUnit end

const BFLOAT_BLOCK = 32

prepare(::BFloatUnit) = nothing
release(::BFloatUnit) = nothing

"""
    BFloats{Unit}(n)

An n × n matrix of bfloat16 numbers as the units take them: block by block, of 32 rows and columns, and of each both halves of the
rows, pairs of columns in 16 rows. Rows and columns beyond n repeat the last.
"""
struct BFloats{U <: BFloatUnit} <: CoarseFactor
    n::Int
    pairs::Array{UInt32, 5}        # 16 rows × 16 pairs of columns × halves × blocks of columns × blocks of rows
end
BFloats{U}(n::Int) where {U} = (blocks = cld(n, BFLOAT_BLOCK); BFloats{U}(n, zeros(UInt32, 16, 16, 2, blocks, blocks)))

accuracy_of(::BFloats) = 2.0f0^-5

"The nearest bfloat16 number, in the lower half of the bits; of two as near the larger one."
@inline bfloat(x::Hardware) = (reinterpret(UInt32, Float32(x)) + 0x8000) >> 16

function fill_factor!(value::F, A::BFloats, threads::Int) where {F}
    (; n, pairs) = A
    in_parallel(size(pairs, 5), n > BLOCK ? threads : 1) do _, block
        for across in axes(pairs, 4), half in 1:2, pair in 1:16
            k, above = BFLOAT_BLOCK * (across - 1) + 2 * pair - 1, BFLOAT_BLOCK * (block - 1) + 16 * (half - 1)
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
The iterates are bfloat16 numbers, two matrices of them by turns. What lies in rows beyond n is zero, but for the sums, of which each
thread has its own.
"""
struct BFloatBuffers <: CoarseBuffers
    iterates::NTuple{2, Matrix{UInt16}}
    sums::Array{Float32, 3}
end

function coarse_buffers(::BFloats, n::Int, width::Int)
    # An odd number of blocks, as the columns would fight for a few lines of the cache with a power of two for a stride.
    rows, columns = BFLOAT_BLOCK * (cld(n, BFLOAT_BLOCK) | 1), BFLOAT_BLOCK * cld(width, BFLOAT_BLOCK)
    return BFloatBuffers(ntuple(_ -> zeros(UInt16, rows, columns), 2), zeros(Float32, BFLOAT_BLOCK, BFLOAT_BLOCK, Threads.nthreads()))
end
size_of_columns(b::BFloatBuffers) = size(first(b.iterates))

function solve_corrections!(q::Corrections, A::BFloats{U}, b::BFloatBuffers, m::Int, accuracy::Float32, threads::Int) where {U}
    (; residuals, slopes, changes), (; iterates, sums) = q, b
    # Where the matrix does not fit in the cache next to the core, more samples share each pass over it.
    width = A.n <= 512 ? BFLOAT_BLOCK : 2 * BFLOAT_BLOCK
    GC.@preserve A residuals slopes changes iterates sums in_parallel(cld(m, width), threads) do thread, k
        samples, place = piece(k, width, m), pointer(sums, 1 + BFLOAT_BLOCK^2 * (thread - 1))
        prepare(U())
        round_columns!(iterates[1], residuals, samples)
        sweep_to(accuracy^2 * length(samples), check_period(A)) do step, number
            sweep!(step, iterates[1 + isodd(number)], q, A, iterates[1 + iseven(number)], samples, place)
        end
        release(U())
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
function sweep!(step::Val, to, q::Corrections, A::BFloats{U}, from, samples, sums::Ptr{Float32}) where {U}
    rows, blocks, halves_in_all, pairs = size(from, 1), size(A.pairs, 4), cld(A.n, 16), cld(A.n, 2)
    residuals, slopes, changes = pointer(q.residuals), pointer(q.slopes), pointer(q.changes)
    change = same_in_all(0.0f0, Val(16))
    for block in 0:(blocks - 1), j in (first(samples) - 1):BFLOAT_BLOCK:(last(samples) - 1)
        weights, halves = pointer(A.pairs, 1 + 512 * blocks * block), min(2, halves_in_all - 2 * block)
        columns = min(BFLOAT_BLOCK, last(samples) - j)
        multiply_block!(U(), sums, weights, halves, pointer(from, 1 + rows * j), sizeof(UInt16) * rows, columns, pairs)
        for l in 0:(columns - 1), half in 0:(halves - 1)
            at = rows * (j + l) + BFLOAT_BLOCK * block + 16 * half
            sum = load_lanes(sums + 4 * (BFLOAT_BLOCK * l + 16 * half), Val(16))
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

# Products of bfloat16 numbers by the matrix unit of Intel's server processors (AMX), five times as fast as single-precision products.

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
# single precision. Four sums make the block.
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

"The matrix unit of this processor."
struct MatrixUnit <: BFloatUnit end

prepare(::MatrixUnit) =
    GC.@preserve AMX_TILES Base.llvmcall((AMX_CODE, "configure"), Cvoid, Tuple{Int64}, Int64(pointer(AMX_TILES)))
release(::MatrixUnit) = Base.llvmcall((AMX_CODE, "release"), Cvoid, Tuple{})

check_period(::BFloats{MatrixUnit}) = UNIT_CHECK_PERIOD

# All of the block.
multiply_block!(::MatrixUnit, sums::Ptr, weights::Ptr, halves::Int, samples::Ptr, stride::Int, columns::Int, pairs::Int) = Base.llvmcall(
    (AMX_CODE, "multiply"), Cvoid, NTuple{5, Int64}, Int64(sums), Int64(samples), stride, Int64(weights), cld(pairs, 16),
)

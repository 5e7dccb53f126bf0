# Products of bfloat16 numbers by the instructions of AVX-512 that add two of them to each sum, twice as fast as single-precision products.

"""
    has_dot_products()

Whether this processor has the instructions. While a package is compiled it has not, as [`has_matrix_unit`](@ref).
"""
function has_dot_products()
    ccall(:jl_generating_output, Cint, ()) == 0 || return false
    CPU = Base.BinaryPlatforms.CPUID
    return Sys.ARCH === :x86_64 && CPU.test_cpu_feature(CPU.JL_X86_avx512bf16)
end

# Code for the sums of so many samples and halves of neurons, which are in as many registers.
function dot_code(samples::Int, halves::Int)
    typed = VERSION < v"1.12-"
    pointer_to(type) = typed ? "$type*" : "ptr"
    each(code, count) = join(map(code, 0:(count - 1)), "\n")
    each_sum(code) = each(s -> each(h -> code(s, h), halves), samples)
    load(name, type, address) = """
    %at_$name = inttoptr i64 $address to $(pointer_to(type))
    %$name = load $type, $(pointer_to(type)) %at_$name, align 4"""
    address(s) = "%far_$s = mul i64 %stride, $s\n%sample_$s = add i64 %samples, %far_$s"
    sum_before(s, h) = "%sum_$(s)_$h = phi <16 x float> [zeroinitializer, %start], [%new_$(s)_$h, %loop]"
    in_all(s) = """
    %x_$s = add i64 %sample_$s, %down
    $(load("number_$s", "i32", "%x_$s"))
    %one_$s = insertelement <16 x i32> undef, i32 %number_$s, i32 0
    %all_$s = shufflevector <16 x i32> %one_$s, <16 x i32> undef, <16 x i32> zeroinitializer"""
    sum_after(s, h) = "%new_$(s)_$h = call <16 x float> asm \"vdpbf16ps \$2, \$1, \$0\", \"=v,v,v,0\"" *
        "(<16 x i32> %weight_$h, <16 x i32> %all_$s, <16 x float> %sum_$(s)_$h)"
    store(s, h) = """
    %to_$(s)_$h = add i64 %sums, $(128s + 64h)
    %at_$(s)_$h = inttoptr i64 %to_$(s)_$h to $(pointer_to("<16 x float>"))
    store <16 x float> %new_$(s)_$h, $(pointer_to("<16 x float>")) %at_$(s)_$h, align 4"""
    return """
    attributes #0 = { noinline "target-features"="+avx512f,+avx512bf16" "min-legal-vector-width"="512" }

    define void @multiply(i64 %sums, i64 %weights, i64 %samples, i64 %stride, i64 %pairs) #0 {
    start:
    $(each(address, samples))
    br label %loop
    loop:
    %pair = phi i64 [0, %start], [%next, %loop]
    $(each_sum(sum_before))
    %block = lshr i64 %pair, 4
    %other_halves = mul i64 %block, 1024
    %within = mul i64 %pair, 64
    %from_block = add i64 %weights, %other_halves
    %w_0 = add i64 %from_block, %within
    %w_1 = add i64 %w_0, 1024
    $(each(h -> load("weight_$h", "<16 x i32>", "%w_$h"), halves))
    %down = mul i64 %pair, 4
    $(each(in_all, samples))
    $(each_sum(sum_after))
    %next = add i64 %pair, 1
    %more = icmp slt i64 %next, %pairs
    br i1 %more, label %loop, label %end
    end:
    $(each_sum(store))
    ret void
    }
    """
end

const DOT_CODE_OF_HALF, DOT_CODE = dot_code(16, 1), dot_code(8, 2)

"Instructions of this processor."
struct DotProducts <: BFloatUnit end

function multiply_block!(::DotProducts, sums::Ptr, weights::Ptr, halves::Int, samples::Ptr, stride::Int, columns::Int, pairs::Int)
    from = Int64(weights)
    for j in 0:(halves == 1 ? 16 : 8):(columns - 1)
        to, x = Int64(sums) + 128 * j, Int64(samples) + stride * j
        if halves == 1
            Base.llvmcall((DOT_CODE_OF_HALF, "multiply"), Cvoid, NTuple{5, Int64}, to, from, x, stride, pairs)
        else
            Base.llvmcall((DOT_CODE, "multiply"), Cvoid, NTuple{5, Int64}, to, from, x, stride, pairs)
        end
    end
    return
end

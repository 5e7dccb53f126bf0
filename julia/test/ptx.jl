"""
Machine code of NVIDIA cards, without a card and without CUDA.jl: GPUCompiler makes PTX of a kernel, and ptxas code of that, with
registers and shared memory. The little of CUDA.jl that the kernels need is defined here.
"""
module PTX

using GPUCompiler: GPUCompiler, AbstractCompilerParams, CompilerConfig, CompilerJob, JuliaContext, PTXCompilerTarget
using KernelAbstractions: KernelAbstractions as KA
using StaticArrays: MArray
using KernelAbstractions.NDIteration: DynamicCheck, DynamicSize, NDRange, NoDynamicCheck, StaticSize, blocks, expand, workitems

const LLVMPtr = Core.LLVMPtr

"An array in the memory of a device."
struct DeviceArray{T, N, A} <: DenseArray{T, N}
    pointer::LLVMPtr{T, A}
    size::NTuple{N, Int}
end
Base.size(a::DeviceArray) = a.size
Base.IndexStyle(::Type{<:DeviceArray}) = IndexLinear()
Base.@propagate_inbounds Base.getindex(a::DeviceArray{T}, i::Int) where {T} = unsafe_load(a.pointer, i, aligned(T))
Base.@propagate_inbounds Base.setindex!(a::DeviceArray{T}, x, i::Int) where {T} = unsafe_store!(a.pointer, convert(T, x), i, aligned(T))
aligned(::Type{T}) where {T} = Val(Base.datatype_alignment(T))      # as in CUDA.jl; else an entry is read byte by byte
const Global{T, N} = DeviceArray{T, N, 1}

# --- the intrinsics -----------------------------------------------------------------------------------------------

struct Parameters <: AbstractCompilerParams end
const Job = CompilerJob{<:Any, Parameters}
module Runtime
    signal_exception() = return
    malloc(size) = C_NULL
    report_oom(size) = return
    report_exception(e) = return
    report_exception_name(e) = return
    report_exception_frame(index, func, file, line) = return
end
GPUCompiler.runtime_module(::Job) = Runtime
Base.Experimental.@MethodTable METHODS
GPUCompiler.method_table(::Job) = METHODS

@generated function register(::Val{name}) where {name}
    code = """
    declare i32 @llvm.nvvm.read.ptx.sreg.$name()
    define i32 @entry() alwaysinline {
        %r = call i32 @llvm.nvvm.read.ptx.sreg.$name()
        ret i32 %r
    }"""
    return :(Int(Base.llvmcall(($code, "entry"), Int32, Tuple{})) + 1)
end
thread() = register(Val(Symbol("tid.x")))
block() = register(Val(Symbol("ctaid.x")))

@generated function shared(::Type{T}, ::Val{dims}, ::Val{id}) where {T, dims, id}
    type = "[$(prod(dims) * sizeof(T)) x i8]"
    code = """
    @\"$id\" = internal addrspace(3) global $type zeroinitializer, align 16
    define i8 addrspace(3)* @entry() alwaysinline {
        ret i8 addrspace(3)* getelementptr inbounds ($type, $type addrspace(3)* @\"$id\", i64 0, i64 0)
    }"""
    pointer = :(reinterpret(LLVMPtr{$T, 3}, Base.llvmcall(($code, "entry"), LLVMPtr{UInt8, 3}, Tuple{})))
    return :(DeviceArray{$T, $(length(dims)), 3}($pointer, $dims))
end

barrier() = Base.llvmcall(
    (
        """
        declare void @llvm.nvvm.barrier0() convergent
        define void @entry() alwaysinline convergent {
            call void @llvm.nvvm.barrier0()
            ret void
        }""", "entry",
    ), Nothing, Tuple{}
)

Base.Experimental.@overlay METHODS @inline KA.__index_Local_Linear(ctx) = thread()
Base.Experimental.@overlay METHODS @inline KA.__index_Group_Linear(ctx) = block()
Base.Experimental.@overlay METHODS @inline KA.__index_Local_Cartesian(ctx) = @inbounds workitems(KA.__iterspace(ctx))[thread()]
Base.Experimental.@overlay METHODS @inline KA.__index_Group_Cartesian(ctx) = @inbounds blocks(KA.__iterspace(ctx))[block()]
Base.Experimental.@overlay METHODS @inline KA.__index_Global_Cartesian(ctx) =
    @inbounds expand(KA.__iterspace(ctx), block(), thread())
Base.Experimental.@overlay METHODS @inline KA.__index_Global_Linear(ctx) =
    @inbounds LinearIndices(KA.__ndrange(ctx))[expand(KA.__iterspace(ctx), block(), thread())]
Base.Experimental.@overlay METHODS @inline KA.__validindex(ctx) =
    KA.__dynamic_checkbounds(ctx) ? (@inbounds expand(KA.__iterspace(ctx), block(), thread())) in KA.__ndrange(ctx) : true
Base.Experimental.@overlay METHODS @inline KA.SharedMemory(::Type{T}, dims::Val, id::Val) where {T} = shared(T, dims, id)
Base.Experimental.@overlay METHODS @inline KA.Scratchpad(ctx, ::Type{T}, ::Val{dims}) where {T, dims} = MArray{Tuple{dims...}, T}(undef)
Base.Experimental.@overlay METHODS @inline KA.__synchronize() = barrier()

# --- the compiler -------------------------------------------------------------------------------------------------

# What a kernel is told of its launch: of a fixed group that divides the range, or of any.
context(group::NTuple{N, Int}) where {N} =
    context(NDRange{N, DynamicSize, StaticSize{group}}(CartesianIndices(group), nothing), NoDynamicCheck)
function context(N::Int)
    any = CartesianIndices(ntuple(_ -> 1, N))
    return context(NDRange{N, DynamicSize, DynamicSize}(any, any), DynamicCheck)
end
context(space::NDRange, check) = typeof(KA.CompilerMetadata{DynamicSize, check}(size(blocks(space)), space))

"The PTX of a kernel's function for a card, for arguments of these types after the context."
function assembly(f, launch, types, card::VersionNumber)
    source = GPUCompiler.methodinstance(typeof(f), Tuple{context(launch), types...})
    target = PTXCompilerTarget(; cap = card, ptx = v"7.8", debuginfo = false)
    job = CompilerJob(source, CompilerConfig(target, Parameters(); kernel = true, name = "kernel"))
    return JuliaContext() do _
        GPUCompiler.compile(:asm, job)[1]
    end
end

"What ptxas says of it: registers, bytes of the stack (local memory), bytes spilled and bytes of shared memory."
function resources(ptx, card::VersionNumber)
    file, said = tempname(), IOBuffer()
    write(file, ptx)
    run(pipeline(`ptxas -v -arch=sm_$(card.major)$(card.minor) -o /dev/null $file`; stdout = said, stderr = said))
    text = String(take!(said))
    number(pattern) = (found = match(pattern, text); found === nothing ? 0 : parse(Int, only(found.captures)))
    return (;
        registers = number(r"Used (\d+) registers"), stack = number(r"(\d+) bytes stack frame"), spilled = number(r"(\d+) bytes spill stores"), shared = number(r"(\d+) bytes smem"),
    )
end

end

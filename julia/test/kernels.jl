# The kernels as machine code of NVIDIA cards.

include("ptx.jl")

"The kernels with their launches and the types of their arguments, for entries of type T."
function kernels_of(::Type{T}) where {T}
    E = Base.get_extension(ImplicitRNN, :ImplicitRNNGPUArraysExt)
    M, f = PTX.Global{T, 2}, typeof(ImplicitRNN.Piecewise((1:4, 5:9), (ImplicitRNN.Gelu(), ImplicitRNN.Softplus())))
    of(types::NamedTuple) = NamedTuple{keys(types), Tuple{(PTX.Global{S, 1} for S in types)...}}
    progress = of((; running = Bool, abandoned = Bool, count = Int32, change = T, rate = T))
    record = of((; status = Status, iterations = Int32, residual = T, rate = T))
    group = (E.LANES, E.GROUP)
    return (;
        stage = (E.gpu_step!, group, (M, progress, record, M, E.Activated{f}, Nothing, E.Rule{T})),
        adjoint = (E.gpu_step!, group, (M, progress, record, M, E.Scaled, M, E.Rule{T})),
        activate = (E.gpu_activate!, 2, (M, M, f)),
        slopes = (E.gpu_slopes!, 2, (M, M, M, f, PTX.Global{Status, 1}, Bool)),
        record = (E.gpu_record_evaluation!, 1, (record, M)),
    )
end

@testset "the kernels assemble without spills: $T, $card" for T in (Float32, Float64), card in (v"8.0", v"9.0")
    for (name, (f, launch, types)) in pairs(kernels_of(T))
        ptx = PTX.assembly(f, launch, types, card)
        used = PTX.resources(ptx, card)
        @info "kernel $name" T card used...
        @test occursin("st.global", ptx)    # rather than a trap, of what does not compile
        @test used.spilled == 0
        @test used.registers <= 128         # two groups of 256 work-items on a multiprocessor
        @test used.shared == (f === first(kernels_of(T).stage) ? 256 * 3 * sizeof(T) + 32 : 0)
    end
end

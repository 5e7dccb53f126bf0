# The kernels as machine code of NVIDIA cards.

include("ptx.jl")

of(types::NamedTuple) = NamedTuple{keys(types), Tuple{values(types)...}}
per_column(types::NamedTuple) = of(map(S -> PTX.Global{S, 1}, types))

"The kernels with their launches and the types of their arguments, for entries of type T."
function kernels_of(::Type{T}) where {T}
    E = Base.get_extension(ImplicitRNN, :ImplicitRNNGPUArraysExt)
    M, V, f = PTX.Global{T, 2}, PTX.Global{T, 1}, typeof(ImplicitRNN.Piecewise((1:4, 5:9), (ImplicitRNN.Gelu(), ImplicitRNN.Softplus())))
    flags = PTX.Global{Bool, 1}
    progress = per_column((; running = Bool, started = Bool, abandoned = Bool, count = Int32, change = T, rate = T))
    record = per_column((; status = Status, iterations = Int32, residual = T, rate = T))
    A = PTX.Global{T, 3}
    history = of((; ΔR = A, ΔF = A, R = M, F = M, gram = A, G = A, γ = M, b = M, change = V, differences = PTX.Global{Int32, 1}))
    line = of((; base = M, picard = M, direction = M, step = V, residual = V, fresh = flags, singular = flags))
    group = (E.WORK_ITEMS, E.GROUP)
    fused = map((fused_16 = 16, fused_64 = 64, fused_128 = 128)) do n
        tiling = E.Tiling(n, T)
        (E.gpu_picard!, (E.work_items(tiling),), (M, progress, record, M, M, E.Activated{ImplicitRNN.Tanh}, Nothing, E.Rule{T}, typeof(tiling)))
    end
    gradients = (;
        gradient_16 = gradient_kernel(E, T, 16, ImplicitRNN.Tanh, MSE, Nothing, progress, record),
        gradient_64 = gradient_kernel(E, T, 64, ImplicitRNN.Tanh, BinaryCrossEntropy, Nothing, progress, record),
        gradient_128 = gradient_kernel(E, T, 128, f, CrossEntropy, V, progress, record),
    )
    tiling = E.Tiling(64, T)
    equations = merge((equation_kernels(E, T, K, f) for (K, f) in FUNCTIONS)...)
    return (;
        stage = (E.gpu_step!, group, (M, Nothing, progress, record, M, E.Activated{f}, Nothing, E.Rule{T})),
        adjoint = (E.gpu_step!, group, (M, Nothing, progress, record, M, E.Scaled, M, E.Rule{T})),
        evaluation = (E.gpu_step!, group, (M, M, progress, record, M, E.Activated{f}, Nothing, E.Rule{T})),
        linearised = (E.gpu_step!, group, (M, Nothing, progress, record, M, E.Deviating{f}, V, E.Rule{T})),
        fused..., gradients...,
        fused_adjoint = (E.gpu_picard!, (E.work_items(tiling),), (M, progress, record, M, M, E.Scaled, M, E.Rule{T}, typeof(tiling))),
        anderson = (E.gpu_accelerate!, group, (M, M, history, flags, V, Int32, T, T, Val{5})),
        search = (E.gpu_search!, group, (M, M, line, flags, V)),
        elimination = (E.gpu_eliminate!, (E.WORKERS,), (M, flags, A, M, Nothing, M, M, PTX.Global{Int, 1})),
        activate = (E.gpu_activate!, 2, (M, M, f)),
        slopes = (E.gpu_slopes!, 2, (M, M, M, f, PTX.Global{Status, 1}, Bool)),
        slopes_at = (E.gpu_slopes_at!, 2, (M, M, M, f)),
        curvatures = (E.gpu_curvatures!, 2, (M, M, M, f)),
        signs = (E.gpu_signs!, 2, (M, UInt64, Int, Int)),
        record = (E.gpu_record_evaluation!, 1, (record, M)),
        equations...,
    )
end

function gradient_kernel(E, ::Type{T}, n, activation, loss, weights, progress, record) where {T}
    M, V, tiling = PTX.Global{T, 2}, PTX.Global{T, 1}, E.Tiling(n, T)
    solves = of((; progress, record, adjoint_progress = progress, adjoint_record = record, results = PTX.Global{Float64, 2}))
    outputs = of((; Y = M, targets = M, weights, loss, scale = T))
    types = (M, M, M, solves, outputs, M, M, M, M, M, V, E.Activated{activation}, E.Rule{T}, E.Rule{T}, typeof(tiling))
    return E.gpu_differentiate!, (E.work_items(tiling),), types
end

"Functions of equations by their unknowns; each sample has a number `a` and as many numbers `b` as it has unknowns."
const FUNCTIONS = (
    1 => ImplicitRNN.compiled_function("(z, a, b) -> sqrt.(z) .- a .* exp.(.-z) .- b"),
    5 => (z, a, b) -> [a * z[1] - z[2]^2 - b[1], exp(-z[1]) * z[2] - b[2], z[3] - a * z[4], z[4] * z[5] - b[4], z[1] - z[5]],
    8 => (z, a, b) -> a .* z .+ z .* z .- b,
)

function equation_kernels(E, ::Type{T}, K, f) where {T}
    M, V, group = PTX.Global{T, 2}, PTX.Global{T, 1}, E.group_of(K)
    ends = per_column((; solved = Bool, iterations = Int32, residual = Float64, rate = Float64))
    args = Tuple{ImplicitRNN.PerSample{0, V}, ImplicitRNN.PerSample{K, M}}
    solve(solver, root) = (E.gpu_solve_samples!, (group,), (M, ends, typeof(f), args, E.SampleRule{K}, Val{solver}, Val{root}, Val{group}))
    found = (;
        newton = solve(Newton, true), auto = solve(Auto, false),
        vjp = (E.gpu_pull_back_samples!, (group,), (M, PTX.Global{Bool, 1}, M, M, typeof(f), args, Val{true}, Val{K}, Val{group})),
        jacobian = (
            E.gpu_jacobian_of_samples!, (group,),
            (PTX.Global{T, 3}, PTX.Global{Bool, 1}, M, PTX.Global{Bool, 1}, typeof(f), args, Val{true}, Val{K}, Val{2}, Val{group}),
        ),
    )
    return NamedTuple{Tuple(Symbol("equation_", name, "_", K) for name in keys(found))}(values(found))
end

function check_resources(name, T, ptx, items, card)
    used = PTX.resources(ptx, card)
    println(rpad("kernel $name", 24), rpad(T, 9), rpad(card, 7), join(("$k $v" for (k, v) in pairs(used)), ", "))
    @test used.stack == used.spilled == 0
    @test used.shared <= 48 * 1024
    @test used.registers * items <= 65536    # those of a multiprocessor
    return
end

# Single precision takes no more registers, but has another layout of workgroups.
const IN_SINGLE_PRECISION = (
    :stage, :fused_16, :fused_64, :fused_128, :gradient_16, :gradient_64, :gradient_128, :fused_adjoint, :anderson, :elimination,
    :equation_newton_8, :equation_auto_8, :equation_vjp_8, :equation_jacobian_8,
)

@testset "the kernels assemble without spills: $T" for T in (Float32, Float64)
    for (name, (f, launch, types)) in pairs(T == Float32 ? kernels_of(T)[IN_SINGLE_PRECISION] : kernels_of(T))
        ptx = PTX.assembly(f, launch, types, v"8.0")
        @test occursin("st.global", ptx)    # rather than a trap, of what does not compile
        foreach(card -> check_resources(name, T, ptx, prod(launch isa Tuple ? launch : 256), card), (v"8.0", v"9.0"))
    end
end

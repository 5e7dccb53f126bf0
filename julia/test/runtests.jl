using Aqua, ForwardDiff, ImplicitRNN, InteractiveUtils, LinearAlgebra, Random, Test, Zygote
using ImplicitRNN: ACTIVATIONS, CONVERGED, LOSSES, Weights, curvature, slope, slope_bound, unpack!, value

include("fixtures.jl")

@testset "ImplicitRNN" begin
    @testset "Package quality" begin
        Aqua.test_all(ImplicitRNN; persistent_tasks = false)
    end
    for file in ("gemm", "activations", "constraints", "network", "columns", "solvers", "gradients", "vjp", "losses", "differentiate", "training", "side_by_side", "fit", "device", "equations", "lanes")
        @testset "$file" begin
            include("$file.jl")
        end
    end
end

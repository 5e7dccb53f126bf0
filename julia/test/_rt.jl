using Aqua, ForwardDiff, ImplicitRNN, InteractiveUtils, LinearAlgebra, Random, Test, Zygote
using ImplicitRNN: ACTIVATIONS, CONVERGED, LOSSES, Weights, curvature, slope, slope_bound, unpack!, value

include("fixtures.jl")

@testset "ImplicitRNN" begin
    for file in ("equations", "lanes")
        @testset "$file" begin
            include("$file.jl")
        end
    end
end

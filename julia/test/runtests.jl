# All tests, or those of the files that are named: Pkg.test("ImplicitRNN"; test_args = ["gemm", "losses"])

using ForwardDiff, ImplicitRNN, InteractiveUtils, LinearAlgebra, Random, Test
using ImplicitRNN: ACTIVATIONS, CONVERGED, Weights, curvature, slope, slope_bound, unpack!, value

include("fixtures.jl")

# Those first in which many exceptions are thrown: that takes the longer the more has been compiled.
const FILES = [
    "quality", "solvers", "lanes", "equations", "gemm", "coarse", "activations", "constraints", "network", "columns", "gradients", "vjp", "losses",
    "differentiate", "training", "side_by_side", "fit", "device",
]

@testset "ImplicitRNN" begin
    issubset(ARGS, FILES) || error("no such tests: $(join(setdiff(ARGS, FILES), ", ")); there are $(join(FILES, ", "))")
    for file in (isempty(ARGS) ? FILES : ARGS)
        @testset "$file" begin
            include("$file.jl")
        end
    end
end

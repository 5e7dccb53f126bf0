"""
The engine on a device: batches of a network on any backend of KernelAbstractions.jl whose arrays are those of GPUArrays.jl.

The states, slopes and statuses of a batch, the weights in force and all products with them are on the device. The parameters, the
constraint and its pullback stay on the host, once per call; so do the samples that Picard iteration leaves unsolved, which the
[`CPUWorkspace`](@ref ImplicitRNN.CPUWorkspace) solves in one piece by the solver asked for.
"""
module ImplicitRNNGPUArraysExt

using GPUArraysCore: AbstractGPUArray
using ImplicitRNN
using ImplicitRNN: AbstractWorkspace, Activation, Adjoint, AUTO_BLOCK, BLOW_UP, CONVERGED, CPUWorkspace, Columns,
    DIVERGED, ElementwiseLoss, LossSeed, MAX_ITERATIONS, NON_FINITE, Outcome, OutputSeed, Piecewise, Quality, SUSPICIOUS_SIZE, Solver,
    Stage, StateSeed, WORST_ADJOINT, Weights, amplification, check_device, check_features, check_interrupt, check_size, clear!, equilibrium!,
    guarantees_uniqueness, norm_of, output_size, pack_gradient!, rows_of, scale_floor, slope, solve_adjoint!,
    tolerance, unpack!, value, worse
using KernelAbstractions
using KernelAbstractions: Backend
using LinearAlgebra: mul!

include("device_kernels.jl")
include("device_workspace.jl")
include("device_passes.jl")

end

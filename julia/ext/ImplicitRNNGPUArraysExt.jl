"""
The engine on a device: batches of a network on any backend of KernelAbstractions.jl whose arrays are those of GPUArrays.jl.

The states, slopes and statuses of a batch, the weights in force and all products with them are on the device. The parameters, the
constraint and its pullback stay on the host, once per call; so do the samples that Picard iteration leaves unsolved, which the
[`CPUWorkspace`](@ref ImplicitRNN.CPUWorkspace) solves in one piece by the solver asked for.
"""
module ImplicitRNNGPUArraysExt

using GPUArraysCore: AbstractGPUArray
using ImplicitRNN
using ImplicitRNN: AbstractWorkspace, Activation, Adjoint, amplification, AUTO_BLOCK, BLOW_UP, check_device, check_features,
    check_interrupt, check_size, clear!, Columns, CONVERGED, CPUWorkspace, DIVERGED, ElementwiseLoss, equilibrium!,
    guarantees_uniqueness, LossSeed, MAX_ITERATIONS, NON_FINITE, norm_of, Outcome, output_size, OutputSeed,
    pack_gradient!, Piecewise, Quality, rows_of, scale_floor, slope, solve_adjoint!, Solver, Stage, StateSeed,
    SUSPICIOUS_SIZE, tolerance, unpack!, unpack_tangent, value, Weights, worse, WORST_ADJOINT
using KernelAbstractions
using KernelAbstractions: Backend
using LinearAlgebra: mul!

include("device_kernels.jl")
include("device_workspace.jl")
include("device_passes.jl")

end

"""
The engine on a device: batches of a network on any backend of KernelAbstractions.jl whose arrays are those of GPUArrays.jl.

The parameters in force, the states, slopes and statuses of a batch and all products with them are on the device. On the host are
singular values and eigenvalues, which the constraints Spectral and Monotone need, and whether an equilibrium attracts; and the
samples that Picard iteration leaves unsolved, which the [`CPUWorkspace`](@ref ImplicitRNN.CPUWorkspace) solves in one piece by the
solver asked for.

Equations of any function of a few unknowns are solved and differentiated by a work-item for each sample.
"""
module ImplicitRNNGPUArraysExt

using GPUArraysCore: AbstractGPUArray
using ImplicitRNN.ForwardDiff: Dual, ForwardDiff, Partials, partials, Tag
using ImplicitRNN
using ImplicitRNN: AbstractWorkspace, Activation, Adjoint, all_finite, amplification, at, ATTEMPT_SHARES, AUTO_BLOCK,
    Batches, beyond, BLOW_UP, call!, cause, check_device, checked_batches, check_interrupt, check_length, check_size,
    COARSE_ROUNDING, Connection, connection_weights, CONVERGED, copy_outcome!, CPUWorkspace, curvature, decreases, DIVERGED,
    ElementwiseLoss, EquationProblem, equilibrium!, evaluation_contracts, exclusively, exp_bounded, exponentials!, far_step,
    FIXED_POINT_SHARE, free_memory, guarantees_uniqueness, is_differentiable, is_singular, jacobian!, JacobianPenalty,
    LARGEST_CHANGE, LEAST_ATTEMPT, LEFT_OF_CONDITIONS, limit, LINEARIZED_PATIENCE, LossSeed, matrix_size,
    MAX_ITERATIONS, MAX_SHORT, NON_FINITE, norm_of, on_host, Outcome, output_size, OutputSeed, Owner, PerSample, picard_patience,
    Piecewise, PILOT_ITERATIONS, PILOTS, predicted_iterations, Quality, rademacher, readout_bias, readout_weights, repels, report!,
    scale_floor, Short, SINGULAR, slope, SLOW, SMALLEST_ROOT_STEP, SMALLEST_STEP, solve!, solve_regularised!, Solver, Stage,
    StateSeed, StepBuffers, Summary, SUSPICIOUS_SIZE, tolerance, train!, trust_radius, unpack!, unpack_tangent, UNSTABLE, value,
    variables, vjp!, with_coarse_products, worse
using KernelAbstractions
using KernelAbstractions: Adapt, Backend
using LinearAlgebra: BlasFloat, I, issuccess, lu!, mul!, norm

include("kernels.jl")
include("weights.jl")
include("workspace.jl")
include("fused.jl")
include("lu.jl")
include("solvers.jl")
include("passes.jl")
include("gradient.jl")
include("fused_gradient.jl")
include("training.jl")
include("functions.jl")
include("newton.jl")
include("equations.jl")
include("derivatives.jl")

end

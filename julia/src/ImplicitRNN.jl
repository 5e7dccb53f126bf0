"""
Implicit recurrent networks: networks for stationary inputs with lateral and feedback connections, whose
state is the equilibrium of `z = f(W x + R z + b)` and whose gradient comes from the implicit function theorem.
After S. Sanokowski, Implicit recurrent networks, arXiv 2010.10564 (2020).

Samples are columns: `X` is features × samples.
"""
module ImplicitRNN

using ChainRulesCore: ChainRulesCore, NoTangent, ignore_derivatives, unthunk
using ForwardDiff: Dual, ForwardDiff, partials
using ImplicitDifferentiation: ImplicitDifferentiation, ImplicitFunction
using KrylovKit: eigsolve, linsolve
using Base: tail
using Base.Cartesian: @nexprs
using LinearAlgebra
using LinearAlgebra: BlasFloat
using NLsolve: NLsolve, OnceDifferentiable, nlsolve
using Optimisers: Optimisers
using PrecompileTools: PrecompileTools, @compile_workload, @setup_workload
using Random: AbstractRNG, default_rng, shuffle!

export Network, Layer, neurons
export Free, Perron, InfNorm, Spectral, Monotone
export Auto, Picard, Anderson, Newton, Chord, NLsolver
export Implicit, JacobianFree, Unrolled
export MSE, MAE, Huber, CrossEntropy, BinaryCrossEntropy
export Problem, Solution, Status, converged, equilibrium, loss_and_gradient, hessian_vector_product, Equilibrium
export Trainer, Replicas, Guard, train!
export initial_parameters, named_weights, recurrent_weights, predict, read_out, fit!
export vjp, jvp, fixed_point, root

include("dispatch.jl")
include("interrupt.jl")
include("checks.jl")

# The basic computations of the CPU.
include("cpu/threads.jl")
include("cpu/registers.jl")
include("cpu/elementwise.jl")
include("cpu/gemm.jl")

# Networks.
include("model/activations.jl")
include("model/constraints.jl")
include("model/network.jl")
include("cpu/tuning.jl")
include("model/weights.jl")
include("model/parameters.jl")
include("model/pullback.jl")
include("model/tangent.jl")

# Finding an equilibrium: the stages of a network in columns, any equation one sample at a time.
include("solvers/solver.jl")
include("cpu/lu.jl")
include("cpu/coarse.jl")
include("cpu/bfloats.jl")
include("cpu/amx.jl")
include("cpu/dot_products.jl")
include("cpu/recurrence.jl")
include("cpu/columns.jl")
include("solvers/iteration.jl")
include("solvers/picard.jl")
include("solvers/anderson.jl")
include("solvers/stability.jl")
include("solvers/newton.jl")
include("solvers/trust_region.jl")
include("solvers/chord.jl")
include("cpu/corrections.jl")
include("solvers/nlsolve.jl")
include("solvers/auto.jl")
include("solvers/adjoints.jl")

# Problems, and the workspaces that solve them: that of the CPU here, that of devices in ext/.
include("model/losses.jl")
include("problem.jl")
include("workspace.jl")
include("devices.jl")
include("cpu/adjoint.jl")
include("cpu/lanes.jl")
include("cpu/workspace.jl")
include("cpu/equilibrium.jl")
include("model/regularization.jl")
include("cpu/tiny.jl")
include("cpu/gradient.jl")
include("cpu/tangent.jl")

# Training, derivatives and equations.
include("hessian.jl")
include("differentiate.jl")
include("training.jl")
include("cpu/side_by_side.jl")
include("fit.jl")
include("equations/equations.jl")
include("precompile.jl")

end

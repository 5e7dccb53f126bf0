# The training gradient: loss and its gradient with respect to all parameters.

"""
    loss_and_gradient(net, p, X, Y; loss = MSE(), solver = Auto(), adjoint = Implicit(), jacobian_penalty = 0, probe = 0)

The loss of the outputs for `X` (features × samples) against the targets `Y` (outputs × samples), and its
gradient with respect to the parameters `p`; with a [`JacobianPenalty`](@ref) where its weight is not zero, whose
random vectors `probe` numbers.
"""
function loss_and_gradient(net::Network{T}, p, X, Y; probe = 0, options...) where {T}
    problem = Problem(net; options...)
    g = zeros(T, length(net))
    value, _ = loss_and_gradient!(g, Workspace(problem), problem, p, X, Y, probe)
    return value, g
end

"A sample whose adjoint is solved to no better relative residual than this counts as unconverged."
const WORST_ADJOINT = 1.0e-3

"""
Summary of the solves behind a gradient: samples that did not converge (forward or adjoint), the worst residual of the forward
solves and of the adjoint (NaN where an adjoint system was singular).
"""
struct Quality
    unconverged::Int
    residual::Float64
    adjoint_residual::Float64
end

function loss_and_gradient!(g, ws::Workspace, problem::Problem, p, X, Y, probe = 0)
    net, B = problem.net, size(X, 2)
    check_features(net, X)
    size(Y) == (output_size(net), B) || throw(
        DimensionMismatch("targets are $(size(Y)), but $(output_size(net)) outputs for $B samples were expected")
    )
    unpack!(ws.weights, net, p)
    clear!(ws.gradient)
    penalty = JacobianPenalty(problem.jacobian_penalty, probe % UInt64, B)
    value, unconverged, residual, adjoint_residual = 0.0, 0, 0.0, 0.0
    for first_sample in 1:ws.width:B
        samples = first_sample:min(first_sample + ws.width - 1, B)
        m = length(samples)
        tile = view(X, :, samples)
        forward!(ws, problem, tile)
        read_out!(ws, net, m)
        value += loss_gradient!(ws.GY, problem.loss, ws.Y, view(Y, :, samples), eltype(net)(1 / length(Y)))
        value += backward!(ws, problem, tile, penalty, first_sample)
        for j in 1:m
            unconverged += needs_equilibrium(problem.adjoint) &&
                (ws.outcome.status[j] != CONVERGED || !(ws.adjoint_outcome.residual[j] < WORST_ADJOINT))
            residual = worse(ws.outcome.residual[j], residual)
            adjoint_residual = worse(ws.adjoint_outcome.residual[j], adjoint_residual)
        end
    end
    pack_gradient!(g, net, ws.gradient, ws.weights)
    return value, Quality(unconverged, residual, adjoint_residual)
end

"Whether the gradient is that of the loss at an equilibrium only."
needs_equilibrium(::Adjoint) = true
needs_equilibrium(::Unrolled) = false

# Losses: the sum over a tile and its derivative.

"""
    Loss

A training loss, the mean over samples and outputs: [`MSE`](@ref).
"""
abstract type Loss end

"Mean squared error `mean((y - t)²)`."
struct MSE <: Loss end

const LOSSES = (; mse = MSE())

"""
    loss_gradient!(G, loss, Y, T, scale)

Sum of the loss over the entries of `Y` (outputs) against `T` (targets), times `scale`; its derivative goes
to `G`.
"""
function loss_gradient!(G, ::MSE, Y, T, scale)
    total = 0.0
    for j in axes(T, 2)
        @inbounds for i in axes(T, 1)
            difference = Y[i, j] - T[i, j]
            G[i, j] = 2 * scale * difference
            total += Float64(difference)^2
        end
    end
    return total * scale
end

"The derivative of the loss's gradient `G` along the direction `dY` of the outputs."
loss_curvature(::MSE, Y, T, dY, scale) = 2 .* scale .* dY

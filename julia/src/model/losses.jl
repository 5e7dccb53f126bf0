# Losses: the sum over a tile, its derivative, and the derivative of that along a direction of the outputs.

"""
    Loss

A training loss: the mean over samples of `wⱼ ℓ(yⱼ, tⱼ)`, with w the sample weights (by default 1), y
the outputs and t the targets. [`MSE`](@ref), [`MAE`](@ref), [`Huber`](@ref) and [`BinaryCrossEntropy`](@ref) take the
mean of a term per output for ℓ; [`CrossEntropy`](@ref) takes the outputs of a sample together.
"""
abstract type Loss end

abstract type ElementwiseLoss <: Loss end

"Mean squared error: `(y - t)²`."
struct MSE <: ElementwiseLoss end

"Mean absolute error: `|y - t|`, with derivative 0 at `y = t`."
struct MAE <: ElementwiseLoss end

"`d²/2` for `d = |y - t| ≤ delta`, `delta (d - delta/2)` beyond (Huber 1964)."
struct Huber <: ElementwiseLoss
    delta::Float64
    function Huber(delta)
        check_number("delta", delta, x -> 0 < x < Inf, "be positive and finite")
        return new(delta)
    end
end
Huber(; delta = 1.0) = Huber(delta)

"`-t log σ(y) - (1 - t) log(1 - σ(y))`, of logits y and probabilities t, as `max(y, 0) - t y + log(1 + exp(-|y|))`."
struct BinaryCrossEntropy <: ElementwiseLoss end

"`-Σᵢ tᵢ log pᵢ` with `p = softmax(y)`, of logits y and probabilities t, by `log pᵢ = yᵢ - max(y) - log Σₖ exp(yₖ - max(y))`."
struct CrossEntropy <: Loss end

const LOSSES = (; MSE, MAE, Huber, CrossEntropy, BinaryCrossEntropy)

"""
    loss_gradient!(G, loss, Y, T, weights, scale)

The sum over the columns of `Y` (outputs × samples) of their loss against `T` (targets), weighted with `weights`
(`nothing` for 1), times `scale`; its derivative goes to `G`.
"""
function loss_gradient!(G, loss::ElementwiseLoss, Y, T, weights, scale)
    total = 0.0
    for j in axes(T, 2)
        w = scale * weight_of(weights, j) / size(T, 1)
        @inbounds for i in axes(T, 1)
            G[i, j] = w * slope(loss, Y[i, j], T[i, j])
            total += Float64(w * value(loss, Float64(Y[i, j]), Float64(T[i, j])))
        end
    end
    return total
end

function loss_gradient!(G, ::CrossEntropy, Y, T, weights, scale)
    total = 0.0
    for j in axes(T, 2)
        w, top = scale * weight_of(weights, j), @inbounds(Y[1, j])
        @inbounds for i in axes(T, 1)
            top = ifelse(Y[i, j] > top, Y[i, j], top)           # a NaN shows in the exponentials
        end
        mass = expected = partition = zero(eltype(Y))
        @inbounds @simd for i in axes(T, 1)
            G[i, j] = Y[i, j] - top
            mass += T[i, j]
            expected = muladd(T[i, j], G[i, j], expected)
        end
        @inbounds @simd for i in axes(T, 1)
            G[i, j] = exp_nonpositive(G[i, j])
            partition += G[i, j]
        end
        share = mass / partition
        @inbounds @simd for i in axes(T, 1)
            G[i, j] = w * (share * G[i, j] - T[i, j])
        end
        total += Float64(w * (Float64(mass) * log(partition) - expected))
    end
    return total
end

"The derivative of the gradient that [`loss_gradient!`](@ref) writes, along the direction `dY` of the outputs."
function loss_curvature(loss::ElementwiseLoss, Y, T, dY, weights, scale)
    w = [scale * weight_of(weights, j) / size(T, 1) for _ in 1:1, j in axes(T, 2)]
    return w .* curvature.(Ref(loss), Y, T) .* dY
end

function loss_curvature(::CrossEntropy, Y, T, dY, weights, scale)
    P = exp.(Y .- maximum(Y; dims = 1))
    P ./= sum(P; dims = 1)
    w = [scale * weight_of(weights, j) for _ in 1:1, j in axes(T, 2)]
    return w .* sum(T; dims = 1) .* P .* (dY .- sum(P .* dY; dims = 1))
end

weight_of(::Nothing, j) = true
weight_of(weights::AbstractVector, j) = weights[j]

value(::MSE, y, t) = (y - t)^2
slope(::MSE, y, t) = 2 * (y - t)
curvature(::MSE, y, t) = oftype(y, 2)

value(::MAE, y, t) = abs(y - t)
slope(::MAE, y, t) = sign(y - t)
curvature(::MAE, y, t) = zero(y)

function value(loss::Huber, y, t)
    d, δ = abs(y - t), oftype(y, loss.delta)
    return d <= δ ? d^2 / 2 : δ * (d - δ / 2)
end
slope(loss::Huber, y, t) = clamp(y - t, -oftype(y, loss.delta), oftype(y, loss.delta))
curvature(loss::Huber, y, t) = oftype(y, abs(y - t) <= loss.delta)

value(::BinaryCrossEntropy, y, t) = max(y, zero(y)) - t * y + log1p(exp(-abs(y)))
slope(::BinaryCrossEntropy, y, t) = logistic(y) - t
curvature(::BinaryCrossEntropy, y, t) = logistic(y) * logistic(-y)

# The training gradient: loss and its gradient with respect to all parameters.

"""
    loss_and_gradient(net, p, X, Y; loss = MSE(), weights = nothing, solver = Auto(), adjoint = Implicit(), jacobian_penalty = 0, probe = 0)

The [`Loss`](@ref) of the outputs for `X` (features × samples) against the targets `Y` (outputs × samples), and its
gradient with respect to the parameters `p`; with a [`JacobianPenalty`](@ref) where its weight is not zero, whose
random vectors `probe` numbers.
"""
function loss_and_gradient(net::Network{T}, p, X, Y; weights = nothing, probe = 0, options...) where {T}
    problem = Problem(net; options...)
    g = zeros(T, length(net))
    value, _ = loss_and_gradient!(g, Workspace(problem), problem, p, X, Y, probe, weights)
    return value, g
end

"""
    loss_and_gradient!(g, ws, problem, p, X, Y, probe = 0, weights = nothing, report = nothing)

The loss and its [`Quality`](@ref); the gradient goes to `g`. A `report` (status, residual, adjoint residual) of vectors is filled
in per sample.
"""
function loss_and_gradient!(g, ws::Workspace, problem::Problem, p, X, Y, probe = 0, weights = nothing, report = nothing)
    net, B = problem.net, size(X, 2)
    check_features(net, X)
    size(Y) == (output_size(net), B) || throw(
        DimensionMismatch("targets are $(size(Y)), but $(output_size(net)) outputs for $B samples were expected")
    )
    weights === nothing || length(weights) == B ||
        throw(DimensionMismatch("there are $(length(weights)) weights for $B samples"))
    unpack!(ws, p)
    problem.solver isa Union{Auto, Chord} && linearize!(ws, problem, X)
    penalty = JacobianPenalty(problem.jacobian_penalty, probe % UInt64, B)
    width = tile_width(net, B)
    tiles = cld(B, width)
    shares = min(tiles, shares_of(net))
    threads = threads_for(net, B)
    buffers = buffers!(ws, B, threads, shares)
    while length(ws.gradients) < shares
        push!(ws.gradients, Weights(net))
        push!(ws.summaries, Summary())
    end
    in_parallel(shares, length(buffers)) do thread, share
        tile = buffers[thread]
        tile.gradient = clear!(ws.gradients[share])
        ws.summaries[share] = sum_tiles!(
            tile, problem, X, Y, weights, report, penalty, width, ((share - 1) * tiles ÷ shares + 1):(share * tiles ÷ shares)
        )
    end
    for share in 2:shares
        add!(ws.gradients[1], ws.gradients[share], threads)
        ws.summaries[1] = merge(ws.summaries[1], ws.summaries[share])
    end
    pack_gradient!(g, net, ws.gradients[1], ws.weights)
    return ws.summaries[1].loss, ws.summaries[1].quality
end

"""
The sums over the batch are taken in so many shares at most, whatever the number of threads; fewer where the gradients, of which
each share has its own, would need much memory.
"""
const SHARES = 4:16

"Memory in bytes from which on there are fewer shares."
const SHARES_LIMIT = 2^26

shares_of(net::Network{T}) where {T} = clamp(SHARES_LIMIT ÷ (sizeof(T) * length(net)), first(SHARES), last(SHARES))

# The loss and the quality of some tiles; their gradient is added to `tile.gradient`.
function sum_tiles!(tile::Tile, problem::Problem, X, Y, weights, report, penalty, width::Int, numbers)
    net = problem.net
    summary = Summary()
    keep_factors!(tile, problem)
    # An evaluation brings it nearer where the equation contracts, as monotone ones need not.
    tile.latest = !(net.constraint isa Monotone)
    for k in numbers
        samples = piece(k, width, size(X, 2))
        m = length(samples)
        x = view(X, :, samples)
        forward!(tile, problem, x)
        read_out!(tile, net, m)
        scale = eltype(net)(1 / size(X, 2))
        loss = loss_gradient!(tile.GY, problem.loss, tile.Y, view(Y, :, samples), weights_of(weights, samples), scale)
        loss += backward!(tile, problem, x, penalty, first(samples))
        report === nothing || report!(report, tile, samples)
        summary = merge(summary, Summary(loss, Quality(tile, problem.adjoint, m)))
    end
    return summary
end

function report!((status, residual, adjoint_residual), tile::Tile, samples)
    m = length(samples)
    copyto!(view(status, samples), view(tile.outcome.status, 1:m))
    copyto!(view(residual, samples), view(tile.outcome.residual, 1:m))
    copyto!(view(adjoint_residual, samples), view(tile.adjoint_outcome.residual, 1:m))
    return
end

# Lets Newton's method leave its factorisations to the adjoint.
function keep_factors!(tile::Tile{T}, problem::Problem) where {T}
    problem.solver isa Newton && problem.adjoint isa Implicit || return
    for (k, stage) in enumerate(problem.net.stages)
        n = length(stage.rows)
        stage.recurrent && n^2 * tile.width * sizeof(T) <= FACTORS_LIMIT || continue
        tile.factors[k] === nothing && (tile.factors[k] = Factors{T}(n, tile.width))
    end
    return
end

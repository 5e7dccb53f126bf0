# The gradient of a batch, of its loss or of a product with any cotangent: the sum over tiles, shared among threads.

# --- where the backward pass begins ----------------------------------------------------------------------------------

"""
    begin_back!(tile, seed, net, samples)

Set `tile.G` = ∂L/∂z of the samples in the tile, add the gradient of the readout, and return their loss.
"""
function begin_back! end

function begin_back!(tile::Tile, seed::LossSeed, net, samples)
    m = length(samples)
    read_out!(tile, net, m)
    loss, targets, weights = seed.loss, view(seed.targets, :, samples), columns_of(seed.weights, samples)
    total = @usual loss Union{MSE, CrossEntropy} loss_gradient!(tile.GY, loss, tile.Y, targets, weights, seed.scale)
    read_out_adjoint!(tile, net, m)
    return total::Float64
end

function begin_back!(tile::Tile, seed::OutputSeed, net, samples)
    m = length(samples)
    copyto!(view(tile.GY, :, 1:m), view(seed.V, :, samples))
    read_out_adjoint!(tile, net, m)
    return 0.0
end

function begin_back!(tile::Tile, seed::StateSeed, net, samples)
    copyto!(view(tile.G, :, 1:length(samples)), view(seed.V, :, samples))
    return 0.0
end

# --- the way back -----------------------------------------------------------------------------------------------

# The gradient goes to `g`, that of the samples to `dX` and the states found to `states` if these are not nothing.
function pull_back!(
        g, ws::CPUWorkspace, problem::Problem, p, X, seed; dX = nothing, start = nothing, probe = 0, report, states = nothing
    )
    unpack!(ws, p)
    if seed isa LossSeed && !is_wanted(report) && states === nothing
        summary = gradient_in_lanes!(g, ws, problem, X, seed)
        summary === nothing || return summary
    end
    net, B = problem.net, size(X, 2)
    problem.solver isa Union{Auto, Chord} && prepare!(ws, problem, X)
    penalty = JacobianPenalty(problem.jacobian_penalty, probe % UInt64, B)
    width = tile_width(net, B)
    tiles = cld(B, width)
    shares = clamp(tiles, 1, shares_of(net))
    threads = threads_for(net, B)
    buffers = buffers!(ws, B, threads, shares)
    while length(ws.gradients) < shares
        push!(ws.gradients, Weights(net))
        push!(ws.summaries, Summary())
    end
    in_parallel(shares, length(buffers)) do thread, share
        tile = buffers[thread]
        tile.gradient = clear!(ws.gradients[share])
        numbers = ((share - 1) * tiles ÷ shares + 1):(share * tiles ÷ shares)
        ws.summaries[share] = sum_tiles!(tile, problem, X, seed, penalty, width, numbers; dX, start, report, states)
    end
    for share in 2:shares
        add!(ws.gradients[1], ws.gradients[share], threads)
        ws.summaries[1] = merge(ws.summaries[1], ws.summaries[share])
    end
    pack_gradient!(g, net, ws.gradients[1], ws.weights)
    return ws.summaries[1]
end

shares_of(net::Network{T}) where {T} = clamp(SHARES_LIMIT ÷ (sizeof(T) * length(net)), first(SHARES), last(SHARES))

# The loss and the quality of some tiles; their gradient is added to `tile.gradient`.
function sum_tiles!(tile::Tile, problem::Problem, X, seed, penalty, width::Int, numbers; dX, start, report, states)
    net = problem.net
    summary = Summary()
    keep_factors!(tile, problem)
    tile.latest = evaluation_contracts(net.constraint)
    for k in numbers
        samples = piece(k, width, size(X, 2))
        x = view(X, :, samples)
        forward!(tile, problem, x, columns_of(start, samples))
        loss = begin_back!(tile, seed, net, samples)
        loss += backward!(tile, problem, x, penalty, first(samples), columns_of(dX, samples))
        report!(report, samples, tile.outcome, tile.adjoint_outcome.residual)
        states === nothing || keep_states!(columns_of(states, samples), tile)
        quality = Quality(tile.outcome, tile.adjoint_outcome.residual, problem.adjoint, length(samples))
        summary = merge(summary, Summary(loss, quality))
    end
    return summary
end

"The columns of an array, or the entries of a vector, for these samples; `nothing` if given `nothing`."
columns_of(::Nothing, samples) = nothing
columns_of(x::AbstractVector, samples) = view(x, samples)
columns_of(A::AbstractMatrix, samples) = view(A, :, samples)

"The states found become `states` (neurons × samples), zero where there is no equilibrium: a solver starts anew from there."
function keep_states!(states, tile::Tile)
    for j in axes(states, 2)
        tile.outcome.status[j] === CONVERGED ? copy_column!(states, j, tile.Z, j) : fill!(view(states, :, j), 0)
    end
    return
end

# Lets Newton's method leave its factorisations to the adjoint.
function keep_factors!(tile::Tile{T}, problem::Problem) where {T}
    tile.factorised = problem.solver isa Newton && problem.adjoint isa Implicit
    tile.factorised || return
    for (k, stage) in enumerate(problem.net.stages)
        n = length(stage.rows)
        stage.recurrent && n^2 * tile.width * sizeof(T) <= FACTORS_LIMIT || continue
        tile.factors[k] === nothing && (tile.factors[k] = Factorisations{T}(n, tile.width))
    end
    return
end

"The factorisations of stage k, where they are wanted and there is room for them."
factors_of(tile::Tile, k::Int) = tile.factorised ? tile.factors[k] : nothing

# The gradient of a batch, of its loss or of a product with any cotangent: the sum over tiles, shared among threads.

function loss_and_gradient!(
        g, ws::CPUWorkspace{T}, problem::Problem, p, X, Y, probe = 0, weights = nothing, report = nothing, states = nothing
    ) where {T}
    check_supervised(problem.net, X, Y, weights)
    check_start(problem.net, X, states)
    unpack!(ws, p)
    seed = LossSeed(problem.loss, Y, weights, T(1 / size(X, 2)))
    summary = pull_back!(g, nothing, ws, problem, X, states, seed, probe, report, states)
    return summary.loss, summary.quality
end

function vjp!(
        g, dX, ws::CPUWorkspace, problem::Problem, p, X, V; of = :outputs, start = nothing, probe = 0, report = nothing
    )
    check_pullback(problem.net, dX, X, V, of, start)
    unpack!(ws, p)
    seed = of === :outputs ? OutputSeed(V) : StateSeed(V)
    summary = pull_back!(g, dX, ws, problem, X, start, seed, probe, report)
    return summary.loss, summary.quality
end

# --- where the way back begins ----------------------------------------------------------------------------------

"""
    begin_back!(tile, seed, net, samples)

Set `tile.G` = ∂L/∂z of the samples in the tile, add the gradient of the readout, and return their loss.
"""
function begin_back! end

struct LossSeed{A, W, T}
    loss::Loss                   # left abstract, as in a problem
    targets::A
    weights::W
    scale::T
end

function begin_back!(tile::Tile, seed::LossSeed, net, samples)
    m = length(samples)
    read_out!(tile, net, m)
    loss, targets, weights = seed.loss, view(seed.targets, :, samples), weights_of(seed.weights, samples)
    total = @usual loss Union{MSE, CrossEntropy} loss_gradient!(tile.GY, loss, tile.Y, targets, weights, seed.scale)
    read_out_adjoint!(tile, net, m)
    return total::Float64
end

"∂L/∂y is given."
struct OutputSeed{A}
    V::A
end

function begin_back!(tile::Tile, seed::OutputSeed, net, samples)
    m = length(samples)
    copyto!(view(tile.GY, :, 1:m), view(seed.V, :, samples))
    read_out_adjoint!(tile, net, m)
    return 0.0
end

"∂L/∂z is given."
struct StateSeed{A}
    V::A
end

function begin_back!(tile::Tile, seed::StateSeed, net, samples)
    copyto!(view(tile.G, :, 1:length(samples)), view(seed.V, :, samples))
    return 0.0
end

# --- the way back -----------------------------------------------------------------------------------------------

# The gradient goes to `g`, that of the samples to `dX` and the states found to `states` if these are not nothing; the weights are in
# force.
function pull_back!(g, dX, ws::CPUWorkspace, problem::Problem, X, start, seed, probe, report, states = nothing)
    net, B = problem.net, size(X, 2)
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
            tile, problem, X, start, seed, dX, report, states, penalty, width,
            ((share - 1) * tiles ÷ shares + 1):(share * tiles ÷ shares)
        )
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
function sum_tiles!(tile::Tile, problem::Problem, X, start, seed, dX, report, states, penalty, width::Int, numbers)
    net = problem.net
    summary = Summary()
    keep_factors!(tile, problem)
    # An evaluation brings it nearer where the equation contracts, as monotone ones need not.
    tile.latest = !(net.constraint isa Monotone)
    for k in numbers
        samples = piece(k, width, size(X, 2))
        x = view(X, :, samples)
        forward!(tile, problem, x, columns_of(start, samples))
        loss = begin_back!(tile, seed, net, samples)
        loss += backward!(tile, problem, x, penalty, first(samples), columns_of(dX, samples))
        report === nothing || report!(report, tile, samples)
        states === nothing || keep_states!(columns_of(states, samples), tile)
        summary = merge(summary, Summary(loss, Quality(tile, problem.adjoint, length(samples))))
    end
    return summary
end

columns_of(::Nothing, samples) = nothing
columns_of(A::AbstractMatrix, samples) = view(A, :, samples)

function report!((status, residual, adjoint_residual), tile::Tile, samples)
    m = length(samples)
    copyto!(view(status, samples), view(tile.outcome.status, 1:m))
    copyto!(view(residual, samples), view(tile.outcome.residual, 1:m))
    copyto!(view(adjoint_residual, samples), view(tile.adjoint_outcome.residual, 1:m))
    return
end

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
        tile.factors[k] === nothing && (tile.factors[k] = Factors{T}(n, tile.width))
    end
    return
end

"The factorisations of stage k, where they are wanted and there is room for them."
factors_of(tile::Tile, k::Int) = tile.factorised ? tile.factors[k] : nothing

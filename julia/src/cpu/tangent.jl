# Tangents: the derivative of the equilibria along a direction of parameters and samples, forward through the stages. Every sample
# has its own, so there is nothing to sum.

function push_forward!(tangent, ws::CPUWorkspace, problem::Problem, p, X, dp, dX, of, start, report)
    net, B = problem.net, size(X, 2)
    unpack!(ws, p)
    direction = unpack_tangent(net, ws.weights, dp)
    problem.solver isa Union{Auto, Chord} && prepare!(ws, problem, X)
    threads = threads_for(net, B)
    tiles = pieces_of(B, tile_width(net, B))
    buffers = buffers!(ws, B, threads, length(tiles))
    qualities = Vector{Quality}(undef, length(tiles))
    in_parallel(length(tiles), length(buffers)) do thread, k
        samples, tile = tiles[k], buffers[thread]
        tile.factorised, tile.latest = false, evaluation_contracts(net.constraint)
        x = view(X, :, samples)
        forward!(tile, problem, x, columns_of(start, samples))
        push_forward!(tile, problem, direction, x, view(dX, :, samples))
        read_out_tangent!(view(tangent, :, samples), tile, net, direction, of)
        report!(report, samples, tile.outcome, tile.adjoint_outcome.residual)
        qualities[k] = Quality(tile.outcome, tile.adjoint_outcome.residual, problem.adjoint, length(samples))
    end
    return reduce(merge, qualities; init = Quality())
end

"""
    push_forward!(ws, problem, direction, X, dX)

`ws.E` = z′, the derivative of the states of a tile along that of the weights in force, `direction`, and of the samples, `dX`:
`(I - D R) z′ = D (u′ + R′ z)` for each stage, where u is what drives it.
"""
function push_forward!(ws::Tile, problem::Problem, direction::Weights, X, dX)
    reset!(ws.adjoint_outcome)
    for (k, stage) in enumerate(problem.net.stages)
        push_forward_stage!(ws, problem, stage, stage.activation, k, direction.stages[k], X, dX)
    end
    return ws
end

function push_forward_stage!(ws::Tile, problem, stage::Stage, f::Activation, k::Int, t::StageWeights, X, dX)
    m, rows, w = size(X, 2), stage.rows, ws.weights.stages[k]
    E, Z, S, D = (view(A, rows, 1:m) for A in (ws.E, ws.Z, ws.S, ws.D))
    U = drive!(ws.columns[k].U, t, ws.Z, X, m, ws.threads)       # which the forward pass needs no more
    multiply_add!(U, w.input, dX, m, ws.threads)
    multiply_add!(U, w.feed, ws.E, m, ws.threads)
    G = view(U, 1:length(rows), 1:m)           # a view like E
    if stage.recurrent && problem.adjoint isa Unrolled
        @late unroll_tangent!(E, ws.adjoints[k], ws.chains[k], problem.adjoint.steps, f, w.recurrent, t.recurrent, G)
        return
    end
    slopes!(D, f, S, Z)
    if stage.recurrent
        multiply_add!(U, t.recurrent, view(ws.Z, rows, :), m, ws.threads)
        solve_adjoint!(
            E, problem.adjoint, ws.adjoints[k], ws.recurrences[k], D, G;
            outcome = ws.adjoint_outcome, latest = ws.latest, threads = ws.threads, tangent = true,
        )
    else
        multiply_each!(E, D, G)
    end
    return
end

# Along the chain of `unroll!`: z′ₖ = Dₖ (u′ + R′ zₖ₋₁ + R z′ₖ₋₁), from z′₀ = 0.
function unroll_tangent!(E, c::Columns, chain, steps, f, R, dR, G)
    m = size(G, 2)
    dZ, D = view(c.Z, :, 1:m), view(c.F, :, 1:m)
    fill!(dZ, 0)
    for k in 1:steps
        check_interrupt()
        copyto!(E, G)
        multiply_add!(E, dR, chain[2k - 1], m)
        multiply_add!(E, R, dZ, m)
        slopes!(D, f, view(chain[2k], :, 1:m), view(chain[2k + 1], :, 1:m))
        multiply_each!(dZ, D, E)
    end
    copyto!(E, dZ)
    return
end

function read_out_tangent!(tangent, ws::Tile, net::Network, direction::Weights, of::Symbol)
    m = size(tangent, 2)
    if of === :state
        copyto!(tangent, view(ws.E, :, 1:m))
    elseif net.outputs == 0
        for (i, neuron) in enumerate(net.readout)
            copyto!(view(tangent, i, :), view(ws.E, neuron, 1:m))
        end
    else
        rows = first(net.readout):last(net.readout)
        foreach(j -> copy_column!(tangent, j, direction.d, 1), 1:m)
        multiply_add!(tangent, direction.C, view(ws.Z, rows, :), m)
        multiply_add!(tangent, ws.weights.C, view(ws.E, rows, :), m)
    end
    return
end

# Second derivatives: the product of the Hessian of the loss with a vector, by the tangents of the forward and
# adjoint passes. Both need linear systems with the same matrix I - D R per sample, which is factorised once.

"""
    hessian_vector_product(net, p, X, Y, v; loss = MSE(), weights = nothing, solver = Auto())

H v with H the Hessian of the loss with respect to the parameters. With primes for derivatives along v, D = f′(s) and
D′ = f″(s) s′ (differentiate `z = f(s)` and `(I - RᵀD) λ = ∂L/∂z`):

    (I - D R) z′ = D (W′x + R′z + b′),    (I - RᵀD) λ′ = (∂L/∂z)′ + R′ᵀD λ + RᵀD′λ.

Throws an `ErrorException` if a sample does not reach its equilibrium.
"""
function hessian_vector_product(net::Network{T}, p, X, Y, v; loss = MSE(), weights = nothing, solver = Auto()) where {T}
    check_arrays(p, X, "targets" => Y)
    check_array("the direction of the parameters", v, 1)
    problem = Problem(net; loss, solver)
    return hessian_vector_product!(zeros(T, length(net)), Workspace(net), problem, p, X, Y, v, weights)
end

function hessian_vector_product!(h, ws::CPUWorkspace{T}, problem::Problem{T}, p, X, Y, v, weights = nothing) where {T}
    check_workspace(ws, problem.net)
    check_supervised(problem.net, X, Y, weights)
    check_length(problem.net, v, "direction")
    check_length(problem.net, h, "product")
    return exclusively(() -> second_derivative!(h, ws, problem, p, X, Y, v, weights), ws)
end

function second_derivative!(h, ws::CPUWorkspace{T}, problem::Problem{T}, p, X, Y, v, weights) where {T}
    net, B = problem.net, size(X, 2)
    unpack!(ws, p)
    problem.solver isa Chord && prepare!(ws, problem, X)
    tile = first(buffers!(ws, B, 1, 1))
    tile.gradient = clear!(ws.gradients[1])
    tile.latest = tile.factorised = false
    tangent = unpack_tangent(net, ws.weights, v)
    second = clear!(Weights(net))
    for samples in pieces_of(B, tile.width)
        x, targets = view(X, :, samples), view(Y, :, samples)
        forward!(tile, problem, x)
        check_converged(view(tile.outcome.status, eachindex(samples)), view(tile.outcome.residual, eachindex(samples)))
        read_out!(tile, net, length(samples))
        mean = columns_of(weights, samples), T(1 / B)
        loss_gradient!(tile.GY, problem.loss, tile.Y, targets, mean...)
        add_tangents!(second, tile, problem, tangent, x, targets, mean)
    end
    return pack_second!(h, net, ws.weights, tangent, tile.gradient, second)
end

# The gradient goes to ws.gradient, its derivative along the tangent to `second`.
function add_tangents!(second, ws::Tile{T}, problem, tangent, X, targets, mean) where {T}
    net, m = problem.net, size(X, 2)
    Z, S = ws.Z[:, 1:m], ws.S[:, 1:m]
    dZ, dS, D = similar(Z), similar(S), similar(S)
    factors = Vector{Any}(undef, length(net.stages))
    for (k, stage) in enumerate(net.stages)
        rows, before, w, t = stage.rows, 1:(first(stage.rows) - 1), ws.weights.stages[k], tangent.stages[k]
        slopes!(view(D, rows, :), stage.activation, view(S, rows, :), view(Z, rows, :))
        drive = t.bias .+ t.feed * Z[before, :] .+ w.feed * dZ[before, :]
        stage.has_input && (drive .+= t.input * X)
        if stage.recurrent
            drive .+= t.recurrent * Z[rows, :]
            factors[k] = [lu(I - D[rows, j] .* w.recurrent) for j in 1:m]
            for j in 1:m
                check_interrupt()
                dZ[rows, j] = factors[k][j] \ (D[rows, j] .* drive[:, j])
            end
            dS[rows, :] = drive .+ w.recurrent * dZ[rows, :]
        else
            dS[rows, :] = drive
            dZ[rows, :] = D[rows, :] .* drive
        end
    end
    G, dG = read_out_tangents!(second, ws, problem, tangent, Z, dZ, targets, mean)
    for k in length(net.stages):-1:1
        stage = net.stages[k]
        rows, before, w, t = stage.rows, 1:(first(stage.rows) - 1), ws.weights.stages[k], tangent.stages[k]
        D2 = curvatures(stage.activation, S[rows, :], Z[rows, :]) .* dS[rows, :]
        λ, dλ = G[rows, :], dG[rows, :]
        if stage.recurrent
            for j in 1:m
                λ[:, j] = factors[k][j]' \ λ[:, j]
            end
            dλ .+= t.recurrent' * (D[rows, :] .* λ) .+ w.recurrent' * (D2 .* λ)
            for j in 1:m
                dλ[:, j] = factors[k][j]' \ dλ[:, j]
            end
        end
        E, dE = D[rows, :] .* λ, D2 .* λ .+ D[rows, :] .* dλ
        h = second.stages[k]
        stage_pullback!(ws.gradient.stages[k], G, w, E, X, Z, rows)
        # The derivative of the pullback: in E, in the state, and in the weights.
        stage_pullback!(h, dG, w, dE, X, Z, rows)
        stage.recurrent && (h.recurrent .+= E * dZ[rows, :]')
        h.feed .+= E * dZ[before, :]'
        dG[before, :] .+= t.feed' * E
    end
    return second
end

# ∂L/∂z and its tangent at the readout.
function read_out_tangents!(second, ws::Tile{T}, problem, tangent, Z, dZ, targets, mean) where {T}
    net, m = problem.net, size(Z, 2)
    G, dG = zeros(T, size(Z)), zeros(T, size(Z))
    GY, read = ws.GY[:, 1:m], net.readout
    if net.outputs == 0
        dGY = loss_curvature(problem.loss, ws.Y[:, 1:m], targets, dZ[read, :], mean...)
        for (i, neuron) in enumerate(read)
            G[neuron, :] .+= GY[i, :]
            dG[neuron, :] .+= dGY[i, :]
        end
    else
        C, dC = ws.weights.C, tangent.C
        dY = C * dZ[read, :] .+ dC * Z[read, :] .+ tangent.d
        dGY = loss_curvature(problem.loss, ws.Y[:, 1:m], targets, dY, mean...)
        G[read, :] = C' * GY
        dG[read, :] = C' * dGY .+ dC' * GY
        second.C .+= dGY * Z[read, :]' .+ GY * dZ[read, :]'
        second.d .+= vec(sum(dGY; dims = 2))
    end
    return G, dG
end

# Through the constraint: the derivative of its pullback, evaluated in dual numbers.
function pack_second!(h, net::Network{T}, w, tangent, G, second) where {T}
    for (stage, ws, ts, gs, hs) in zip(net.stages, w.stages, tangent.stages, G.stages, second.stages)
        stage.recurrent || continue
        dual = constrain!(dual_stage(stage, net, ws, ts), net.constraint, stage.slopes)
        gradient = StageWeights{Dual{Nothing, T, 1}}(stage, net.inputs)
        gradient.recurrent .= Dual{Nothing}.(gs.recurrent, hs.recurrent)
        constrain_pullback!(gradient, net.constraint, dual, stage.slopes)
        hs.raw .= only.(partials.(gradient.raw))
        hs.scales .= only.(partials.(gradient.scales))
    end
    return pack!(h, net, second)
end

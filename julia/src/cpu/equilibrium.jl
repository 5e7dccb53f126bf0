# The passes through a network: a tile of samples is brought to its equilibrium stage by stage, and the adjoint
# goes back stage by stage. Everything else (solutions, gradients, training) is made of these two passes.

# --- forward -------------------------------------------------------------------------------------------------

"""
    forward!(ws, problem, X, start = nothing)

Bring the samples `X` (features × samples, at most a tile) to their equilibrium: `ws.Z`, `ws.S` and
`ws.outcome`. `ws.weights` must be in force. `start` is the first iterate (neurons × samples), zero if absent.
"""
function forward!(ws::Tile, problem::Problem, X::AbstractMatrix, start = nothing)
    reset!(ws.outcome)
    for (k, stage) in enumerate(problem.net.stages)
        forward_stage!(ws, problem, stage, k, X, start)
    end
    return ws
end

function forward_stage!(ws::Tile, problem, stage::Stage, k::Int, X, start)
    m, c, factors = size(X, 2), ws.columns[k], factors_of(ws, k)
    drive!(c.U, ws.weights.stages[k], ws.Z, X, m, ws.threads)
    stage.recurrent || return evaluate_stage!(ws, stage.rows, stage.activation, c, m)
    start === nothing || copyto!(view(c.Z, :, 1:m), view(start, stage.rows, 1:m))
    start!(c, m; cold = start === nothing)
    factors === nothing || fill!(factors.known, false)
    f = stage.activation
    return @usual f Tanh solve_stage!(ws, problem, stage.rows, f, k)
end

function evaluate_stage!(ws::Tile, rows, f::Activation, c::Columns, m::Int)
    copyto!(c.S, 1, c.U, 1, size(c.U, 1) * m)
    for j in 1:m
        activate!(c.F, f, c.S, c.Z, j)
        ws.outcome.iterations[j] = max(ws.outcome.iterations[j], 1)
        all(isfinite, view(c.F, :, j)) || record!(ws.outcome, j, NON_FINITE, 1, NaN, 0.0)
    end
    copyto!(view(ws.Z, rows, 1:m), view(c.F, :, 1:m))
    copyto!(view(ws.S, rows, 1:m), view(c.S, :, 1:m))
    return
end

function solve_stage!(ws::Tile{T}, problem, rows, f::F, k::Int) where {T, F <: Activation}
    c, recurrence, solver, adjoint = ws.columns[k], ws.recurrences[k], problem.solver, problem.adjoint
    Z, S = view(ws.Z, rows, :), view(ws.S, rows, :)
    unique = guarantees_uniqueness(problem.net.constraint)::Bool || adjoint isa Unrolled
    tol = @usual solver Auto tolerance(solver, T)::T
    # Not by keywords, whose values would be boxed for every tile.
    stationary = Stationary{T, F, typeof(Z)}(
        recurrence.forward, recurrence, f, tol, scale_floor(T, length(rows)), Z, S, ws.outcome, unique, ws.latest,
        factors_of(ws, k), ws.threads,
    )
    if adjoint isa Unrolled
        @late unroll!(ws.chains[k], c, stationary, adjoint.steps)
    else
        @usual solver Auto solve!(solver, c, stationary)
    end
    return
end

"Picard steps whose states are all kept: chain = Z₀, S₁, Z₁, S₂, Z₂, …, as far as there are samples."
function unroll!(chain, c::Columns{T}, p::Stationary{T}, steps::Int) where {T}
    n, m = size(c.Z, 1), c.active
    while length(chain) < 2steps + 1
        push!(chain, zeros(T, n, size(c.Z, 2)))
    end
    copyto!(chain[1], 1, c.Z, 1, n * m)
    for k in 1:steps
        check_interrupt()
        affine!(c, p)
        for j in 1:m
            status, residual = evaluate!(c, p, j)
            k == steps && record!(p.outcome, j, something(status, MAX_ITERATIONS), k, residual, c.rate[j])
        end
        copyto!(chain[2k], 1, c.S, 1, n * m)
        copyto!(chain[2k + 1], 1, c.F, 1, n * m)
        copyto!(c.Z, 1, c.F, 1, n * m)
    end
    for j in 1:m
        copy_column!(p.Z, j, c.F, j)
        copy_column!(p.S, j, c.S, j)
    end
    return
end

"U = input X + feed Z + bias: the external drive of a stage."
function drive!(U::Matrix, w::StageWeights, Z, X, m, threads = 1)
    multiply!(U, w.bias, w.input, X, m, threads)
    return multiply_add!(U, w.feed, Z, m, threads)
end

"Outputs of the tile: `ws.Y = C z + d` or the neurons read."
function read_out!(ws::Tile{T}, net::Network, m::Int) where {T}
    if net.outputs == 0
        @inbounds for j in 1:m, (i, neuron) in enumerate(net.readout)
            ws.Y[i, j] = ws.Z[neuron, j]
        end
    else
        multiply!(ws.Y, ws.weights.d, ws.weights.C, view(ws.Z, first(net.readout):last(net.readout), :), m)
    end
    return ws.Y
end

# --- backward ------------------------------------------------------------------------------------------------

"""
    backward!(ws, problem, X, penalty, first_sample, dX = nothing)

Add the gradient of the tile to `ws.gradient` (with respect to the weights in force), given `ws.G` = ∂L/∂z, and return
the Jacobian penalty of the tile, which starts at `first_sample` of the batch. `ws.E` is left as ∂L/∂s. Where it is wanted,
∂L/∂x = Σ inputᵀE goes to `dX`.
"""
function backward!(ws::Tile{T}, problem::Problem, X::AbstractMatrix, penalty, first_sample, dX = nothing) where {T}
    net = problem.net
    reset!(ws.adjoint_outcome)
    dX === nothing || fill!(dX, 0)
    total = 0.0
    for k in length(net.stages):-1:1
        stage = net.stages[k]
        f = stage.activation
        total += (@usual f Tanh backward_stage!(ws, problem, stage, f, k, X, penalty, first_sample))::Float64
        dX === nothing || add_input_pullback!(dX, ws, stage, k)
    end
    return total
end

function add_input_pullback!(dX, ws::Tile, stage::Stage, k::Int)
    w = ws.weights.stages[k]
    isempty(w.input) || gemm!('T', 'N', true, w.input, view(ws.E, stage.rows, axes(dX, 2)), true, dX)
    return
end

"`ws.G` = ∂L/∂z from `ws.GY` = ∂L/∂y; the gradient of the readout is added to `ws.gradient`."
function read_out_adjoint!(ws::Tile{T}, net, m) where {T}
    fill!(view(ws.G, :, 1:m), 0)
    if net.outputs == 0
        @inbounds for j in 1:m, (i, neuron) in enumerate(net.readout)
            ws.G[neuron, j] += ws.GY[i, j]
        end
    else
        rows = first(net.readout):last(net.readout)
        transposed_multiply!(view(ws.G, rows, :), ws.weights.C, ws.GY, m)
        add_outer!(ws.gradient.C, ws.GY, view(ws.Z, rows, :), m)
        add_columns!(ws.gradient.d, ws.GY, m)
    end
    return
end

function backward_stage!(
        ws::Tile{T}, problem, stage::Stage, f::Activation, k::Int, X, penalty, first_sample
    ) where {T}
    m, rows, w, g = size(X, 2), stage.rows, ws.weights.stages[k], ws.gradient.stages[k]
    E, G, Z, S, D = (view(A, rows, 1:m) for A in (ws.E, ws.G, ws.Z, ws.S, ws.D))
    total = 0.0
    unrolled = stage.recurrent && problem.adjoint isa Unrolled
    if unrolled
        @late unroll_back!(E, g.recurrent, ws.adjoints[k], ws.chains[k], problem.adjoint.steps, f, w.recurrent, G)
    else
        slopes!(D, f, S, Z)
        direct = nothing
        if stage.recurrent && penalty.weight > 0
            total, direct = @late(add_penalty!(ws, penalty, problem.net, stage, w, g, first_sample, m))::Tuple{Float64, Matrix{T}}
        end
        if stage.recurrent
            adjoint = problem.adjoint
            @usual adjoint Implicit solve_adjoint!(
                E, adjoint, ws.adjoints[k], ws.recurrences[k], D, G;
                outcome = ws.adjoint_outcome, factors = factors_of(ws, k), latest = ws.latest, threads = ws.threads,
            )
            direct === nothing || add!(E, direct)
        else
            multiply_each!(E, D, G)
        end
    end
    # The recurrent weights act in every unrolled step, what drives the stage in the sum of them.
    unrolled ? drive_pullback!(g, ws.G, w, E, X, ws.Z, ws.threads) : stage_pullback!(g, ws.G, w, E, X, ws.Z, rows, ws.threads)
    return total
end

# Backpropagation through the chain of `unroll!`: E = Σₖ ∂L/∂sₖ, and gR += Σₖ ∂L/∂sₖ zₖ₋₁ᵀ.
function unroll_back!(E, gR, c::Columns{T}, chain, steps, f, R, G) where {T}
    m = size(G, 2)
    λ, e = view(c.Z, :, 1:m), view(c.F, :, 1:m)
    copyto!(λ, G)
    fill!(E, 0)
    for k in steps:-1:1
        check_interrupt()
        slopes!(e, f, view(chain[2k], :, 1:m), view(chain[2k + 1], :, 1:m))
        multiply_each!(e, e, λ)
        add!(E, e)
        add_outer!(gR, e, view(chain[2k - 1], :, 1:m), m)
        gemm!('T', 'N', true, R, e, false, λ)
    end
    return
end

# --- what the samples share -----------------------------------------------------------------------------------

"Samples from which the mean slopes are taken, and the Picard iterations they get."
const PILOTS, PILOT_ITERATIONS = 16, 3

"""
    prepare!(ws, problem, X)

Prepare what the samples share: coarse products where there are some, else the linearised equations ([`Linearized`](@ref)) of the
recurrent stages where the products saved outweigh the factorisation; these always, and alone, for [`Chord`](@ref). Mean slopes and
contraction rates come from a few samples spread over the batch.
"""
function prepare!(ws::CPUWorkspace{T}, problem::Problem{T}, X) where {T}
    B = size(X, 2)
    (B == 0 || problem.adjoint isa Unrolled) && return
    asked = problem.solver isa Chord
    asked || multiply_coarsely!(ws, B)
    if asked || B >= 2 * PILOTS && any(r -> may_pay(r, B), ws.recurrences)
        linearize_around!(ws, problem, X[:, 1:cld(B, PILOTS):B], B, asked)
    end
    return
end

"Let recurrent stages use coarse products for batches of B samples, if there are some and that is worth it."
multiply_coarsely!(ws::CPUWorkspace, B::Int) =
    B >= COARSE_SAMPLES && foreach(r -> multiply_coarsely!(r, Threads.nthreads()), ws.recurrences)

function linearize_around!(ws::CPUWorkspace{T}, problem::Problem{T}, pilots, B::Int, asked::Bool) where {T}
    net, m = problem.net, size(pilots, 2)
    tile = first(buffers!(ws, m, 1, 1))
    tile.latest = tile.factorised = false
    forward!(tile, Problem(net, Picard(max_iterations = PILOT_ITERATIONS), Implicit(), problem.loss, 0.0), pilots)
    finite = filter(j -> tile.outcome.status[j] !== NON_FINITE, 1:m)
    isempty(finite) && return
    for (stage, r) in zip(net.stages, ws.recurrences)
        stage.recurrent && (asked || may_pay(r, B)) || continue
        n = length(stage.rows)
        D = slopes!(zeros(T, n, length(finite)), stage.activation, tile.S[stage.rows, finite], tile.Z[stage.rows, finite])
        fill!(r.slope, 0)
        add_columns!(r.slope, D, length(finite))
        rmul!(r.slope, T(1 / length(finite)))
        all(isfinite, r.slope) || continue
        rate = mean_rate(view(tile.outcome.rate, finite))
        spread = deviation(D, r.slope)
        tol = Float64(tolerance(problem.solver, T))
        saved = 2 * (products(rate, tol) - products(rate * spread, tol) - 2)
        asked || pays(saved, n, B) || continue
        linearize!(r, Threads.nthreads())
    end
    return
end

# ‖D - mean‖ / ‖D‖ for the mean of its columns.
function deviation(D, mean)
    left, whole = 0.0, 0.0
    for j in axes(D, 2), i in axes(D, 1)
        left += (Float64(D[i, j]) - mean[i])^2
        whole += Float64(D[i, j])^2
    end
    return sqrt(left / whole)
end

# Whether any number of products saved could pay.
function may_pay(r::Recurrence, B)
    n = size(r.R, 1)
    return !r.coarse && n > LANE_NEURONS && pays(MOST_SAVED, n, B)
end

mean_rate(rates) = sum(rate -> clamp(rate, 0.05, 0.98), rates) / length(rates)

"Iterations to the tolerance at a rate."
products(rate, tol) = log(tol) / log(clamp(rate, 0.02, 0.98))

# --- solutions ------------------------------------------------------------------------------------------------

function solve_batch!(solution::Solution, ws::CPUWorkspace, problem::Problem, p, X, start)
    net, B = problem.net, size(X, 2)
    unpack!(ws, p)
    problem.solver isa Chord && prepare!(ws, problem, X)
    problem.solver isa Auto && multiply_coarsely!(ws, B)
    amplifications = Float64[
        stage.recurrent ? amplification(net.constraint, w, stage.slopes) : 1.0 for (stage, w) in zip(net.stages, ws.weights.stages)
    ]
    threads = threads_for(net, B)
    tiles = pieces_of(B, tile_width(net, B))
    buffers = buffers!(ws, B, threads, length(tiles))
    in_parallel(length(tiles), length(buffers)) do thread, k
        samples, tile = tiles[k], buffers[thread]
        tile.latest = tile.factorised = false
        forward!(tile, problem, view(X, :, samples), columns_of(start, samples))
        copyto!(view(solution.state, :, samples), view(tile.Z, :, 1:length(samples)))
        copy_outcome!(solution.outcome, samples, tile.outcome)
        certify!(view(solution.bound, samples), tile, net, view(X, :, samples), amplifications)
    end
    return solution
end

"""
    certify!(bound, ws, net, X, amplifications)

The bound on max |z - z*| per sample. With e the elementwise error bound of the stages before and r the
residual of a stage, its error is at most A ‖r + L |feed| e‖ in the norm of its constraint, where A is its
[`amplification`](@ref).
"""
function certify!(bound, ws::Tile, net::Network, X, amplifications)
    any(isnan, amplifications) && return fill!(bound, NaN)
    m = size(X, 2)
    error = zeros(size(ws.Z, 1), m)
    weighted = net.constraint isa Union{InfNorm, Perron}
    for (k, stage) in enumerate(net.stages)
        w, c, rows = ws.weights.stages[k], ws.columns[k], stage.rows
        before = 1:(first(rows) - 1)
        fed = view(error, rows, :)
        isempty(before) || multiply_add!(fed, map(x -> Float64(abs(x)), w.feed), view(error, before, :), m)
        copyto!(view(c.Z, :, 1:m), view(ws.Z, rows, 1:m))
        drive!(c.U, w, ws.Z, X, m)
        stage.recurrent ? multiply!(c.S, c.U, w.recurrent, c.Z, m) : copyto!(c.S, c.U)
        f = stage.activation
        @usual f Tanh bound_errors!(fed, c, f, stage.slopes, amplifications[k], stage.recurrent ? w.scaling : nothing, weighted, m)
    end
    for j in 1:m
        largest = 0.0
        for i in axes(error, 1)
            largest = worse(error[i, j], largest)
        end
        bound[j] = largest
    end
    return bound
end

# From what the error of the stages before does to the argument of a stage, |feed| e, to the bounds on its own errors: in the norm
# weighted with `scaling` of a recurrent stage, the largest entry or the Euclidean one.
function bound_errors!(fed, c::Columns, f::Activation, slopes, amplification, scaling, weighted::Bool, m::Int)
    for j in 1:m
        activate!(c.F, f, c.S, c.Z, j)
        largest = 0.0
        @inbounds for i in axes(fed, 1)
            e = abs(Float64(c.F[i, j]) - c.Z[i, j]) + slopes[i] * fed[i, j]
            fed[i, j] = e
            scaling === nothing || (largest = worse(scaling[i] * e, largest))
        end
        scaling === nothing && continue
        norm = weighted ? zero(largest) : euclidean_norm(view(fed, :, j))
        @inbounds for i in axes(fed, 1)
            fed[i, j] = amplification * (weighted ? largest / scaling[i] : norm)
        end
    end
    return
end

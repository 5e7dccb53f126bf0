# The way through a network: a tile of samples goes stage by stage to its equilibrium, and the adjoint comes
# back stage by stage. Everything else (solutions, gradients, training) is made of these two passes.

const SOLVERS = (; Auto, Picard, Anderson, Newton, Chord, NLsolve = NLsolver)

"""
    Problem(net; solver = Auto(), adjoint = Implicit(), loss = MSE(), jacobian_penalty = 0)

A network with all that is chosen about its solution and its training; for the penalty see [`JacobianPenalty`](@ref).
"""
struct Problem{T}
    net::Network{T}
    # Left abstract: they are dispatched on once per tile, and the code is compiled once for all of their combinations.
    solver::Solver
    adjoint::Adjoint
    loss::Loss
    jacobian_penalty::Float64
end
function Problem(net::Network; solver = Auto(), adjoint = Implicit(), loss = MSE(), jacobian_penalty = 0.0)
    jacobian_penalty >= 0 || throw(ArgumentError("jacobian_penalty must not be negative, got $jacobian_penalty"))
    jacobian_penalty > 0 && adjoint isa Unrolled &&
        throw(ArgumentError("the Jacobian penalty is taken at an equilibrium, which Unrolled does not have"))
    return Problem(net, solver, adjoint, loss, Float64(jacobian_penalty))
end

"""
    Workspace(problem)

All buffers of a solve and of a gradient, for a tile of `width` samples; the batch is worked through tile by
tile, so memory does not grow with the batch or with the number of iterations.
"""
struct Workspace{T}
    width::Int
    weights::Weights{T}
    gradient::Weights{T}
    Z::Matrix{T}                              # N × width: state, pre-activation, ∂L/∂z, ∂L/∂s, f′(s)
    S::Matrix{T}
    G::Matrix{T}
    E::Matrix{T}
    Y::Matrix{T}                              # outputs × width: outputs, ∂L/∂y
    GY::Matrix{T}
    D::Matrix{T}
    columns::Vector{Columns{T}}               # per stage
    adjoints::Vector{Columns{T}}
    chains::Vector{Vector{Matrix{T}}}         # per stage: Z₀, S₁, Z₁, S₂, … of unrolled steps
    outcome::Outcome                          # per sample of the tile
    adjoint_outcome::Outcome
end

function Workspace(problem::Problem{T}; width = tile_width(problem.net)) where {T}
    net = problem.net
    N, k = neurons(net), output_size(net)
    recurrent = [stage.recurrent ? length(stage.rows) : 0 for stage in net.stages]
    return Workspace{T}(
        width, Weights(net), Weights(net),
        (zeros(T, N, width) for _ in 1:4)..., zeros(T, k, width), zeros(T, k, width), zeros(T, N, width),
        [Columns{T}(length(stage.rows), width) for stage in net.stages],
        [Columns{T}(n, n > 0 ? width : 0) for n in recurrent],
        [Matrix{T}[] for _ in net.stages],
        Outcome(width), Outcome(width),
    )
end

"Samples in a tile: a handful of N × width matrices should stay in a core's L2 cache (1 MiB or so)."
tile_width(net::Network{T}) where {T} = clamp(2^16 ÷ (neurons(net) * sizeof(T) ÷ 4), 64, 1024)

# --- forward -------------------------------------------------------------------------------------------------

"""
    forward!(ws, problem, X, start = nothing)

Bring the samples `X` (features × samples, at most a tile) to their equilibrium: `ws.Z`, `ws.S` and
`ws.outcome`. `ws.weights` must be in force. `start` is the first iterate (neurons × samples), zero if absent.
"""
function forward!(ws::Workspace, problem::Problem, X::AbstractMatrix, start = nothing)
    reset!(ws.outcome)
    for (k, stage) in enumerate(problem.net.stages)
        forward_stage!(ws, problem, stage, ws.weights.stages[k], ws.columns[k], ws.chains[k], X, start)
    end
    return ws
end

function forward_stage!(ws::Workspace{T}, problem, stage::Stage, w, c::Columns{T}, chain, X, start) where {T}
    m = size(X, 2)
    rows = stage.rows
    drive!(c.U, w, ws.Z, X, m)
    if !stage.recurrent
        for j in 1:m
            copyto!(c.S, (j - 1) * size(c.S, 1) + 1, c.U, (j - 1) * size(c.U, 1) + 1, size(c.U, 1))
            activate!(c.F, stage.activation, c.S, c.Z, j)
            ws.outcome.iterations[j] = max(ws.outcome.iterations[j], 1)
            all(isfinite, view(c.F, :, j)) || record!(ws.outcome, j, NON_FINITE, 1, NaN, 0.0)
        end
        copyto!(view(ws.Z, rows, 1:m), view(c.F, :, 1:m))
        copyto!(view(ws.S, rows, 1:m), view(c.S, :, 1:m))
        return
    end
    start === nothing ? fill!(view(c.Z, :, 1:m), 0) : copyto!(view(c.Z, :, 1:m), view(start, rows, 1:m))
    start!(c, m)
    check = !guarantees_uniqueness(problem.net.constraint)::Bool && !(problem.adjoint isa Unrolled)
    stationary = Stationary(
        w.recurrent, stage.activation, tolerance(problem.solver, T)::T, scale_floor(T, length(rows)),
        view(ws.Z, rows, :), view(ws.S, rows, :), ws.outcome, check,
        check ? norm_estimate(w.recurrent) : zero(T),
    )
    problem.adjoint isa Unrolled ? unroll!(chain, c, stationary, problem.adjoint.steps) : solve!(problem.solver, c, stationary)
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

"U = input X + feed Z + bias: all that drives a stage from outside."
function drive!(U::Matrix{T}, w::StageWeights{T}, Z, X, m) where {T}
    n = size(U, 1)
    @inbounds for j in 1:m
        @simd for i in 1:n
            U[i, j] = w.bias[i]
        end
    end
    size(w.input, 2) > 0 && multiply_add!(U, w.input, X, m)
    size(w.feed, 2) > 0 && multiply_add!(U, w.feed, Z, m)
    return U
end

# U[:, 1:m] += A B[1:k, 1:m], by plain loops where a BLAS call would cost more than the work.
function multiply_add!(U::Matrix{T}, A::Matrix{T}, B::AbstractMatrix, m::Int) where {T}
    n, k = size(A)
    if n * k <= SMALL^2
        @inbounds for j in 1:m, l in 1:k
            b = B[l, j]
            @simd for i in 1:n
                U[i, j] = muladd(A[i, l], b, U[i, j])
            end
        end
    else
        mul!(view(U, :, 1:m), A, view(B, 1:k, 1:m), one(T), one(T))
    end
    return U
end

"Outputs of the tile: `ws.Y = C z + d` or the neurons read."
function read_out!(ws::Workspace{T}, net::Network, m::Int) where {T}
    if net.outputs == 0
        @inbounds for j in 1:m, (i, neuron) in enumerate(net.readout)
            ws.Y[i, j] = ws.Z[neuron, j]
        end
    else
        ws.Y .= ws.weights.d
        first_read = first(net.readout)
        mul!(view(ws.Y, :, 1:m), ws.weights.C, view(ws.Z, first_read:last(net.readout), 1:m), one(T), one(T))
    end
    return ws.Y
end

# --- backward ------------------------------------------------------------------------------------------------

"""
    backward!(ws, problem, X, penalty, first_sample)

Add the gradient of the tile to `ws.gradient` (with respect to the weights in force), given `ws.GY` = ∂L/∂y, and return
the Jacobian penalty of the tile, which starts at `first_sample` of the batch. `ws.E` is left as ∂L/∂s, from which
∂L/∂x = Σ inputᵀE.
"""
function backward!(
        ws::Workspace{T}, problem::Problem, X::AbstractMatrix, penalty = JacobianPenalty(0.0, 0, 1), first_sample = 1
    ) where {T}
    net, m = problem.net, size(X, 2)
    read_out_adjoint!(ws, net, m)
    reset!(ws.adjoint_outcome)
    total = 0.0
    for k in length(net.stages):-1:1
        total += backward_stage!(ws, problem, net.stages[k], k, X, penalty, first_sample)
    end
    return total
end

function read_out_adjoint!(ws::Workspace{T}, net, m) where {T}
    fill!(view(ws.G, :, 1:m), 0)
    if net.outputs == 0
        @inbounds for j in 1:m, (i, neuron) in enumerate(net.readout)
            ws.G[neuron, j] += ws.GY[i, j]
        end
    else
        rows = first(net.readout):last(net.readout)
        GY = view(ws.GY, :, 1:m)
        mul!(view(ws.G, rows, 1:m), ws.weights.C', GY)
        mul!(ws.gradient.C, GY, view(ws.Z, rows, 1:m)', one(T), one(T))
        add_columns!(ws.gradient.d, ws.GY, m)
    end
    return
end

function backward_stage!(ws::Workspace{T}, problem, stage::Stage, k::Int, X, penalty, first_sample) where {T}
    m, rows, w, g = size(X, 2), stage.rows, ws.weights.stages[k], ws.gradient.stages[k]
    E, G, Z, S, D = (view(A, rows, 1:m) for A in (ws.E, ws.G, ws.Z, ws.S, ws.D))
    total = 0.0
    if stage.recurrent && problem.adjoint isa Unrolled
        unroll_back!(E, g.recurrent, ws.adjoints[k], ws.chains[k], problem.adjoint.steps, stage.activation, w.recurrent, G)
    else
        slopes!(D, stage.activation, S, Z)
        direct = nothing
        if stage.recurrent && penalty.weight > 0
            total, direct = add_penalty!(ws, penalty, problem.net, stage, w, g, first_sample, m)
        end
        if stage.recurrent
            solve_adjoint!(E, problem.adjoint, ws.adjoints[k], w.recurrent, D, G, ws.adjoint_outcome)
            direct === nothing || (E .+= direct)
            add_outer!(g.recurrent, E, Z, m)
        else
            E .= D .* G
        end
    end
    add_columns!(g.bias, E, m)
    size(w.input, 2) > 0 && add_outer!(g.input, E, X, m)
    before = size(w.feed, 2)
    if before > 0
        add_outer!(g.feed, E, view(ws.Z, 1:before, 1:m), m)
        mul!(view(ws.G, 1:before, 1:m), w.feed', E, one(T), one(T))
    end
    return total
end

# Backpropagation through the chain of `unroll!`: E = Σₖ ∂L/∂sₖ, and gR += Σₖ ∂L/∂sₖ zₖ₋₁ᵀ.
function unroll_back!(E, gR, c::Columns{T}, chain, steps, f, R, G) where {T}
    m = size(G, 2)
    λ, e = view(c.Z, :, 1:m), view(c.F, :, 1:m)
    copyto!(λ, G)
    fill!(E, 0)
    for k in steps:-1:1
        slopes!(e, f, view(chain[2k], :, 1:m), view(chain[2k + 1], :, 1:m))
        e .*= λ
        E .+= e
        add_outer!(gR, e, view(chain[2k - 1], :, 1:m), m)
        mul!(λ, R', e)
    end
    return
end

# G += A Bᵀ over the first m columns.
function add_outer!(G::Matrix{T}, A, B, m) where {T}
    n, k = size(G)
    if n * k <= SMALL^2
        @inbounds for j in 1:m, l in 1:k
            b = B[l, j]
            @simd for i in 1:n
                G[i, l] = muladd(A[i, j], b, G[i, l])
            end
        end
    else
        mul!(G, A, view(B, :, 1:m)', one(T), one(T))
    end
    return G
end

function add_columns!(g, A, m)
    @inbounds for j in 1:m
        @simd for i in eachindex(g)
            g[i] += A[i, j]
        end
    end
    return g
end

# --- solutions ------------------------------------------------------------------------------------------------

"""
    Solution

The equilibria of a batch: `state` (neurons × samples) and, per sample, `status`, `iterations`, the relative
`residual`, the contraction `rate` observed and `bound`, a certified bound on max |z - z*| (NaN where the
constraint gives none).
"""
struct Solution{T}
    state::Matrix{T}
    status::Vector{Status}
    iterations::Vector{Int32}
    residual::Vector{Float64}
    rate::Vector{Float64}
    bound::Vector{Float64}
end

"A solution for so many samples, to be filled in."
Solution(net::Network{T}, samples::Int) where {T} = Solution{T}(
    Matrix{T}(undef, neurons(net), samples), Vector{Status}(undef, samples), Vector{Int32}(undef, samples),
    (Vector{Float64}(undef, samples) for _ in 1:3)...
)

"Which samples reached their equilibrium."
converged(s::Solution) = s.status .== CONVERGED

"""
    equilibrium(net, p, X; solver = Auto(), start = nothing)

The [`Solution`](@ref) for the samples `X` (features × samples) and the parameters `p`; `start` (neurons ×
samples) is the first iterate, zero if absent. Nothing is thrown for unconverged samples: see `status`.
"""
function equilibrium(net::Network{T}, p::AbstractVector, X::AbstractMatrix; solver = Auto(), start = nothing) where {T}
    problem = Problem(net; solver)
    return equilibrium!(Solution(net, size(X, 2)), Workspace(problem), problem, p, X, start)
end

function equilibrium!(solution::Solution, ws::Workspace, problem::Problem, p, X, start = nothing)
    check_features(problem.net, X)
    unpack!(ws.weights, problem.net, p)
    each_tile(ws, size(X, 2)) do samples
        m = length(samples)
        forward!(ws, problem, view(X, :, samples), start === nothing ? nothing : view(start, :, samples))
        copyto!(view(solution.state, :, samples), view(ws.Z, :, 1:m))
        for (name, values) in ((:status, solution.status), (:iterations, solution.iterations), (:residual, solution.residual), (:rate, solution.rate))
            copyto!(view(values, samples), view(getfield(ws.outcome, name), 1:m))
        end
        certify!(view(solution.bound, samples), ws, problem.net, view(X, :, samples))
    end
    return solution
end

check_features(net, X) = size(X, 1) == net.inputs ||
    throw(DimensionMismatch("the network takes $(net.inputs) features, the samples have $(size(X, 1))"))

function each_tile(work, ws::Workspace, samples::Int)
    for first_sample in 1:ws.width:samples
        work(first_sample:min(first_sample + ws.width - 1, samples))
    end
    return
end

"""
    certify!(bound, ws, net, X)

The bound on max |z - z*| per sample. With e the elementwise error bound of the stages before and r the
residual of a stage, its error is at most A ‖r + L |feed| e‖ in the norm of its constraint, where A is its
[`amplification`](@ref).
"""
function certify!(bound, ws::Workspace, net::Network, X)
    constant = [stage.recurrent ? amplification(net.constraint, w, stage.slopes) : 1.0 for (stage, w) in zip(net.stages, ws.weights.stages)]
    any(isnan, constant) && return fill!(bound, NaN)
    m = size(X, 2)
    error = zeros(size(ws.Z, 1), m)
    for (k, stage) in enumerate(net.stages)
        w, c, rows = ws.weights.stages[k], ws.columns[k], stage.rows
        Z = ws.Z[rows, 1:m]
        copyto!(view(c.Z, :, 1:m), Z)
        drive!(c.U, w, ws.Z, X, m)
        stage.recurrent ? affine!(c.S, w.recurrent, c.Z, c.U, m) : copyto!(c.S, c.U)
        foreach(j -> activate!(c.F, stage.activation, c.S, c.Z, j), 1:m)
        e = abs.(view(c.F, :, 1:m) .- Z) .+ stage.slopes .* (abs.(w.feed) * view(error, 1:(first(rows) - 1), 1:m))
        if stage.recurrent
            stretch = net.constraint isa Union{InfNorm, Perron} ? w.stretch : ones(length(rows))
            measure = net.constraint isa Union{InfNorm, Perron} ? maximum : norm
            for j in 1:m
                e[:, j] .= constant[k] * measure(stretch .* view(e, :, j)) ./ stretch
            end
        end
        error[rows, :] .= e
    end
    for j in 1:m
        bound[j] = maximum(view(error, :, j))
    end
    return bound
end

# The buffers of the CPU: those of a tile of samples, one set per thread, and those that tiles share.

"""
    Tile(net, width)

The buffers of one thread for a tile of `width` samples. The batch is worked through tile by tile, so memory does not grow with
the batch or with the number of iterations.
"""
mutable struct Tile{T}
    const width::Int
    const weights::Weights{T}                 # in force, shared
    const recurrences::Vector{Recurrence{T}}  # per stage, shared
    gradient::Weights{T}                      # to which backward! adds
    const Z::Matrix{T}                        # N × width: state, pre-activation, ∂L/∂z, ∂L/∂s, f′(s)
    const S::Matrix{T}
    const G::Matrix{T}
    const E::Matrix{T}
    const Y::Matrix{T}                        # outputs × width: outputs, ∂L/∂y
    const GY::Matrix{T}
    const D::Matrix{T}
    const columns::Vector{Columns{T, Nothing}}     # per stage
    const adjoints::Vector{Columns{T, Matrix{T}}}
    const factors::Vector{Union{Nothing, Factorisations{T}}}    # of Newton's method, where the adjoint is going to use them
    const chains::Vector{Vector{Matrix{T}}}   # per stage: Z₀, S₁, Z₁, S₂, … of unrolled steps
    const outcome::Outcome                    # per sample of the tile
    const adjoint_outcome::Outcome
    threads::Int                              # among which products may be shared
    latest::Bool                              # whether the values of the last evaluations are wanted, see `store_result!`
    factorised::Bool                          # whether the factorisations of Newton's method are
end

function Tile(net::Network{T}, width::Int, weights, recurrences, gradient) where {T}
    N, k = neurons(net), output_size(net)
    recurrent = [stage.recurrent ? length(stage.rows) : 0 for stage in net.stages]
    return Tile{T}(
        width, weights, recurrences, gradient,
        (zeros(T, N, width) for _ in 1:4)..., zeros(T, k, width), zeros(T, k, width), zeros(T, N, width),
        [Columns{T}(length(stage.rows), width) for stage in net.stages],
        [Columns{T}(n, n > 0 ? width : 0, zeros(T, n, n > 0 ? width : 0)) for n in recurrent],
        Union{Nothing, Factorisations{T}}[nothing for _ in net.stages],
        [Matrix{T}[] for _ in net.stages],
        Outcome(width), Outcome(width), 1, false, false,
    )
end

# --- all buffers ----------------------------------------------------------------------------------------------

"""
    CPUWorkspace(net)

The [`AbstractWorkspace`](@ref) of the CPU: the weights in force, a [`Tile`](@ref) per thread, and the partial sums of the
gradient.
"""
mutable struct CPUWorkspace{T} <: AbstractWorkspace{T}
    const net::Network{T}
    const weights::Weights{T}
    const recurrences::Vector{Recurrence{T}}
    const tiles::Vector{Tile{T}}              # per thread, made when first needed
    const gradients::Vector{Weights{T}}       # per share of the batch
    const summaries::Vector{Summary}
    const sample_lanes::Vector{Any}           # of a tiny net, made when first needed
    const owner::Owner
end

function CPUWorkspace(net::Network{T}) where {T}
    weights = Weights(net)
    return CPUWorkspace{T}(
        net, weights, [Recurrence(w.recurrent) for w in weights.stages], Tile{T}[], [Weights(net)], [Summary()], Any[], Owner(),
    )
end

allocate(::CPUWorkspace{T}, dimensions::Int...) where {T} = zeros(T, dimensions)

"Put the parameters into force."
function unpack!(ws::CPUWorkspace, p)
    unpack!(ws.weights, ws.net, p)
    foreach(r -> refresh!(r, Threads.nthreads()), ws.recurrences)
    return ws
end

"""
    buffers!(ws, samples, threads, pieces)

A [`Tile`](@ref) for each of the threads that can work at once on a batch of so many samples. Threads that a single tile leaves
idle share its products.
"""
function buffers!(ws::CPUWorkspace, samples::Int, threads::Int, pieces::Int)
    width, workers = maximum(tile -> tile.width, ws.tiles; init = tile_width(ws.net, samples)), min(threads, pieces)
    all(tile -> tile.width == width, ws.tiles) || empty!(ws.tiles)
    while length(ws.tiles) < workers
        push!(ws.tiles, Tile(ws.net, width, ws.weights, ws.recurrences, ws.gradients[1]))
    end
    foreach(tile -> tile.threads = pieces == 1 ? threads : 1, ws.tiles)
    return view(ws.tiles, 1:workers)
end

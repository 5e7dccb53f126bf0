# The weights of a network as dense matrices per stage, unpacked from the flat parameter vector; gradients
# have the same form and are packed back.

"""
    StageWeights{T}

The weights of one stage of n neurons: `z = f(input x + feed z_before + recurrent z + bias)`. The same struct
holds gradients. `raw` and `scales` are the parameters that determine `recurrent`, see [`constrain!`](@ref).
"""
mutable struct StageWeights{T}
    const input::Matrix{T}          # n × d, or n × 0
    const feed::Matrix{T}           # n × neurons of the stages before
    const raw::Matrix{T}            # n × n, or 0 × 0
    const recurrent::Matrix{T}
    const bias::Vector{T}
    const scales::Vector{T}
    const scaling::Vector{T}        # exp.(scales), up to a common factor
    const row_sum::Vector{T}
    const row_factor::Vector{T}
end

function StageWeights{T}(stage::Stage, inputs::Int) where {T}
    n = length(stage.rows)
    m = stage.recurrent ? n : 0
    return StageWeights{T}(
        zeros(T, n, stage.has_input ? inputs : 0), zeros(T, n, first(stage.rows) - 1), zeros(T, m, m), zeros(T, m, m),
        zeros(T, n), zeros(T, length(stage.scales)), ones(T, m), zeros(T, m), zeros(T, m),
    )
end

"""
    Weights(net, T = eltype(net))

All weights of `net`: one [`StageWeights`](@ref) per stage, and the readout `y = C z_read + d`.
"""
struct Weights{T}
    stages::Vector{StageWeights{T}}
    C::Matrix{T}
    d::Vector{T}
end

function Weights(net::Network{V}, ::Type{T} = V) where {V, T}
    stages = [StageWeights{T}(stage, net.inputs) for stage in net.stages]
    return Weights{T}(stages, zeros(T, net.outputs, net.outputs > 0 ? length(net.readout) : 0), zeros(T, net.outputs))
end

# The position of a connection's block: the matrix of its stage, and the block's rows and columns in it.
function target(w::StageWeights, stage::Stage, c::Connection)
    start = first(stage.rows)
    rows = (first(c.rows) - start + 1):(last(c.rows) - start + 1)
    c.from == 0 && return w.input, rows, c.cols
    last(c.cols) < start && return w.feed, rows, c.cols
    return w.raw, rows, (first(c.cols) - start + 1):(last(c.cols) - start + 1)
end

# Call `move(array, i, q, count)` for numbers that lie together in an array of weights, from its entry i on, and among the parameters, from q.
@inline function each_run(move::F, w::Weights, net::Network) where {F}
    for (stage, s) in zip(net.stages, w.stages)
        for c in stage.connections
            matrix, rows, cols = target(s, stage, c)
            n, count = size(matrix, 1), length(rows)
            if count == n
                move(matrix, (first(cols) - 1) * n + 1, c.offset + 1, n * length(cols))
            else
                foreach(k -> move(matrix, (cols[k] - 1) * n + first(rows), c.offset + (k - 1) * count + 1, count), eachindex(cols))
            end
        end
        move(s.bias, 1, net.bias + first(stage.rows), length(s.bias))
        move(s.scales, 1, first(stage.scales), length(s.scales))
    end
    move(w.C, 1, net.weights_out + 1, length(w.C))
    move(w.d, 1, net.weights_out + length(w.C) + 1, length(w.d))
    return w
end

"""
    unpack!(w::Weights, net, p)

Fill `w` from the parameter vector `p` and apply the constraint.
"""
function unpack!(w::Weights, net::Network, p)
    check_length(net, p)
    each_run((array, i, q, count) -> copy_run!(array, i, p, q, count), w, net)
    for (stage, s) in zip(net.stages, w.stages)
        stage.recurrent && constrain!(s, net.constraint, stage.slopes)
    end
    return w
end

"""
    pack_gradient!(g, net, G::Weights, w::Weights)

The flat gradient `g` from the gradients `G` with respect to the weights in force, through the constraint.
"""
function pack_gradient!(g::AbstractVector, net::Network, G::Weights, w::Weights)
    for (stage, Gs, ws) in zip(net.stages, G.stages, w.stages)
        stage.recurrent && constrain_pullback!(Gs, net.constraint, ws, stage.slopes)
    end
    return pack!(g, net, G)
end

"The inverse of [`unpack!`](@ref): `g` from `G`, with its raw recurrent weights and scales."
function pack!(g::AbstractVector, net::Network, G::Weights)
    check_length(net, g)
    each_run((array, i, q, count) -> copy_run!(g, q, array, i, count), G, net)
    return g
end

function clear!(G::Weights)
    for s in G.stages
        foreach(array -> fill!(array, 0), (s.input, s.feed, s.recurrent, s.bias))
    end
    fill!(G.C, 0)
    fill!(G.d, 0)
    return G
end

function add!(G::Weights, H::Weights, threads::Int = 1)
    for (a, b) in zip(G.stages, H.stages)
        add!(a.input, b.input)
        for (A, B) in ((a.feed, b.feed), (a.recurrent, b.recurrent))
            in_blocks(columns -> add!(view(A, :, columns), view(B, :, columns)), size(A, 2), threads)
        end
        add!(a.bias, b.bias)
    end
    add!(G.C, H.C)
    add!(G.d, H.d)
    return G
end

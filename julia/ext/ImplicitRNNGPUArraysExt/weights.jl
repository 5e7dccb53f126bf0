# The weights in force, on the device: unpacked from the flat parameter vector, constrained, and their gradient packed back. The same
# as for the CPU, in terms of whole arrays.

"The weights of a stage, from the inputs, from the preceding stages connected to it, and its own; and those that read it."
struct DeviceStage{T, M <: AbstractMatrix{T}, V <: AbstractVector{T}}
    input::M
    feeds::Vector{Pair{Int, M}}           # stage before => block
    raw::M
    recurrent::M
    transposed::M                         # of `recurrent`
    bias::V
    scaling::V                            # exp of the learnt scales
    readout::M                            # outputs × neurons of the stage; no rows where nothing reads it
    slopes::V                             # bounds on |f′|
end

"Room for the weights of all stages, in arrays that `make` returns."
function device_stages(net::Network{T}, make) where {T}
    M, V = typeof(make(0, 0)), typeof(make(0))
    return map(net.stages) do stage
        n = length(stage.rows)
        m, outputs = stage.recurrent ? n : 0, reads(net, stage) ? output_size(net) : 0
        feeds = Pair{Int, M}[l => make(n, length(net.stages[l].rows)) for l in sources(net, stage)]
        slopes = copyto!(make(n), T.(stage.slopes))
        readout = make(outputs, n)
        net.outputs == 0 && outputs > 0 && copyto!(readout, selection(net, stage))
        return DeviceStage{T, M, V}(
            make(n, stage.has_input ? net.inputs : 0), feeds, make(m, m), make(m, m), make(m, m), make(n), fill!(make(m), 1), readout, slopes
        )
    end
end

"The stages before a stage that are connected to it."
function sources(net, stage::Stage)
    feeds(s) = s !== stage && any(c -> c.from > 0 && c.cols ⊆ s.rows, stage.connections)
    return findall(feeds, net.stages)
end

"Whether the outputs read the stage."
reads(net, stage::Stage) = any(in(stage.rows), net.readout)

"The readout of a stage whose neurons are the outputs: a matrix of ones at those."
function selection(net::Network{T}, stage::Stage) where {T}
    C = zeros(T, output_size(net), length(stage.rows))
    for (k, neuron) in enumerate(net.readout)
        neuron in stage.rows && (C[k, neuron - first(stage.rows) + 1] = 1)
    end
    return C
end

# --- the places in the parameter vector ---------------------------------------------------------------------------------

"Where the block of a connection lies: in which of a stage's matrices (`raw` or another that stands for it)."
function block_of(net, stage::Stage, input, feeds, raw, c::Connection)
    rows = c.rows .- (first(stage.rows) - 1)
    c.from == 0 && return view(input, rows, c.cols)
    c.cols ⊆ stage.rows && return view(raw, rows, c.cols .- (first(stage.rows) - 1))
    l, block = only(filter(((l, _),) -> c.cols ⊆ net.stages[l].rows, feeds))
    return view(block, rows, c.cols .- (first(net.stages[l].rows) - 1))
end

"Neurons of the stage that linear outputs read."
readout_columns(net, stage::Stage) = net.readout .- (first(stage.rows) - 1)

"Unpack the parameters, on the device, and constrain them."
function unpack_stages!(stages, offset, net::Network, p, constraint = net.constraint)
    for (stage, w) in zip(net.stages, stages)
        for c in stage.connections
            block_of(net, stage, w.input, w.feeds, w.raw, c) .= connection_weights(p, c)
        end
        w.bias .= view(p, net.bias .+ stage.rows)
        isempty(stage.scales) || exponentials!(w.scaling, view(p, stage.scales))
        if stage.recurrent
            apply_constraint!(w, constraint, stage.slopes)
            permutedims!(w.transposed, w.recurrent, (2, 1))
        end
        net.outputs == 0 || isempty(w.readout) ||
            (view(w.readout, :, readout_columns(net, stage)) .= readout_weights(net, p))
    end
    net.outputs == 0 || (offset .= readout_bias(net, p))
    return
end

# The extremes stay on the device.
function ImplicitRNN.exponentials!(scaling::AbstractGPUArray, scales)
    low, high = minimum(scales; dims = 1), maximum(scales; dims = 1)
    return scaling .= exp_bounded.(scales .- (low ./ 2 .+ high ./ 2))
end

# --- constraints and their derivatives ------------------------------------------------------------------------------------

apply_constraint!(w::DeviceStage, ::Free, slopes) = copyto!(w.recurrent, w.raw)
function apply_constraint!(w::DeviceStage, c::Union{InfNorm, Perron}, slopes)
    w.recurrent .= row_factors(w, c) .* w.raw .* (w.scaling' ./ w.scaling)
    return
end
function apply_constraint!(w::DeviceStage{T}, c::Union{Spectral, Monotone}, slopes) where {T}
    size, _ = matrix_size(c, on_host(w.raw), slopes)
    w.recurrent .= T(min(1, limit(c) / size)) .* w.raw
    return
end

row_factors(w::DeviceStage{T}, c) where {T} = min.(one(T), T(c.kappa) ./ w.slopes ./ sum(abs, w.raw; dims = 2))

"""
∂L/∂raw, and for [`Perron`](@ref ImplicitRNN.Perron) ∂L/∂scales, from `G` = ∂L/∂R, which may be overwritten; see `constrain_pullback!`.
"""
pull_back_constraint!(G, ::Free, w::DeviceStage, slopes) = (G, nothing)
function pull_back_constraint!(G, c::Union{InfNorm, Perron}, w::DeviceStage{T}, slopes) where {T}
    flow, factors = G .* w.recurrent, row_factors(w, c)
    inner = sum(flow; dims = 2)
    scales = c isa Perron ? vec(sum(flow; dims = 1)) .- vec(inner) : nothing
    loss = ifelse.(factors .< 1, inner ./ sum(abs, w.raw; dims = 2), zero(T))
    G .= G .* factors .* (w.scaling' ./ w.scaling) .- sign.(w.raw) .* loss
    return G, scales
end
function pull_back_constraint!(G, c::Union{Spectral, Monotone}, w::DeviceStage{T}, slopes) where {T}
    size, direction = matrix_size(c, on_host(w.raw), slopes)
    size <= limit(c) && return G, nothing
    inner = sum(G .* w.raw)
    G .= T(limit(c) / size) .* (G .- T(inner / size) .* copyto!(similar(G), T.(direction)))
    return G, nothing
end

"Pack the gradient of stage k with respect to its weights in force: `input` and `feeds` as the stage has them, and `recurrent`."
function pack_stage!(g, ws, k, input, feeds, recurrent, bias)
    net, stage, w = ws.net, ws.net.stages[k], ws.stages[k]
    raw = recurrent
    if stage.recurrent
        raw, scales = pull_back_constraint!(recurrent, net.constraint, w, stage.slopes)
        scales === nothing || (view(g, stage.scales) .= scales)
    end
    for c in stage.connections
        connection_weights(g, c) .= block_of(net, stage, input, feeds, raw, c)
    end
    view(g, net.bias .+ stage.rows) .= vec(bias)
    return
end

"Pack the gradient of the linear outputs: `weights` for all neurons of stage k, of which some are read."
function pack_readout!(g, net, k, weights, offset)
    readout_weights(net, g) .= weights[:, readout_columns(net, net.stages[k])]
    readout_bias(net, g) .= vec(offset)
    return
end

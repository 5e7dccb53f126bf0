# The parameters by name, and the initial parameters.

"""
    initial_parameters([rng], net)

Initial parameters for training, a vector of `length(net)` numbers: weights from the input W ~ N(0, 1/inputs), from an earlier
layer of n neurons R ~ N(0, 1/n), from the same or a later one R ~ N(0, 0.09/n), those of the readout C ~ N(0, 1/n); the others are 0.

    p = initial_parameters(Xoshiro(1), Network(2, [Layer(16)]; outputs = 1))
"""
initial_parameters(net::Network) = initial_parameters(default_rng(), net)
function initial_parameters(rng::AbstractRNG, net::Network{T}) where {T}
    p = zeros(T, length(net))
    draw!(block, gain) = copyto!(block, T.(gain / sqrt(size(block, 2)) .* randn(rng, size(block))))
    for c in sort!(connections(net); by = c -> c.offset)
        draw!(connection_weights(p, c), c.from >= c.to ? 0.3 : 1.0)
    end
    net.outputs > 0 && draw!(readout_weights(net, p), 1.0)
    return p
end

"""
    named_weights(net, p)

The parts of the parameters `p` by name, as a dictionary of views: changing one changes `p`. A net with one layer has `"W"`
(neurons × inputs), `"R"` (neurons × neurons), the biases `"b"`, the scales `"a"` that [`Perron`](@ref) learns, and for the readout
`"C"` (outputs × neurons) and `"d"`. With several layers `"W[l]"` goes from the input to layer l, `"R[l,k]"` from layer k to layer l,
`"b"` holds the biases of all neurons, and `"a[l,…]"` the scales of the layers l, … whose equilibrium is found together. Only parts
that the net has are listed. Throws an `ArgumentError` if `p` is not a vector, and a `DimensionMismatch` if it does not have
`length(net)` entries.

    named_weights(net, p)["R"] .= 0        # start without lateral connections
"""
function named_weights(net::Network, p)
    check_shape("the parameters", p, 1)
    check_length(net, p)
    weights = Dict{String, AbstractVecOrMat{eltype(p)}}()
    name(letter, indices...) = length(net.layers) == 1 ? letter : "$letter[$(join(indices, ','))]"
    for c in connections(net)
        key = c.from == 0 ? name("W", c.to) : name("R", c.to, c.from)
        weights[key] = connection_weights(p, c)
    end
    weights["b"] = view(p, net.bias .+ (1:neurons(net)))
    for stage in net.stages
        isempty(stage.scales) || (weights[name("a", layers_of(stage)...)] = view(p, stage.scales))
    end
    if net.outputs > 0
        weights["C"], weights["d"] = readout_weights(net, p), readout_bias(net, p)
    end
    return weights
end

"""
    recurrent_weights(net, p)

The matrix R (neurons × neurons) in `z = f(W x + R z + b)` for the parameters `p`, with the constraint applied: it has all
connections between neurons, including those from earlier layers.

    opnorm(recurrent_weights(net, p), Inf)
"""
function recurrent_weights(net::Network{T}, p) where {T}
    check_host_array("the parameters", p, 1)
    R = zeros(T, neurons(net), neurons(net))
    for (stage, w) in zip(net.stages, unpack!(Weights(net), net, p).stages)
        R[stage.rows, axes(w.feed, 2)] = w.feed
        stage.recurrent && (R[stage.rows, stage.rows] = w.recurrent)
    end
    return R
end

connections(net::Network) = reduce(vcat, (stage.connections for stage in net.stages))
layers_of(stage::Stage) = sort!(unique!([c.to for c in stage.connections]))

# Views of parameters, or of a gradient with respect to them, on any device.
connection_weights(p, c::Connection) = matrix_in(p, c.offset, length(c.rows), length(c.cols))
readout_weights(net::Network, p) = matrix_in(p, net.weights_out, net.outputs, length(net.readout))
readout_bias(net::Network, p) = view(p, (length(net) - net.outputs + 1):length(net))
matrix_in(p, offset, rows, columns) = reshape(view(p, offset .+ (1:(rows * columns))), rows, columns)

# A network: its layers, its connections, the stages in which its equilibrium is found, and the
# layout of its parameters in one flat vector.

"""
    Layer(neurons, activation = :tanh; lateral = true)

A layer of `neurons` neurons; `lateral` says whether they are connected among themselves.
"""
struct Layer
    neurons::Int
    activation::Activation
    lateral::Bool
    function Layer(neurons, f = :tanh; lateral = true)
        check_count("neurons", neurons)
        check_truth("lateral", lateral)
        return new(neurons, activation(f), lateral)
    end
end

Base.show(io::IO, layer::Layer) =
    print(io, "Layer($(layer.neurons), $(repr(name_of(layer.activation)))", layer.lateral ? ")" : "; lateral = false)")

"""
    Connection

An existing block of weights: from layer `from` (0 is the input) to layer `to`, rows × cols, stored
column by column after `offset` entries of the parameter vector.
"""
struct Connection
    to::Int
    from::Int
    rows::UnitRange{Int}      # neurons of the state
    cols::UnitRange{Int}      # neurons of the state, or input features when from == 0
    offset::Int
end

"""
    Stage

Neighbouring layers whose equilibrium must be found together: a strongly connected component of the
graph of layers. `rows` are its neurons in the state. A stage that is not `recurrent` (one layer without
lateral connections) is evaluated in one step, so a feed-forward net is solved exactly, layer by layer.
"""
mutable struct Stage                       # with constant fields, so that it is never copied
    const rows::UnitRange{Int}
    const recurrent::Bool
    const has_input::Bool
    const activation::Activation           # left abstract, dispatched on once per tile
    const slopes::Vector{Float64}          # bound on |f′|, per neuron
    const connections::Vector{Connection}  # which end in this stage
    const scales::UnitRange{Int}           # of its learnt scales in the parameter vector, maybe empty
end

"""
    Network{T}(inputs, layers; feedback = false, skips = [], input_skips = [], outputs, constraint = Perron())

An implicit recurrent network: the state `z` of all neurons is an equilibrium of `z = f(W x + R z + b)`.

- `inputs`: number of features of `x`.
- `layers`: a vector of [`Layer`](@ref); layer l feeds layer l + 1.
- `feedback`: `true` for connections from every later to every earlier layer, or pairs `later => earlier`.
- `skips`: pairs `earlier => later` of feed-forward connections that skip a layer.
- `input_skips`: layers other than the first that also receive the input.
- `outputs`: a number of outputs `y = C z_last + d`, or a vector of neurons of the state.
- `constraint`: the constraint on the recurrent weights, see [`Constraint`](@ref).

`length(net)` is the number of parameters, `neurons(net)` the number of neurons.
"""
struct Network{T <: AbstractFloat}
    inputs::Int
    layers::Vector{Layer}
    constraint::Constraint
    stages::Vector{Stage}
    readout::Vector{Int}       # neurons of the state which the output reads
    outputs::Int               # linear outputs; 0 when the output is the read neurons themselves
    bias::Int                  # offsets in the parameter vector
    weights_out::Int
    parameters::Int
end

function Base.show(io::IO, net::Network)
    layers = join(("$(layer.neurons) $(nameof(typeof(layer.activation)))" for layer in net.layers), ", ")
    return print(
        io, typeof(net), "($(net.inputs) inputs, layers [$layers], $(output_size(net)) outputs, $(net.constraint), $(length(net)) parameters)"
    )
end

# Everything that distinguishes networks.
specification(net::Network{T}) where {T} = (T, net.inputs, net.layers, connections(net), net.constraint, net.readout, net.outputs)
Base.:(==)(a::Network, b::Network) = specification(a) == specification(b)
Base.hash(net::Network, h::UInt) = hash(specification(net), h)

"The number of neurons of all layers, N."
neurons(net::Network) = last(last(net.stages).rows)
Base.length(net::Network) = net.parameters
Base.eltype(::Network{T}) where {T} = T
output_size(net::Network) = net.outputs > 0 ? net.outputs : length(net.readout)

function check_length(net::Network, p, what = "vector")
    p isa AbstractVector || throw(ArgumentError("the $what is $(described(p)); expected a vector of $(length(net)) numbers"))
    length(p) == length(net) || throw(DimensionMismatch("the network has $(length(net)) parameters, the $what $(length(p))"))
    return check_indices("the $what", p)
end

Network(args...; kwargs...) = Network{Float64}(args...; kwargs...)

function Network{T}(
        inputs, layers; feedback = false, skips = [], input_skips = [],
        outputs, constraint = Perron(),
    ) where {T}
    T <: Hardware || throw(ArgumentError("a network computes in Float32 or Float64, not in $T"))
    check_count("inputs", inputs)
    layers isa AbstractVector{Layer} || throw(ArgumentError("layers is $(repr(layers)); expected a vector of layers, such as [Layer(16)]"))
    check_option("constraint", constraint, Constraint, "Perron()")
    isempty(layers) && throw(ArgumentError("a network needs at least one layer"))
    constraint isa Monotone && !all(layer -> is_monotone(layer.activation), layers) &&
        throw(ArgumentError("the constraint Monotone needs activations whose slope is never negative, unlike gelu and silu"))
    ends = cumsum(layer.neurons for layer in layers)
    rows = [(stop - layer.neurons + 1):stop for (stop, layer) in zip(ends, layers)]
    pairs_back = feedback_pairs(feedback, length(layers))
    connections = connect(inputs, layers, rows, pairs_back, skip_pairs(skips, length(layers)), input_skips)
    bias = sum(c -> length(c.rows) * length(c.cols), connections)
    offset = bias + last(ends)
    stages = Stage[]
    for members in strong_components(pairs_back, length(layers))
        push!(stages, Stage(members, layers, rows, connections, constraint, offset))
        offset += length(last(stages).scales)
    end
    readout, count = read_neurons(outputs, last(rows))
    return Network{T}(
        inputs, copy(layers), constraint, stages, readout, count, bias, offset, offset + count * (length(readout) + 1)
    )
end

# All existing blocks of weights, in their order in the parameter vector.
function connect(inputs, layers, rows, pairs_back, skips, input_skips)
    offset = 0
    connections = Connection[]
    add!(to, from, cols) = begin
        push!(connections, Connection(to, from, rows[to], cols, offset))
        offset += length(rows[to]) * length(cols)
    end
    for to in sort!(unique!([1; whole_numbers("input_skips", input_skips, "layers, such as [2]")]))
        checkindex(Bool, eachindex(layers), to) || throw(ArgumentError("no layer $to for an input skip"))
        add!(to, 0, 1:inputs)
    end
    for to in eachindex(layers), from in eachindex(layers)
        exists = from == to ? layers[to].lateral :
            from > to ? (from => to) in pairs_back :
            from == to - 1 || (from => to) in skips
        exists && add!(to, from, rows[from])
    end
    return connections
end

# The stage of the layers `members`, whose scales, if any, come after `offset` entries of the parameter vector.
function Stage(members, layers, rows, connections, constraint, offset::Int)
    recurrent = length(members) > 1 || layers[first(members)].lateral
    span = first(rows[first(members)]):last(rows[last(members)])
    scales = recurrent && has_scales(constraint) ? ((offset + 1):(offset + length(span))) : 1:0
    incoming = filter(c -> c.to in members, connections)
    slopes = reduce(vcat, fill(slope_bound(layers[l].activation), layers[l].neurons) for l in members)
    return Stage(
        span, recurrent, any(c -> c.from == 0, incoming), stage_activation(layers[members]), slopes, incoming, scales
    )
end

# The neurons that the output reads, and the number of linear outputs, 0 where it is these neurons themselves.
function read_neurons(outputs::Integer, last_layer)
    check_count("outputs", outputs)
    return collect(last_layer), Int(outputs)
end
function read_neurons(outputs, last_layer)
    readout = whole_numbers("outputs", outputs, "a number of outputs, or neurons, such as [3, 4]")
    isempty(readout) && throw(ArgumentError("the list of output neurons is empty"))
    all(in(1:last(last_layer)), readout) ||
        throw(ArgumentError("output neurons $readout are not all among the $(last(last_layer)) neurons"))
    return readout, 0
end

function whole_numbers(name, values, expected)
    listed = applicable(iterate, values) ? collect(values) : [values]
    all(x -> x isa Integer && !(x isa Bool), listed) || throw(ArgumentError("$name is $(repr(values)); expected $expected"))
    return collect(Int, listed)
end

function feedback_pairs(feedback, layers)
    feedback === false && return Pair{Int, Int}[]
    feedback === true && return [j => i for j in 2:layers for i in 1:(j - 1)]
    listed = layer_pairs("feedback", feedback, "pairs later => earlier of layers, such as [2 => 1], or true for all of them")
    for (from, to) in listed
        1 <= to < from <= layers || throw(
            ArgumentError("feedback $from => $to does not lead from a later to an earlier of the $layers layers")
        )
    end
    return listed
end

function skip_pairs(skips, layers)
    listed = layer_pairs("skips", skips, "pairs earlier => later of layers, such as [1 => 3]")
    for (from, to) in listed
        1 <= from < to <= layers || throw(ArgumentError("the skip $from => $to does not lead from an earlier to a later of the $layers layers"))
        to > from + 1 || throw(ArgumentError("the skip $from => $to passes over no layer: layer $from feeds layer $to anyway"))
    end
    return listed
end

function layer_pairs(name, pairs, expected)
    listed = applicable(iterate, pairs) ? collect(pairs) : [pairs]
    all(pair -> pair isa Pair{<:Integer, <:Integer}, listed) || throw(ArgumentError("$name is $pairs; expected $expected"))
    return Pair{Int, Int}[from => to for (from, to) in listed]
end

# Layer l always feeds layer l + 1, so feedback j => i closes the cycle i..j: components are intervals.
function strong_components(pairs_back, layers)
    components = UnitRange{Int}[]
    first_layer = 1
    while first_layer <= layers
        last_layer = first_layer
        while true
            reach = last_layer
            for (j, i) in pairs_back
                i <= last_layer && (reach = max(reach, j))
            end
            reach > last_layer || break
            last_layer = reach
        end
        push!(components, first_layer:last_layer)
        first_layer = last_layer + 1
    end
    return components
end

function stage_activation(layers)
    all(layer -> layer.activation == first(layers).activation, layers) && return first(layers).activation
    ends = cumsum(layer.neurons for layer in layers)
    ranges = Tuple((stop - layer.neurons + 1):stop for (stop, layer) in zip(ends, layers))
    return Piecewise(ranges, Tuple(layer.activation for layer in layers))
end

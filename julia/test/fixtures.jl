# Networks and data that several tests use.

const CONSTRAINED = (Free(), Perron(0.9), InfNorm(0.9), Spectral(0.9), Monotone(0.1))

"Random parameters; `gain` scales the recurrent weights."
function parameters(net; seed = 1, gain = 0.3)
    rng = Xoshiro(seed)
    return eltype(net).(gain .* randn(rng, length(net)))
end

samples(net, count; seed = 2) = eltype(net).(randn(Xoshiro(seed), net.inputs, count))
targets(net, count; seed = 3) = eltype(net).(randn(Xoshiro(seed), ImplicitRNN.output_size(net), count))

one_layer(; neurons = 5, activation = :tanh, lateral = true, T = Float64, kwargs...) =
    Network{T}(3, [Layer(neurons, activation; lateral)]; outputs = 2, kwargs...)

layered(; feedback = true, constraint = Perron(0.9), kwargs...) = Network(
    3, [Layer(4, :tanh), Layer(3, :sigmoid; lateral = false), Layer(5, :softplus)];
    feedback, outputs = 2, constraint, kwargs...
)

"Central differences of order four."
function finite_difference(f, x; h = 1.0e-3)
    return map(eachindex(x)) do i
        shifted(δ) = (y = copy(x); y[i] += δ; f(y))
        (8 * (shifted(h) - shifted(-h)) - (shifted(2h) - shifted(-2h))) / 12h
    end
end

relative_error(a, b) = norm(a - b) / norm(b)

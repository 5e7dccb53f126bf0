# Tiny nets in vector registers, alone or side by side: the same as by tiles and one by one, to the last bit.

using ImplicitRNN: Batches, descend!, goes_side_by_side, gradient_in_lanes!, is_tiny, loss_and_gradient!, optimizer_state, Optimisers,
    train_each!, train_side_by_side!, Workspace

# Parameters, losses, unconverged samples, states of the optimiser and what halted the nets, each way.
function both_ways(
        net::Network{T}; nets = 5, samples = 7, batch_size = 3, epochs = 12, rule = Optimisers.Adam(0.03), loss = MSE(), weighted = false,
        size = 1.0, rate = 0.05, solver = Auto(), options...
    ) where {T}
    rng = MersenneTwister(1)
    X, Y = randn(rng, T, net.inputs, samples), rand(rng, T, ImplicitRNN.output_size(net), samples)
    P = T(size) .* randn(rng, T, length(net), nets)
    batches = Batches(
        X, Y, weighted ? rand(rng, T, samples) : nothing, reduce(hcat, [randperm(rng, samples) for _ in 1:epochs]), batch_size,
        rate .* rand(rng, epochs * cld(samples, batch_size))
    )
    return map((train_each!, train_side_by_side!)) do train
        trainer = Trainer(Problem(net; loss, solver), rule; nets, batch_size, options...)
        replicas, losses, unconverged = Replicas(copy(P)), zeros(epochs, nets), zeros(Int, epochs, nets)
        train(trainer, replicas, batches, losses, unconverged)
        (; replicas.parameters, replicas.good, replicas.halted, losses, unconverged, state = optimizer_state(trainer))
    end
end

same_bits(a, b) = all(name -> isequal(a[name], b[name]), keys(a))

@testset "few samples in lanes: $(nameof(typeof(constraint))), $(nameof(typeof(loss))), $T" for
    (T, constraint, loss) in (
        (Float64, Perron(0.9), MSE()), (Float64, Free(), Huber(0.3)), (Float32, InfNorm(0.8), BinaryCrossEntropy()), (Float32, Perron(0.9), MAE()),
    )
    rng = MersenneTwister(2)
    for (inputs, n, outputs) in ((2, 1, 1), (1, 2, 3), (12, 5, [1, 5]), (3, 12, 2)), samples in (1, 4, 8), activation in (:tanh, :softplus)
        net = Network{T}(inputs, [Layer(n, activation)]; outputs, constraint)
        p, X, Y = randn(rng, T, length(net)), randn(rng, T, inputs, samples), rand(rng, T, ImplicitRNN.output_size(net), samples)
        ws, problem, weights = Workspace(net), Problem(net; loss), samples == 4 ? rand(rng, T, samples) : nothing
        by_lanes, by_tiles = zeros(T, length(net)), zeros(T, length(net))
        report = (fill(ImplicitRNN.CONVERGED, samples), zeros(samples), zeros(samples))          # for which tiles are needed
        @test isequal(
            loss_and_gradient!(by_lanes, ws, problem, p, X, Y; weights), loss_and_gradient!(by_tiles, ws, problem, p, X, Y; weights, report)
        )
        @test isequal(by_lanes, by_tiles)
        seed = ImplicitRNN.LossSeed(loss, Y, weights, T(1 / samples))
        by_lanes .= NaN
        @test gradient_in_lanes!(by_lanes, ws, problem, X, seed) !== nothing || constraint isa Free
        constraint isa Free || @test isequal(by_lanes, by_tiles)
    end
end

@testset "few samples that lanes do not solve" begin
    net = Network(2, [Layer(3)]; outputs = 1, constraint = Free())
    rng, X, Y, ws = MersenneTwister(1), [-1.0 -1 1 1; -1 1 -1 1], ones(1, 4), Workspace(net)
    unsolved = 0
    for _ in 1:50
        p, g = 3 .* randn(rng, length(net)), zeros(length(net))
        loss_and_gradient!(g, ws, Problem(net), p, X, Y)
        seed = ImplicitRNN.LossSeed(MSE(), Y, nothing, 0.25)
        unsolved += gradient_in_lanes!(zero(g), ws, Problem(net), X, seed) === nothing
        report = (fill(ImplicitRNN.CONVERGED, 4), zeros(4), zeros(4))
        h = zero(g)
        loss_and_gradient!(h, ws, Problem(net), p, X, Y; report)
        @test isequal(g, h)
    end
    @test 0 < unsolved < 50
end

@testset "side by side: $(nameof(typeof(constraint))), $(nameof(typeof(loss))), $T" for
    (T, constraint, loss) in (
        (Float64, Perron(0.9), MSE()), (Float64, Free(), Huber(0.3)), (Float64, InfNorm(0.8), BinaryCrossEntropy()), (Float32, Perron(0.9), MAE()),
    )
    net = Network{T}(2, [Layer(3)]; outputs = 2, constraint)
    @test same_bits(both_ways(net; loss)...)
    @test same_bits(both_ways(net; loss, nets = 1, batch_size = 7)...)
    @test same_bits(both_ways(net; loss, nets = 35, weighted = true, clip = 0.1)...)
end

@testset "side by side: $name" for (name, rule) in (
        ("descent", Optimisers.Descent(0.1)), ("momentum", Optimisers.Momentum(0.1, 0.9)), ("Nesterov", Optimisers.Nesterov(0.1, 0.9)),
        ("AdamW", Optimisers.AdamW(0.1, (0.9, 0.999), 0.01)), ("RMSProp", Optimisers.RMSProp(0.1, 0.9)),
        ("weight decay", Optimisers.OptimiserChain(Optimisers.WeightDecay(0.01), Optimisers.Adam(0.1))),
    )
    @test same_bits(both_ways(Network(2, [Layer(2)]; outputs = 1); rule)...)
end

@testset "a solve in lanes begins at zero, whatever the lanes held before: $T" for T in (Float64, Float32)
    net = Network{T}(1, [Layer(1)]; outputs = [1])
    p, Y = T[1, 0.5, 0, 0], fill(T(0.3), 1, 1)          # W, R, b and the scale
    ws, problem, g = Workspace(net), Problem(net), zeros(T, 4)
    loss_and_gradient!(g, ws, problem, p, fill(T(0.3), 1, 1), Y)
    X = atanh.(ws.sample_lanes[1].lanes.Z[1:1, 1:1])          # tanh(x) is what is there, and no equilibrium
    @test loss_and_gradient!(g, ws, problem, p, X, Y) == loss_and_gradient!(zeros(T, 4), Workspace(net), problem, p, X, Y)
end

@testset "side by side: layers, activations, outputs" begin
    two = [Layer(2, :sigmoid), Layer(3, :softplus; lateral = false)]
    @test same_bits(both_ways(Network(3, two; feedback = true, outputs = 2))...)
    @test same_bits(both_ways(Network(3, two; feedback = true, outputs = [1, 5], input_skips = [2]))...)
    for (inputs, n, outputs) in ((1, 1, 1), (12, 1, 1), (1, 12, 1), (2, 8, 2), (2, 3, 12)), T in (Float32, Float64)
        net = Network{T}(inputs, [Layer(n, :relu)]; outputs)
        @test same_bits(both_ways(net; samples = 300, batch_size = 300, epochs = 3)...)
    end
end

@testset "side by side: nets that need the general solver" begin
    one_by_one, together = both_ways(Network(2, [Layer(3)]; outputs = 1, constraint = Free()); nets = 20, size = 3.0)
    @test same_bits(one_by_one, together)
    @test any(>(0), one_by_one.unconverged)
end

@testset "side by side: nets that are halted" begin
    net = Network(2, [Layer(2)]; outputs = 1, constraint = Free())
    for (options, halt) in (
            ((; rule = Optimisers.Descent(1.0), rate = 1.0e200), ImplicitRNN.NOT_FINITE), ((; guard = Guard(parameter_norm = 3.0)), ImplicitRNN.TOO_LARGE),
            ((; guard = Guard(unconverged = 0.2), size = 4.0), ImplicitRNN.TOO_MANY_UNCONVERGED),
        )
        one_by_one, together = both_ways(net; nets = 20, options...)
        @test same_bits(one_by_one, together)
        @test Int8(halt) in one_by_one.halted
    end
end

@testset "nets that do not fit side by side" begin
    tiny = Network(2, [Layer(2)]; outputs = 1)
    @test is_tiny(Problem(tiny))
    @test !is_tiny(Problem(Network(2, [Layer(13)]; outputs = 1)))
    @test !is_tiny(Problem(Network(2, [Layer(2), Layer(2)]; outputs = 1)))
    @test !is_tiny(Problem(tiny; solver = Newton()))
    @test !is_tiny(Problem(tiny; adjoint = JacobianFree()))
    @test !is_tiny(Problem(tiny; jacobian_penalty = 0.1))
    @test !is_tiny(Problem(tiny; loss = CrossEntropy()))
    batches = Batches(zeros(2, 4), zeros(1, 4), nothing, [1 2 3 4]', 4, [0.1])
    nets(count) = Replicas(zeros(length(tiny), count))
    @test goes_side_by_side(Trainer(Problem(tiny), Optimisers.Adam(); nets = 40), nets(40), batches)
    @test !goes_side_by_side(Trainer(Problem(tiny), Optimisers.ClipNorm(1.0); nets = 40), nets(40), batches)
    halves = Trainer(Problem(tiny), Optimisers.Adam(); nets = 40)
    train_each!(halves, nets(20), batches, zeros(1, 20), zeros(Int, 1, 20))
    @test goes_side_by_side(halves, nets(20), batches) && !goes_side_by_side(halves, nets(40), batches)         # of other steps
    single = Network{Float32}(2, [Layer(3)]; outputs = 1)
    @test !goes_side_by_side(Trainer(Problem(single), Optimisers.Adam(); nets = 40), Replicas(zeros(Float32, length(single), 40)), batches)
end

@testset "samples and targets of another type than the nets': $T" for T in (Float64, Int)
    net = Network{Float32}(2, [Layer(3)]; outputs = 1)
    X, Y, p = T[-1 -1 1 1; -1 1 -1 1], T[-1 1 1 -1], Float32.(sin.(1:length(net)))
    trained = map((Float32, T)) do S
        P = repeat(p, 1, 40)
        trainer = Trainer(Problem(net), Optimisers.Adam(0.1f0); nets = 40)
        train!(trainer, Replicas(P), S.(X), S.(Y), repeat(1:4, 1, 3), 4, fill(0.1, 3), zeros(3, 40), zeros(Int, 3, 40))
        P
    end
    @test trained[2] ≈ trained[1] rtol = 1.0e-5
end

@testset "$name is that of Optimisers.jl, $T" for (name, rule) in (
            ("Adam", Optimisers.Adam(0.01, (0.9, 0.99), 1.0e-7)), ("AdamW", Optimisers.AdamW(0.01, (0.9, 0.99), 0.1)),
            ("AdamW, uncoupled", Optimisers.AdamW(0.01, (0.9, 0.99), 0.1; couple = false)),
            ("Adam with weight decay", Optimisers.OptimiserChain(Optimisers.WeightDecay(0.1), Optimisers.Adam(0.01))),
        ), T in (Float64, Float32)
    p, q = ones(T, 37), ones(T, 37)
    ours, theirs = Optimisers.init(rule, p), Optimisers.init(rule, q)
    @test which(descend!, typeof.((rule, ours, p, p))) != which(descend!, (Optimisers.AbstractRule, Any, Any, Any))
    for k in 1:10
        g = T[sin(i * k) for i in eachindex(p)]
        ours = descend!(rule, ours, p, copy(g))
        theirs, change = Optimisers.apply!(rule, theirs, q, g)
        q .-= change
    end
    @test p == q
    @test ours == theirs
end

@testset "the averages of Adam without gradients end at zero, not at subnormal numbers, $T" for T in (Float64, Float32)
    rule, p = Optimisers.Adam(0.01), ones(T, 5)
    state = descend!(rule, Optimisers.init(rule, p), p, T[1, -1, floatmin(T), 1.0e-15, 0])
    for _ in 1:8000
        state = descend!(rule, state, p, zeros(T, 5))
    end
    after = copy(p)
    m, v, powers = descend!(rule, state, p, zeros(T, 5))
    @test all(iszero, m) && iszero(first(powers))
    @test all(x -> iszero(x) || x >= floatmin(T), v)
    @test p == after
end

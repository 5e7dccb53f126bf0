const TWO_LAYERS = Network(
    3, [Layer(400), Layer(300)]; feedback = true, outputs = 200, constraint = Perron(), input_skips = [2]
)

@testset "initial weights have the spread that their place asks for, and all else is zero" begin
    w = named_weights(TWO_LAYERS, initial_parameters(Xoshiro(1), TWO_LAYERS))
    spread(name) = sqrt(sum(abs2, w[name]) / length(w[name]))
    @test sort!(collect(keys(w))) == ["C", "R[1,1]", "R[1,2]", "R[2,1]", "R[2,2]", "W[1]", "W[2]", "a[1,2]", "b", "d"]
    @test all(iszero, (w["a[1,2]"]..., w["b"]..., w["d"]...))
    for (name, expected) in (
            "W[1]" => 1 / sqrt(3), "W[2]" => 1 / sqrt(3), "R[1,1]" => 0.3 / sqrt(400), "R[1,2]" => 0.3 / sqrt(300),
            "R[2,1]" => 1 / sqrt(400), "R[2,2]" => 0.3 / sqrt(300), "C" => 1 / sqrt(300),
        )
        @test spread(name) ≈ expected rtol = 0.1
        @test abs(sum(w[name]) / length(w[name])) < 0.1 * expected
    end
end

@testset "the random numbers are those of the generator" begin
    net = one_layer(; T = Float32)
    @test initial_parameters(Xoshiro(1), net) == initial_parameters(Xoshiro(1), net) != initial_parameters(Xoshiro(2), net)
    @test initial_parameters(net) isa Vector{Float32}
end

@testset "named weights are all of the parameters, each once, and views of them" for net in (one_layer(), layered(), layered(; feedback = false))
    p = collect(1.0:length(net))
    w = named_weights(net, p)
    @test sort!(reduce(vcat, vec.(collect(values(w))))) == p
    foreach(part -> fill!(part, 7), values(w))
    @test all(==(7), p)
end

@testset "recurrent weights, and those from the input, are those of the equation" begin
    net = Network(3, [Layer(4), Layer(2; lateral = false)]; feedback = [2 => 1], outputs = [6], constraint = Spectral(0.5))
    p, X = parameters(net; gain = 2.0), samples(net, 3)
    w, Z = named_weights(net, p), equilibrium(net, p, X).state
    @test Z ≈ tanh.([w["W[1]"]; zeros(2, 3)] * X .+ recurrent_weights(net, p) * Z .+ w["b"]) rtol = 1.0e-8
    @test opnorm(recurrent_weights(net, p)) ≈ 0.5
end

@testset "predictions are the outputs at the equilibrium" for outputs in (2, [5, 1])
    net = Network(3, [Layer(5)]; outputs)
    p, X = parameters(net), samples(net, 7)
    Z, w = equilibrium(net, p, X).state, named_weights(net, p)
    @test predict(net, p, X) == read_out(net, p, Z)
    @test predict(net, p, X) ≈ (outputs == 2 ? w["C"] * Z .+ w["d"] : Z[outputs, :])
end

@testset "training by fit! is gradient descent with the rule" begin
    net = one_layer()
    X, Y, weights = samples(net, 10), targets(net, 10), rand(Xoshiro(1), 10)
    p, q = parameters(net), parameters(net)
    history = fit!(p, net, X, Y; epochs = 3, rule = ImplicitRNN.Optimisers.Descent(0.1), weights)
    losses = map(1:3) do _
        loss, gradient = loss_and_gradient(net, q, X, Y; weights)
        q .-= 0.1 .* gradient
        loss
    end
    @test p ≈ q rtol = 1.0e-12
    @test history.loss ≈ losses rtol = 1.0e-12
    @test history.unconverged == zeros(3)
end

@testset "minibatches are drawn by the generator, every sample once an epoch" begin
    net = one_layer(; T = Float32)
    X, Y = samples(net, 10), targets(net, 10)
    trained(seed) = (p = parameters(net); fit!(p, net, X, Y; epochs = 4, batch_size = 3, rng = Xoshiro(seed)); p)
    @test trained(1) == trained(1) != trained(2)
end

@testset "a schedule gives the learning rate of each step" begin
    net = one_layer()
    X, Y = samples(net, 10), targets(net, 10)
    function trained(; options...)
        p = parameters(net)
        fit!(p, net, X, Y; epochs = 4, batch_size = 4, rng = Xoshiro(1), options...)
        return p
    end
    steps = Int[]
    scheduled = trained(; rule = ImplicitRNN.Optimisers.Adam(9.0), schedule = t -> (push!(steps, t); 0.01))
    @test scheduled == trained(; rule = ImplicitRNN.Optimisers.Adam(0.01))
    @test steps == 1:12
end

@testset "a warm start leads to the same losses, to the tolerance" begin
    net = one_layer()
    X, Y = samples(net, 10), targets(net, 10)
    losses(warm_start) = fit!(parameters(net), net, X, Y; epochs = 5, batch_size = 4, rng = Xoshiro(1), warm_start).loss
    @test losses(true) ≈ losses(false) rtol = 1.0e-8
    @test losses(true) != losses(false)
    @test_throws "warm_start gives" fit!(parameters(net), net, X, Y; adjoint = Unrolled(3), warm_start = true)
end

@testset "a rule without a learning rate, and one of several, are taken as they are" begin
    net = one_layer()
    X, Y = samples(net, 10), targets(net, 10)
    (; AdaDelta, ClipNorm, Descent, OptimiserChain) = ImplicitRNN.Optimisers
    for rule in (AdaDelta(0.9), OptimiserChain(ClipNorm(1.0), Descent(0.1)))
        @test (history = fit!(parameters(net), net, X, Y; epochs = 20, rule); history.loss[end] < history.loss[1])
    end
end

@testset "a rule that keeps a copy of the parameters begins at them" begin
    (; Adam, MixedPrecision, OptimiserChain, WeightDecay) = ImplicitRNN.Optimisers
    net = one_layer()
    X, Y = samples(net, 10), targets(net, 10)
    trained(rule) = (p = parameters(net); fit!(p, net, X, Y; epochs = 3, rule); p)
    @test trained(MixedPrecision(Float64, Adam(0.01))) ≈ trained(Adam(0.01)) rtol = 1.0e-12
    @test trained(MixedPrecision(Float64, OptimiserChain(WeightDecay(0.1), Adam(0.01)))) ≈ trained(OptimiserChain(WeightDecay(0.1), Adam(0.01))) rtol = 1.0e-12
end

@testset "a training that is halted says so and leaves good parameters" begin
    net = Network(1, [Layer(2, :identity; lateral = false)]; outputs = [1])
    p = fill(3.0, length(net))
    history = @test_logs (:warn, r"halted in epoch \d of 5: NOT_FINITE") fit!(p, net, ones(1, 2), ones(1, 2); epochs = 5, rule = ImplicitRNN.Optimisers.Descent(1.0e200))
    @test isnan(history.loss[end])
    @test all(isfinite, p)
end

@testset "what does not fit is refused" begin
    net = one_layer()
    p, X, Y = parameters(net), samples(net, 10), targets(net, 10)
    @test_throws "the network has $(length(net)) parameters, the vector 2" fit!(p[1:2], net, X, Y)
    @test_throws "the network takes 3 features, the samples have 2" fit!(p, net, X[1:2, :], Y)
    @test_throws "targets are (1, 10)" fit!(p, net, X, Y[1:1, :])
    @test_throws "there are 9 weights for 10 samples" fit!(p, net, X, Y; weights = ones(9))
    @test_throws "batch_size must be from 1 to the 10 samples, got 11" fit!(p, net, X, Y; batch_size = 11)
    @test_throws "batch_size must be from 1 to the 10 samples, got 2.5" fit!(p, net, X, Y; batch_size = 2.5)
    @test_throws "epochs must be a positive whole number, got 0" fit!(p, net, X, Y; epochs = 0)
    @test_throws "epochs must be a positive whole number, got 2.5" fit!(p, net, X, Y; epochs = 2.5)
    @test_throws "there are no samples" fit!(p, net, X[:, 1:0], Y[:, 1:0])
    @test_throws "clip must be positive" fit!(p, net, X, Y; clip = 0)
    @test_throws "the parameters are a StepRangeLen, which cannot be written to; give them as a Vector" fit!(range(0, 1, length(net)), net, X, Y)
    for (call, name) in (
            (() -> fit!(p, net, X, Y; epoch = 3), "fit!"), (() -> loss_and_gradient(net, p, X, Y; weight = ones(10)), "loss_and_gradient"),
            (() -> vjp(net, p, X, Y; solvers = Newton()), "vjp"), (() -> jvp(net, p, X, p, X; solvers = Newton()), "jvp"),
            (() -> root(z -> z, [1.0]; tol = 1.0e-9), "root"), (() -> fixed_point(z -> z ./ 2, [1.0]; tol = 1.0e-9), "fixed_point"),
        )
        @test_throws "no method matching $name(" call()               # which Julia explains by the keywords that there are
    end
    @test_throws DimensionMismatch predict(net, p[1:2], X)
    @test_throws DimensionMismatch named_weights(net, p[1:2])
    @test_throws DimensionMismatch read_out(net, p, ones(4, 2))
end

@testset "the code of the README runs" begin
    text = read(joinpath(@__DIR__, "..", "README.md"), String)
    blocks = [block[1] for block in eachmatch(r"^```julia\n(.*?)^```$"ms, text)]
    room = Module()
    for block in filter(!contains("Pkg"), blocks)
        @test (include_string(room, block, "README.md"); true)
    end
    @test length(blocks) >= 3
end

@testset "a schedule that is no function, or gives no learning rate, is refused in words" begin
    net = one_layer()
    X, Y, p = samples(net, 4), targets(net, 4), parameters(net)
    fit_by(schedule) = fit!(p, net, X, Y; epochs = 2, schedule)
    @test_throws "schedule is 0.1; expected a function of the step" fit_by(0.1)
    for (given, said) in ((nothing, "nothing"), (NaN, "NaN"), (-0.1, "-0.1"), (0.1im, "0.0 + 0.1im"))
        @test_throws "the learning rate of step 2 that schedule gives must be a number that is not negative, got $said" fit_by(t -> t == 1 ? 0.1 : given)
    end
end

@testset "a rule may have a rate of any type, with and without a schedule ($(T))" for T in (Float64, Float32)
    (; Adam, Descent, OptimiserChain, WeightDecay) = ImplicitRNN.Optimisers
    net = one_layer(; T)
    X, Y, schedule = samples(net, 12), targets(net, 12), t -> 0.5 / t
    trained(rule, schedule) = (p = parameters(net); fit!(p, net, X, Y; epochs = 3, batch_size = 4, rule, schedule, rng = Xoshiro(1)); p)
    for (given, usual) in (
            Adam(0.5f0) => Adam(0.5), Descent(Float16(0.5)) => Descent(0.5),
            OptimiserChain(WeightDecay(0.25), Descent(1 // 2)) => OptimiserChain(WeightDecay(0.25), Descent(0.5)),
        )
        @test trained(given, nothing) ≈ trained(usual, nothing) rtol = 1.0e-3
        @test trained(given, schedule) == trained(usual, schedule)
    end
end

@testset "parameters of another type are converted, and trained in that of the network" begin
    for (T, S) in ((Float64, Float32), (Float32, Float64))
        net = one_layer(; T)
        p, X, Y = S.(parameters(net)), samples(net, 10), targets(net, 10)
        q = T.(p)
        history = fit!(p, net, X, Y; epochs = 3)
        @test history.loss == fit!(q, net, X, Y; epochs = 3).loss
        @test p == S.(q) && p isa Vector{S}
        w = named_weights(net, p)
        @test w["R"] == p[16:40] |> x -> reshape(x, 5, 5)
        w["R"] .= 1
        @test all(==(1), p[16:40])
    end
    net = one_layer()
    @test_throws "cannot be trained" fit!(zeros(Int, length(net)), net, samples(net, 10), targets(net, 10))
    @test only(ForwardDiff.gradient(p -> named_weights(net, p)["d"][2], parameters(net))[end]) == 1
    @test_throws "the parameters are a tuple" named_weights(net, Tuple(parameters(net)))
end

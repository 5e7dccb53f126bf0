const XOR_INPUTS = [-1.0 -1.0 1.0 1.0; -1.0 1.0 -1.0 1.0]
const XOR_TARGETS = [-0.9 0.9 0.9 -0.9]

function train_xor(neurons, lateral; epochs = 2000, seeds = 1:10, constraint = Perron(0.95), rule = ImplicitRNN.Optimisers.Adam(0.03))
    net = Network(2, [Layer(neurons; lateral)]; outputs = [1], constraint)
    P = reduce(hcat, [parameters(net; seed, gain = 0.7) for seed in seeds]; init = zeros(length(net), 0))
    losses, unconverged = zeros(epochs, length(seeds)), zeros(Int, epochs, length(seeds))
    trainer = Trainer(Problem(net), rule; nets = length(seeds), clip = 10.0)
    train!(trainer, Replicas(P), XOR_INPUTS, XOR_TARGETS, repeat(1:4, 1, epochs), 4, fill(0.03, epochs), losses, unconverged)
    return net, P, losses, unconverged
end

@testset "one lateral layer of two neurons learns XOR, a feed-forward layer cannot" begin
    _, _, losses, unconverged = train_xor(2, true)
    @test count(<(0.01), losses[end, :]) >= 9
    @test all(iszero, unconverged)
    _, _, losses, _ = train_xor(2, false)
    @test all(>(0.3), losses[end, :])
end

@testset "nets trained side by side are the nets trained alone" begin
    _, together, _, _ = train_xor(2, true; epochs = 50, seeds = 1:3)
    _, alone, _, _ = train_xor(2, true; epochs = 50, seeds = 3:3)
    @test together[:, 3] == alone[:, 1]
end

@testset "a continued run is the run in one go" begin
    net = one_layer()
    X, Y = samples(net, 20), targets(net, 20)
    order = reduce(hcat, randperm(Xoshiro(e), 20) for e in 1:10)
    run!(trainer, p, epochs) = train!(trainer, Replicas(p), X, Y, order[:, epochs], 8, fill(0.01, 3 * length(epochs)), zeros(length(epochs), 1), zeros(Int, length(epochs), 1))
    new() = Trainer(Problem(net), ImplicitRNN.Optimisers.Adam(0.01); batch_size = 8)
    whole = reshape(parameters(net), :, 1)
    run!(new(), whole, 1:10)
    parts = reshape(parameters(net), :, 1)
    first_half = new()
    run!(first_half, parts, 1:5)
    second_half = ImplicitRNN.restore_optimizer_state!(new(), ImplicitRNN.optimizer_state(first_half))
    run!(second_half, parts, 6:10)
    @test parts == whole
end

@testset "what a step allocates depends neither on the samples nor on the iterations" begin
    net = one_layer(; neurons = 4)
    p = parameters(net; gain = 1.0)
    function allocated(samples_count, tol)
        problem = Problem(net; solver = Picard(; tol))
        X, Y = samples(net, samples_count), targets(net, samples_count)
        ws, g = ImplicitRNN.Workspace(problem), zeros(length(net))
        step() = (ImplicitRNN.loss_and_gradient!(g, ws, problem, p, X, Y); nothing)
        step()
        return @allocated step()
    end
    @test allocated(8, 1.0e-3) == allocated(64, 1.0e-12) <= 4096
end

@testset "a net that explodes stops and says so" begin
    net = Network(1, [Layer(2, :identity; lateral = false)]; outputs = [1])
    P = fill(3.0, length(net), 1)
    losses, unconverged = zeros(5, 1), zeros(Int, 5, 1)
    train!(Trainer(Problem(net), ImplicitRNN.Optimisers.Descent(1.0e200)), Replicas(P), ones(1, 2), ones(1, 2), repeat(1:2, 1, 5), 2, fill(1.0e200, 5), losses, unconverged)
    @test isnan(losses[end])
    @test all(isfinite, P)
end

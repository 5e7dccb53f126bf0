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

@testset "a rate that is not a number is the rule's own, also after another" begin
    net = one_layer(; neurons = 40)
    X, Y = samples(net, 20), targets(net, 20)
    function trained(rates)
        P = reshape(parameters(net; gain = 0.05), :, 1)
        trainer = Trainer(Problem(net), ImplicitRNN.Optimisers.Descent(0.02))
        train!(trainer, Replicas(P), X, Y, repeat(1:20, 1, length(rates)), 20, rates, zeros(length(rates), 1), zeros(Int, length(rates), 1))
        return P
    end
    @test trained([0.1, NaN, NaN]) == trained([0.1, 0.02, 0.02])
    @test trained([NaN, 1, NaN]) == trained([0.02, 1.0, 0.02])
end

@testset "nets trained side by side are the nets trained alone" begin
    _, together, _, _ = train_xor(2, true; epochs = 50, seeds = 1:3)
    _, alone, _, _ = train_xor(2, true; epochs = 50, seeds = 3:3)
    @test together[:, 3] == alone[:, 1]
end

const OPTIMIZER_EXAMPLES = map(collect(pairs(ImplicitRNN.OPTIMIZERS))) do (name, make)
    options = (; learning_rate = 0.01, momentum = 0.9, beta1 = 0.9, beta2 = 0.999, decay = 0.9, epsilon = 1.0e-8)
    return name => weight_decay -> make(Dict{Symbol, Any}(pairs(options)..., :weight_decay => weight_decay))
end

@testset "$name with weight decay $weight_decay: a continued run is the run in one go" for (name, make) in OPTIMIZER_EXAMPLES,
        weight_decay in (0.0, 0.1)

    net = one_layer()
    X, Y = samples(net, 20), targets(net, 20)
    order = reduce(hcat, randperm(Xoshiro(e), 20) for e in 1:10)
    run!(trainer, p, epochs) = train!(trainer, Replicas(p), X, Y, order[:, epochs], 8, [0.02 / t for e in epochs for t in (3e - 2):3e], zeros(length(epochs), 1), zeros(Int, length(epochs), 1))
    new() = Trainer(Problem(net), make(weight_decay); batch_size = 8)
    whole = reshape(parameters(net), :, 1)
    run!(new(), whole, 1:10)
    parts = reshape(parameters(net), :, 1)
    first_half = new()
    run!(first_half, parts, 1:5)
    second_half = ImplicitRNN.restore_optimizer_state!(new(), ImplicitRNN.optimizer_state(first_half))
    run!(second_half, parts, 6:10)
    @test parts == whole
end

@testset "what a step allocates depends neither on the samples nor on the iterations, warm start $warm" for warm in (false, true)
    net = one_layer(; neurons = 4)
    p = parameters(net; gain = 1.0)
    function allocated(samples_count, tol)
        problem = Problem(net; solver = Picard(; tol))
        X, Y = samples(net, samples_count), targets(net, samples_count)
        ws, g = ImplicitRNN.Workspace(net), zeros(length(net))
        states = warm ? zeros(4, samples_count) : nothing
        step() = (ImplicitRNN.loss_and_gradient!(g, ws, problem, p, X, Y; states); nothing)
        step()
        return @allocated step()
    end
    @test allocated(8, 1.0e-3) == allocated(64, 1.0e-12) <= 4096
end

function train_warm!(P, net, X, Y; epochs = 3, rate = 0.02, batch_size = 8, warm_start = true, options...)
    samples, nets = size(X, 2), size(P, 2)
    order = stack(e -> batch_size < samples ? randperm(Xoshiro(e), samples) : 1:samples, 1:epochs)
    losses, unconverged = zeros(epochs, nets), zeros(Int, epochs, nets)
    trainer = Trainer(Problem(net; options...), ImplicitRNN.Optimisers.Descent(rate); nets, batch_size, warm_start)
    train!(trainer, Replicas(P), X, Y, order, batch_size, fill(rate, epochs * cld(samples, batch_size)), losses, unconverged)
    return trainer, losses, unconverged
end

@testset "a warm start begins at the equilibrium of the sample and the net, batches of $batch_size" for batch_size in (8, 20)
    net = layered()
    X, Y, P = samples(net, 20), targets(net, 20), reduce(hcat, parameters(net; seed) for seed in 1:5)
    first_visit, _, _ = train_warm!(P, net, X, Y; rate = 0.0, epochs = 1, batch_size)
    for s in 1:5
        @test first_visit.equilibria[s] ≈ equilibrium(net, P[:, s], X).state rtol = 1.0e-9
    end
    # From there, one evaluation says that it is one.
    order, losses, unconverged = reshape(shuffle(Xoshiro(9), 1:20), :, 1), zeros(1, 5), zeros(Int, 1, 5)
    second_visit = Trainer(
        Problem(net; solver = Picard(tol = 1.0e-8, max_iterations = 1)), ImplicitRNN.Optimisers.Descent(0.0); nets = 5, batch_size, warm_start = true
    )
    append!(second_visit.equilibria, first_visit.equilibria)
    train!(second_visit, Replicas(P), X, Y, order, batch_size, zeros(cld(20, batch_size)), losses, unconverged)
    @test all(iszero, unconverged)
end

@testset "warm starts lead to the same training, to the tolerance: $constraint" for constraint in (Perron(0.9), Free(), Monotone(0.1))
    net = one_layer(; constraint)
    X, Y, p = samples(net, 20), targets(net, 20), reshape(parameters(net; gain = 0.3), :, 1)
    (_, warm, failed), (_, cold, _) = (train_warm!(copy(p), net, X, Y; epochs = 10, warm_start) for warm_start in (true, false))
    @test warm ≈ cold rtol = 1.0e-8
    @test all(iszero, failed)
end

@testset "tiny nets with warm starts are those trained alone, to the last bit" begin
    net = one_layer(; neurons = 3)
    X, Y, P = samples(net, 4), targets(net, 4), reduce(hcat, parameters(net; seed) for seed in 1:64)
    together, alone = copy(P), P[:, 64:64]
    _, losses, _ = train_warm!(together, net, X, Y; batch_size = 4)
    _, expected, _ = train_warm!(alone, net, X, Y; batch_size = 4)
    @test together[:, 64:64] == alone
    @test losses[:, 64:64] == expected
end

@testset "a sample that does not converge starts anew, and so do other samples" begin
    net = Network(1, [Layer(1)]; outputs = [1], constraint = Free())
    P = reshape([1.0, -3.0, 0.0], :, 1)                 # z = tanh(x - 3 z)
    trainer, _, unconverged = train_warm!(P, net, [5.0 0.5], zeros(1, 2); rate = 0.0, batch_size = 2, solver = Picard())
    @test unconverged[:] == [1, 1, 1]
    @test trainer.equilibria[1][1] > 0.9 && trainer.equilibria[1][2] == 0
    train!(trainer, Replicas(P), fill(5.0, 1, 3), zeros(1, 3), reshape(1:3, :, 1), 3, [0.0], zeros(1, 1), zeros(Int, 1, 1))
    @test size(only(trainer.equilibria)) == (1, 3)
    @test allequal(only(trainer.equilibria))
end

@testset "warm starts where there is no first iterate, or states that do not fit, are refused" begin
    net = one_layer()
    p, X, Y, rule = parameters(net), samples(net, 4), targets(net, 4), ImplicitRNN.Optimisers.Adam()
    @test_throws "Unrolled does not use" Trainer(Problem(net; adjoint = Unrolled(3)), rule; warm_start = true)
    step!(states) = ImplicitRNN.loss_and_gradient!(zero(p), ImplicitRNN.Workspace(net), Problem(net), p, X, Y; states)
    @test_throws "states are (5, 3)" step!(zeros(5, 3))
end

@testset "a guard halts a net and gives it the parameters from which its last good epoch began" begin
    net = one_layer()
    X, Y, start = samples(net, 20), 9 .* targets(net, 20), reshape(parameters(net), :, 1)
    function trained(epochs, guard)
        nets, losses = Replicas(copy(start)), zeros(epochs, 1)
        trainer = Trainer(Problem(net), ImplicitRNN.Optimisers.Descent(0.003); guard)
        train!(trainer, nets, X, Y, repeat(1:20, 1, epochs), 20, fill(0.003, epochs), losses, zeros(Int, epochs, 1))
        return nets, losses
    end
    limit = 1.1 * norm(start)
    nets, losses = trained(200, Guard(parameter_norm = limit))
    ended = count(isfinite, losses)
    @test 1 < ended < 200
    @test nets.halted == [Int8(ImplicitRNN.TOO_LARGE)]
    @test norm(nets.parameters) <= limit
    @test nets.parameters == trained(ended - 1, Guard())[1].parameters
    @test norm(trained(ended, Guard())[1].parameters) > limit
end

@testset "too many unconverged samples halt a net" begin
    net = Network(1, [Layer(1)]; outputs = [1], constraint = Free())
    P, losses, unconverged = reshape([1.0, -3.0, 0.0], :, 1), zeros(3, 1), zeros(Int, 3, 1)
    for (share, halt) in ((0.5, ImplicitRNN.TOO_MANY_UNCONVERGED), (0.7, ImplicitRNN.RUNNING))
        nets = Replicas(copy(P))
        trainer = Trainer(Problem(net; solver = Picard()), ImplicitRNN.Optimisers.Descent(1.0e-9); guard = Guard(unconverged = share))
        train!(trainer, nets, [5.0 0.5 0.7], zeros(1, 3), repeat(1:3, 1, 3), 3, fill(1.0e-9, 3), losses, unconverged)
        @test nets.halted == [Int8(halt)]
        @test unconverged[1] == 2
        halt == ImplicitRNN.RUNNING || @test nets.parameters == P
    end
end

@testset "a halted net takes no part in the training" begin
    net = one_layer()
    X, Y, P = samples(net, 8), targets(net, 8), repeat(parameters(net), 1, 2)
    nets, losses = Replicas(copy(P)), zeros(3, 2)
    nets.halted[1] = Int8(ImplicitRNN.TOO_LARGE)
    train!(Trainer(Problem(net), ImplicitRNN.Optimisers.Adam(0.01); nets = 2), nets, X, Y, repeat(1:8, 1, 3), 8, fill(0.01, 3), losses, zeros(Int, 3, 2))
    @test nets.parameters[:, 1] == P[:, 1]
    @test nets.parameters[:, 2] != P[:, 2]
    @test all(isnan, losses[:, 1]) && all(isfinite, losses[:, 2])
end

@testset "samples that are taken twice, or not at all" begin
    net = Network(2, [Layer(3)]; outputs = 1)
    rng = Xoshiro(8)
    p, X, Y = initial_parameters(rng, net), randn(rng, 2, 30), randn(rng, 1, 30)
    loss(order; nets = 1, batch_size = 30) = begin
        trainer = Trainer(Problem(net), ImplicitRNN.Optimisers.Descent(0.1); nets, batch_size)
        losses = zeros(1, nets)
        train!(trainer, Replicas(repeat(p, 1, nets)), X, Y, reshape(order, :, 1), 30, [0.1], losses, zeros(Int, 1, nets))
        return losses
    end
    for order in ([3, 1, 2], rand(rng, 1:30, 30), collect(30:-1:1))
        expected, _ = loss_and_gradient(net, p, X[:, order], Y[:, order])
        @test all(≈(expected), loss(order)) && all(≈(expected), loss(order; nets = 20))
    end
    @test_throws "order has numbers from 1 to 31 for 30 samples" loss([1, 31])
    @test_throws "need a Trainer of that batch_size" loss([1, 2]; batch_size = 0)
end

@testset "what does not fit is refused before any of it is read" begin
    net = Network(2, [Layer(3)]; outputs = 1)
    rng = Xoshiro(9)
    p, X, Y = initial_parameters(rng, net), randn(rng, 2, 6), randn(rng, 1, 6)
    train(X, Y; order = reshape(1:6, :, 1), rates = [0.1], losses = zeros(1, 1), nets = 1, weights = nothing) =
        train!(Trainer(Problem(net), ImplicitRNN.Optimisers.Adam()), Replicas(repeat(p, 1, nets)), X, Y, order, 6, rates, losses, zeros(Int, 1, 1); weights)
    @test_throws DimensionMismatch train(randn(3, 6), Y)
    @test_throws DimensionMismatch train(X, randn(2, 6))
    @test_throws DimensionMismatch train(X, Y[:, 1:3])
    @test_throws DimensionMismatch train(X, Y; weights = ones(5))
    @test_throws DimensionMismatch train(X, Y; rates = [0.1, 0.1])
    @test_throws DimensionMismatch train(X, Y; losses = zeros(2, 1))
    @test_throws DimensionMismatch train(X, Y; nets = 2)
    @test_throws "order is an array of shape (6,) of Int64; expected a matrix of Int" train(X, Y; order = collect(1:6))
    @test_throws "expected a matrix of Int" train(X, Y; order = reshape(Int32.(1:6), :, 1))
    @test_throws DimensionMismatch loss_and_gradient(net, p, X, Y; weights = ones(5))
    @test_throws DimensionMismatch hessian_vector_product(net, p, X, randn(5, 7), p)
    @test_throws DimensionMismatch ImplicitRNN.loss_and_gradient!(zeros(2), ImplicitRNN.Workspace(net), Problem(net), p, X, Y)
end

@testset "nets, trainers and guards that cannot be are refused" begin
    net = one_layer()
    X, Y, N = samples(net, 4), targets(net, 4), length(net)
    train(nets) = train!(
        Trainer(Problem(net), ImplicitRNN.Optimisers.Adam(); nets = 2), nets, X, Y, reshape(1:4, :, 1), 4, [0.1], zeros(1, 1), zeros(Int, 1, 1)
    )
    for rows in (N - 1, N + 1)
        @test_throws "the network has $N parameters, the nets to train have $rows" train(Replicas(zeros(rows, 1)))
    end
    @test_throws "`halted` of length 0" train(Replicas(zeros(N, 1), zeros(N, 1), Int8[]))
    @test_throws "`good` is ($N, 2)" train(Replicas(zeros(N, 1), zeros(N, 2), Int8[0]))
    @test_throws "those of one are reshape(p, :, 1)" Replicas(zeros(N))
    for option in ((; nets = 0), (; nets = 2.5), (; nets = "2"), (; clip = 0), (; clip = NaN), (; batch_size = -1), (; batch_size = 2.5))
        @test_throws "$(only(keys(option))) must" Trainer(Problem(net), ImplicitRNN.Optimisers.Adam(); option...)
    end
    @test_throws "rule is :adam" Trainer(Problem(net), :adam)
    for unconverged in (-1, NaN, "a")
        @test_throws "unconverged must be a share" Guard(; unconverged)
    end
    @test_throws "parameter_norm must be positive, got NaN" Guard(parameter_norm = NaN)
    @test_throws "jacobian_penalty must be finite" Problem(net; jacobian_penalty = Inf)
end

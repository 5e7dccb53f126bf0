loss_of(net, X, Y; kwargs...) = p -> loss_and_gradient(net, p, X, Y; solver = Picard(tol = 1.0e-14, max_iterations = 100_000), kwargs...)[1]
gradient_of(net, p, X, Y; kwargs...) =
    loss_and_gradient(net, p, X, Y; solver = Picard(tol = 1.0e-14, max_iterations = 100_000), kwargs...)[2]

@testset "finite differences: $name, $constraint" for (name, _) in pairs(ACTIVATIONS), constraint in CONSTRAINED
    if constraint isa Monotone && !ImplicitRNN.is_monotone(ACTIVATIONS[name])
        @test_throws "slope is never negative" one_layer(; activation = name, constraint)
        constraint = Free()
    end
    net = one_layer(; activation = name, constraint)
    p, X, Y = parameters(net; gain = 0.25), samples(net, 6), targets(net, 6)
    name == :relu && (p .+= 0.01)
    for linear_solver in (:lu, :neumann)
        g = gradient_of(net, p, X, Y; adjoint = Implicit(; linear_solver, tol = 1.0e-13))
        @test relative_error(g, finite_difference(loss_of(net, X, Y), p; h = 1.0e-4)) < 1.0e-8
    end
end

@testset "active constraints: $constraint" for constraint in CONSTRAINED[2:4]
    for net in (one_layer(; constraint, neurons = 6), layered(; constraint), layered(; constraint, feedback = [2 => 1]))
        p, X, Y = parameters(net; gain = 0.8), samples(net, 6), targets(net, 6)
        g = gradient_of(net, p, X, Y)
        @test relative_error(g, finite_difference(loss_of(net, X, Y), p; h = 2.0e-4)) < 1.0e-8
    end
end

@testset "neurons as outputs, feed-forward nets and skips" begin
    for net in (
            Network(3, [Layer(4)]; outputs = [1, 4]),
            Network(3, [Layer(4; lateral = false), Layer(3; lateral = false)]; outputs = 2),
            Network(3, [Layer(4), Layer(3), Layer(2)]; outputs = 2, skips = [1 => 3], input_skips = [3], feedback = [3 => 2]),
        )
        p, X, Y = parameters(net), samples(net, 6), targets(net, 6)
        @test relative_error(gradient_of(net, p, X, Y), finite_difference(loss_of(net, X, Y), p)) < 1.0e-8
    end
end

@testset "near the edge of stability the gradient is still right" begin
    net = Network(1, [Layer(1)]; outputs = [1], constraint = Free())
    p, X, Y = [0.0, 0.99, 0.0], zeros(1, 1), ones(1, 1)
    g = gradient_of(net, p, X, Y)
    @test g[3] ≈ -2 / (1 - 0.99) rtol = 1.0e-8
end

@testset "the way through tiles does not change the gradient ($neurons neurons)" for (neurons, count) in
    ((7, 1200), (24, 1200), (40, 1200), (209, 300))

    net = one_layer(; neurons)
    p, X, Y = parameters(net), samples(net, count), targets(net, count)
    whole = loss_and_gradient(net, p, X, Y; solver = Auto(tol = 1.0e-13), adjoint = Implicit(tol = 1.0e-13))
    parts = [
        loss_and_gradient(net, p, X[:, k], Y[:, k]; solver = Picard(tol = 1.0e-13), adjoint = Implicit(linear_solver = :lu))
            for k in Iterators.partition(1:count, 30)
    ]
    @test whole[1] ≈ sum(first, parts) / length(parts) rtol = 1.0e-12
    @test relative_error(whole[2], sum(last, parts) ./ length(parts)) < 1.0e-11
end

@testset "the linearised equation gives the same gradient ($neurons neurons, $constraint)" for neurons in (30, 209),
        constraint in (Free(), Spectral(0.9))

    net = one_layer(; neurons, constraint)
    p, X, Y = parameters(net; gain = 0.5 / sqrt(neurons)), samples(net, 60), targets(net, 60)
    problem = Problem(net; solver = Chord(tol = 1.0e-13), adjoint = Implicit(tol = 1.0e-13))
    ws, g = ImplicitRNN.Workspace(net), zeros(length(net))
    ImplicitRNN.loss_and_gradient!(g, ws, problem, p, X, Y)
    @test only(ws.recurrences).linearized
    exact = loss_and_gradient(net, p, X, Y; solver = Picard(tol = 1.0e-13), adjoint = Implicit(linear_solver = :lu))[2]
    @test relative_error(g, exact) < 1.0e-11
end

@testset "large stages use LAPACK and Neumann alike" begin
    net = one_layer(; neurons = 40, constraint = Spectral(0.9))
    p, X, Y = parameters(net), samples(net, 5), targets(net, 5)
    lu = gradient_of(net, p, X, Y; adjoint = Implicit(linear_solver = :lu))
    @test relative_error(gradient_of(net, p, X, Y; adjoint = Implicit(linear_solver = :neumann, tol = 1.0e-13, max_iterations = 1000)), lu) < 1.0e-11
end

@testset "the other adjoints" begin
    net = one_layer(; neurons = 30, constraint = Perron(0.9))
    p, X, Y = parameters(net), samples(net, 6), targets(net, 6)
    exact = gradient_of(net, p, X, Y; adjoint = Implicit(linear_solver = :lu))
    @testset "$linear_solver solves the adjoint to its tolerance" for linear_solver in (:auto, :neumann, :anderson, :gmres)
        g = gradient_of(net, p, X, Y; adjoint = Implicit(; linear_solver, tol = 1.0e-12))
        @test relative_error(g, exact) < 1.0e-10
    end
    @testset "enough unrolled steps give the implicit gradient" begin
        @test relative_error(gradient_of(net, p, X, Y; adjoint = Unrolled(400)), exact) < 1.0e-12
    end
    @testset "few unrolled steps give the gradient of those steps" begin
        few = one_layer(; constraint = Free())
        q, x, y = parameters(few), samples(few, 5), targets(few, 5)
        unrolled(q) = loss_and_gradient(few, q, x, y; adjoint = Unrolled(3))
        @test relative_error(unrolled(q)[2], finite_difference(r -> unrolled(r)[1], q)) < 1.0e-8
    end
    @testset "the Jacobian-free gradient is not the gradient" begin
        @test 0.01 < relative_error(gradient_of(net, p, X, Y; adjoint = JacobianFree()), exact) < 1
    end
end

@testset "the Jacobian penalty has its exact gradient" begin
    for net in (
            one_layer(; constraint = Free()), one_layer(; constraint = Perron(0.9), activation = :gelu),
            layered(; constraint = Spectral(0.9)), layered(; constraint = Free(), feedback = false),
        )
        p, X, Y = parameters(net; gain = 0.25), samples(net, 6), targets(net, 6)
        penalised(p) = loss_and_gradient(net, p, X, Y; solver = Newton(tol = 2.0e-13), jacobian_penalty = 3.0, probe = 7)
        @test relative_error(penalised(p)[2], finite_difference(q -> penalised(q)[1], p; h = 1.0e-4)) < 1.0e-8
    end
end

@testset "the probes of the Jacobian penalty estimate the Frobenius norm" begin
    net = one_layer(; constraint = Free())
    p, X = parameters(net), samples(net, 1)
    solution = equilibrium(net, p, X)
    d = slope.(Ref(ACTIVATIONS.tanh), 0.0, solution.state[:, 1])
    R = unpack!(Weights(net), net, p).stages[1].recurrent
    Y = zeros(2, 1)
    plain = loss_and_gradient(net, p, X, Y)[1]
    estimates = [loss_and_gradient(net, p, X, Y; jacobian_penalty = 1.0, probe)[1] - plain for probe in 1:4000]
    @test sum(estimates) / 4000 ≈ norm(d .* R)^2 / 5 rtol = 0.05
end

@testset "Hessian-vector products: $constraint" for constraint in CONSTRAINED
    for net in (one_layer(; constraint), layered(; constraint), layered(; constraint, feedback = false), one_layer(; constraint, activation = :softplus))
        p, X, Y = parameters(net; gain = constraint isa Free ? 0.25 : 0.5), samples(net, 5), targets(net, 5)
        v, solver = randn(Xoshiro(4), length(net)), Newton(tol = 2.0e-13)
        gradient(ε) = loss_and_gradient(net, p + ε * v, X, Y; solver)[2]
        h = 1.0e-4
        difference = (8 * (gradient(h) - gradient(-h)) - (gradient(2h) - gradient(-2h))) / 12h
        @test relative_error(hessian_vector_product(net, p, X, Y, v; solver), difference) < 1.0e-7
    end
end

@testset "products with the Hessian are symmetric where weights are zero: $constraint" for constraint in (Perron(0.5), InfNorm(0.5))
    net = one_layer(; constraint)
    p, X, Y = parameters(net; gain = 2.0), samples(net, 4), targets(net, 4)
    named_weights(net, p)["R"][2:2:end] .= 0
    product(v) = hessian_vector_product(net, p, X, Y, v; solver = Newton(tol = 1.0e-13))
    v, w = parameters(net; seed = 5), parameters(net; seed = 6)
    @test dot(w, product(v)) ≈ dot(v, product(w)) rtol = 1.0e-9
end

@testset "the factors of Newton's method serve the adjoint ($n neurons, $constraint)" for n in (5, 30), constraint in (Perron(0.9), Monotone(0.2))
    net = one_layer(; neurons = n, constraint)
    p, X, Y = parameters(net), samples(net, 40), targets(net, 40)
    problem = Problem(net; solver = Newton(tol = 1.0e-8), adjoint = Implicit())
    ws, g = ImplicitRNN.Workspace(net), zeros(length(net))
    _, quality = ImplicitRNN.loss_and_gradient!(g, ws, problem, p, X, Y)
    @test all(view(first(ws.tiles).factors[1].known, 1:40))
    @test all(>(1), view(first(ws.tiles).adjoint_outcome.iterations, 1:40))         # refined, not factorised anew
    @test quality.adjoint_residual < 1.0e-13
    fresh = loss_and_gradient(net, p, X, Y; solver = Newton(tol = 1.0e-8), adjoint = Implicit(linear_solver = :gmres, tol = 1.0e-13))[2]
    @test relative_error(g, fresh) < 1.0e-11
end

@testset "an adjoint for which Neumann's series grows is left to the factorisation ($T, $method)" for T in (Float32, Float64), method in (:auto, :neumann)
    net = Network{T}(2, [Layer(32)]; outputs = 1, constraint = Monotone())
    rng = Xoshiro(10)
    X, Y = randn(rng, T, 2, 10), randn(rng, T, 1, 10)
    p, K = initial_parameters(rng, net), randn(rng, T, 32, 32) ./ 2
    named_weights(net, p)["R"] .= K .- K'
    gradient(method) = loss_and_gradient(net, p, X, Y; adjoint = Implicit(; linear_solver = method))[2]
    @test isapprox(gradient(method), gradient(:lu); rtol = T === Float64 ? 1.0e-8 : 1.0e-4)
end

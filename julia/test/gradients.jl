loss_of(net, X, Y; kwargs...) = p -> loss_and_gradient(net, p, X, Y; solver = Picard(tol = 1.0e-14, max_iterations = 100_000), kwargs...)[1]
gradient_of(net, p, X, Y; kwargs...) =
    loss_and_gradient(net, p, X, Y; solver = Picard(tol = 1.0e-14, max_iterations = 100_000), kwargs...)[2]

@testset "finite differences: $name, $constraint" for (name, _) in pairs(ACTIVATIONS), constraint in CONSTRAINED
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

@testset "the way through tiles does not change the gradient" begin
    net = one_layer(; neurons = 7)
    p, X, Y = parameters(net), samples(net, 150), targets(net, 150)
    problem = Problem(net)
    g, h = zeros(length(net)), zeros(length(net))
    whole = ImplicitRNN.loss_and_gradient!(g, ImplicitRNN.Workspace(problem; width = 200), problem, p, X, Y)[1]
    tiled = ImplicitRNN.loss_and_gradient!(h, ImplicitRNN.Workspace(problem; width = 32), problem, p, X, Y)[1]
    @test whole ≈ tiled rtol = 1.0e-14
    @test relative_error(h, g) < 1.0e-13
end

@testset "large stages use LAPACK and Neumann alike" begin
    net = one_layer(; neurons = 40, constraint = Spectral(0.9))
    p, X, Y = parameters(net), samples(net, 5), targets(net, 5)
    lu = gradient_of(net, p, X, Y; adjoint = Implicit(linear_solver = :lu))
    @test relative_error(gradient_of(net, p, X, Y; adjoint = Implicit(linear_solver = :neumann, tol = 1.0e-13, max_iterations = 1000)), lu) < 1.0e-11
end

reference(net, p, X) = equilibrium(net, p, X; solver = Picard(tol = 1.0e-14, max_iterations = 100_000)).state

@testset "NLsolve and Picard agree to 1e-10 ($constraint)" for constraint in (Free(), Perron(0.9), Spectral(0.9))
    for net in (one_layer(; constraint), layered(; constraint))
        p, X = parameters(net), samples(net, 9)
        exact = reference(net, p, X)
        @test maximum(abs, equilibrium(net, p, X; solver = Picard(tol = 1.0e-13)).state - exact) < 1.0e-11
        for method in (:trust_region, :newton, :anderson)
            solution = equilibrium(net, p, X; solver = NLsolver(; method, tol = 1.0e-12))
            @test all(converged(solution))
            @test maximum(abs, solution.state - exact) < 1.0e-10
        end
    end
end

@testset "the certified bound holds ($constraint)" for constraint in CONSTRAINED[2:end]
    for net in (one_layer(; constraint, neurons = 8), layered(; constraint), layered(; constraint, feedback = false))
        p, X = parameters(net; gain = 1.5), samples(net, 20)
        exact = equilibrium(net, p, X; solver = NLsolver(tol = 1.0e-14)).state
        loose = equilibrium(net, p, X; solver = Picard(tol = 1.0e-3, damping = 0.3, max_iterations = 60))
        error = vec(maximum(abs, loose.state - exact; dims = 1))
        @test all(error .<= loose.bound .+ 1.0e-12)
        @test all(isfinite, loose.bound)
    end
end

@testset "no bound is claimed for free weights" begin
    net = one_layer(; constraint = Free())
    @test all(isnan, equilibrium(net, parameters(net), samples(net, 3)).bound)
end

@testset "an unconverged sample is reported, not returned silently" begin
    net = Network(1, [Layer(2)]; outputs = [1], constraint = Free())
    p = [1.0, 1.0, 0.0, -3.0, 3.0, 0.0, 0.0, 0.0]          # a rotation with gain 3: Picard cycles
    solution = equilibrium(net, p, [0.1 0.0]; solver = Picard(max_iterations = 50))
    @test solution.status == [Status(1), Status(0)]
    @test solution.iterations[1] == 50
    @test solution.residual[1] > 0.1
end

@testset "a NaN sample harms nobody else" begin
    net = one_layer()
    p, X = parameters(net), samples(net, 5)
    alone = equilibrium(net, p, X[:, [1, 2, 4, 5]])
    X[1, 3] = NaN
    solution = equilibrium(net, p, X)
    @test Int.(solution.status) == [0, 0, 3, 0, 0]
    @test solution.state[:, [1, 2, 4, 5]] == alone.state
end

@testset "a sample's result does not depend on its batch mates" begin
    net = one_layer(; neurons = 6)
    p, X = parameters(net; gain = 1.0), samples(net, 300)
    together = equilibrium(net, p, X)
    for j in (1, 17, 256, 257, 300)
        @test equilibrium(net, p, X[:, j:j]).state[:, 1] == together.state[:, j]
    end
end

@testset "a start is used" begin
    net = one_layer()
    p, X = parameters(net), samples(net, 4)
    cold = equilibrium(net, p, X)
    warm = equilibrium(net, p, X; start = cold.state)
    @test all(warm.iterations .<= 2)
    @test warm.state ≈ cold.state
end

@testset "Float32 converges to its own tolerance" begin
    net = one_layer(; T = Float32)
    solution = equilibrium(net, parameters(net), samples(net, 6))
    @test all(converged(solution))
    @test eltype(solution.state) == Float32
end

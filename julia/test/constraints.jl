for T in (Float64, Float32), (constraint, holds) in (
            Perron(0.9) => (R, L) -> maximum(abs, eigvals(L .* abs.(R))) <= 0.9 + 1.0e-5,
            InfNorm(0.9) => (R, L) -> opnorm(L .* R, Inf) <= 0.9 + 1.0e-5,
            Spectral(0.9) => (R, L) -> opnorm(L .* R) <= 0.9 + 1.0e-5,
            Monotone(0.1) => (R, L) -> eigmax(Symmetric((L .* R + (L .* R)') / 2)) <= 0.9 + 1.0e-5,
        ), seed in 1:20
    net = Network{T}(3, [Layer(4, :tanh), Layer(3, :sigmoid)]; feedback = true, outputs = 2, constraint)
    w = unpack!(Weights(net), net, parameters(net; seed, gain = 2.0))
    @test holds(Float64.(w.stages[1].recurrent), net.stages[1].slopes)
end

@testset "feed-forward weights between stages stay unconstrained" begin
    net = Network(3, [Layer(4), Layer(4)]; outputs = 1, constraint = Perron(0.5))
    p = fill(3.0, length(net))
    w = unpack!(Weights(net), net, p)
    @test all(==(3.0), w.stages[2].feed)
    @test all(<(3.0), w.stages[2].recurrent)
end

@testset "raw weights within the limit are left as they are" begin
    for constraint in CONSTRAINED
        net = one_layer(; constraint)
        p = parameters(net; gain = 0.01)
        w = unpack!(Weights(net), net, p)
        constraint isa Perron || @test w.stages[1].recurrent == w.stages[1].raw
    end
end

@testset "options are checked" begin
    @test_throws "kappa must lie strictly between 0 and 1, got 1.5" Perron(1.5)
    @test_throws "margin" Monotone(0.0)
end

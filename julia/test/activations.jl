points = [-30.0, -3.0, -1.2, -0.1, 1.0e-9, 0.3, 0.9, 2.4, 4.0, 25.0]

for (name, f) in pairs(ACTIVATIONS)
    @testset "$name: slope and curvature are the derivatives" begin
        for s in points
            z = value(f, s)
            @test slope(f, s, z) ≈ ForwardDiff.derivative(t -> value(f, t), s) atol = 1.0e-13
            @test curvature(f, s, z) ≈ ForwardDiff.derivative(t -> slope(f, t, value(f, t)), s) atol = 1.0e-12
        end
    end
    @testset "$name: the slope bound holds and is tight" begin
        slopes = [abs(slope(f, s, value(f, s))) for s in -8:0.001:8]
        @test maximum(slopes) <= slope_bound(f) + 1.0e-9
        @test maximum(slopes) >= slope_bound(f) - 1.0e-3
    end
    @testset "$name: the derivatives are numbers however large the argument: $T" for T in (Float64, Float32)
        for s in (10, -10) .* sqrt(floatmax(T))
            z = value(f, s)
            @test isfinite(z) && min(abs(slope(f, s, z)), abs(slope(f, s, z) - 1)) < 1.0e-15 && abs(curvature(f, s, z)) < 1.0e-15
        end
    end
    @testset "$name: NaN stays NaN" begin
        @test isnan(value(f, NaN))
        @test isnan(value(f, NaN32))
    end
end

@testset "the exponential of scales is accurate to a few ulp, and bounded: $T" for T in (Float32, Float64)
    largest = T == Float64 ? T(700) : T(86)
    for y in range(-largest, largest, 1001)
        @test ImplicitRNN.exp_bounded(y) ≈ exp(y) rtol = 4eps(T)
    end
    @test ImplicitRNN.exp_bounded(zero(T)) == 1
    @test ImplicitRNN.exp_bounded(T(Inf)) == ImplicitRNN.exp_bounded(largest) < Inf
    @test ImplicitRNN.exp_bounded(T(-Inf)) == ImplicitRNN.exp_bounded(-largest) > 0
    @test isnan(ImplicitRNN.exp_bounded(T(NaN)))
end

@testset "tanh and sigmoid are accurate to a few ulp" begin
    for T in (Float32, Float64), s in T.(vcat(-12:0.037:12, [0, 1.0e-6, -1.0e-4, 30, -30, 1.0e6]))
        @test value(ACTIVATIONS.tanh, s) ≈ tanh(s) rtol = 4eps(T)
        @test value(ACTIVATIONS.sigmoid, s) ≈ inv(1 + exp(-big(s))) rtol = 8eps(T) atol = floatmin(T) * 10
    end
end

@testset "an unknown name is refused with the valid ones" begin
    @test_throws "choose one of tanh, sigmoid" ImplicitRNN.activation(:tahn)
end

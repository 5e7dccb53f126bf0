# Coarse products, and equilibria and adjoints found with them, which are as exact as others.

using ImplicitRNN: BFloats, coarse_buffers, COARSE_NEURONS, COARSE_SAMPLES, CoarseFactor, has_matrix_unit, multiply_add_coarsely!, rounding_of, Singles,
    store_coarse!, store_coarse_transposed!

"The factors of coarse products that this machine has."
coarse_factors(n) = has_matrix_unit() ? (Singles(n), BFloats{Float32}(n), BFloats{Float64}(n)) : (Singles(n),)
number_type(::CoarseFactor{T}) where {T} = T

@testset "coarse products of small whole numbers are exact ($(typeof(A)), $n rows)" for n in (32, 33, 63, 100, 300), A in coarse_factors(n)
    T, rng, width = number_type(A), Xoshiro(n), 70
    M, B, S0 = T.(rand(rng, -9:9, n, n)), T.(rand(rng, -9:9, n, width)), T.(rand(rng, -9:9, n, width))
    buffers = coarse_buffers(A, width)
    for (store!, matrix) in ((store_coarse!, M), (store_coarse_transposed!, M')), threads in (1, 2), m in (0, 1, 31, 32, 33, 64, 70)
        store!(A, M, threads)
        S = multiply_add_coarsely!(copy(S0), A, B, m, threads, buffers)
        @test S[:, 1:m] == S0[:, 1:m] + matrix * B[:, 1:m]
        @test S[:, (m + 1):end] == S0[:, (m + 1):end]
    end
end

@testset "coarse products have the digits that are said, whatever the other columns ($(typeof(A)))" for A in coarse_factors(130)
    T, rng = number_type(A), Xoshiro(1)
    M, B = randn(rng, T, 130, 130), randn(rng, T, 130, 70)
    store_coarse!(A, M, 1)
    product(B) = multiply_add_coarsely!(zero(B), A, B, size(B, 2), 1, coarse_buffers(A, size(B, 2)))
    S, exact = product(B), Float64.(M) * Float64.(B)
    @test all(abs.(S - exact) .<= rounding_of(A) .* (abs.(M) * abs.(B)))
    @test rounding_of(A) / 100 < norm(S - exact) / norm(exact) < rounding_of(A)
    @test all(j -> product(B[:, [j]]) == S[:, [j]], 1:70)
end

@testset "the nearest bfloat16 number" begin
    nearest(x) = reinterpret(Float32, ImplicitRNN.bfloat(x) << 16)
    for (x, expected) in (
            (1.0f0, 1.0f0), (1.0f0 + 2.0f0^-9, 1.0f0), (1.0f0 + 2.0f0^-8, 1.0f0), (1.0f0 + 3 * 2.0f0^-8, 1.0f0 + 2.0f0^-6),
            (-1.0f0 - 1.1f0 * 2.0f0^-8, -1.0f0 - 2.0f0^-7), (Inf32, Inf32), (0.0f0, 0.0f0), (1.0e300, Inf32),
        )
        @test nearest(x) === expected
    end
end

"A workspace of a net whose products are coarse, by the factor that `make` returns."
function coarse_workspace(net, make)
    ws = ImplicitRNN.Workspace(net)
    for r in ws.recurrences
        append!(empty!(r.coarse_factors), (make(size(r.R, 1)) for _ in 1:2))
    end
    return ws
end

coarse_kinds(T) = filter(make -> number_type(make(1)) === T, has_matrix_unit() ? [Singles, BFloats{Float32}, BFloats{Float64}] : [Singles])
tight(::Type{Float64}) = 1.0e-12
tight(::Type{Float32}) = 1.0e-6

function gradient_in(ws, net, p, X, Y, tol; solver = Auto(; tol))
    g, report = zeros(eltype(net), length(net)), (fill(CONVERGED, size(X, 2)), zeros(size(X, 2)), zeros(size(X, 2)))
    loss, quality = ImplicitRNN.loss_and_gradient!(g, ws, Problem(net; solver, adjoint = Implicit(; tol)), p, X, Y; report)
    return (; loss, g, quality, status = report[1])
end

@testset "gradients with coarse products are as exact ($make, $neurons neurons, $constraint, $count samples)" for T in (Float64, Float32),
        make in coarse_kinds(T), (neurons, count) in ((COARSE_NEURONS, COARSE_SAMPLES), (150, 300), (40, 2000)),
        constraint in (Free(), Perron(0.9), Spectral(0.9))

    net = one_layer(; T, neurons, constraint)
    p, X, Y = parameters(net; gain = 0.5 / sqrt(neurons)), samples(net, count), targets(net, count)
    ws, tol = coarse_workspace(net, make), tight(T)
    coarse = gradient_in(ws, net, p, X, Y, tol)
    @test only(ws.recurrences).coarse
    @test coarse.quality.unconverged == 0 && coarse.quality.residual <= tol && coarse.quality.adjoint_residual <= tol
    exact = loss_and_gradient(net, p, X, Y; solver = Picard(; tol), adjoint = Implicit(linear_solver = :lu))
    @test coarse.loss ≈ exact[1] rtol = 10 * tol
    @test relative_error(coarse.g, exact[2]) < 50 * tol
    @test gradient_in(coarse_workspace(net, make), net, p, X, Y, tol) == coarse
end

@testset "tangents likewise, and layers one after the other ($make)" for T in (Float64, Float32), make in coarse_kinds(T)
    net = Network{T}(3, [Layer(130, :tanh), Layer(140, :sigmoid)]; outputs = 2, constraint = Perron(0.9))
    p, X, tol = parameters(net; gain = 0.05), samples(net, COARSE_SAMPLES), tight(T)
    ws, rng, tangent = coarse_workspace(net, make), Xoshiro(5), zeros(T, 2, COARSE_SAMPLES)
    dp, dX = randn(rng, T, length(net)), randn(rng, T, 3, COARSE_SAMPLES)
    problem = Problem(net; solver = Auto(; tol), adjoint = Implicit(; tol))
    ImplicitRNN.jvp!(tangent, ws, problem, p, X, dp, dX)
    @test all(r -> r.coarse, ws.recurrences)
    expected = jvp(net, p, X, dp, dX; solver = Picard(; tol), adjoint = Implicit(linear_solver = :lu))
    @test relative_error(tangent, expected) < 50 * tol
end

@testset "nets that may have several equilibria or none are solved as often as by iteration ($make, gain $gain)" for T in (Float64, Float32),
        make in coarse_kinds(T), gain in (1, 1.3, 2)

    net = one_layer(; T, neurons = 130, constraint = Free())
    p, X, Y = parameters(net; gain = gain / sqrt(130)), samples(net, 150), targets(net, 150)
    p[1:390] .*= 3
    tol = 100 * tight(T)
    solved(solver) = count(==(CONVERGED), gradient_in(coarse_workspace(net, make), net, p, X, Y, tol; solver).status)
    @test solved(Auto(; tol)) >= solved(Picard(; tol)) - 2         # of 150; where orbits wander, rounding decides
end

@testset "a start with no finite number, and inputs that overflow, spoil no other sample ($make)" for T in (Float64, Float32), make in coarse_kinds(T)
    net = one_layer(; T, neurons = 130, constraint = Perron(0.9))
    p, X, Y = parameters(net; gain = 0.05), samples(net, 150), targets(net, 150)
    clean = gradient_in(coarse_workspace(net, make), net, p, X, Y, tight(T))
    X[:, 7] .= NaN
    X[:, 50] .= floatmax(T)
    spoilt = gradient_in(coarse_workspace(net, make), net, p, X, Y, tight(T))
    @test clean.quality.unconverged == 0
    @test findall(!=(CONVERGED), spoilt.status) ⊆ [7, 50] && 7 in findall(!=(CONVERGED), spoilt.status)
end

# Coarse products, and equilibria and adjoints found with them, which are as exact as others.

using ImplicitRNN: accuracy_of, bfloat, BFloats, COARSE_EVALUATIONS, COARSE_SAMPLES, CoarseFactor, Corrections, DotProducts, has_dot_products,
    has_matrix_unit, load_bfloats, MatrixUnit, Singles, solve_corrections!, store!, store_bfloats!, store_transposed!

"The kinds of coarse products that this machine has for a type of columns."
coarse_kinds(::Type{Float32}) = [BFloats{U} for (U, is_here) in (MatrixUnit => has_matrix_unit(), DotProducts => has_dot_products()) if is_here]
coarse_kinds(::Type{Float64}) = [Singles; coarse_kinds(Float32)]
coarse_factors(n) = [kind(n) for kind in coarse_kinds(Float64)]

"Corrections of columns with these residuals and slopes, and the changes of their arguments."
function corrected(A, residuals, slopes; width = size(residuals, 2), accuracy = accuracy_of(A), threads = 1)
    n, m = size(residuals)
    q = Corrections(A, n, width)
    q.residuals[1:n, 1:m], q.slopes[1:n, 1:m] = residuals, slopes
    solve_corrections!(q, A, q.buffers, m, Float32(accuracy), threads)
    return q.residuals[1:n, 1:m], q.changes[1:n, 1:m]
end

@testset "coarse products of small whole numbers are exact ($(typeof(A)), $n rows)" for n in (32, 33, 63, 100, 300, 530), A in coarse_factors(n)
    rng, width = Xoshiro(n), 70
    M, r, D = (Float32.(rand(rng, -9:9, n, k)) for k in (n, width, width))
    for (put!, matrix) in ((store!, M), (store_transposed!, M')), threads in (1, 2), m in (0, 1, 31, 32, 33, 64, 70)
        put!(A, M, threads)
        δ, changes = corrected(A, r[:, 1:m], D[:, 1:m]; width, accuracy = Inf, threads)
        @test changes == matrix * r[:, 1:m]
        @test δ == r[:, 1:m] + D[:, 1:m] .* changes
    end
end

@testset "corrections solve their equations to the accuracy of the factor ($(typeof(A)), $m columns)" for A in coarse_factors(130), m in (1, 40)
    rng = Xoshiro(1)
    M, r, D = randn(rng, 130, 130) ./ 15, randn(rng, 130, m), rand(rng, 130, m)
    r ./= norm.(eachcol(r))'
    store!(A, M, 1)
    δ, changes = corrected(A, r, D)
    exact = reduce(hcat, [(I - Diagonal(D[:, j]) * M) \ r[:, j] for j in 1:m])
    @test norm(δ - exact) < accuracy_of(A) * norm(exact)
    @test norm(changes - M * exact) < 2 * accuracy_of(A) * norm(M * exact)          # the product rounds as well
    @test corrected(A, r, D; threads = 2) == (δ, changes)
    r[:, 1], D[:, m] = fill(NaN, 130), fill(3, 130)
    @test all(j -> isapprox(corrected(A, r, D)[1][:, j], exact[:, j]; rtol = 5 * accuracy_of(A)), 2:(m - 1))
end

@testset "the nearest bfloat16 number" begin
    for (x, expected) in (
            (1.0f0, 1.0f0), (1.0f0 + 2.0f0^-9, 1.0f0), (1.0f0 + 2.0f0^-8, 1.0f0 + 2.0f0^-7), (1.0f0 + 3 * 2.0f0^-8, 1.0f0 + 2.0f0^-6),
            (-1.0f0 - 1.1f0 * 2.0f0^-8, -1.0f0 - 2.0f0^-7), (Inf32, Inf32), (0.0f0, 0.0f0), (1.0e300, Inf32),
        )
        @test reinterpret(Float32, bfloat(x) << 16) === expected
        numbers, stored = ntuple(_ -> VecElement(Float32(x)), 16), zeros(UInt16, 16)
        GC.@preserve stored begin
            @test store_bfloats!(pointer(stored), numbers) === load_bfloats(pointer(stored)) === ntuple(_ -> VecElement(expected), 16)
        end
        @test all(==(bfloat(x)), stored)
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

tight(::Type{Float64}) = 1.0e-12
tight(::Type{Float32}) = 1.0e-6

function gradient_in(ws, net, p, X, Y, tol; solver = Auto(; tol))
    g, report = zeros(eltype(net), length(net)), (fill(CONVERGED, size(X, 2)), zeros(size(X, 2)), zeros(size(X, 2)))
    loss, quality = ImplicitRNN.loss_and_gradient!(g, ws, Problem(net; solver, adjoint = Implicit(; tol)), p, X, Y; report)
    return (; loss, g, quality, status = report[1])
end

@testset "gradients with coarse products are as exact ($make, $neurons neurons, $constraint, $count samples)" for T in (Float64, Float32),
        make in coarse_kinds(T), (neurons, count) in ((32, COARSE_SAMPLES), (150, 300), (600, 100), (40, 2000)),
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

@testset "saturated samples, whose residual vanishes, leave nothing in a workspace ($make)" for T in (Float64, Float32), make in coarse_kinds(T)
    net = one_layer(; T, neurons = 31, constraint = Perron(0.9))
    p, X, Y = parameters(net; gain = 0.05), samples(net, 70), targets(net, 70)
    saturated = copy(X)
    saturated[:, 1:2:end] .*= 1000
    results(ws) = gradient_in(ws, net, p, X, Y, tight(T))
    used = coarse_workspace(net, make)
    @test gradient_in(used, net, p, saturated, Y, tight(T)).quality.unconverged == 0
    @test all(tile -> all(all(isfinite, q.residuals) for c in tile.columns for q in c.buffers if q isa Corrections), used.tiles)
    @test isequal(results(used), results(coarse_workspace(net, make)))
end

@testset "few evaluations are no more with coarse products, and what they leave is said ($make)" for T in (Float64, Float32), make in coarse_kinds(T),
        max_iterations in (1, 3, COARSE_EVALUATIONS - 1, COARSE_EVALUATIONS)

    net = one_layer(; T, neurons = 130, constraint = Perron(0.99))
    p, X, Y = parameters(net; gain = 0.3), samples(net, 150), targets(net, 150)
    solver, solution = Auto(; max_iterations, tol = tight(T)), Solution(net, 150)
    ImplicitRNN.equilibrium!(solution, coarse_workspace(net, make), Problem(net; solver), p, X)
    (; status, iterations, residual) = solution.outcome
    @test all(<=(max_iterations), iterations) && all(j -> (status[j] === CONVERGED) == (residual[j] <= T(tight(T))), 1:150)
    w = ImplicitRNN.unpack!(ImplicitRNN.Weights(net), net, p)
    Z = solution.state
    F = tanh.(only(w.stages).input * X .+ only(w.stages).bias .+ only(w.stages).recurrent * Z)
    @test residual ≈ norm.(eachcol(F - Z)) ./ norm.(eachcol(F)) rtol = 0.1 atol = 10 * eps(T)
end

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

@testset "residuals are told where squares overflow ($neurons neurons, $T)" for neurons in (2, 30, 150), T in (Float64, Float32)
    net = Network{T}(3, [Layer(neurons, :relu)]; outputs = 2, constraint = InfNorm(0.9))
    p, X = parameters(net), sqrt(floatmax(T)) .* 20 .* samples(net, 40)
    solution, R = equilibrium(net, p, X), recurrent_weights(net, p)
    w, z = named_weights(net, p), big.(solution.state)
    @test all(converged(solution))
    @test norm(max.(w["W"] * X .+ w["b"] .+ R * z, 0) .- z) <= 1.0e-5 * norm(z)
end

@testset "an unconverged sample is reported, not returned silently" begin
    net = Network(1, [Layer(2)]; outputs = [1], constraint = Free())
    p = [1.0, 1.0, 0.0, -3.0, 3.0, 0.0, 0.0, 0.0]          # a rotation with gain 3: Picard cycles
    solution = equilibrium(net, p, [0.1 0.0]; solver = Picard(max_iterations = 50))
    @test solution.status == [ImplicitRNN.MAX_ITERATIONS, ImplicitRNN.UNSTABLE]      # the second rests where it starts
    @test solution.iterations[1] == 50
    @test solution.residual[1] > 0.1
end

@testset "a NaN sample harms nobody else ($Solver)" for Solver in (Auto, Picard, Anderson, Newton, Chord, NLsolver)
    net = one_layer()
    p, X = parameters(net), samples(net, 5)
    alone = equilibrium(net, p, X[:, [1, 2, 4, 5]]; solver = Solver())
    X[1, 3] = NaN
    solution = equilibrium(net, p, X; solver = Solver())
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

@testset "$solver agrees with the reference, stage by stage and sample by sample" for solver in
    (Auto(tol = 1.0e-12), Anderson(tol = 1.0e-12), Newton(tol = 1.0e-12), Chord(tol = 1.0e-12))
    for constraint in (Perron(0.9), Spectral(0.9), Monotone(0.2)), net in (one_layer(; constraint, neurons = 30), layered(; constraint))
        p, X = parameters(net), samples(net, 40)
        solution = equilibrium(net, p, X; solver)
        @test all(converged(solution))
        @test maximum(abs, solution.state - equilibrium(net, p, X; solver = NLsolver(tol = 1.0e-13)).state) < 1.0e-9
    end
end

@testset "Auto solves what Picard iteration cannot" begin
    # A skew matrix is monotone whatever its size, and Picard iteration diverges.
    net = Network(1, [Layer(3, :relu)]; outputs = [1], constraint = Monotone(0.05))
    p = [1.0; 0.0; 0.0; vec(100 .* [0.0 1 -1; -1 0 1; 1 -1 0]); zeros(3)]
    @test equilibrium(net, p, ones(1, 1); solver = Picard()).status == [ImplicitRNN.DIVERGED]
    @test all(converged(equilibrium(net, p, ones(1, 1))))
end

const EVERY_SOLVER = (Auto, Picard, Anderson, Newton, Chord, NLsolver)

# An activation that counts its evaluations, but for those of the pilots of the chord method.
struct Counted <: ImplicitRNN.Activation end
const EVALUATIONS = Ref(0)
function ImplicitRNN.activate!(F, ::Counted, S, Z, j::Int)
    EVALUATIONS[] += 1
    return ImplicitRNN.activate!(F, ACTIVATIONS.tanh, S, Z, j)
end
ImplicitRNN.pieces(::Counted, n::Int) = ((1:n, ACTIVATIONS.tanh),)
ImplicitRNN.slope_bound(::Counted) = 1.0
ImplicitRNN.is_few(::Int, ::Counted) = false

@testset "$Solver never evaluates f more often than allowed ($neurons neurons, $constraint)" for Solver in EVERY_SOLVER,
        neurons in (2, 8, 16, 30), constraint in (Free(), Perron(0.95))

    net = one_layer(; neurons, constraint)
    counted = Network(3, [Layer(neurons, Counted())]; outputs = 2, constraint)
    p, X = parameters(net; gain = 3.0), samples(net, 5)
    for max_iterations in (1, 2, 3, 4, 9, 13, 20, 45, 60)
        solver = Solver(; tol = 1.0e-13, max_iterations)
        solution = equilibrium(net, p, X; solver)
        @test all(<=(max_iterations), solution.iterations)
        @test all(j -> solution.status[j] != ImplicitRNN.MAX_ITERATIONS || solution.iterations[j] == max_iterations, 1:5)
        @test all(isfinite, solution.state)
        (Solver === Chord || constraint != Free()) && continue       # a certified bound takes an evaluation
        EVALUATIONS[] = 0
        equilibrium(counted, p, X[:, 1:1]; solver)
        @test EVALUATIONS[] <= max_iterations
    end
end

@testset "a singular Jacobian has its own status ($solver)" for solver in
    (Auto(), Newton(), Chord(), NLsolver(), NLsolver(method = :newton), Anderson())
    for (neurons, R) in ((1, [1.0;;]), (2, [0.3 0.7; 0.7 0.3]), (30, fill(1 / 30, 30, 30)))
        net = Network(1, [Layer(neurons, :identity)]; outputs = [1], constraint = Free())
        p = [ones(neurons); vec(R); zeros(neurons)]                    # z = R z + x, where R (1, 1, …) = (1, 1, …)
        solution = equilibrium(net, p, [1.0 -0.5]; solver)
        @test !any(converged(solution))
        solver isa Anderson || @test solution.status == [ImplicitRNN.SINGULAR, ImplicitRNN.SINGULAR]
    end
end

@testset "a sample is not called singular for another that is" begin
    net = Network(2, [Layer(2, :identity)]; outputs = [1], constraint = Free())
    p = [1.0, 0, 0, 1, 0.5, 0, 0, prevfloat(1.0), 0, 0]                # z₁ = z₁ / 2 + x₁, z₂ = z₂ + x₂ to rounding
    solution = equilibrium(net, p, [1.0e8 0; 0 1]; solver = Auto(max_iterations = 5))
    @test solution.status == [ImplicitRNN.SINGULAR, ImplicitRNN.MAX_ITERATIONS]
end

@testset "where the Jacobian is singular a Picard step may lead on" begin
    net = Network(1, [Layer(1, :relu)]; outputs = [1], constraint = Free())
    p = [1.0, 1.0, 0.0]                                                # z = max(z + x, 0), at x = -1 from z = 5
    solution = equilibrium(net, p, [-1.0;;]; solver = Newton(), start = [5.0;;])
    @test solution.status == [CONVERGED] && solution.state == [0.0;;]
end

@testset "the residual is that of the state returned" begin
    net = one_layer(; constraint = Free())
    p, X = parameters(net), samples(net, 5)
    solution = equilibrium(net, p, X; solver = Picard(tol = 1.0e-3))
    w = unpack!(Weights(net), net, p).stages[1]
    F = tanh.(w.input * X .+ w.recurrent * solution.state .+ w.bias)
    @test [norm(F[:, j] - solution.state[:, j]) / norm(F[:, j]) for j in 1:5] ≈ solution.residual rtol = 1.0e-6
end

@testset "Anderson acceleration never needs many more iterations than Picard (gain $gain)" for gain in (0.5, 0.9, 1.0)
    rng = Xoshiro(1)
    net = Network(64, [Layer(64)]; outputs = [1], constraint = Free())
    p = [vec(randn(rng, 64, 64) ./ 8); vec(gain .* randn(rng, 64, 64) ./ 8); zeros(64)]
    X = randn(rng, 64, 128)
    picard, anderson = (equilibrium(net, p, X; solver = s(tol = 1.0e-10, max_iterations = 2000)) for s in (Picard, Anderson))
    both = converged(picard) .& converged(anderson)
    @test count(both) > 100
    @test sum(anderson.iterations[both]) <= 1.1 * sum(picard.iterations[both])
end

@testset "an equilibrium that repels is reported as unstable" begin
    net = Network(1, [Layer(1)]; outputs = [1], constraint = Free())
    p = [0.0, 1.5, 0.05]                                  # z = tanh(1.5 z + 0.05): three equilibria
    newton = equilibrium(net, p, zeros(1, 1); solver = Newton())
    @test newton.status == [ImplicitRNN.UNSTABLE]
    for solver in (Picard(), Anderson(), Auto(), Newton(), Chord(), NLsolver())
        at_rest = Network(1, [Layer(1)]; outputs = [1], constraint = Free())
        @test equilibrium(at_rest, [0.0, 2.0, 0.0], zeros(1, 1); solver).status == [ImplicitRNN.UNSTABLE]
    end
    auto = equilibrium(net, p, zeros(1, 1))
    @test auto.status == [ImplicitRNN.CONVERGED]
    @test auto.state[1] > 0.8
end

@testset "no equilibrium that repels is returned as converged ($n neurons, gain $gain, $T)" for n in (2, 6, 16, 24), gain in (1, 2), T in (Float64, Float32)
    net = Network{T}(2, [Layer(n)]; outputs = 1, constraint = Free())
    found = 0
    for seed in 1:10
        p, X = randn(Xoshiro(seed), T, length(net)) .* T(gain / sqrt(n)), randn(Xoshiro(seed), T, 2, 20)
        solution = equilibrium(net, p, X)
        found += count(converged(solution))
        @test all(ImplicitRNN.spectral_radius(net, p, X, solution.state)[converged(solution)] .< 1)
    end
    @test found > 20
end

@testset "what repels is told by the spectral radius, however large the norm ($n rows, $T)" for n in (1, 3, 12, 40), T in (Float64, Float32)
    rng = Xoshiro(n)
    for radius in (0.3, 0.9, 0.999, 1.001, 1.3, 20), skew in (0, 1, 10)
        R = triu(randn(rng, n, n), 1) .* skew .+ randn(rng, n, n)
        R = T.(R .* (radius / maximum(abs, eigvals(R))))
        @test ImplicitRNN.repels(R, ones(T, n, 1)) == (radius > 1)
        @test ImplicitRNN.repels(2 .* R, fill(T(0.5), n, 1)) == (radius > 1)
    end
end

@testset "no matrix hides its spectral radius or norm from where their estimates begin" begin
    @test ImplicitRNN.spectral_radius(2 .* (I - fill(1 / 300, 300, 300)), ones(300)) ≈ 2
    cycle = circshift(Matrix(1.0I, 300, 300), 1)                          # a circulant matrix, as is this polynomial of it
    @test ImplicitRNN.spectral_radius(cycle + cycle' - 2I, ones(300)) ≈ 4
    u = [1.0, -2.0, 1.0] ./ sqrt(6)
    R = 0.9I + 0.15 .* u .* u'
    @test ImplicitRNN.norm_estimate(R) >= 1.05
    net = Network(1, [Layer(3)]; outputs = [1], constraint = Free())
    for solver in EVERY_SOLVER                                            # zero rests where it is, and repels
        @test equilibrium(net, [zeros(3); vec(R); zeros(3)], zeros(1, 1); solver = solver()).status == [ImplicitRNN.UNSTABLE]
    end
end

@testset "the norm of few rows is never estimated too small, and by 5 % too large at most ($n rows, $T)" for n in (1, 2, 7, 24), T in (Float64, Float32)
    rng = Xoshiro(n)
    for scale in (1.0e-15, 1, 1.0e15), R in (randn(rng, n, n), randn(rng, n) * randn(rng, n)', Matrix(qr(randn(rng, n, n)).Q), zeros(n, n))
        A = T.(scale .* R)
        @test opnorm(Float64.(A)) <= ImplicitRNN.norm_estimate(A) * (1 + n * eps(T))
        @test ImplicitRNN.norm_estimate(A) <= 1.05 * opnorm(Float64.(A))
    end
    @test ImplicitRNN.norm_estimate(fill(floatmax(T), n, n)) >= floatmax(T)
end

@testset "the spectral radius is right on rotations and for large stages" begin
    rotation = 1.5 .* [0.0 -1.0; 1.0 0.0]
    @test ImplicitRNN.spectral_radius(rotation, ones(2)) ≈ 1.5
    R = randn(Xoshiro(1), 300, 300) ./ sqrt(300)
    @test ImplicitRNN.spectral_radius(R, ones(300)) ≈ maximum(abs, eigvals(R)) rtol = 1.0e-4
end

@testset "no samples at all, by any solver ($(nameof(Solver)))" for Solver in EVERY_SOLVER
    net = one_layer()
    p, none = parameters(net), zeros(3, 0)
    @test size(predict(net, p, none; solver = Solver())) == (2, 0)
    @test iszero(vjp(net, p, none, zeros(2, 0); solver = Solver())[1])
end

@testset "a sample that is no number does not keep the chord method from the others ($activation)" for activation in (:softplus, :tanh)
    net = one_layer(; neurons = 20, activation, constraint = Monotone(0.2))
    p, X = parameters(net; gain = 1.0), samples(net, 64)
    clean = equilibrium(net, p, X; solver = Chord())
    X[:, 1] .= NaN
    spoilt = equilibrium(net, p, X; solver = Chord())
    @test all(converged(clean)) && findall(.!converged(spoilt)) == [1]
    @test spoilt.state[:, 2:end] ≈ clean.state[:, 2:end]
end

@testset "samples that the linearised equation takes no nearer to their equilibrium go on with Picard iteration" begin
    net = one_layer(; neurons = 20, constraint = Free())
    p, X = parameters(net), samples(net, 130)
    X[:, 7] .= (Inf, 0, 0)                                     # f is at its bounds there, and the linearised equation has no numbers
    picard, chord = (converged(equilibrium(net, p, X; solver)) for solver in (Picard(), Chord(max_iterations = 1000)))
    @test picard[7] && chord[7]
    @test count(chord[picard]) > 30
end

@testset "a singular Jacobian of NLsolve.jl is divided by without an exception" begin
    for J in ([2.0 1; 1 3], [1.0 2; 2 4], [1.0 0; 0 0], zeros(1, 1), [0.0 1; 0 0])
        r = collect(1.0:size(J, 1))
        divided = ImplicitRNN.Jacobian(copy(J)) \ r
        @test divided ≈ pinv(J) * r
        @test copy(ImplicitRNN.Jacobian(J)) isa ImplicitRNN.Jacobian          # as NLsolve.jl keeps it
    end
end

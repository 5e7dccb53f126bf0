using ImplicitRNN: Equation, Inverses, Outcome, Short, SingularSolution, compiled_function, find_inverses!, is_small, jacobian!,
    jacobian_by_implicit_function!, jacobian_by_samples!, vjp_by_implicit_function!, vjp_by_samples!

const POISED = z -> tanh.(1.5 .* z .+ 0.05)          # two attracting fixed points, a repelling one between them

@testset "the example of the docs" begin
    solution = fixed_point((z, a) -> cos.(a .* z), [0.5], 0.8)
    z = only(solution.value)
    @test z ≈ cos(0.8z)
    @test vjp(solution, [1.0])[1] ≈ -z * sin(0.8z) / (1 + 0.8 * sin(0.8z))
end

@testset "every solver finds the same fixed point" begin
    A, b = 0.2 .* randn(Xoshiro(1), 12, 12), randn(Xoshiro(2), 12, 5)
    for n in (3, 12)             # short vectors and ordinary ones
        f = (z, A, b) -> tanh.(A * z .+ b)
        a, c = A[1:n, 1:n], b[1:n, :]
        exact = fixed_point(f, zeros(n, 5), a, c; batched = (2,), solver = Picard(tol = 1.0e-15, max_iterations = 5000)).value
        for solver in (Auto(), Picard(), Picard(damping = 0.5), Anderson(), Newton(), NLsolver(), NLsolver(method = :anderson))
            solution = fixed_point(f, zeros(n, 5), a, c; batched = (2,), solver)
            @test all(converged(solution))
            @test solution.value ≈ exact rtol = 1.0e-8
        end
    end
end

@testset "every solver finds the same root" begin
    f = (z, a) -> [z[1]^2 + z[2]^2 - a, z[1] - 2z[2]]
    for solver in (Auto(), Newton(), NLsolver(), NLsolver(method = :newton))
        solution = root(f, [1.0, 1.0], 5.0; solver)
        @test solution.status == [Status(0)]
        @test solution.value ≈ [2.0, 1.0]
    end
    @test_throws "does not solve f(z) = 0" root(f, [1.0, 1.0], 5.0; solver = Picard())
end

@testset "a root is found whatever the unit of f" begin
    for unit in (1.0e-12, 1.0, 1.0e12)
        @test root(z -> unit .* (z .^ 3 .- 2), [1.0]).value ≈ [cbrt(2)]
    end
end

@testset "hard roots are found by Newton's method and by the trust region" begin
    f = z -> [10 * (z[2] - z[1]^2), 1 - z[1], sin(z[3]) + z[3]]               # Rosenbrock's valley
    for solver in (Newton(), NLsolver())
        @test root(f, [-1.2, 1.0, 3.0]; solver).value ≈ [1, 1, 0] atol = 1.0e-8
        @test root(z -> atan.(z), [20.0]; solver).value ≈ [0] atol = 1.0e-8
    end
end

@testset "a fixed point that repels is reported" begin
    @test fixed_point(POISED, [0.0]; solver = Newton()).status == [Status(4)]
    @test fixed_point(POISED, [0.0]).value[1] > 0.5
    @test fixed_point(z -> -3 .* tanh.(z) .+ 0.1, [0.3]).status == [Status(4)]
    @test root(z -> POISED(z) .- z, [0.0]).status == [Status(0)]
end

@testset "a sample does not harm another" begin
    f = (z, a) -> a .* cos.(z)
    a = [0.1 0.5 NaN 0.7 1.0e200 0.9]
    solution = fixed_point(f, zeros(1, 6), a; batched = (1,))
    @test Int.(solution.status) == [0, 0, 3, 0, 1, 0]
    for j in (1, 2, 4, 6)
        @test fixed_point(f, zeros(1), a[j]).value == solution.value[:, j]
    end
    @test fixed_point((z, a) -> a .* z .+ 1, zeros(1, 2), [0.5, 3.0]; batched = (1,)).status == [Status(0), Status(2)]
end

@testset "leaving the domain of f concerns that sample only" begin
    @test root(z -> log.(z), [9.0]).value ≈ [1.0]          # the first Newton step leads below zero
    solution = fixed_point((z, a) -> sqrt.(a .+ z), ones(1, 2), [1.0, -5.0]; batched = (1,))
    @test solution.status == [Status(0), Status(3)]
end

@testset "what does not converge is reported" begin
    @test fixed_point((z) -> cos.(z), [0.5]; solver = Picard(max_iterations = 3)).status == [Status(1)]
    solution = root(z -> z .^ 2 .+ 1, [0.5])
    @test solution.status == [Status(5)]
    @test_throws "did not converge" vjp(solution, [1.0])
    @test vjp(solution, [0.0]) == ()
    solution = root((z, a) -> z .^ 2 .+ a, [0.5 0.5], [-1.0, 1.0]; batched = (1,))
    @test vjp(solution, [1.0 0.0])[1] ≈ [-0.5, 0.0]
end

const DERIVATIVES = (
    ((z, a, b) -> tanh.(a * z .+ b), zeros(3, 4), (0.3randn(Xoshiro(1), 3, 3), randn(Xoshiro(2), 3, 4)), (2,), fixed_point),
    ((z, a, b, k) -> tanh.(a * z .+ b) .* k, zeros(10, 2), (0.1randn(Xoshiro(1), 10, 10), randn(Xoshiro(2), 10, 2), [0.5, 0.9]), (2, 3), fixed_point),
    ((z, a, k) -> [z[1]^k + z[2] - a[1], z[1] - z[2] * a[2]], ones(2, 1), ([2.0, 1.5], 2), (), root),
    ((z, W, x) -> sinh.(z) .- W * x, zeros(2, 3), (randn(Xoshiro(1), 2, 9), randn(Xoshiro(2), 9, 3)), (2,), root),
    ((z, K) -> K * z .+ 0.1, zeros(2, 2), (0.2randn(Xoshiro(1), 2, 2, 2),), (1,), fixed_point),
)

@testset "ImplicitDifferentiation.jl and the loop over the samples agree to 1e-10" begin
    for (f, z0, args, batched, solve) in DERIVATIVES
        solution = solve(f, z0, args...; batched)
        @test all(converged(solution))
        problem, Z = solution.problem, solution.value
        p, inverses = Equation(problem), solution.inverses
        find_inverses!(inverses, p)
        v = randn(Xoshiro(3), size(Z))
        loop, implicit = ([float(zero(x)) for x in problem.args] for _ in 1:2)
        vjp_by_samples!(loop, p, inverses, v)
        vjp_by_implicit_function!(implicit, problem, inverses, v)
        for (g, h, x) in zip(loop, implicit, problem.args)
            @test g ≈ h rtol = 1.0e-10
        end
        for (i, x) in enumerate(problem.args)
            eltype(x) == Float64 || continue
            J = zeros(size(Z, 1), length(x) ÷ (problem.batched[i] ? size(Z, 2) : 1), size(Z, 2))
            @test jacobian_by_samples!(copy(J), p, inverses, Val(i), trues(size(Z, 2))) ≈ jacobian_by_implicit_function!(J, problem, inverses, i) rtol = 1.0e-10
        end
    end
end

@testset "derivatives agree with finite differences to 1e-8" begin
    tight = (fixed_point => Picard(tol = 1.0e-14), root => Newton(tol = 1.0e-14))
    for (f, z0, args, batched, solve) in DERIVATIVES, copies in (1, 20)        # through both ways
        z = repeat(z0, 1, copies)
        all_args = ((i in batched ? repeat(x, ntuple(_ -> 1, ndims(x) - 1)..., copies) : x for (i, x) in enumerate(args))...,)
        solver = Dict(tight)[solve]
        solution = solve(f, z, all_args...; batched, solver)
        v = randn(Xoshiro(3), size(z))
        @test is_small(solution.problem) || copies > 1
        for (i, g) in enumerate(vjp(solution, v))
            g === nothing && continue
            loss(y) = sum(v .* solve(f, z, Base.setindex(all_args, reshape(y, size(all_args[i])), i)...; batched, solver).value)
            @test relative_error(vec(g), finite_difference(loss, vec(copy(all_args[i])))) < 1.0e-8
        end
    end
end

@testset "no derivative where the Jacobian is singular" begin
    @test_throws SingularSolution vjp(root(z -> z .^ 2, [0.0]), [1.0])
    @test_throws SingularSolution vjp(root((z, a) -> z .^ 2 .- a, [1.0], 0.0), [1.0])          # found to 1e-13 only
    @test_throws SingularSolution vjp(root((z, a) -> [z[1] + z[2] - a, 2z[1] + 2z[2] - 2a], [1.0, 1.0], 2.0), [1.0, 0.0])
    @test_throws SingularSolution vjp(root((z, a) -> z .^ 2 .- a, ones(1, 50), zeros(50); batched = (1,)), ones(1, 50))
    # Near a fold, but not at it.
    @test vjp(root((z, a) -> z .^ 2 .- a, [1.0], 1.0e-8), [1.0])[1] ≈ 5000 rtol = 1.0e-6
end

@testset "the loop over the samples allocates nothing" begin
    f = (E, M, e) -> M .+ e .* sin.(E)
    allocations(samples) = begin
        M = collect(range(0, 6, samples))
        solution = fixed_point(f, reshape(M, 1, :), M, 0.3; batched = (1,))
        v = ones(1, samples)
        problem = solution.problem
        Z, start, outcome = solution.value, reshape(copy(M), 1, :), Outcome(samples)
        gradients = [zero(x) for x in problem.args]
        ImplicitRNN.solve!(copy(start), outcome, problem, Auto())
        ImplicitRNN.vjp!(gradients, problem, Inverses(problem, Z), v)
        inverses = Inverses(problem, Z)
        (@allocated ImplicitRNN.solve!(start, outcome, problem, Auto())), (@allocated ImplicitRNN.vjp!(gradients, problem, inverses, v))
    end
    allocations(512)
    @test all(allocations(51_200) .<= allocations(512) .+ 100 * 51_200 ÷ 256)
end

@testset "Float32 stays Float32" begin
    solution = fixed_point((z, a) -> cos.(a .* z), [0.5f0], 0.8f0)
    @test eltype(solution.value) == Float32
    @test all(converged(solution))
    @test vjp(solution, [1.0f0])[1] ≈ -0.324205f0 rtol = 1.0e-5
end

@testset "short vectors are vectors" begin
    x, y = Short((1.0, 2.0, 3.0)), [1.0, 2.0, 3.0]
    @test x .* 2 .+ sin.(x) isa Short{3, Float64}
    @test x .* 2 .+ sin.(x) == y .* 2 .+ sin.(y)
    @test x .+ y == 2y
    @test x .* Short((2,)) == 2y
    @test x .* y' == y .* y'
    @test [1.0 0 0; 0 2 0] * x == [1.0, 4.0]
    @test norm(x) == norm(y)
    @test ifelse.(x .> 1, x, 0) == [0, 2, 3]
    @test_throws DimensionMismatch x .+ [1.0, 2.0]
    @test_throws DimensionMismatch x .+ Short((1.0, 2.0))
end

@testset "a function that is at fault is told so" begin
    @test_throws "f returned an array of shape (2,); expected a vector of 1 entry" fixed_point(z -> [1.0, 2.0], [0.5])
    @test_throws "f returned a Float64" fixed_point(z -> 1.0, [0.5, 0.5])
    @test_throws "f returned a tuple of 1; expected a vector of 1 entry, or a number" fixed_point(z -> (1.0,), [0.5])
    @test_throws "f returned a tuple of 2" root(z -> (z[1], z[2]), [0.5, 0.5])
    @test_throws UndefVarError fixed_point(z -> undefined_function(z), [0.5])
    @test_throws "has 3 samples, z has 2" fixed_point((z, a) -> z, ones(1, 2), ones(3); batched = (1,))
end

@testset "a text is compiled once" begin
    f = compiled_function("(z, a) -> norm(z) .* cos.(a .* z)")          # LinearAlgebra is at hand
    @test f === compiled_function("(z, a) -> norm(z) .* cos.(a .* z)")
    @test fixed_point(f, [0.5], 0.1).status == [Status(0)]
    foreach(_ -> GC.gc(), 1:3)                                          # its module must not be collected
    compiled_function.(["z -> $k .* z" for k in 1:50])
    @test f([0.5], 0.1) isa Vector
    @test_throws "cannot be parsed: Expected `)`" compiled_function("(z, a) -> cos.(a .* z")
    @test_throws "not a function" compiled_function("1 + 1")
end

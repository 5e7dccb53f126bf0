using ForwardDiff: Dual
using ImplicitRNN: Equation, Inverses, Outcome, Short, SingularSolution, TotalFunctions, compiled_function, find_inverses!, is_small, jacobian!,
    jacobian_by_implicit_function!, jacobian_by_samples!, vjp_by_implicit_function!, vjp_by_samples!

include("classical_systems.jl")

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
    @test root((z, a) -> z .^ 2 .- a, [1.0], 2.0; solver = NLsolver(method = :anderson)).value ≈ [sqrt(2)]
    @test converged(root(z -> cos.(z) .- z, [1.0]; solver = NLsolver(method = :anderson))) == [true]
end

const ROOT_SOLVERS = (Auto(), Newton(), NLsolver(), NLsolver(method = :newton))
const FIXED_POINT_SOLVERS = (Auto(), Picard(), Picard(damping = 0.8), Anderson(), Newton(), NLsolver(), NLsolver(method = :anderson))

# Equations of x = z / unit, of one and of several unknowns, in short and in other vectors.
const LATERAL = [0.3 -0.5 0.1; 0.2 0.4 -0.3; 0.1 0.1 0.5]
const FIXED_POINTS_IN_UNITS = (
    (x -> cos.(x), [0.5]),
    (x -> tanh.(LATERAL * x .+ [0.3, -0.2, 0.7]), zeros(3)),
    (x -> tanh.(0.1 .* x[[2:12; 1]] .- 0.9 .* x .+ (1:12) ./ 12), zeros(12)),
)
const ROOTS_IN_UNITS = (
    (x -> x .^ 2 .- 4, [1.0]),
    (x -> exp.(x) .- 3, [0.0]),
    (x -> [x[1]^2 + x[2]^2 - 5, x[1] - 2x[2]], [1.0, 1.0]),
    (x -> [10 * (x[2] - x[1]^2), 1 - x[1]], [-1.2, 1.0]),
    (x -> [x[1:9] .+ sum(x) .- 11; prod(x) - 1], fill(0.5, 10)),
)

@testset "the unit of z makes no difference: $T" for (T, accuracy) in ((Float64, 1.0e-8), (Float32, 1.0e-4))
    for (kind, equations, solvers) in ((fixed_point, FIXED_POINTS_IN_UNITS, FIXED_POINT_SOLVERS), (root, ROOTS_IN_UNITS, ROOT_SOLVERS))
        for (g, x0) in equations, solver in solvers
            T == Float32 && length(x0) == 10 && continue          # it has two roots, and rounding decides
            f = kind == root ? (z, unit) -> g(z ./ unit) : (z, unit) -> unit .* g(z ./ unit)
            expected = kind(f, T.(x0), T(1); solver)
            @test all(converged(expected))
            for k in -18:3:18
                unit = T(10.0^k)
                solution = kind(f, T.(x0) .* unit, unit; solver)
                @test all(converged(solution))
                @test solution.value ./ unit ≈ expected.value rtol = accuracy
            end
        end
    end
end

@testset "the unit of f makes no difference" begin
    for unit in (1.0e-18, 1.0e-12, 1.0, 1.0e12, 1.0e18), solver in ROOT_SOLVERS
        @test root(z -> unit .* (z .^ 3 .- 2), [1.0]; solver).value ≈ [cbrt(2)]
        @test root(z -> unit .* [10 * (z[2] - z[1]^2), 1 - z[1]], [-1.2, 1.0]; solver).value ≈ [1, 1]
    end
end

@testset "a small solution is not taken for zero, and zero is found" begin
    for solver in FIXED_POINT_SOLVERS
        @test fixed_point(z -> 0.3 .* z .+ 7.0e-17, [0.0]; solver).value ≈ [1.0e-16]
        @test fixed_point(z -> 0.1 .* z .+ 9.0e-17, [1.0]; solver).value ≈ [1.0e-16]
        zero_found = fixed_point(z -> 0.9 .* z, [1.0]; solver)
        @test all(converged(zero_found))
        @test abs(only(zero_found.value)) <= 1.0e-14
    end
    for solver in ROOT_SOLVERS
        @test root(z -> z .^ 2 .- 4.0e-26, [1.0e-12]; solver).value ≈ [2.0e-13]
        @test root(z -> z .^ 2 .- 4.0e-26, [1.0]; solver).value ≈ [2.0e-13]
        for f in (z -> sin.(z), z -> z .^ 3, z -> [z[1] + z[2]^2, z[2] - z[1]^2])
            zero_found = root(f, f([1.0, 1.0]) isa Vector && length(f([1.0, 1.0])) == 2 ? [0.5, 0.4] : [0.5]; solver)
            @test all(converged(zero_found))
            @test norm(zero_found.value) <= 1.0e-13
        end
    end
end

@testset "entries of very different sizes have a scale" begin
    f = (z, a) -> [z[1] - a, (z[2] - 3.0e-9)^3 / 1.0e-27]
    g = (z, a) -> [0.5 * z[1] + a, 0.99 * z[2] + 3.0e-11]
    loose, scaled = (fixed_point(g, [1.0e3, 0.0], 1.0e3; scale, solver = Anderson()) for scale in (nothing, [1.0e3, 1.0e-9]))
    @test abs(scaled.value[2] - 3.0e-9) < 1.0e-17 < abs(loose.value[2] - 3.0e-9)
    @test scaled.residual[1] <= 1.0e-10
    @test_throws "scale has 2 entries" root(z -> z, [1.0]; scale = [1.0, 2.0])
    @test_throws "scale is [0]; expected numbers, positive" root(z -> z, [1.0]; scale = 0)
    @test_throws "expected numbers, positive" root(z -> z, [1.0]; scale = "1")
    @test_throws "v has entries of type ComplexF64" vjp(root(z -> z .- 1, [0.5]), [1.0im])
end

@testset "max_iterations is kept, whatever the solver" begin
    for n in (2, 12), limit in (1, 2, 3, 5, 8, 20, 70), T in (Float64, Float32)
        count = Ref(0)
        counted(z) = (count[] += 1; z)
        A = randn(Xoshiro(1), T, n, n)
        for (kind, f, solvers) in (
                    (fixed_point, z -> counted(T(3) .* cos.(A * z .+ T(0.1))), FIXED_POINT_SOLVERS),
                    (root, z -> counted(A * z .+ sin.(T(5) .* z) .+ z .^ 2 .+ T(1)), ROOT_SOLVERS),
                ), solver in solvers
            count[] = 0
            limited = typeof(solver)(; (name => name == :max_iterations ? limit : getfield(solver, name) for name in fieldnames(typeof(solver)))...)
            solution = kind(f, fill(T(0.3), n); solver = limited)
            @test solution.iterations[1] <= limit
            n > 8 || continue                                  # with derivatives from further calls
            count[] = 0
            kind(z -> eltype(z) == T ? f(z) : (y = f(z); count[] -= 1; y), fill(T(0.3), n); solver = limited)
            @test count[] <= limit
        end
    end
end

@testset "a Jacobian without inverse has a status of its own" begin
    for solver in ROOT_SOLVERS
        @test root(z -> z .^ 2 .+ 1, [0.0]; solver).status == [Status(5)]
        solver isa NLsolver || @test root(z -> [z[1] + z[2] - 1, z[1] + z[2] - 2], [0.3, 0.1]; solver).status == [Status(5)]
    end
    @test root(z -> z .^ 2 .+ 1, [0.5]).status == [Status(5)]
    @test root(z -> [z[1] + z[2] - 2, 2z[1] + 2z[2] - 4], [0.3, 0.1]).status == [Status(0)]          # any of its roots
end

@testset "what is no root is not called one" begin
    for solver in ROOT_SOLVERS, (f, z0) in (
                (z -> 1 ./ z, [1.0]), (z -> exp.(-z), [0.0]), (z -> exp.(-z .^ 2), [0.5]), (z -> z .* exp.(-z), [2.0]),
                (z -> z .^ 2 .+ 1.0e-20, [1.0e-9]), (z -> 1 .+ exp.(z), [0.0]), (z -> abs.(z) .+ 1, [1.0]),
                (z -> 2 .+ atan.(1.0e6 .* z), [3.0]),
            )
        @test root(f, z0; solver).status != [Status(0)]
    end
    for solver in ROOT_SOLVERS, (f, pole) in ((z -> tan.(z), [π / 2]), (z -> 1 ./ (z .- 1), [1 + 1.0e-14]), (z -> z ./ (z .- 3) .^ 2 .+ 1, [3 - 1.0e-13]))
        solution = root(f, pole; solver)
        @test solution.status != [Status(0)] || norm(f(solution.value)) < 1.0e-8
    end
    for solver in ROOT_SOLVERS
        solution = root(freudenstein_roth, [0.5, -2.0]; solver)          # most end in a minimum of ‖f‖
        @test solution.status != [Status(0)] || solution.value ≈ [5, 4]
    end
    @test root(z -> z .^ 2 .- 2, [sqrt(2) + 1.0e-13]).iterations == [1]          # but a start may be a root
end

@testset "the classical systems are solved where MINPACK solves them" begin
    for (name, f, start, factors) in CLASSICAL_SYSTEMS, factor in factors
        solution = root(f, far_start(collect(Float64, start), factor))
        @test converged(solution) == [true] || error("$name from $factor times its start is not solved")
        @test norm(f(solution.value)) < 1.0e-7
    end
end

@testset "whole Newton steps lead out of the minima of ‖f‖ in which the other methods end" begin
    cubic(z, A, B, c) = A * z .^ 3 .+ B * z .+ c
    rng = Xoshiro(1)
    found = map(1:100) do _
        A, B, c, start = randn(rng, 5, 5), randn(rng, 5, 5), randn(rng, 5), 10 .* randn(rng, 5)
        solution = root(cubic, start, A, B, c)
        converged(solution) == [true] && norm(cubic(solution.value, A, B, c)) < 1.0e-8
    end
    @test count(found) >= 95
end

@testset "of no samples, the derivatives are empty" begin
    for (a, batched, entries) in ((zeros(0), (1,), 1), (zeros(2, 0), (1,), 2), (zeros(2), (), 2))
        found = root((z, a) -> z .^ 3 .+ z .- a, zeros(2, 0), a; batched)
        @test vjp(found, zeros(2, 0)) == (zero(a),)
        @test size(ImplicitRNN.jacobian!(zeros(2, entries, 0), found.problem, found.inverses, 1)) == (2, entries, 0)
    end
end

@testset "one unknown may be a number, and has a number as its value" begin
    solution = root((z, a) -> z^2 - a, 1.0, 2.0)
    @test solution.value isa Float64 && solution.value ≈ sqrt(2)
    @test vjp(solution, 1)[1] ≈ vjp(solution, 1.0)[1] ≈ vjp(solution, fill(1.0))[1] ≈ 1 / sqrt(8)
    @test fixed_point(cos, 1).value ≈ 0.7390851332151607
    @test fixed_point(cos, 1.0f0).value isa Float32
    @test root((z, a) -> z[1]^2 - a, [1.0], 2.0).value ≈ [sqrt(2)]
    @test vjp(fixed_point((z, a) -> only(cos.(a .* z)), [0.5], 0.8), [1.0])[1] ≈ -0.324205030031247
end

@testset "hard roots are found by Newton's method and by the trust region" begin
    f = z -> [10 * (z[2] - z[1]^2), 1 - z[1], sin(z[3]) + z[3]]               # Rosenbrock's valley
    for solver in (Newton(), NLsolver())
        @test root(f, [-1.2, 1.0, 3.0]; solver).value ≈ [1, 1, 0] atol = 1.0e-8
        @test root(z -> atan.(z), [20.0]; solver).value ≈ [0] atol = 1.0e-8
    end
end

@testset "a root behind a local minimum is found" begin
    found = [root((z, a) -> z .^ 3 .- a .* z .- 2a, [start], a) for a in (0.5, 1.0, 1.5), start in -3:0.37:1]
    @test all(s -> s.status == [CONVERGED], found)
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
    @test Int.(solution.status[1:4]) == [0, 0, 3, 0] && !converged(solution)[5]
    for j in (1, 2, 4, 6)
        @test fixed_point(f, zeros(1), a[j]).value == solution.value[:, j]
    end
    statuses(solver) = fixed_point((z, a) -> a .* z .+ 1, zeros(1, 2), [0.5, 3.0]; batched = (1,), solver).status
    @test statuses(Picard()) == [Status(0), Status(2)]
    @test statuses(Auto()) == [Status(0), Status(4)]          # which comes upon the fixed point that repels
end

@testset "leaving the domain of f concerns that sample only" begin
    @test root(z -> log.(z), [9.0]).value ≈ [1.0]          # the first Newton step leads below zero
    solution = fixed_point((z, a) -> sqrt.(a .+ z), ones(1, 2), [1.0, -5.0]; batched = (1,))
    @test solution.status == [Status(0), Status(3)]
end

@testset "a start at a guard of f is left: $n unknowns" for n in (1, 12, 40)
    bernoulli(x) = x == 0 ? one(x) : x / expm1(x)
    found = root((z, a) -> bernoulli.(z) .- a, zeros(n), 0.5)
    @test found.status == [CONVERGED] && all(x -> isapprox(x, 1.2564312086261697), found.value)
    # Drift and diffusion between two contacts; the differences that f guards are zero at first. Its solution is linear.
    current(z) = (φ = [0; z; 3]; [φ[i] - 2φ[i + 1] + φ[i + 2] + bernoulli(φ[i + 1] - φ[i]) - bernoulli(φ[i + 2] - φ[i + 1]) for i in 1:n])
    found = root(current, zeros(n))
    @test found.status == [CONVERGED] && found.value ≈ (1:n) .* 3 / (n + 1)
    found = fixed_point((z, a) -> bernoulli.(z) .- a, zeros(n), 0.5; solver = Newton())
    @test found.status == [CONVERGED] && all(x -> isapprox(bernoulli(x) - 0.5, x), found.value)
end

@testset "a solution at a guard of f has its derivative: $n unknowns, $T" for n in (1, 4, 12, 130), T in (Float64, Float32)
    bernoulli(x) = x == 0 ? one(x) : x / expm1(x)          # 1 - x / 2 + …
    f(z, a, b) = bernoulli.(z) .+ sum(z) ./ 10 .- a .* bernoulli.(b)
    found = root(f, zeros(T, n), ones(T, n), zero(T))
    slope, rtol = inv(T(n) / 10 - T(0.5)), T(Float64(eps(T))^0.6)
    if n == 130                                            # by GMRES
        @test all(isapprox.(vjp(found, ones(T, n))[1], slope; rtol = sqrt(rtol)))
    else
        by_a, by_b = vjp(found, ones(T, n))
        @test all(isapprox.(by_a, slope; rtol)) && isapprox(by_b, -n * slope / 2; rtol)
        J = zeros(T, n, n, 1)
        ImplicitRNN.jacobian!(J, found.problem, found.inverses, 1)
        @test all(isapprox.(sum(J; dims = 1), slope; rtol))
    end
end

@testset "a guard of f among many samples and in many arguments" begin
    bernoulli(x) = x == 0 ? one(x) : x / expm1(x)
    masked(x) = ifelse(x == 0, one(x), x / expm1(x))
    for (f, slope) in (((z, a) -> bernoulli.(z) .- a) => -2, ((z, a) -> masked.(z) .- a) => -2, ((z, a) -> z .+ masked.(z) .- a) => 2),
            samples in (3, 3ImplicitRNN.MANY)
        a = repeat([0.75, 1.0, 1.5], samples ÷ 3)
        each = vjp(root(f, zeros(1, samples), a; batched = (1,)), ones(1, samples))[1]
        @test all(isapprox(slope), each[2:3:end]) && all(isfinite, each)
    end
    a, J = repeat([0.0, 0.5, 1.0], ImplicitRNN.MANY), zeros(1, 1, 3ImplicitRNN.MANY)
    found = root((z, a) -> z .- masked.(a), ones(1, length(a)), a; batched = (1,))
    each, _ = vjp(found, ones(1, length(a)))[1], ImplicitRNN.jacobian!(J, found.problem, found.inverses, 1)
    @test all(isapprox(-0.5), each[1:3:end]) && all(isfinite, each)
    @test vec(J) ≈ each
    a = [0.0; ones(1999)]
    @test vjp(root((z, a) -> [z[1] - sum(bernoulli, a)], [0.3], a), [1.0])[1][1] ≈ -0.5
    found = root((z, b, a) -> z .^ 3 .+ z .- b .- masked.(a), fill(0.5, 1, ImplicitRNN.MANY), fill(1.0, ImplicitRNN.MANY), 0.0; batched = (1,))
    @test vjp(found, ones(1, ImplicitRNN.MANY))[2] ≈ -ImplicitRNN.MANY / 8
end

@testset "there is none at a kink, a jump, or where the slope is infinite" begin
    at_zero(g) = x -> x == 0 ? zero(x) : g(x)
    for g in (cbrt, x -> sqrt(abs(x)), x -> sign(x) * abs(x)^1.5, x -> x * log(abs(x)), x -> x + x^2 / abs(x) / 2, x -> x + x^2 * sin(1 / x), x -> 1 / x, x -> x / expm1(x))
        found = root((x, a) -> at_zero(g)(x) - a, 0.0, 0.0)
        @test_throws SingularSolution vjp(found, 1.0)
    end
    @test vjp(root((x, a) -> x + at_zero(x -> abs(x)^1.5)(x) - a, 0.0, 0.0), 1.0)[1] ≈ 1
    @test isnan(vjp(root((x, a) -> x - sqrt(abs(a)), 0.0, 0.0), 1.0)[1])
end

"f in code with an exception handler, which runs one sample after the other."
one_by_one(f) = function (z, a, b)
    try
        return f(z, a, b)
    finally
    end
end

@testset "by one argument there is none, by the others there are ($samples samples)" for samples in (1, 4096)
    of_all(f, args...) = vjp(root(f, fill(3.0, 1, samples), (fill(x, samples) for x in args)...; batched = eachindex(args)), ones(1, samples))
    with_root(z, a, b) = z .^ 2 .- sqrt.(a) .- b
    for f in (with_root, one_by_one(with_root))
        a, b = of_all(f, 0.0, 1.0)
        @test all(isnan, a) && b ≈ fill(0.5, samples)
    end
    # By the exponent of a negative number.
    with_power(z, a, b) = z .^ 3 .+ z .- a .^ b
    for f in (with_power, one_by_one(with_power))
        z = root(z -> z^3 + z - 4, 1.0).value
        a, b = of_all(f, -2.0, 2.0)
        @test a ≈ fill(-4 / (3z^2 + 1), samples) && all(isnan, b)
        shared = root(f, fill(3.0, 1, samples), -2.0, 2.0)
        a, b = vjp(shared, ones(1, samples))
        @test a ≈ -4samples / (3z^2 + 1) && isnan(b)
        J = zeros(1, 1, samples)
        @test all(≈(-4 / (3z^2 + 1)), ImplicitRNN.jacobian!(J, shared.problem, shared.inverses, 1))
        @test all(isnan, ImplicitRNN.jacobian!(J, shared.problem, shared.inverses, 2))
    end
end

@testset "by many exponents of negative numbers there is none" begin
    z = root((z, a, b) -> [z[1]^3 + z[1] - sum(a .^ b) / 100], [3.0], fill(-2.0, 100), fill(2.0, 100))
    a, b = vjp(z, [1.0])
    @test a ≈ fill(-0.04 / (3z.value[1]^2 + 1), 100) && all(isnan, b)
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
    @test_throws SingularSolution vjp(root((z, a) -> z .^ 2 .- a, [1.0], 0.0), [1.0])
    @test_throws SingularSolution vjp(root((z, a) -> [z[1] + z[2] - a, 2z[1] + 2z[2] - 2a], [1.0, 1.0], 2.0), [1.0, 0.0])
    @test_throws SingularSolution vjp(root((z, a) -> z .^ 2 .- a, ones(1, 50), zeros(50); batched = (1,)), ones(1, 50))
    # Found at zero, where rounding hides that the Jacobian changes; but exp(z) - 1 has a root there.
    for f in (z -> cosh.(z) .- 1, z -> exp.(z) .- z .- 1), z0 in (1.0e-9, 0.1, 1.0), n in (1, 50, 5000)
        hidden = root((z, a) -> f(z) .- a, fill(z0, 1, n), 0.0)
        @test all(converged(hidden))
        @test_throws SingularSolution vjp(hidden, ones(1, n))
        @test vjp(root((z, a) -> exp.(z) .- 1 .- a, fill(z0, 1, n), 0.0), ones(1, n))[1] ≈ n
    end
    @test_throws SingularSolution vjp(root((z, a) -> [cosh(z[1]) - 1 - a, z[2] - 1], [0.1, 0.1], 0.0), [1.0, 0.0])
    # What is solved side by side, where the solver may know that the derivative is regular.
    a = repeat([0.0, 1.0e-3, 0.25, 4.0], 2048)
    many = root((z, a) -> z .^ 2 .- a, fill(3.0, 1, 8192), a; batched = (1,))
    @test_throws SingularSolution vjp(many, ones(1, 8192))
    @test vjp(many, reshape(Float64.(a .> 0), 1, :))[1] ≈ [x > 0 ? 0.5 / sqrt(x) : 0.0 for x in a] rtol = 1.0e-12
    # All that are singular are named, up to more than one wants to read.
    for n in (1, 12), samples in (7, 5000)
        some = root((z, a) -> z .^ 2 .- a, ones(n, samples), [Float64(k % 3 != 1) for k in 1:samples]; batched = (1,))
        error = try
            vjp(some, ones(n, samples))
        catch e
            e
        end
        @test error isa SingularSolution && first(error.samples, 20) == first(1:3:samples, 20)
        @test occursin(samples == 7 ? "samples 1, 4, 7, which" : "samples 1, 4, 7, 10", sprint(showerror, error))
    end
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
    @test all(allocations(51_200) .<= allocations(512) .+ 51_200 .+ 100 * 51_200 ÷ 256)       # a truth for each
end

@testset "Float32 stays Float32" begin
    solution = fixed_point((z, a) -> cos.(a .* z), [0.5f0], 0.8f0)
    @test eltype(solution.value) == Float32
    @test all(converged(solution))
    @test vjp(solution, [1.0f0])[1] ≈ -0.324205f0 rtol = 1.0e-5
end

@testset "numbers that LAPACK does not have are solved and differentiated: $T" for (T, accuracy) in ((Float16, 1.0e-2), (BigFloat, 1.0e-8))
    W, b = 0.4 .* randn(Xoshiro(1), 30, 30) ./ sqrt(30), randn(Xoshiro(2), 30)
    for (solve, f) in ((fixed_point, (z, W, b) -> tanh.(W * z .+ b)), (root, (z, W, b) -> z .+ z .^ 3 .+ W * z .- b))
        found, expected = solve(f, zeros(T, 30), T.(W), T.(b)), solve(f, zeros(30), W, b)
        @test eltype(found.value) == T && all(converged(found))
        @test found.value ≈ expected.value rtol = accuracy
        @test all(isapprox.(vjp(found, ones(T, 30)), vjp(expected, ones(30)); rtol = accuracy))
    end
    @test fixed_point(z -> T[0 1; -1 0] * z, ones(T, 2); solver = Newton()).status == [ImplicitRNN.UNSTABLE]
end

@testset "large arguments of many digits are differentiated to as many" begin
    n = 40
    W, b = BigFloat.(0.4 .* randn(Xoshiro(1), n, n) ./ sqrt(n)), BigFloat.(randn(Xoshiro(2), n))
    solution = root((z, W, b) -> z .+ z .^ 3 .+ W * z .- b, zeros(BigFloat, n), W, b)
    λ = -(Diagonal(1 .+ 3 .* solution.value .^ 2) + W)' \ ones(BigFloat, n)
    of_W, of_b = vjp(solution, ones(BigFloat, n))
    @test of_W ≈ λ * solution.value' rtol = 1.0e-60
    @test of_b ≈ -λ rtol = 1.0e-60
end

@testset "a far start costs no digits, in $T" for T in (Float32, Float64, BigFloat)
    far = eps(T)^-1 * 1000
    for z0 in (T[far], fill(far, 1, 5000))[1:(T == BigFloat ? 1 : 2)], solver in (Newton(; max_iterations = 400), Auto(; max_iterations = 4000))
        @test all(z -> isapprox(z, sqrt(T(2)); rtol = max(4eps(T), 1.0e-15)), root((z, a) -> z .* z .- a, z0, T(2); solver).value)
        @test all(iszero, root((z, a) -> a .* z .* z, z0, T(2); solver).value)
    end
    for solver in (Picard(; max_iterations = 2000), Auto(; max_iterations = 2000))
        @test fixed_point((z, a) -> z ./ 2 .+ a, T[far], T(1); solver).value ≈ T[2] rtol = 1.0e-5
        @test iszero(fixed_point((z, a) -> z ./ 2 .* a, T[far], T(1); solver).value)
    end
end

@testset "constants of another type do no harm" begin
    f = (z, a) -> [tanh(0.3 * z[1] - 0.5 * z[2] + a), tanh(0.2 * z[1] + 0.4 * z[2])]
    single, double = (fixed_point(f, T[0.1, 0.2], T(0.7); solver = Newton()) for T in (Float32, Float64))
    @test all(converged(single))
    @test vjp(single, Float32[1, 2])[1] ≈ vjp(double, [1.0, 2.0])[1] rtol = 1.0e-5
end

# The same for W whatever way it is written.
const DENSE_LAYERS = (
    (z, W, x) -> tanh.(W * z .+ x),
    (z, W, x) -> [tanh(dot(W[i, :], z) + x[i]) for i in eachindex(z)],
    (z, W, x) -> tanh.(vec(sum(W .* z', dims = 2)) .+ x),
    (z, W, x) -> map(tanh, transpose(permutedims(W)) * z + x),
    (z, W, x) -> [(t = exp(-2 * (sum(W[i, j] * z[j] for j in eachindex(z)) + x[i])); (1 - t) / (1 + t)) for i in eachindex(z)],
)

@testset "large arguments are differentiated in reverse mode" begin
    for (T, n, layers) in ((Float64, 12, DENSE_LAYERS), (Float64, 40, DENSE_LAYERS), (Float32, 40, DENSE_LAYERS[1:1])), f in layers
        W, x, v = T.(0.5 .* randn(Xoshiro(1), n, n) ./ sqrt(n)), randn(Xoshiro(2), T, n), randn(Xoshiro(3), T, n)
        solution = fixed_point(f, zeros(T, n), W, x; solver = Newton(tol = 4eps(T)))
        z = solution.value
        D = Diagonal(1 .- z .^ 2)
        λ = D * ((I - W' * D) \ v)
        dW, dx = vjp(solution, v)
        @test dW ≈ λ * z' rtol = 1000eps(T)
        @test dx ≈ λ rtol = 1000eps(T)
        J = ImplicitRNN.jacobian!(zeros(T, n, n^2, 1), solution.problem, solution.inverses, 1)[:, :, 1]
        @test J' * v ≈ vec(dW) rtol = 1000eps(T)
        @test ImplicitRNN.recorded(W -> f(z, W, x), W, n) !== nothing
    end
end

@testset "what cannot be recorded, or is recorded wrongly, is differentiated forwards" begin
    inverse(W) = inv(W)                                                    # by LAPACK, but for dual numbers
    detached(W::AbstractArray{T}) where {T} = T == ImplicitRNN.Traced ? map(w -> T(w.value), W) : W
    refused(W::AbstractArray{T}) where {T} = T == ImplicitRNN.Traced ? throw(MethodError(refused, (W,))) : W
    n = 12
    W, v = 0.3 .* randn(Xoshiro(1), n, n), randn(Xoshiro(3), n)
    expected = vjp(fixed_point((z, W) -> tanh.(W * z .+ 0.1), zeros(n), W), v)[1]
    for g in (detached, refused)
        @test vjp(fixed_point((z, W) -> tanh.(g(W) * z .+ 0.1), zeros(n), W), v)[1] ≈ expected rtol = 1.0e-12
    end
    solution = root((z, W) -> (W + 3I) * z .- 1 .+ 0.1 .* inv(W + 4I) * z, zeros(n), W)
    loss(W) = dot(v, ((reshape(W, n, n) + 3I) + 0.1 .* inv(reshape(W, n, n) + 4I)) \ ones(n))
    @test vec(vjp(solution, v)[1]) ≈ finite_difference(loss, vec(W)) rtol = 1.0e-8
end

@testset "a function that computes in several tasks, or differentiates within, is differentiated rightly" begin
    n = 12
    W, A, v = (0.3 .* randn(Xoshiro(k), n, n) for k in 1:3)
    inner() = vjp(fixed_point((y, A) -> tanh.(A * y .+ 0.1), zeros(n), A), v[:, 1])[1][:, 2]
    shift = inner()
    expected = vjp(fixed_point((z, W) -> tanh.(W * z .+ shift), zeros(n), W), v[:, 1])[1]
    in_tasks(z, W) = tanh.(reduce(vcat, fetch.([Threads.@spawn(W[k, :] * z) for k in (1:6, 7:12)])) .+ shift)
    nested(z, W) = tanh.(W * z .+ inner())
    for f in (in_tasks, nested)
        @test vjp(fixed_point(f, zeros(n), W), v[:, 1])[1] ≈ expected rtol = 1.0e-10
    end
    @test ImplicitRNN.recorded(W -> in_tasks(ones(n), W), W, n) === nothing
    pull = ImplicitRNN.recorded(W -> nested(ones(n), W), W, n)
    @test pull(v[:, 1]) ≈ ImplicitRNN.recorded(W -> tanh.(W * ones(n) .+ shift), W, n)(v[:, 1])
end

@testset "recorded numbers are numbers" begin
    functions = (
        abs, abs2, inv, sqrt, cbrt, exp, expm1, log, log1p, log2, sin, cos, tan, asin, acos, atan, sinh, cosh, tanh, asinh, atanh, sinpi,
        x -> x^2, x -> x^3, x -> x^-1, x -> x^0.7, x -> 2^x, x -> 1 / x, x -> x / 3, x -> 3x - 1, x -> -x, x -> hypot(x, 2), x -> max(x, 0.3),
        x -> min(x, 0.3), x -> atan(x, 2), x -> mod(x, 0.4), x -> x > 0.2 ? x^2 : x, x -> clamp(x, 0.1, 0.9) * x, x -> muladd(x, x, 1),
        x -> sincos(x)[1], x -> x * sign(x), x -> float(x) * one(x) + zero(x), x -> x^x, x -> floor(x) + x, x -> x + π, x -> x * (1 // 3),
        x -> x * big"0.1", x -> big"0.1" - x, x -> x + big(2),
    )
    for f in functions
        pull = ImplicitRNN.recorded(x -> [f(only(x))], [0.7], 1)
        @test only(pull([1.0])) ≈ ForwardDiff.derivative(f, 0.7)
    end
end

@testset "a large equation is solved and differentiated without a matrix" begin
    n = 4000
    f = (z, a) -> 0.3 .* a .* sin.(circshift(z, 1)) .+ 0.2 .* cos.(circshift(z, -2)) .+ 0.1
    a, v = 1 .+ 0.5 .* sin.(1:n), cos.(1:n)
    gradient_of(v) = (solution = fixed_point(f, zeros(n), a); @assert all(converged(solution)); vjp(solution, v)[1])
    gradient = gradient_of(v)
    @test (@allocated gradient_of(v)) < 8n^2
    loss(t) = dot(v, fixed_point(f, zeros(n), a .+ t .* v; solver = Picard(tol = 1.0e-14)).value)
    @test dot(gradient, v) ≈ (loss(1.0e-4) - loss(-1.0e-4)) / 2.0e-4 rtol = 1.0e-7
end

@testset "the Jacobian of the solution is found once" begin
    count = Ref(0)
    f = (z, a) -> (eltype(z) <: ForwardDiff.Dual && (count[] += 1); cos.(a .* z))
    for samples in (1, 50)
        a = fill(0.8, samples)
        solution = fixed_point(f, fill(0.5, 1, samples), a; batched = (1,), solver = Picard())
        vjp(solution, ones(1, samples))
        used = count[]
        vjp(solution, ones(1, samples))
        ImplicitRNN.jacobian!(zeros(1, 1, samples), solution.problem, solution.inverses, 1)
        samples == 1 || @test count[] == used
    end
end

@testset "tasks that differentiate one solution take turns" begin
    count = Ref(0)
    f = (z, a) -> (eltype(z) <: ForwardDiff.Dual && (count[] += 1); yield(); cos.(a .* z))
    solution = fixed_point(f, fill(0.5, 1, 50), fill(0.8, 50); batched = (1,), solver = Picard())
    alone = (vjp(solution, ones(1, 50)); count[])
    count[], again = 0, fixed_point(f, fill(0.5, 1, 50), fill(0.8, 50); batched = (1,), solver = Picard())
    at_once = fetch.([@async vjp(again, ones(1, 50)) for _ in 1:4])
    @test all(==(vjp(solution, ones(1, 50))), at_once)
    @test count[] == alone
end

@testset "few samples and many are solved alike" begin
    samples = ImplicitRNN.MANY
    f = (z, a, b) -> [tanh(a * z[1] - z[2]), sin(z[1] + b)]
    a, b, v = randn(Xoshiro(1), samples), 0.3, randn(Xoshiro(2), 2, samples)
    for solver in (Auto(), Picard(), Anderson(), Newton())
        many = fixed_point(f, zeros(2, samples), a, b; batched = (1,), solver)
        few = fixed_point(f, zeros(2, 100), a[1:100], b; batched = (1,), solver)
        @test few.value ≈ many.value[:, 1:100] rtol = 1.0e-12
        @test few.status == many.status[1:100]
        v[:, .!converged(many)] .= 0
        @test vjp(few, v[:, 1:100])[1] ≈ vjp(many, v)[1][1:100] rtol = 1.0e-10
    end
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

# A vector whose indices are 0 and 1.
struct CountedFromZero <: AbstractVector{Float64}
    z::Any
end
Base.axes(::CountedFromZero) = (Base.IdentityUnitRange(0:1),)
Base.size(::CountedFromZero) = (2,)
Base.getindex(y::CountedFromZero, i::Int) = Float64(i)

@testset "a function that is at fault is told so" begin
    @test_throws "f returned an array of shape (2,); expected a vector of 1 entry" fixed_point(z -> [1.0, 2.0], [0.5])
    @test_throws "f returned a Float64" fixed_point(z -> 1.0, [0.5, 0.5])
    @test_throws "expected a vector of 2 entries" fixed_point(CountedFromZero, [0.5, 0.5])
    @test_throws "f returned a tuple of 1; expected a vector of 1 entry, or a number" fixed_point(z -> (1.0,), [0.5])
    @test_throws "f returned complex numbers" root(z -> sqrt.(complex.(z)), [0.5])
    @test_throws "f returned complex numbers" root(z -> z + 1im, 0.5)
    @test_throws "f returned a tuple of 2" root(z -> (z[1], z[2]), [0.5, 0.5])
    @test_throws UndefVarError fixed_point(z -> undefined_function(z), [0.5])
    @test_throws "has 3 samples, z has 2" fixed_point((z, a) -> z, ones(1, 2), ones(3); batched = (1,))
end

@testset "a function that writes to its arguments is told so" begin
    increased(z, A) = (A[1] += 1; z .- sum(A))
    for (A, samples, batched) in ((ones(2, 2), 1, ()), (ones(12), 2, ()), (ones(2, 2, 3), 3, (1,)))
        @test_throws "f has written to its argument number 1" root(increased, zeros(1, samples), A; batched)
    end
    for f in ((z, a) -> (z .-= a; z), (z, a) -> (a .+= 1; z .- a)), samples in (1, 5000)
        @test_throws "f writes to a vector that it was given" root(f, zeros(2, samples), ones(2))
    end
    @test root((z, a) -> (y = copy(z); y[1] -= 1; y .- a), zeros(2), ones(2)).value == [2, 1]
    written(z, a) = (b = copy(a); b[1] += 1; z[1] += 0; z .- sum(b))
    @test root(written, zeros(12), [NaN; ones(11)]).status == [ImplicitRNN.NON_FINITE]
    @test root(written, zeros(12), ones(12)).value ≈ fill(13, 12)
end

@testset "functions are NaN outside their domains in a text: $T" for T in (Float64, Float32, BigFloat, Dual{Nothing, Float64, 1})
    numbers = T[-Inf, -3, -1.5, -1, -0.5, -0.0, 0, 0.5, 1, 1.5, 2, Inf, NaN]
    or_nan(g, x...) = try
        g(x...)
    catch error
        error isa DomainError ? NaN : rethrow()
    end
    same(a, b) = isequal(a, b) || isnan(a) && isnan(b)
    same(a::Tuple, b::Tuple) = all(map(same, a, b))
    for name in setdiff(TotalFunctions.NAMES, (:^, :sincos)), x in numbers
        g = compiled_function("x -> $name(x)")
        @test same(g(x), or_nan(getfield(Base, name), x))
        @test @inferred(g(x)) isa T
    end
    power = compiled_function("(x, y) -> x^y")
    for x in numbers[2:end], y in (T[-Inf, -2, -0.5, 0, 0.25, 2, 3, Inf, NaN]..., 2, -3, 1 // 3)
        @test same(power(x, y), or_nan(^, x, y))
    end
    for x in numbers
        @test same(compiled_function("x -> sincos(x)")(x), isinf(x) ? (NaN, NaN) : sincos(x))
        @test same(compiled_function("x -> (x^-1, x^2, log(2, abs(x)))")(x), (x^-1, x^2, log(2, abs(x))))
        @test same(compiled_function("x -> log(2, x)")(x), or_nan(x -> log(2, x), x))
    end
end

@testset "functions in a text that are Julia's" begin
    A = Diagonal([2.0, 3.0])
    @test compiled_function("A -> (sqrt(A), log(A), A^2, A^0.5)")(A) == (sqrt(A), log(A), A^2, A^0.5)
    @test compiled_function("z -> (sqrt(z), z^0.5, sin(z))")(-1.0 + 0im) == (im, (-1.0 + 0im)^0.5, sin(-1.0 + 0im))
    @test compiled_function("x -> try sqrt(x) catch; 7.0 end")(-1.0) == 7          # it counts on the exception
    @test Base.return_types(compiled_function("n -> (n^2, 2^n, n^-1)"), (Int,)) == [Tuple{Int, Int, Float64}]
end

@testset "leaving the domain of a text: $samples samples" for samples in (1, 4096)
    for text in ("(z, a) -> sqrt.(z) .+ a", "(z, a) -> z .^ 1.5 .+ a", "(z, a) -> ifelse.(z .< 0.1, log(0.1) .+ 10 .* (z .- 0.1), log.(z)) .+ 1 .+ a")
        f = compiled_function(text)
        found = root(f, fill(2.0, 1, samples), ones(samples); batched = (1,), solver = Newton())
        if contains(text, "ifelse")                                                # of functions that have a value there
            @test all(==(CONVERGED), found.status) && all(≈(exp(-2)), found.value)
            @test all(≈(-exp(-2)), vjp(found, ones(1, samples))[1])
        else
            @test !any(converged(found))
        end
    end
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
    @test_throws "has more behind a semicolon" compiled_function("(z, a) -> b = 2a; z .- b")
    @test compiled_function("z -> (b = 2; z .- b);")([3.0]) == [1.0]
end

@testset "a fixed point that iteration would leave is unstable by every solver ($solver)" for solver in
    (Auto(), Newton(), Anderson(), Picard(damping = 0.3), NLsolver())
    @test fixed_point((z, a) -> tanh.(a .- 3 .* z), [0.2], 0.5; solver).status == [ImplicitRNN.UNSTABLE]
    @test fixed_point(z -> 2 .* z, [0.0]; solver).status == [ImplicitRNN.UNSTABLE]       # it rests where it starts
end

@testset "a sample whose evaluations are used up is not called singular (NLsolve)" begin
    net = one_layer(; neurons = 8, constraint = Perron(0.95))
    p, X = parameters(net; gain = 3.0), samples(net, 5)
    R, weights = recurrent_weights(net, p), named_weights(net, p)
    drive = weights["W"] * X .+ weights["b"]
    solution = fixed_point((z, u) -> tanh.(R * z .+ u), zeros(8, 5), drive; batched = (1,), solver = NLsolver(max_iterations = 13))
    @test count(converged(solution)) == 3
    @test all(==(ImplicitRNN.MAX_ITERATIONS), solution.status[.!converged(solution)])
    @test all(==(13), solution.iterations[.!converged(solution)])
end

@testset "a point of infinite slope is no root ($solver)" for solver in (Auto(max_iterations = 300), Newton(), NLsolver())
    for f in (z -> sqrt.(z) .+ 1, z -> sqrt.(z) .+ z .+ 0.1, z -> sqrt.(abs.(z)) .+ 1)
        @test !any(root(f, [0.01 1.0 100.0]; solver).status .== ImplicitRNN.CONVERGED)
    end
end

@testset "nor is it for many samples ($solver)" for solver in (Auto(max_iterations = 100), Newton())
    Z = collect(exp.(range(-3, 3, 4100))')
    @test !any(root(z -> sqrt.(abs.(z)) .+ 1, Z; solver).status .== ImplicitRNN.CONVERGED)
    @test abs.(root(z -> sqrt.(abs.(z) .+ 1) .- 2, Z; solver).value) ≈ fill(3, 1, 4100)
end

@testset "what is written to a value changes no derivative" begin
    for samples in (1, 3, 5000)
        a = 1 .+ (1:samples) ./ samples
        solution = root((z, a) -> z .^ 3 .+ z .- a, ones(1, samples), a; batched = (1,))
        expected = 1 ./ (3 .* vec(solution.value) .^ 2 .+ 1)
        solution.value .= 7
        @test vjp(solution, ones(1, samples))[1] ≈ expected
    end
end

@testset "batched is checked" begin
    f, Z, a = (z, a, b) -> cos.(a .* z) .+ b, zeros(1, 3), [0.1, 0.2, 0.3]
    @test fixed_point(f, Z, a, 0.5; batched = 1).value == fixed_point(f, Z, a, 0.5; batched = [1]).value
    for batched in ((3,), (0,), (:a,), (1.0,), "a", (true, false), [true, false], true)
        @test_throws "expected positions of the 2 arguments behind z" fixed_point(f, Z, a, 0.5; batched)
    end
    for batched in (nothing, :a)
        @test_throws "expected positions of arguments" fixed_point(f, Z, a, 0.5; batched)
    end
    @test_throws "argument 2 is a number, which all samples share" fixed_point(f, Z, a, 0.5; batched = (1, 2))
    @test_throws "argument 2 is a number" fixed_point(f, Z, a, fill(0.5); batched = (1, 2))
end

@testset "functions that take Arrays or plain numbers only are told what to do" begin
    f(z::Vector{Float64}) = z .- 1
    g(z, a::Vector{Float64}) = z .- a
    for work in (() -> root(f, zeros(12)), () -> root(z -> setindex!(zeros(2), z[1], 1), ones(2)), () -> vjp(root(g, zeros(12), ones(12)), ones(12)))
        @test_throws "f is differentiated by dual numbers of ForwardDiff.jl, and takes none" work()
    end
    @test fixed_point(f, fill(1.0, 12); solver = Picard(max_iterations = 3)).iterations == [3]          # which needs no derivatives
    for work in (() -> fixed_point(f, [1.0]), () -> root(g, zeros(3), ones(3)), () -> root((z, a) -> [sum(f(z)) - a], [1.0], 2.0))
        @test_throws "f is given vectors of up to 8 entries that are no Arrays, and takes none" work()
    end
    @test_throws "f is differentiated by dual numbers" root((z::Float64, a) -> z - a, 1.0, 2.0)
    foreach(n -> (@test_throws MethodError root(z -> sin(z), ones(n))), (2, 12))          # not what is wrong
end

@testset "starts and arguments of another kind are refused" begin
    f = (z, a) -> cos.(a .* z)
    for z0 in ((0.5,), (; z = 0.5), 0.5im, zeros(1, 2, 3), fill(0.5), "z", nothing)
        @test_throws "the start z0 is a" fixed_point(f, z0, 0.8)
    end
    @test_throws "the start z0 has entries of type ComplexF64" fixed_point(f, [0.5im], 0.8)
    @test_throws "the start z0 has entries of type Any" root(f, Any[0.5], 0.8)
    @test_throws "the start z0 has no entries" root(f, Float64[], 0.8)
    @test_throws "an argument is a tuple of 2" fixed_point(f, [0.5], (0.1, 0.2))
    @test_throws "an argument is a named tuple of u, v" fixed_point(f, [0.5], (; u = 0.1, v = 0.2))
    @test_throws "an argument has dual numbers" ForwardDiff.derivative(a -> only(fixed_point(f, [0.5], a).value), 0.8)
    @test_throws "an argument has dual numbers" ForwardDiff.gradient(a -> only(fixed_point(f, [0.5], a).value), [0.8])
    @test_throws "the start z0 has dual numbers" ForwardDiff.derivative(z -> fixed_point(f, z, 0.8).value, 0.5)
    @test_throws "solver is Newton; expected one made by its constructor" fixed_point(f, [0.5], 0.8; solver = Newton)
end

@testset "a fixed point that was found is unstable where iteration runs away, one that was not is diverged" begin
    for f in (z -> -3 .* z .+ 1, z -> 2 .* z, z -> z .^ 2 .- 0.1), z0 in ([3.0], fill(3.0, 1, 2))
        solution = fixed_point(f, z0)
        @test all(==(ImplicitRNN.UNSTABLE), solution.status)
        @test f(solution.value) ≈ solution.value atol = 1.0e-9
    end
    @test fixed_point(z -> 1 .+ z .^ 2, [0.3]).status == [ImplicitRNN.DIVERGED]
    # Iteration goes on without end, and leads the other methods nowhere.
    a = collect(range(2.0, 6.0, 400))
    for f in ((z, a) -> cos.(a .* z), (z, a) -> a .* cos.(z))
        solution = fixed_point(f, zeros(1, 400), a; batched = (1,))
        found = in.(solution.status, Ref((CONVERGED, ImplicitRNN.UNSTABLE)))
        @test count(!, found) < 12
        @test maximum(solution.residual[found]) < 1.0e-10 && f(solution.value, a')[:, found] ≈ solution.value[:, found]
    end
end

helped(z, a) = try
    a > 0.5 ? a * z : z
catch
    z
end
@testset "f may catch exceptions, for few samples and for many" begin
    inner = (z, a) -> map(z -> helped(cos(z), a), z)
    for f in (
            (z, a) -> [helped(cos(z[1]), a)],
            (z, a) -> [helped(helped(cos(z[1]), a), -1.0)],
            (z, a) -> inner(z, a),
        )
        @test ImplicitRNN.catches(f)
        a = collect(range(0.1, 0.9, ImplicitRNN.MANY))
        few, many = [1, 2, 4000, 4050], axes(a, 1)
        found = map((few, many)) do which
            solution = fixed_point(f, fill(0.5, 1, length(which)), a[which]; batched = (1,), solver = Newton())
            @test all(converged(solution))
            vec(solution.value), vjp(solution, ones(1, length(which)))[1]
        end
        @test found[1][1] ≈ found[2][1][few] && found[1][2] ≈ found[2][2][few]
        @test found[2][2][4000] < -0.1 || found[2][2][4000] > 0.1
    end
    for f in ((z, a) -> a .* cos.(z), cos, ImplicitRNN.OfNumber(cos), compiled_function("(z, a) -> a .* norm(z)"))
        @test !ImplicitRNN.catches(f)
    end
    @test ImplicitRNN.catches(ImplicitRNN.OfNumber(inner))
    @test ImplicitRNN.catches(compiled_function("(z, a) -> try a .* z catch; z end"))
end

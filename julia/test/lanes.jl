# Equations of many samples: numbers side by side, their functions, and that samples are solved and differentiated as one by one.

using ImplicitRNN: SingularSolution, Jet, Vec, LANES, from_lanes, lane, partial_of, runs_side_by_side, suited, variable

"f of all numbers, as many side by side as there are lanes."
function in_lanes(f, x::Vector{Float64}...)
    load(x, k) = from_lanes(l -> x[min(k + l - 1, end)])
    return reduce(vcat, [[lane(f((load(v, k) for v in x)...), l) for l in 1:min(LANES, length(x[1]) - k + 1)] for k in 1:LANES:length(x[1])])
end

"The largest error in units of the last place; infinite where one is finite and the other is not."
function worst_error(f, x::Vector{Float64}...)
    exact = setprecision(() -> in_domain_or_nan.(f, map(v -> big.(v), x)...), 400)
    return maximum(zip(in_lanes(f, x...), exact)) do (y, e)
        rounded = Float64(e)
        isfinite(rounded) || return isequal(y, rounded) ? 0.0 : Inf
        Float64(abs(y - e) / max(eps(rounded), nextfloat(0.0)))
    end
end
in_domain_or_nan(f, x...) = try
    f(x...)
catch error
    error isa DomainError ? big(NaN) : rethrow()
end

const EDGES = [0.0, 1.0, -1.0, 0.5, 1.0e-300, 5.0e-324, -3.0e-310, 1.0e-17, -1.0e-9, 0.1, π / 2, π, 100π, 1.0e5, 9.9e5, 1.1e6, 1.0e15, -1.0e300, 700.0, 709.7, 710.0, -745.1, -746.0, -708.5, Inf, -Inf, NaN]
spread(rng, count) = [randn(rng, count); 30 .* randn(rng, count); 1000 .* randn(rng, count); exp.(20 .* randn(rng, count)) .* rand(rng, (-1, 1), count)]

@testset "elementary functions of numbers side by side" begin
    x = [EDGES; spread(Xoshiro(1), 500)]
    for (f, bound) in (
            (exp, 1), (exp2, 1), (expm1, 2), (log, 1), (log1p, 1), (sin, 1), (cos, 1.2), (tan, 2), (tanh, 2), (sinh, 2), (cosh, 1.5), (sqrt, 0.5),
            (abs, 0), (inv, 0.5), (floor, 0), (round, 0), (asin, 1), (atan, 1), (cbrt, 1), (sinpi, 1.3), (x -> x^2, 0.5), (x -> x^3, 1.5), (x -> x^-1, 0.5),
            (x -> x^5, 0.6), (x -> x^-3, 0.6), (x -> x^10, 0.6), (x -> x^0, 0), (x -> abs(x)^oftype(x, 1.5), 1.2), (x -> abs(x)^oftype(x, -0.375), 1.2),
        )
        @test worst_error(f, x) <= bound
    end
end

@testset "truths are compared sample by sample" begin
    a = [ones(1, 16) (-1.0) .^ (1:ImplicitRNN.MANY)']          # the first of them, by which f is tried, all alike
    for f in (
            (z, a) -> ifelse.((z .> 0) .== (a .> 0), z .- 3, z .- 5), (z, a) -> ifelse.((z .> 0) .!= (a .> 0), z .- 5, z .- 3),
            (z, a) -> ifelse.((a .> 0) .== true, z .- 3, z .- 5), (z, a) -> ifelse.(false .== (a .> 0), z .- 5, z .- 3),
            (z, a) -> z .- 4 .+ copysign.(z .* a, 2.0),
        )
        solution = root(f, ones(1, size(a, 2)), a; batched = (1,))
        @test all(converged(solution))
        few = root(f, ones(1, 48), a[:, 1:48]; batched = (1,))          # one by one
        @test solution.value[:, 1:48] == few.value
    end
end

@testset "near multiples of π/2, 1 and 0" begin
    multiples = [prevfloat(k * (π / 2), j) for k in 0:3:600_000 for j in -1:1][1:50:end]
    @test worst_error(sin, multiples) <= 1
    @test worst_error(cos, multiples) <= 1.2
    ones = [1 .+ eps() .* (-40:40); exp.(1.0e-3 .* randn(Xoshiro(1), 300))]
    @test worst_error(log, ones) <= 1
    @test worst_error(log1p, ones .- 1) <= 1
    @test worst_error(expm1, ones .- 1) <= 2
    @test worst_error(tanh, ones .- 1) <= 2
end

@testset "powers" begin
    rng = Xoshiro(2)
    x, y = exp.(3 .* randn(rng, 2000)), 30 .* randn(rng, 2000)
    @test worst_error(^, x, y) <= 1.2
    special = [0.0, -0.0, 1.0, -1.0, -2.0, 2.0, Inf, -Inf, NaN, 5.0e-324, 1.0e300]
    a, b = vec(repeat(setdiff(special, [-Inf]), 1, 11)), vec(repeat(special', 10))
    @test worst_error(^, a, b) <= 1
    @test worst_error(hypot, a, b) <= 1
    @test worst_error(max, a, b) == worst_error(min, a, b) == 0
end

@testset "derivatives at ties are those of one sample" begin
    for f in (x -> min(x, 1.0), x -> min(1.0, x), x -> max(x, 1.0), x -> max(1.0, x), x -> clamp(x, -1, 1)), x in (-1.0, 1.0)
        @test lane(partial_of(f(variable(Vec(x), 1, Val(1))), 1), 1) == ForwardDiff.derivative(f, x)
    end
end

@testset "derivatives of functions of numbers side by side" begin
    functions = (
        abs, abs2, inv, sqrt, cbrt, exp, exp2, exp10, expm1, log, log1p, log2, log10, sin, cos, tan, asin, acos, atan, sinh, cosh, tanh, asinh, atanh,
        sinpi, cospi, x -> acosh(1 + x), x -> x^2, x -> x^3, x -> x^-1, x -> x^-2, x -> x^5, x -> x^0.7, x -> 2^x, x -> x^x, x -> π^x, x -> x^(1 // 3),
        x -> 1 / x, x -> x / 3, x -> 3x - 1, x -> 2 - x, x -> -x, x -> hypot(x, 2), x -> max(x, 0.3), x -> min(0.3, x), x -> atan(x, 2), x -> atan(1, x),
        x -> mod(x, 0.4), x -> rem(x, 0.4), x -> clamp(x, 0.1, 0.9) * x, x -> ifelse(x > 0.2, x^2, x), x -> muladd(x, x, 1), x -> sincos(x)[1],
        x -> x * sign(x), x -> float(x) * one(x) + zero(x), x -> floor(x) + x, x -> x + π, x -> x * (1 // 3), x -> copysign(x, -1.0), x -> evalpoly(x, (1, 2, 3)),
        x -> sum([x, 2x, 1.0]), x -> sec(x), x -> deg2rad(x),
    )
    for f in functions
        y = f(variable(Vec(0.7), 1, Val(1)))
        @test all(l -> lane(y.value, l) ≈ f(0.7), 1:LANES)
        @test all(l -> lane(y.partials[1], l) ≈ ForwardDiff.derivative(f, 0.7), 1:LANES)
    end
end

# Text, the unknowns, and arguments of a sample.
const KEPLER = (E, M, e) -> E .- e .* sin.(E) .- M
const ACID = function (z, c)
    HA, A, H, OH = exp.(z)
    return [HA + A - c[1], H + c[2] - OH - A, z[3] + z[2] - z[1] - log(c[3]), z[3] + z[4] + log(1.0e14)]
end
const MANY = ImplicitRNN.MANY

kepler_data(rng, n) = (M = π .* (2 .* rand(rng, n) .- 1); e = 0.99 .* rand(rng, n); (reshape(M .+ 0.8 .* sin.(M), 1, :), M, e))
function acid_data(rng, n)
    c = [0.05 .+ 0.15 .* rand(rng, n)'; 0.01 .+ 0.03 .* rand(rng, n)'; 10 .^ (-6 .+ 2 .* rand(rng, n)')]
    return log.([c[1, :]' .- c[2, :]'; c[2, :]'; c[3, :]'; 1.0e-14 ./ c[3, :]']), c
end

"Some of the samples of all arguments that are batched."
some(args, batched, range) = map(i -> i in batched ? collect(selectdim(args[i], ndims(args[i]), range)) : args[i], keys(args))

"A shared argument as that of each sample."
for_each(x::Number, samples) = fill(x, samples)
for_each(x::Vector, samples) = repeat(x, 1, samples)

side_by_side(s) = runs_side_by_side(suited(s.problem), s.inverses.Z)

@testset "samples are solved side by side as one by one: $name" for (name, solve, f, (z0, args...), batched) in (
        ("Kepler", root, KEPLER, kepler_data(Xoshiro(1), MANY + 3), (1, 2)),
        ("acid", root, ACID, acid_data(Xoshiro(1), MANY + 3), (1,)),
        ("Kepler in Float32", root, KEPLER, map(x -> Float32.(x), kepler_data(Xoshiro(1), MANY + 3)), (1, 2)),
        ("a shared argument", root, (z, a, b) -> [z[1]^2 + b[1] * z[2] - a, z[2]^3 - b[2] * z[1]], (ones(2, MANY), 1 .+ rand(Xoshiro(1), MANY), [0.5, 0.9]), (1,)),
        ("a fixed point", fixed_point, (z, a, b) -> [tanh(a * z[1] - z[2]), sin(z[1] + b)], (zeros(2, MANY), randn(Xoshiro(1), MANY), 0.3), (1,)),
        ("poles and no roots", root, (z, a) -> 1 ./ (z .- 1) .- a, (fill(1.0 + 1.0e-12, 1, MANY), [zeros(8); 1.0; randn(Xoshiro(1), MANY - 9)]), (1,)),
        ("no root for half of them", root, (z, a) -> z .^ 2 .- a, (ones(1, MANY), randn(Xoshiro(1), MANY)), (1,)),
        ("a start at the root", root, (z, a) -> z .^ 3 .- a .^ 3, ((a = randn(Xoshiro(1), MANY); (reshape(copy(a), 1, :), a))...,), (1,)),
        ("outside the domain", root, (z, a) -> log.(z) .- a, (fill(3.0, 1, MANY), 2 .* randn(Xoshiro(1), MANY)), (1,)),
    )
    T, few = eltype(z0), 1:300
    solver = name == "Kepler" ? Newton() : Auto()
    solved(range) = solve(f, z0[:, range], some(args, batched, range)...; batched, solver)
    many, one_by_one = solved(axes(z0, 2)), solved(few)
    @test side_by_side(many)
    @test many.status[few] == one_by_one.status
    good = findall(converged(one_by_one))
    @test many.value[:, good] ≈ one_by_one.value[:, good] rtol = 1000eps(T)
    @test all(abs.(many.iterations[good] .- one_by_one.iterations[good]) .<= 1)
    @test all(many.residual[good] .<= (T == Float64 ? 1.0e-10 : 1.0e-6))
    v = randn(Xoshiro(5), T, size(z0))
    v[:, .!converged(many)] .= 0
    gradients, expected = vjp(many, v), vjp(one_by_one, v[:, few])
    for i in batched
        @test collect(selectdim(gradients[i], ndims(args[i]), few)) ≈ expected[i] rtol = 1.0e5 * eps(T)
    end
    J = zeros(T, size(z0, 1), length(args[1]) ÷ size(z0, 2), size(z0, 2))
    ImplicitRNN.jacobian!(J, many.problem, many.inverses, 1, converged(many))
    products = reduce(hcat, [J[:, :, j]' * v[:, j] for j in good])
    @test vec(products) ≈ vec(collect(selectdim(gradients[1], ndims(args[1]), good))) rtol = 1.0e5 * eps(T)
    @test all(isnan, J[:, :, .!converged(many)])
    # Whichever share a register.
    size(z0, 2) > MANY && @test isequal(solved(4:size(z0, 2)).value, many.value[:, 4:end])
    # A shared argument gets the sum over the samples.
    for i in eachindex(args)
        i in batched && continue
        own = vjp(solve(f, z0, ntuple(k -> k == i ? for_each(args[k], size(z0, 2)) : args[k], length(args))...; batched = (batched..., i), solver), v)[i]
        @test gradients[i] ≈ (args[i] isa Number ? sum(own) : vec(sum(own, dims = 2)))
    end
end

@testset "what cannot run side by side is solved one by one" begin
    a = rand(Xoshiro(1), MANY)
    branch(z, a) = z[1] > 0 ? [z[1]^2 - a] : [z[1]^2 + a - 1]
    library(z, a) = (LinearAlgebra.qr([1.0 0; 0 2]); [Float64(ForwardDiff.value(z[1])) * 0 + z[1]^2 - a])
    for f in (branch, library, (z, a) -> (x = zeros(eltype(z), 1); x[1] = z[1]; z[1] === 1.0; (z[1] > 3 || true) ? x .^ 2 .- a : x))
        solution = root(f, ones(1, MANY), a; batched = (1,))
        @test !side_by_side(solution)
        @test solution.value ≈ sqrt.(a')
    end
    # A function that lies about it.
    liar(z::AbstractVector{T}, a) where {T} = T <: Jet ? z .^ 2 .- 2 .* a : z .^ 2 .- a
    @test root(liar, ones(1, MANY), a; batched = (1,)).value ≈ sqrt.(a')
    # What fails for some of the samples only.
    a[MANY] = 0.999
    a[1:100] .= 0.5
    @test_throws "a is large" root((z, a) -> (any(a .> 0.99) && error("a is large"); z .^ 2 .- a), ones(1, MANY), a; batched = (1,))
end

@testset "an interrupt is no failure of f" begin
    calls = Ref(0)
    for at in (1, 20)
        f(z, a) = (eltype(z) <: ImplicitRNN.LaneNumber && (calls[] += 1) == at && throw(InterruptException()); z .^ 2 .- a)
        calls[] = 0
        @test_throws InterruptException root(f, ones(1, MANY), rand(Xoshiro(1), MANY); batched = (1,))
    end
end

@testset "singular solutions among many are named" begin
    a = fill(2.0, MANY)
    a[[777, 3000]] .= 0
    solution = root((z, a) -> z .^ 2 .- a, ones(1, MANY), a; batched = (1,))
    @test_throws SingularSolution([777, 3000]) vjp(solution, ones(1, MANY))
    v = ones(1, MANY)
    v[[777, 3000]] .= 0
    expected = 1 ./ (2 .* solution.value[:])
    expected[[777, 3000]] .= 0
    @test vjp(solution, v)[1] ≈ expected
end

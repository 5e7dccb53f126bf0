# Equations on device arrays: the same solutions, statuses and derivatives as on the CPU.

using ImplicitRNN: SingularSolution, UNSTABLE, jacobian!

"What `solve` and `vjp` give on the CPU and on the device, for arguments of which those `batched` are each sample's own."
function on_both(pose, f, z0, args...; batched = (), options...)
    there(x, i) = i in batched ? JLArray(x) : x
    return pose(f, z0, args...; batched, options...), pose(f, JLArray(z0), map(there, args, eachindex(args))...; batched, options...)
end

on_cpu(x::AbstractArray) = Array(x)
on_cpu(x) = x

function agree(here, there; tol)
    solved = converged(here)
    @test there.status == here.status
    @test there.value isa JLArray
    @test relative_error(Array(there.value)[:, solved], here.value[:, solved]) < tol
    @test all(<=(ImplicitRNN.tolerance(Auto(), eltype(here.value))), there.residual[solved])
    v = randn(Xoshiro(1), eltype(here.value), size(here.value)) .* solved'
    for (expected, found) in zip(vjp(here, v), vjp(there, JLArray(v)))
        expected === nothing ? (@test found === nothing) : (@test relative_error(on_cpu(found), expected) < tol)
    end
    for k in eachindex(here.problem.args)
        ImplicitRNN.is_differentiable(here.problem.args[k]) || continue
        n, samples = size(here.value)
        J = map((here, there)) do s
            entries = length(s.problem.args[k]) ÷ (s.problem.batched[k] ? samples : 1)
            jacobian!(fill!(similar(here.value, n, entries, samples), 0), s.problem, s.inverses, k, solved)
        end
        @test isnan.(J[2]) == isnan.(J[1])
        @test relative_error(J[2][:, :, solved], J[1][:, :, solved]) < tol
    end
    return
end

@testset "equations on the device" begin
    rng, samples = Xoshiro(3), 300
    M, e = 6 .* rand(rng, samples), 0.9 .* rand(rng, samples)
    kepler, start = (E, M, e) -> E .- e .* sin.(E) .- M, reshape(copy(M), 1, :)

    @testset "a root" begin
        here, there = on_both(root, kepler, start, M, e; batched = (1, 2))
        agree(here, there; tol = 1.0e-10)
        @test there.iterations == here.iterations
        @test there.rate ≈ here.rate rtol = 1.0e-6
        again = root(kepler, there.value, M, e; batched = (1, 2))             # a start at the root
        @test all(converged(again)) && maximum(again.iterations) <= 2
    end

    @testset "a fixed point by $(nameof(typeof(solver)))" for solver in (Auto(), Newton(), Picard())
        here, there = on_both(fixed_point, (E, M, e) -> M .+ e .* sin.(E), start, M, e; batched = (1, 2), solver)
        agree(here, there; tol = 1.0e-8)
        @test there.iterations == here.iterations
    end

    @testset "in single precision" begin
        here, there = on_both(root, kepler, Float32.(start), Float32.(M), Float32.(e); batched = (1, 2))
        agree(here, there; tol = 1.0e-3)
    end

    @testset "a system" begin
        f = (z, a, b, k) -> [a * z[1] - z[2]^2 - b[1], z[1] * z[2] - b[2] + z[3], exp(z[k]) - z[1] - 1]
        here, there = on_both(root, f, 1 .+ rand(rng, 3, samples), 2.0, rand(rng, 2, samples), 3; batched = (2,))
        agree(here, there; tol = 1.0e-8)
        @test 0 < count(!=(CONVERGED), here.status) < samples ÷ 10              # which the CPU has solved or given up
    end

    @testset "of as many unknowns as there may be, with a scale" begin
        f = (z, a) -> tanh.(0.3 .* z .+ a)
        here, there = on_both(fixed_point, f, rand(rng, 8, 20), rand(rng, 8); solver = Newton(), scale = 1.0:8.0)
        agree(here, there; tol = 1.0e-9)
    end

    @testset "of no samples" begin
        for (solve, f) in ((root, (z, a, b) -> z .- a .* b), (fixed_point, (z, a, b) -> a .* b .+ z ./ 2)), own in (zeros(0), zeros(2, 0))
            here, there = on_both(solve, f, zeros(2, 0), own, [1.0, 2.0]; batched = (1,))
            @test isempty(there.status) && size(there.value) == (2, 0)
            @test map(on_cpu, vjp(there, JLArray(zeros(2, 0)))) == vjp(here, zeros(2, 0))
        end
    end

    @testset "from a start on the CPU, there" begin
        f, a, b = (z, a, b) -> z .^ 2 .- a .* b, rand(rng, 1, 5), [2.0]
        here, found = (root(f, ones(1, 5), args...; batched = (1,)) for args in ((a, b), (JLArray(a), JLArray(b))))
        @test found.value == here.value
        @test vjp(found, ones(1, 5)) == vjp(here, ones(1, 5))
    end

    @testset "what is left to the CPU" begin
        a = [1.0, 0.0, 2.0, -1.0]
        here, there = on_both(root, (z, a) -> z .^ 2 .- a, ones(1, 4), a; batched = (1,))
        @test there.status == here.status
        @test count(converged(there)) == 3
        @test_throws SingularSolution(2) vjp(there, JLArray([1.0 1.0 1.0 0.0]))
        @test_throws "1 samples did not converge and have no derivative" vjp(there, JLArray(ones(1, 4)))
        @test Array(only(vjp(there, [1.0 0.0 1.0 0.0]))) ≈ [1 / 2, 0, 1 / (2sqrt(2)), 0]
        _, there = on_both(root, (z, a) -> sin.(z) .- a, ones(1, 3), [0.5, 1.0, 0.2]; batched = (1,))    # to rounding a double root
        @test_throws SingularSolution(2) vjp(there, JLArray(ones(1, 3)))
        for (solve, f) in ((root, (z, a) -> z .^ 2 .- a), (fixed_point, (z, a) -> z ./ 2 .+ a))       # of far starts
            here, there = on_both(solve, f, fill(1.0e20, 1, 3), [0.0, 1.0, 2.0]; batched = (1,), solver = solve == root ? Newton() : Picard())
            @test Array(there.value) == here.value ≈ (solve == root ? [0 1 sqrt(2)] : [0 2 4])
        end
        here, there = on_both(fixed_point, (z, a) -> a .* cos.(z), fill(0.5, 1, 40), collect(range(0.2, 3, 40)); batched = (1,), solver = Newton())
        @test there.status == here.status
        @test 0 < count(==(UNSTABLE), there.status) < 40
        for solver in (Picard(), Picard(damping = 0.5))                   # from where it rests, and to where only damped iteration leads
            here, there = on_both(fixed_point, (z, a) -> a .* sin.(z), [0 0 1 1.0], [0.5, 2.0, 0.5, -1.5]; batched = (1,), solver)
            @test there.status == here.status && UNSTABLE in here.status
        end
        here, there = on_both(fixed_point, (z, a) -> a .* z ./ (1 .+ z .^ 2), ones(1, 3), [0.2, 0.3, 0.5]; batched = (1,), solver = Picard())
        @test there.iterations == here.iterations && all(<(80), here.iterations)        # zero is seen to solve it
        @test all(==(ImplicitRNN.NON_FINITE), root(z -> sqrt.(z .- 2), JLArray(ones(1, 3))).status)      # outside the domain
        start = JLArray(rand(rng, 1, 5) .+ 1)
        @test !any(converged(root(z -> z ./ (1 .+ z) .- 1, start)))                          # zero by rounding alone
        @test !any(converged(fixed_point(z -> z .+ 1 ./ z, start; solver = Newton())))       # a small residual, and no fixed point
        f = (z, a) -> [a * z[1] - z[2] / 1.0e12, 1.0e15 * (z[1] * z[2] / 1.0e12 - a)]
        here, there = on_both(root, f, repeat([1.0, 2.0e12], 1, 5), collect(1.0:5.0); batched = (1,))
        @test there.status == here.status && all(converged(here))
        @test Array(only(vjp(there, JLArray(repeat([1.0, 1.0e-12], 1, 5))))) ≈ only(vjp(here, repeat([1.0, 1.0e-12], 1, 5)))
    end

    @testset "derivatives that are left to the CPU, in memory of the device" begin
        E = Base.get_extension(ImplicitRNN, :ImplicitRNNGPUArraysExt)
        here = root((z, a, s) -> s .* z .- a, ones(2, 40), rand(rng, 2, 40), rand(rng, 2); batched = (1,))
        problem, Z = ImplicitRNN.on_device(here.problem, JLBackend()), JLArray(here.value)
        v, left = randn(rng, 2, 40) .* [1 zeros(1, 10) ones(1, 29)], [1; 12:40]
        found = (JLArray(zeros(2, 40)), JLArray(zeros(2)))
        E.add_left!(found, problem, Z, JLArray(v), left)
        @test all(map((g, expected) -> Array(g) ≈ expected, found, vjp(here, v)))
        J, expected = JLArray(zeros(2, 2, 40)), zeros(2, 2, 40)
        E.put_left!(J, problem, Z, left, 1)
        @test Array(J)[:, :, left] ≈ jacobian!(expected, here.problem, here.inverses, 1)[:, :, left]
        @test all(iszero, Array(J)[:, :, 2])
    end

    @testset "what a device does not offer is refused by name" begin
        ones_of(n) = JLArray(ones(n, 5))
        local shift = [1.0]
        @test_throws "does not offer equations of more than 8 unknowns (9 came)" root(z -> z, ones_of(9))
        @test_throws "does not offer the solver Anderson for equations; choose Auto, Picard or Newton" fixed_point(z -> z ./ 2, ones_of(2); solver = Anderson())
        @test_throws "does not offer the solver NLsolver for equations; choose Auto or Newton" root(z -> z, ones_of(2); solver = NLsolver())
        @test_throws "arguments but numbers and vectors of up to 8 entries (number 1 is an array of 4 entries, 2 axes)" root((z, A) -> A * z, ones_of(2), ones(2, 2))
        @test_throws "functions that refer to variables outside" root(z -> z .- shift, ones_of(1))
        @test_throws "which gives values of type Array" root(z -> reshape([z[1] 1.0; 1.0 z[2]], 4)[1:2], ones_of(2))
        @test_throws "f returned an array of shape (3,); expected a vector of 2 entries" root(z -> [z[1], z[2], z[1]], ones_of(2))
        @test_throws ArgumentError root(z -> z, ones_of(2); solver = Picard())
        @test_throws ErrorException root((z, a) -> z[1] > 3 ? error("z is large") : z .- a, ones_of(1), 5.0)       # is f's own affair
        @test_throws DimensionMismatch root((z, a) -> z .- a, ones_of(2), ones(4); batched = (1,))
    end
end

# What belongs to a sample stays with it, whatever columns move.

using ImplicitRNN: AndersonState, Columns, Lanes, NewtonState, RefinementState, SolverState, bits_up_to, move_column!, per_column, reclaim!,
    defer!, swap_columns!

mark(A::Array{Bool}, sample) = isodd(sample)
mark(A::Array, sample) = sample
column(A::Array, j) = selectdim(A, ndims(A), j)

states(n, width) = (AndersonState{Float64, Float64}(n, 3, width), NewtonState{Float64}(n, width), RefinementState{Float64}(zeros(n, width)))

@testset "all arrays of a column move with it ($(nameof(typeof(state))), $(nameof(typeof(coefficients))))" for
    state in (nothing, states(3, 11)...), coefficients in (nothing, zeros(3, 11))

    n, width, rng = 3, 11, Xoshiro(1)
    c = Columns{Float64}(n, width, coefficients)
    ImplicitRNN.start!(c, width)
    c.state = state
    arrays = (per_column(c)..., (state === nothing ? () : per_column(state))...)
    for j in 1:width, A in arrays
        column(A, j) .= mark(A, j)
    end
    c.sample .= 1:width
    for step in 1:200
        c.active > 1 || reclaim!(c)
        j, k = rand(rng, 1:c.active, 2)
        isodd(step) ? swap_columns!(c, j, k) : defer!(c, j)
        step % 7 == 0 && reclaim!(c)
    end
    reclaim!(c)
    @test sort(c.sample) == 1:width
    @test all(all(==(mark(A, c.sample[j])), column(A, j)) for A in arrays, j in 1:width)
    move_column!(c, 2, 5)
    @test all(column(A, 2) == column(A, 5) for A in arrays)
end

@testset "no array of the columns is left behind" begin
    c = Columns{Float64}(3, 11, zeros(3, 11))
    arrays = [getfield(c, name) for name in fieldnames(Columns) if getfield(c, name) isa Array && name ∉ (:deferred, :buffers)]
    @test all(A -> any(B -> A === B, per_column(c)), arrays)
    @test all(state -> all(A -> A isa Array && size(A)[end] == 11, per_column(state)), states(3, 11))
end

@testset "a method that goes on after others were set aside uses the history of its own sample" begin
    net = one_layer(; neurons = 30, constraint = Free())
    m = ImplicitRNN.COARSE_SAMPLES - 1          # more of them would share coarse products
    p, X = parameters(net; gain = 0.7), samples(net, m)
    together = equilibrium(net, p, X; solver = Auto(tol = 1.0e-12))
    for j in 1:m
        alone = equilibrium(net, p, X[:, j:j]; solver = Auto(tol = 1.0e-12))
        @test alone.status == together.status[j:j]
        # Where the evaluations were spent before an equilibrium was near, rounding has had time to grow.
        alone.status[1] == ImplicitRNN.MAX_ITERATIONS && continue
        @test alone.state[:, 1] ≈ together.state[:, j] rtol = 1.0e-9
    end
    @test count(==(ImplicitRNN.MAX_ITERATIONS), together.status) <= 2
end

# One equation of each kind with its columns, ready to be solved, and what its solution satisfies.
function stationary(n, m)
    rng = Xoshiro(3)
    r = ImplicitRNN.Recurrence(randn(rng, n, n) ./ (3 * sqrt(n)))
    ImplicitRNN.refresh!(r)
    p = ImplicitRNN.Stationary(;
        M = r.forward, recurrence = r, f = ACTIVATIONS.tanh, tol = 1.0e-12, floor = 1.0e-3, Z = zeros(n, m), S = zeros(n, m),
        outcome = ImplicitRNN.Outcome(m), unique = true, latest = false, factors = nothing, threads = 1,
    )
    c = Columns{Float64}(n, m)
    c.U .= randn(rng, n, m)
    ImplicitRNN.start!(c, m; cold = true)
    U = copy(c.U)
    return c, p, Z -> tanh.(U .+ r.R * Z)
end

function adjoint_system(n, m)
    rng, (_, s, _) = Xoshiro(4), stationary(n, m)
    D = rand(rng, n, m)
    p = ImplicitRNN.AdjointSystem{Float64, Matrix{Float64}}(;
        M = s.recurrence.backward, recurrence = s.recurrence, tol = 1.0e-12, floor = floatmin(), Z = zeros(n, m),
        outcome = ImplicitRNN.Outcome(m), latest = false, threads = 1,
    )
    c = Columns{Float64}(n, m, copy(D))
    c.U .= randn(rng, n, m)
    ImplicitRNN.start!(c, m; cold = true)
    U = copy(c.U)
    return c, p, E -> D .* (U .+ s.recurrence.R' * E)
end

function tangent_system(n, m)
    c, p, _ = adjoint_system(n, m)
    fields = (; (name => getfield(p, name) for name in fieldnames(typeof(p)))..., M = p.recurrence.forward, tangent = true)
    D, U = copy(c.coefficients), copy(c.U)
    return c, typeof(p)(; fields...), E -> D .* (U .+ p.recurrence.R * E)
end

fixed_points() = subtypes(ImplicitRNN.FixedPoint)
const FIXED_POINTS = Dict(ImplicitRNN.Stationary => [stationary], ImplicitRNN.AdjointSystem => [adjoint_system, tangent_system])

@testset "Picard and Anderson solve every fixed point ($system, $(nameof(typeof(solver))))" for P in fixed_points(),
        system in FIXED_POINTS[P], solver in (Picard(), Picard(damping = 0.7), Anderson(), Anderson(memory = 2))

    c, p, f = system(30, 7)
    ImplicitRNN.solve!(solver, c, p)
    @test all(==(CONVERGED), p.outcome.status)
    @test p.Z ≈ f(p.Z) rtol = 1.0e-11
end

@testset "the linearised equation has the same solution ($system)" for P in fixed_points(), system in FIXED_POINTS[P]
    c, p, f = system(30, 7)
    fill!(p.recurrence.slope, 0.6)
    @test ImplicitRNN.linearize!(p.recurrence)
    @test !ImplicitRNN.evaluate_all!(c, p)
    @test ImplicitRNN.iterate_linearized!(c, p, 100)
    @test all(==(CONVERGED), p.outcome.status)
    @test p.Z ≈ f(p.Z) rtol = 1.0e-11
end

@testset "corrections by coarse products have the same solution ($system)" for P in fixed_points(), system in FIXED_POINTS[P]
    c, p, f = system(30, 7)
    append!(p.recurrence.coarse_factors, (ImplicitRNN.Singles(30) for _ in 1:2))
    @test ImplicitRNN.multiply_coarsely!(p.recurrence)
    @test !ImplicitRNN.evaluate_all!(c, p)
    @test ImplicitRNN.iterate_coarsely!(c, p)
    @test all(==(CONVERGED), p.outcome.status) && maximum(p.outcome.iterations) < 10
    @test p.Z ≈ f(p.Z) rtol = 1.0e-11
end

@testset "every equation of the columns has what evaluate_all! asks for ($(nameof(P)))" for P in
    [fixed_points(); filter(!isabstracttype, subtypes(ImplicitRNN.ColumnEquation))]

    @test issubset((:M, :tol, :floor, :Z, :outcome, :threads), fieldnames(Base.unwrap_unionall(P)))
end

# With numbers in them, and the second lane done.
function lanes_at_work(T, n)
    w = Lanes{T, 16}(n)
    w.D .= rand(Xoshiro(1), T, 16, n) ./ T(2n)
    foreach(k -> getfield(w, (:U, :Z, :step)[k]) .= randn(Xoshiro(k), T, 16, n), 1:3)
    w.active = bits_up_to(16) - 2
    return w
end

@testset "lanes in registers compute what passes through memory do, to the last bit ($T, $n, $(ndims(M)) axes, $f)" for
    T in (Float32, Float64), n in 1:ImplicitRNN.FEW, M in (randn(Xoshiro(n), T, n, n), randn(Xoshiro(n), T, 16, n, n)), f in (ACTIVATIONS.tanh, ACTIVATIONS.softplus)

    few, many = lanes_at_work(T, n), lanes_at_work(T, n)
    same(fields...) = all(field -> isequal(getfield(few, field), getfield(many, field)), fields)
    ImplicitRNN.evaluate_few!(few, M, f, Val(n))
    ImplicitRNN.affine_lanes!(many, M, false)
    ImplicitRNN.activate_lanes!(many, f)
    @test same(:S, :F, :change2, :size2)
    before = copy(few.Z)
    ImplicitRNN.newton_step_few!(few, M, f, 4, Val(n))
    ImplicitRNN.slopes_lanes!(many, f)
    ImplicitRNN.direction_lanes!(many, M)
    ImplicitRNN.prefer_picard!(many, 4, Val(16))
    ImplicitRNN.step_lanes!(many, many.step, Val(16), false)
    @test same(:Z) && few.Z[2, :] == before[2, :] && few.Z[3, :] ≈ few.F[3, :]
    copyto!(few.D, many.D)
    ImplicitRNN.adjoint_few!(few, M, Val(n))
    ImplicitRNN.adjoint_of_many!(many, M)
    @test same(:Z, :residual2, :size2)
end

@testset "the directions of lanes solve their systems ($T, $n, $(ndims(M)) axes)" for
    T in (Float32, Float64), n in (1:5..., 8, 13), M in (randn(Xoshiro(n), T, n, n), randn(Xoshiro(n), T, 16, n, n))

    w = lanes_at_work(T, n)
    step = copy(w.step)
    ImplicitRNN.direction_lanes!(w, M)
    of_lane(l) = M isa Matrix ? M : M[l, :, :]
    @test all(l -> w.step[l, :] ≈ (I - Diagonal(w.D[l, :]) * of_lane(l)) \ step[l, :], 1:16)
end

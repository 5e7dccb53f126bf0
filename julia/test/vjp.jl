# Products with the derivatives of a batch: against differences, against each other, and over the ways through a workspace.

const EXACT = Picard(tol = 1.0e-14, max_iterations = 100_000)

outputs_of(net, p, X) = predict(net, p, X; solver = EXACT)

seeded(net, count, of = :outputs; seed = 9) =
    eltype(net).(randn(Xoshiro(seed), of === :outputs ? ImplicitRNN.output_size(net) : neurons(net), count))

@testset "vjp is that of differences: $constraint" for constraint in (Free(), Perron(0.9), Spectral(0.9))
    for net in (
            one_layer(; constraint), layered(; constraint), layered(; constraint, feedback = false),
            Network(3, [Layer(4), Layer(3), Layer(2)]; outputs = [1, 9, 1], skips = [1 => 3], input_skips = [3], constraint),
        )
        p, X = parameters(net; gain = constraint isa Free ? 0.25 : 0.8), samples(net, 6)
        V = seeded(net, 6)
        g, dX = vjp(net, p, X, V; solver = EXACT)
        @test relative_error(g, finite_difference(q -> dot(V, outputs_of(net, q, X)), p; h = 2.0e-4)) < 1.0e-8
        @test relative_error(vec(dX), finite_difference(x -> dot(V, outputs_of(net, p, reshape(x, size(X)))), vec(X); h = 2.0e-4)) < 1.0e-8
    end
end

@testset "derivatives may be written over the samples and the parameters they are taken at" for net in (one_layer(), layered())
    p, X, V = parameters(net), samples(net, 6), seeded(net, 6)
    expected = vjp(net, p, X, V)
    g, dX = copy(p), copy(X)
    ImplicitRNN.vjp!(g, dX, ImplicitRNN.Workspace(net), Problem(net), g, dX, V)
    @test (g, dX) == expected
end

@testset "vjp with the derivative of a loss is its gradient" begin
    net = layered()
    p, X, Y = parameters(net), samples(net, 6), targets(net, 6)
    V = 2 .* (outputs_of(net, p, X) .- Y) ./ length(Y)
    g = loss_and_gradient(net, p, X, Y; solver = EXACT)[2]
    @test relative_error(vjp(net, p, X, V; solver = EXACT)[1], g) < 1.0e-12
end

adjoints_of_all_kinds() = [
    [Implicit(; linear_solver, tol = 1.0e-13, max_iterations = 2000) for linear_solver in (:auto, :lu, :neumann, :anderson, :gmres)]
    JacobianFree()
    Unrolled(7)
]

@testset "jvp is the transpose of vjp ($(nameof(typeof(adjoint))) $(adjoint isa Implicit ? adjoint.linear_solver : ""), $of)" for
    adjoint in adjoints_of_all_kinds(), of in (:outputs, :state)

    for net in (one_layer(; neurons = 7), layered(), layered(; constraint = Monotone(0.2)), one_layer(; neurons = 30, constraint = Spectral(0.9)))
        # The products of the adjoints are compared at one state, which the start is.
        p, X, dp, dX = parameters(net), samples(net, 50), parameters(net; seed = 5), samples(net, 50; seed = 6)
        start = equilibrium(net, p, X; solver = Newton(tol = 1.0e-14)).state
        options = (; of, adjoint, start = adjoint isa Unrolled ? nothing : start, solver = Newton(tol = 1.0e-13))
        V = seeded(net, 50, of)
        tangent = jvp(net, p, X, dp, dX; options...)
        g, dx = vjp(net, p, X, V; options...)
        @test dot(V, tangent) ≈ dot(g, dp) + dot(dx, dX) rtol = 1.0e-10 atol = 1.0e-10 * norm(V) * norm(tangent)
    end
end

@testset "jvp is that of differences" begin
    for net in (one_layer(), layered(; constraint = Spectral(0.9)), Network(3, [Layer(4)]; outputs = [3, 1]))
        p, X, dp, dX = parameters(net), samples(net, 6), parameters(net; seed = 5), samples(net, 6; seed = 6)
        along(ε) = outputs_of(net, p + ε * dp, X + ε * dX)
        h = 1.0e-3
        difference = (8 .* (along(h) .- along(-h)) .- (along(2h) .- along(-2h))) ./ 12h
        @test relative_error(jvp(net, p, X, dp, dX; solver = EXACT), difference) < 1.0e-8
    end
end

@testset "jvp is the transpose of vjp where weights are zero: $constraint" for constraint in (Perron(0.5), InfNorm(0.5))
    net = one_layer(; constraint)
    p, X, V, v = parameters(net; gain = 2.0), samples(net, 4), seeded(net, 4), parameters(net; seed = 5)
    named_weights(net, p)["R"][2:2:end] .= 0
    @test dot(V, jvp(net, p, X, v, zero(X); solver = EXACT)) ≈ dot(vjp(net, p, X, V; solver = EXACT)[1], v) rtol = 1.0e-10
end

@testset "the way through tiles does not change the products ($neurons neurons)" for (neurons, count) in
    ((7, 1200), (24, 1200), (40, 1200), (209, 300))

    net = one_layer(; neurons)
    p, X, V = parameters(net), samples(net, count), seeded(net, count)
    dp, dX = parameters(net; seed = 5), samples(net, count; seed = 6)
    g, dx = vjp(net, p, X, V; solver = Auto(tol = 1.0e-13), adjoint = Implicit(tol = 1.0e-13))
    tangent = jvp(net, p, X, dp, dX; solver = Auto(tol = 1.0e-13), adjoint = Implicit(tol = 1.0e-13))
    lu = (; solver = Picard(tol = 1.0e-13), adjoint = Implicit(linear_solver = :lu))
    pieces = collect(Iterators.partition(1:count, 30))
    parts = [vjp(net, p, X[:, k], V[:, k]; lu...) for k in pieces]
    @test relative_error(g, sum(first, parts)) < 1.0e-11
    @test relative_error(dx, reduce(hcat, last.(parts))) < 1.0e-11
    @test relative_error(tangent, reduce(hcat, [jvp(net, p, X[:, k], dp, dX[:, k]; lu...) for k in pieces])) < 1.0e-11
end

@testset "an equilibrium that is known takes one evaluation ($neurons neurons, $(nameof(typeof(solver))))" for
    neurons in (5, 40), solver in (Auto(), Newton(), Chord(), Picard(max_iterations = 1))

    net = one_layer(; neurons)
    p, X, V = parameters(net), samples(net, 40), seeded(net, 40)
    problem, ws = Problem(net; solver), ImplicitRNN.Workspace(net)
    start = equilibrium(net, p, X; solver = Picard(tol = 1.0e-13)).state
    g, dX = zeros(length(net)), zero(X)
    _, quality = ImplicitRNN.vjp!(g, dX, ws, problem, p, X, V; start)
    @test quality.unconverged == 0
    @test all(==(1), view(first(ws.tiles).outcome.iterations, 1:40))
    @test relative_error(g, vjp(net, p, X, V; solver = EXACT)[1]) < 1.0e-8
end

@testset "a workspace gives the same whatever it has done before" begin
    net = one_layer()
    p, X, Y, V = parameters(net), samples(net, 40), targets(net, 40), seeded(net, 40)
    run!(ws, solver) = (
        g = zeros(length(net));
        ImplicitRNN.loss_and_gradient!(g, ws, Problem(net; solver), p, X, Y);
        h = zeros(length(net));
        ImplicitRNN.vjp!(h, zero(X), ws, Problem(net; solver), p, X, V);
        (g, h)
    )
    used = ImplicitRNN.Workspace(net)
    foreach(solver -> run!(used, solver), (Newton(), Chord(), Picard(), Auto(tol = 1.0e-3)))
    for solver in (Auto(), Picard(), Anderson(), Newton(), Chord())
        @test run!(used, solver) == run!(ImplicitRNN.Workspace(net), solver)
    end
end

@testset "no samples have a loss and a gradient of zero, whatever the workspace has done before" begin
    net = one_layer()
    p, g, ws = parameters(net), fill(NaN, length(one_layer())), ImplicitRNN.Workspace(net)
    ImplicitRNN.loss_and_gradient!(g, ws, Problem(net), p, samples(net, 40), targets(net, 40))
    loss, _ = ImplicitRNN.loss_and_gradient!(g, ws, Problem(net), p, samples(net, 0), targets(net, 0))
    @test iszero(loss) && iszero(g)
end

@testset "products with the Hessian are those by another solver, of which Picard iteration is none" begin
    net = Network(1, [Layer(3)]; outputs = [1], constraint = Monotone(0.05))
    p = [ones(3); vec(-3.0I(3)); zeros(3)]
    X, Y, v = 0.1 .* samples(net, 40), targets(net, 40), parameters(net)
    @test_throws "did not" hessian_vector_product(net, p, X, Y, v; solver = Picard())
    @test hessian_vector_product(net, p, X, Y, v; solver = Chord()) ≈ hessian_vector_product(net, p, X, Y, v; solver = Newton()) rtol = 1.0e-6
    @test_throws "the product 2" ImplicitRNN.hessian_vector_product!(zeros(2), ImplicitRNN.Workspace(net), Problem(net), p, X, Y, v)
end

@testset "what a product allocates does not depend on the samples" begin
    net = one_layer(; neurons = 4)
    p = parameters(net)
    function allocated(count)
        X, V = samples(net, count), seeded(net, count)
        problem, ws, g, dX = Problem(net; solver = Picard()), ImplicitRNN.Workspace(net), zeros(length(net)), zero(X)
        step() = (ImplicitRNN.vjp!(g, dX, ws, problem, p, X, V); nothing)
        step()
        return @allocated step()
    end
    @test allocated(8) == allocated(64) <= 4096
end

@testset "arrays of wrong sizes and other things than outputs and states are refused" begin
    net = one_layer()
    p, X, V = parameters(net), samples(net, 4), seeded(net, 4)
    @test_throws "2 rows for 4 samples" vjp(net, p, X, V[:, 1:3])
    @test_throws "5 rows for 4 samples" vjp(net, p, X, V; of = :state)
    @test_throws "states are" vjp(net, p, X, V; start = zeros(4, 4))
    @test_throws "of must be :outputs or :state" vjp(net, p, X, V; of = :loss)
    @test_throws "the direction" jvp(net, p, X, p[1:3], X)
    @test_throws "directions are" jvp(net, p, X, p, X[:, 1:2])
end

# --- the seam -------------------------------------------------------------------------------------------------

"A workspace that leaves the work to another, with arrays of a type of its own."
struct Elsewhere{T, W} <: ImplicitRNN.AbstractWorkspace{T}
    net::Network{T}
    inner::W
    calls::Vector{Symbol}
end
Elsewhere(net::Network{T}) where {T} = (w = ImplicitRNN.Workspace(net); Elsewhere{T, typeof(w)}(net, w, Symbol[]))

struct Remote{T, N} <: AbstractArray{T, N}
    values::Array{T, N}
end
Base.size(A::Remote) = size(A.values)
Base.getindex(A::Remote, i::Int...) = A.values[i...]
Base.setindex!(A::Remote, v, i::Int...) = (A.values[i...] = v)
Base.similar(A::Remote, ::Type{T}, dims::Dims) where {T} = Remote(Array{T}(undef, dims))
Base.BroadcastStyle(::Type{<:Remote}) = Broadcast.ArrayStyle{Remote}()
Base.similar(b::Broadcast.Broadcasted{Broadcast.ArrayStyle{Remote}}, ::Type{T}) where {T} = Remote(Array{T}(undef, length.(axes(b))))

ImplicitRNN.allocate(::Elsewhere{T}, dimensions::Int...) where {T} = Remote(zeros(T, dimensions))
function ImplicitRNN.loss_and_gradient!(
        g::Remote, ws::Elsewhere, problem::Problem, p, X, Y; weights = nothing, states = nothing, options...
    )
    push!(ws.calls, :loss_and_gradient!)
    found = states === nothing ? nothing : collect(states)
    result = ImplicitRNN.loss_and_gradient!(g.values, ws.inner, problem, collect(p), collect(X), collect(Y); weights, states = found, options...)
    states === nothing || copyto!(states, found)
    return result
end

@testset "a Trainer works with any workspace and its arrays, warm start $warm_start" for warm_start in (false, true)
    net = one_layer()
    X, Y, order = samples(net, 20), targets(net, 20), repeat(1:20, 1, 3)
    run!(trainer, P, X, Y) = train!(trainer, Replicas(P), X, Y, order, 8, fill(0.02, 9), zeros(3, 1), zeros(Int, 3, 1))
    here, there = reshape(parameters(net), :, 1), Remote(reshape(parameters(net), :, 1))
    rule, elsewhere = ImplicitRNN.Optimisers.Adam(0.02), Elsewhere(net)
    run!(Trainer(Problem(net), rule; batch_size = 8, warm_start), here, X, Y)
    run!(Trainer(Problem(net), rule; workspace = elsewhere, batch_size = 8, warm_start), there, Remote(X), Remote(Y))
    @test length(elsewhere.calls) == 9
    @test there.values ≈ here rtol = 1.0e-12
end

@testset "products are as exact for tiny cotangents ($T, $size, $neurons neurons, $linear_solver)" for (T, sizes) in
        ((Float32, (1.0f-12, 1.0f-18, 1.0f-25, 1.0f-33)), (Float64, (1.0e-150, 1.0e-170, 1.0e-290))), size in sizes, neurons in (5, 40, 130),
        linear_solver in (:auto, :lu, :neumann, :anderson, :gmres)

    net = one_layer(; T, neurons, constraint = Perron(0.9))
    p, X = parameters(net), samples(net, 70)
    V = seeded(net, 70)
    scale = fill(one(T), 1, 70)
    scale[1, 5:9] .= T(2)^exponent(size)
    adjoint = Implicit(; linear_solver)
    dX, dx = vjp(net, p, X, V; adjoint)[2], vjp(net, p, X, V .* scale; adjoint)[2]
    @test relative_error(dx[:, 5:9] ./ scale[:, 5:9], dX[:, 5:9]) < 1000 * ImplicitRNN.default_tolerance(T)
end

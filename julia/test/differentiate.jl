using Zygote

for net in (one_layer(; constraint = Free()), one_layer(; constraint = Perron(0.9)), layered(; feedback = true), layered(; feedback = false))
    p, X, Y = parameters(net), samples(net, 4), targets(net, 4)
    state = Equilibrium(net; solver = Picard(tol = 1.0e-14, max_iterations = 10_000))
    read(p) = (w = unpack!(Weights(net, eltype(p)), net, p); (w.C, w.d))
    last_rows = net.readout

    # C and d enter the loss outside the equilibrium; we differentiate through the state only and compare those entries.
    C, d = read(p)
    loss(p, X) = sum(abs2, C * state(p, X)[last_rows, :] .+ d .- Y) / length(Y)
    inner = 1:net.weights_out

    @testset "ImplicitFunction and our own kernels agree to 1e-12" begin
        _, g = loss_and_gradient(net, p, X, Y; solver = Picard(tol = 1.0e-14, max_iterations = 10_000))
        zygote = Zygote.gradient(loss, p, X)
        @test relative_error(zygote[1][inner], g[inner]) < 1.0e-12
        @test relative_error(vec(zygote[2]), finite_difference(x -> loss(p, reshape(x, size(X))), vec(X))) < 1.0e-8
    end
    @testset "forward mode agrees with reverse mode" begin
        forward = ForwardDiff.gradient(q -> loss(q, X), p)
        reverse = Zygote.gradient(q -> loss(q, X), p)[1]
        @test relative_error(forward, reverse) < 1.0e-11
    end
end

@testset "forward mode agrees with reverse mode, through $constraint" for constraint in CONSTRAINED[2:end]
    net = one_layer(; constraint)
    p, X = parameters(net; gain = 2.0), samples(net, 4)
    state = Equilibrium(net; solver = Newton(tol = 1.0e-13))
    loss(p, X) = sum(abs2, state(p, X))
    reverse = Zygote.gradient(loss, p, X)
    @test ForwardDiff.gradient(p -> loss(p, X), p) ≈ reverse[1] rtol = 1.0e-9
    @test ForwardDiff.gradient(X -> loss(p, X), X) ≈ reverse[2] rtol = 1.0e-9
end

@testset "forward mode takes the derivatives of reverse mode at kinks, too: $(net.constraint)" for net in (
        one_layer(; activation = :relu, constraint = InfNorm(0.5)), layered(; constraint = Perron(0.5)),
        Network(3, [Layer(4; lateral = false), Layer(3, :relu; lateral = false)]; outputs = 2, constraint = Free()),
    )
    p, X = parameters(net; gain = 2.0), samples(net, 3)
    w = named_weights(net, p)
    fill!(w["b"], 0)
    foreach(name -> startswith(name, "R") && (w[name][2:2:end] .= 0), keys(w))
    X[:, 2] .= 0                # of which all pre-activations are 0
    V = randn(Xoshiro(4), neurons(net), 3)
    state = Equilibrium(net; solver = Newton(tol = 1.0e-13))
    loss(p, X) = dot(V, state(p, X))
    reverse = Zygote.gradient(loss, p, X)
    @test ForwardDiff.gradient(p -> loss(p, X), p) ≈ reverse[1] rtol = 1.0e-9
    @test ForwardDiff.gradient(X -> loss(p, X), X) ≈ reverse[2] rtol = 1.0e-9
end

@testset "parameters of another type have gradients of that type" begin
    net = one_layer(; constraint = Perron(0.9))
    p, X = big.(parameters(net)), samples(net, 3)
    g = only(Zygote.gradient(p -> sum(Equilibrium(net)(p, X)), p))
    @test g isa Vector{BigFloat}
    @test g ≈ only(Zygote.gradient(p -> sum(Equilibrium(net)(p, X)), Float64.(p))) rtol = 1.0e-8
end

@testset "an unconverged equilibrium is not differentiated" begin
    net = one_layer()
    @test_throws "did not reach an equilibrium" Equilibrium(net; solver = Picard(max_iterations = 1))(parameters(net), samples(net, 2))
end

@testset "second derivatives through an Equilibrium are refused" begin
    net = Network(2, [Layer(3)]; outputs = 1)
    X, p = randn(2, 4), 0.3 .* randn(length(net))
    @test_throws "hessian_vector_product" ForwardDiff.hessian(q -> sum(abs2, Equilibrium(net)(q, X)), p)
end

@testset "no samples have no equilibria, and a gradient of zero" begin
    net = one_layer()
    p, X = parameters(net), zeros(3, 0)
    @test ForwardDiff.gradient(q -> sum(Equilibrium(net)(q, X)), p) == Zygote.gradient(q -> sum(Equilibrium(net)(q, X)), p)[1] == zero(p)
end

@testset "arrays that do not fit an Equilibrium are refused in words" begin
    net = one_layer()
    p, X = parameters(net), samples(net, 3)
    @test_throws "the samples are an array of shape" Equilibrium(net)(p, X[:, 1])
    @test_throws "the parameters are a " Equilibrium(net)(nothing, X)
    @test_throws "parameters, the vector 3" Zygote.gradient(q -> sum(Equilibrium(net)(q, X)), p[1:3])
    @test_throws "parameters, the vector" Equilibrium(net)([p; ones(3)], X[1:(end - 1), :])
end

@testset "what is written to the equilibrium or its arguments changes no pullback" begin
    net = one_layer()
    p, X = parameters(net), samples(net, 3)
    V = randn(Xoshiro(1), neurons(net), 3)
    expected = Zygote.pullback(Equilibrium(net), p, X)[2](V)
    q, Y = copy(p), copy(X)
    Z, back = Zygote.pullback(Equilibrium(net), q, Y)
    foreach(A -> A .= 7, (Z, q, Y))
    @test back(V) == expected
end

@testset "the solution of an equation is not differentiated through the solver" begin
    for solve in (root, fixed_point)
        @test_throws "differentiated by vjp(solution, v)" Zygote.gradient(a -> sum(solve((z, a) -> cos.(z) .- a, [0.5], a).value), 0.2)
    end
end

@testset "an Equilibrium of what are no numbers is refused" begin
    net = one_layer()
    p, X = parameters(net), samples(net, 3)
    @test_throws "takes arrays of real numbers; these have entries of type Any" Equilibrium(net)(Vector{Any}(p), X)
    @test_throws "these have entries of type Union{Missing" Equilibrium(net)(p, [X fill(missing, 3)])
    @test_throws "these have entries of type ComplexF64" Equilibrium(net)(complex.(p), X)
end

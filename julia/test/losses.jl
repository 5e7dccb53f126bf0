const LOSS_EXAMPLES = (MSE(), MAE(), Huber(0.7), CrossEntropy(), BinaryCrossEntropy())

"Targets that the loss takes; those of MAE are away from its kink."
function targets_of(loss, net, p, X)
    Y = targets(net, size(X, 2))
    loss isa MAE && return Y .+ 0.2 .* sign.(Y .- predict(net, p, X))
    loss isa BinaryCrossEntropy && return float.(Y .> 0)
    loss isa CrossEntropy && return exp.(Y) ./ sum(exp.(Y); dims = 1)
    return Y
end

@testset "the value of $(nameof(typeof(loss))) is that of its formula" for loss in LOSS_EXAMPLES
    net = one_layer()
    p, X, w = parameters(net), samples(net, 7), rand(Xoshiro(5), 7)
    T, y = targets_of(loss, net, p, X), predict(net, p, X)
    d, σ = abs.(y .- T), 1 ./ (1 .+ exp.(-y))
    terms = Dict(
        MSE => d .^ 2, MAE => d, Huber => ifelse.(d .<= 0.7, d .^ 2 ./ 2, 0.7 .* (d .- 0.35)),
        BinaryCrossEntropy => .-T .* log.(σ) .- (1 .- T) .* log.(1 .- σ),
        CrossEntropy => .-2 .* T .* log.(exp.(y) ./ sum(exp.(y); dims = 1)),     # a sum over the 2 outputs, no mean
    )[typeof(loss)]
    per_sample = vec(sum(terms; dims = 1)) ./ 2
    @test loss_and_gradient(net, p, X, T; loss)[1] ≈ sum(per_sample) / 7 rtol = 1.0e-9
    @test loss_and_gradient(net, p, X, T; loss, weights = w)[1] ≈ sum(w .* per_sample) / 7 rtol = 1.0e-9
end

@testset "derivatives of $(nameof(typeof(loss))), weighted: $weighted" for loss in LOSS_EXAMPLES, weighted in (false, true)
    for net in (one_layer(; constraint = Free()), Network(3, [Layer(5)]; outputs = [1, 4]))
        p, X = parameters(net), samples(net, 6)
        T = net.outputs == 0 ? targets(net, 6) : targets_of(loss, net, p, X)
        net.outputs == 0 && !(loss isa Union{MSE, Huber}) && continue
        weights = weighted ? rand(Xoshiro(5), 6) : nothing
        exact = Newton(tol = 2.0e-13)
        value(p) = loss_and_gradient(net, p, X, T; loss, weights, solver = exact)
        @test relative_error(value(p)[2], finite_difference(q -> value(q)[1], p)) < 1.0e-8
        v, h = randn(Xoshiro(4), length(net)), 1.0e-3
        along(ε) = value(p + ε * v)[2]
        difference = (8 * (along(h) - along(-h)) - (along(2h) - along(-2h))) / 12h
        @test relative_error(hessian_vector_product(net, p, X, T, v; loss, weights, solver = exact), difference) < 1.0e-8
    end
end

@testset "derivatives are those of the value: $(nameof(typeof(loss)))" for loss in LOSS_EXAMPLES[[1, 2, 3, 5]]
    for y in (-2.0, -0.3, 0.25, 1.9), t in (0.0, 1.0)
        f(y) = ImplicitRNN.value(loss, y, t)
        @test slope(loss, y, t) ≈ ForwardDiff.derivative(f, y) atol = 1.0e-14
        @test curvature(loss, y, t) ≈ ForwardDiff.derivative(z -> ForwardDiff.derivative(f, z), y) atol = 1.0e-14
    end
end

@testset "cross-entropies of huge logits are finite: $T" for T in (Float64, Float32)
    G, target = zeros(T, 2, 1), T[0; 1;;]
    for size in (1.0e4, -1.0e4)
        @test ImplicitRNN.loss_gradient!(G, CrossEntropy(), T[size; 0;;], target, nothing, one(T)) ≈ max(size, 0)
        @test all(isfinite, G)
        @test ImplicitRNN.loss_gradient!(G, BinaryCrossEntropy(), T[size; 0;;], target, nothing, one(T)) ≈
            (max(size, 0) + log(2)) / 2
        @test all(isfinite, G)
    end
end

@testset "losses allocate nothing: $(nameof(typeof(loss)))" for loss in LOSS_EXAMPLES
    G, Y, T, w = zeros(2, 9), randn(Xoshiro(1), 2, 9), fill(0.5, 2, 9), ones(9)
    step(weights) = (ImplicitRNN.loss_gradient!(G, loss, Y, T, weights, 0.1); nothing)
    for weights in (nothing, w)
        step(weights)
        @test @allocated(step(weights)) <= 16
    end
end

@testset "targets and weights may be of any real type: $(nameof(typeof(loss)))" for loss in LOSS_EXAMPLES
    net = one_layer()
    p, X, Y, weights = parameters(net), samples(net, 6), abs.(targets(net, 6)), rand(Xoshiro(4), 6)
    expected = loss_and_gradient(net, p, X, Y; loss, weights)
    for kind in (x -> big.(x), x -> collect(Real, x), x -> rationalize.(x; tol = 1.0e-15)), (Y, weights) in ((kind(Y), weights), (Y, kind(weights)))
        found = loss_and_gradient(net, p, X, Y; loss, weights)
        @test found[1] isa Float64 && found[1] ≈ expected[1] && found[2] ≈ expected[2]
    end
end

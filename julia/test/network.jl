@testset "only existing weights are parameters" begin
    net = Network(3, [Layer(4), Layer(5; lateral = false)]; outputs = 2, constraint = Free())
    @test length(net) == 4 * 3 + 4 * 4 + 5 * 4 + 9 + 2 * 5 + 2
    @test length(net.stages) == 2
    @test [stage.recurrent for stage in net.stages] == [true, false]
end

@testset "a network keeps its layers, whatever becomes of the vector it was made of" begin
    layers = [Layer(2), Layer(3)]
    net = Network(1, layers; outputs = 1)
    push!(layers, Layer(4))
    @test net.layers == layers[1:2]
end

@testset "feedback joins layers into one stage" begin
    layers = [Layer(2), Layer(3), Layer(4), Layer(5)]
    stages(feedback) = [stage.rows for stage in Network(1, layers; feedback, outputs = 1).stages]
    @test stages(false) == [1:2, 3:5, 6:9, 10:14]
    @test stages(true) == [1:14]
    @test stages([3 => 2]) == [1:2, 3:9, 10:14]
    @test stages([2 => 1, 4 => 3]) == [1:5, 6:14]
    @test stages([3 => 1, 4 => 2]) == [1:14]
end

@testset "a feed-forward net is evaluated exactly, layer by layer" begin
    net = Network(3, [Layer(4; lateral = false), Layer(5, :sigmoid; lateral = false)]; outputs = 1)
    p, X = parameters(net), samples(net, 7)
    w = unpack!(Weights(net), net, p)
    first_layer = tanh.(w.stages[1].input * X .+ w.stages[1].bias)
    second_layer = 1 ./ (1 .+ exp.(-(w.stages[2].feed * first_layer .+ w.stages[2].bias)))
    solution = equilibrium(net, p, X)
    @test solution.state ≈ [first_layer; second_layer] rtol = 1.0e-14
    @test all(==(1), solution.iterations)
    @test all(<(1.0e-14), solution.bound)
end

@testset "bad topologies are refused" begin
    @test_throws "neurons must be a positive whole number, got 0" Layer(0)
    @test_throws "at least one layer" Network(2, Layer[]; outputs = 1)
    @test_throws "from a later to an earlier" Network(2, [Layer(2), Layer(2)]; outputs = 1, feedback = [1 => 2])
    @test_throws "output neurons" Network(2, [Layer(2)]; outputs = [3])
    @test_throws DimensionMismatch equilibrium(one_layer(), zeros(3), zeros(3, 2))
    @test_throws "takes 3 features" equilibrium(one_layer(), zeros(length(one_layer())), zeros(2, 2))
end

@testset "no samples have no states, outputs or loss" begin
    net = Network(2, [Layer(3)]; outputs = 1)
    p, X, Y = initial_parameters(Xoshiro(1), net), zeros(2, 0), zeros(1, 0)
    @test size(equilibrium(net, p, X).state) == (3, 0)
    @test size(predict(net, p, X)) == (1, 0)
    @test iszero(vjp(net, p, X, Y)[1])
    @test size(jvp(net, p, X, p, X)) == (1, 0)
    loss, gradient = loss_and_gradient(net, p, X, Y)
    @test iszero(loss) && iszero(gradient)
end

@testset "a sample without an equilibrium is never passed over" begin
    net = Network(2, [Layer(3)]; outputs = 1, constraint = Free())
    p, X = 40 .* initial_parameters(Xoshiro(1), net), randn(Xoshiro(2), 2, 5)
    options = (; solver = Picard(; max_iterations = 1))
    @test_throws "did not reach an equilibrium" predict(net, p, X; options...)
    @test_throws "did not reach an equilibrium" loss_and_gradient(net, p, X, ones(1, 5); options...)
    @test_throws "did not reach an equilibrium" vjp(net, p, X, ones(1, 5); options...)
    @test_throws "did not reach an equilibrium" jvp(net, p, X, p, X; options...)
    @test_throws DimensionMismatch equilibrium(net, p, X; start = zeros(3, 4))
    @test_throws ArgumentError Network{Float16}(2, [Layer(3)]; outputs = 1)
end

# Parameters of which the first that is read tells so, and waits.
struct Waiting <: AbstractVector{Float64}
    numbers::Vector{Float64}
    began::Base.Event
    go::Base.Event
end
Waiting(numbers) = Waiting(numbers, Base.Event(), Base.Event())
Base.size(x::Waiting) = size(x.numbers)
Base.getindex(x::Waiting, i::Int) = (notify(x.began); wait(x.go); x.numbers[i])

@testset "networks and solutions are shown in a line" begin
    net = Network(2, [Layer(3), Layer(2, :relu)]; outputs = 1, constraint = InfNorm(0.9))
    p, X = initial_parameters(net), zeros(2, 4)
    @test repr(net) == "Network{Float64}(2 inputs, layers [3 Tanh, 2 Relu], 1 outputs, InfNorm(0.9), $(length(net)) parameters)"
    @test repr(equilibrium(net, p, X)) == "Solution(4 of 4 samples converged, iterations up to 1, residual up to 0.0)"
    @test repr(equilibrium(net, p, X[:, 1:0])) == "Solution(0 of 0 samples converged, iterations up to 0, residual up to 0.0)"
    @test startswith(repr(root((z, a) -> z - a, [1.0], [2.0])), "ImplicitSolution(1 of 1 samples converged, ")
    @test :state in propertynames(equilibrium(net, p, X)) && :status in propertynames(equilibrium(net, p, X))
end

@testset "layers, workspaces, trainers and nets in training are shown in a line" begin
    net = Network(2, [Layer(3)]; outputs = 1)
    @test repr(net.layers) == "Layer[Layer(3, :tanh)]"
    @test repr(Layer(2, "relu"; lateral = false)) == "Layer(2, :relu; lateral = false)"
    @test repr(ImplicitRNN.Workspace(net)) == "CPUWorkspace($net)"
    @test repr(Trainer(Problem(net), ImplicitRNN.Optimisers.Descent(0.1))) == "Trainer(1 net of $net, Descent(0.1), 0 steps taken)"
    @test repr(Replicas(zeros(length(net), 2))) == "Replicas(2 nets, 0 halted)"
end

@testset "networks are equal where all that makes them is" begin
    layers, options = [Layer(3), Layer(2), Layer(2)], (; outputs = 1)
    net = Network(2, layers; options...)
    for same in (Network(2, copy(layers); options...), deepcopy(net), Network(2, layers; feedback = [], options...))
        @test same == net && hash(same) == hash(net)
    end
    for other in (
            Network{Float32}(2, layers; options...), Network(3, layers; options...), Network(2, layers; feedback = [2 => 1], options...),
            Network(2, layers; skips = [1 => 3], options...), Network(2, layers; input_skips = [2], options...),
            Network(2, layers; outputs = [7]), Network(2, layers; outputs = 2), Network(2, layers; constraint = Perron(0.5), options...),
            Network(2, [Layer(3, :relu); layers[2:3]]; options...), Network(2, [Layer(3; lateral = false); layers[2:3]]; options...),
        )
        @test other != net
    end
end

@testset "a workspace is for networks like its own, and a solution for as many samples as it has" begin
    net, other = one_layer(), one_layer(; activation = :relu)
    p, X, Y, g = parameters(net), samples(net, 4), targets(net, 4), zeros(length(net))
    ws, problem = ImplicitRNN.Workspace(other), Problem(net)
    for call in (
            () -> ImplicitRNN.equilibrium!(Solution(net, 4), ws, problem, p, X), () -> ImplicitRNN.loss_and_gradient!(g, ws, problem, p, X, Y),
            () -> ImplicitRNN.vjp!(g, zero(X), ws, problem, p, X, Y), () -> ImplicitRNN.jvp!(zero(Y), ws, problem, p, X, p, X),
            () -> ImplicitRNN.hessian_vector_product!(g, ws, problem, p, X, Y, p),
            () -> Trainer(problem, ImplicitRNN.Optimisers.Adam(); workspace = ws),
        )
        @test_throws "the workspace is that of $other, the problem has $net" call()
    end
    like = ImplicitRNN.Workspace(one_layer())
    @test ImplicitRNN.loss_and_gradient!(g, like, problem, p, X, Y)[1] == loss_and_gradient(net, p, X, Y)[1]
    for samples in (3, 5)
        @test_throws "states of the solution are (5, $samples)" ImplicitRNN.equilibrium!(Solution(net, samples), like, problem, p, X)
    end
    for (outcome, bound) in ((1, 4), (4, 1))
        short = Solution(zero(equilibrium(net, p, X).state), ImplicitRNN.Outcome(outcome), zeros(bound))
        @test_throws "the vectors of the solution have the lengths" ImplicitRNN.equilibrium!(short, like, problem, p, X)
    end
end

# An array whose indices begin at 0.
struct FromZero{T, N} <: AbstractArray{T, N}
    numbers::Array{T, N}
end
Base.size(x::FromZero) = size(x.numbers)
Base.axes(x::FromZero) = map(n -> Base.IdentityUnitRange(0:(n - 1)), size(x.numbers))
Base.getindex(x::FromZero{<:Any, N}, i::Vararg{Int, N}) where {N} = x.numbers[(i .+ 1)...]

@testset "arrays whose indices do not begin at 1 are refused" begin
    net = one_layer()
    p, X, Y, w = parameters(net), samples(net, 4), targets(net, 4), ones(4)
    Z, g, ws, problem = equilibrium(net, p, X).state, zeros(length(net)), ImplicitRNN.Workspace(net), Problem(net)
    for call in (
            () -> predict(net, FromZero(p), X), () -> predict(net, p, FromZero(X)), () -> predict(net, p, X; start = FromZero(Z)),
            () -> read_out(net, p, FromZero(Z)), () -> named_weights(net, FromZero(p)), () -> recurrent_weights(net, FromZero(p)),
            () -> loss_and_gradient(net, p, X, FromZero(Y)), () -> loss_and_gradient(net, p, X, Y; weights = FromZero(w)),
            () -> vjp(net, p, X, FromZero(Y)), () -> jvp(net, p, X, FromZero(p), X), () -> jvp(net, p, X, p, FromZero(X)),
            () -> hessian_vector_product(net, p, X, Y, FromZero(p)), () -> fit!(copy(p), net, X, FromZero(Y)),
            () -> Equilibrium(net)(p, FromZero(X)), () -> Equilibrium(net)(FromZero(p), X),
            () -> ImplicitRNN.equilibrium!(Solution(net, 4), ws, problem, FromZero(p), X),
            () -> ImplicitRNN.loss_and_gradient!(g, ws, problem, p, FromZero(X), Y),
            () -> ImplicitRNN.loss_and_gradient!(g, ws, problem, p, X, FromZero(Y)),
            () -> train!(Trainer(problem, ImplicitRNN.Optimisers.Adam()), Replicas(reshape(p, :, 1)), X, FromZero(Y), reshape(1:4, :, 1), 4, [0.1], zeros(1, 1), zeros(Int, 1, 1)),
        )
        @test_throws "expected an array whose indices begin at 1" call()
    end
end

@testset "every tile of a workspace holds the batch, whatever the batches before" begin
    net = Network(3, [Layer(80)]; outputs = 2)
    ws = ImplicitRNN.Workspace(net)
    for (samples, pieces) in ((32, 1), (36, 2), (42, 2))     # of widths 32, 20 and 24
        tiles = ImplicitRNN.buffers!(ws, samples, 2, pieces)
        @test all(tile -> tile.width >= ImplicitRNN.tile_width(net, samples), tiles)
    end
end

@testset "a workspace is for one task at a time" begin
    net = one_layer()
    p, X, Y = parameters(net), samples(net, 4), targets(net, 4)
    ws, problem, g = ImplicitRNN.Workspace(net), Problem(net), zeros(length(net))
    trainer = Trainer(problem, ImplicitRNN.Optimisers.Descent(0.1); workspace = ws)
    calls = (
        p -> ImplicitRNN.equilibrium!(Solution(net, 4), ws, problem, p, X),
        p -> ImplicitRNN.loss_and_gradient!(zeros(length(net)), ws, problem, p, X, Y),
        p -> ImplicitRNN.vjp!(zeros(length(net)), zero(X), ws, problem, p, X, Y),
        p -> ImplicitRNN.jvp!(zero(Y), ws, problem, p, X, p, X),
        p -> ImplicitRNN.hessian_vector_product!(zeros(length(net)), ws, problem, p, X, Y, p),
        p -> train!(trainer, Replicas(reshape(collect(p), :, 1)), X, Y, reshape(1:4, :, 1), 4, [0.1], zeros(1, 1), zeros(Int, 1, 1)),
    )
    expected = loss_and_gradient(net, p, X, Y)
    slow = Waiting(p)
    task = @async ImplicitRNN.loss_and_gradient!(g, ws, problem, slow, X, Y)
    wait(slow.began)
    for call in calls
        @test_throws "another task is at work in this workspace" call(p)
    end
    notify(slow.go)
    @test first(fetch(task)) == expected[1] && g == expected[2]
    foreach(call -> call(p), calls)

    # It is free again after an error.
    failing = view(Union{Missing, Float64}[p; missing], (1:length(net)) .+ 1)
    foreach(call -> (@test_throws Exception call(failing)), calls)
    @test ImplicitRNN.loss_and_gradient!(g, ws, problem, p, X, Y)[1] == expected[1]
    @test fetch(@async ImplicitRNN.loss_and_gradient!(g, ws, problem, p, X, Y))[1] == expected[1]
end

@testset "connections that do not exist are refused by name" begin
    net(; options...) = Network(2, [Layer(2), Layer(3), Layer(2)]; outputs = 1, options...)
    @test length(net(skips = [1 => 3])) == length(net()) + 4
    @test_throws "the skip 1 => 5 does not lead from an earlier to a later of the 3 layers" net(skips = [1 => 5])
    @test_throws "the skip 3 => 1 does not lead" net(skips = [3 => 1])
    @test_throws "the skip 1 => 2 passes over no layer" net(skips = [1 => 2])
    for skips in ([(1, 3)], 1 => 3, true, nothing)
        @test_throws "skips is" net(; skips)
    end
    for feedback in ([(3, 1)], 3 => 1, 1, nothing)
        @test_throws "feedback is" net(; feedback)
    end
end

@testset "options of another kind are refused by name" begin
    for kind in (Auto, Newton, Picard, Anderson, Chord, NLsolver, Implicit)
        for tol in (0, -1.0e-3, 1, Inf, NaN, "a")          # the others of which anything would meet
            @test_throws "tol must lie strictly between 0 and 1, got $(repr(tol))" kind(; tol)
        end
        @test_throws "max_iterations must be a positive whole number, got 2.5" kind(max_iterations = 2.5)
        @test_throws "max_iterations must be at most $(typemax(Int)), got $(big(10)^30)" kind(max_iterations = big(10)^30)
    end
    for kind in (Picard, Anderson)
        @test_throws "damping must lie in (0, 1], got nothing" kind(damping = nothing)
    end
    @test_throws "memory must be a whole number in 1:10, got 2.5" Anderson(memory = 2.5)
    @test_throws "ridge must not be negative, got :a" Anderson(ridge = :a)
    @test_throws "steps must be a positive whole number, got \"a\"" Unrolled("a")
    @test_throws "neurons must be a positive whole number, got \"x\"" Layer("x")
    @test_throws "an activation is tanh; expected its name, such as :tanh" Layer(3, tanh)
    @test_throws "kappa must lie strictly between 0 and 1, got \"a\"" Perron("a")
    for delta in (0, "a")
        @test_throws "delta must be positive and finite, got $(repr(delta))" Huber(delta)
    end
    for truth in (1, nothing)
        @test_throws "lateral must be true or false, got $truth" Layer(3; lateral = truth)
        @test_throws "warm_start must be true or false, got $truth" Trainer(Problem(one_layer()), ImplicitRNN.Optimisers.Adam(); warm_start = truth)
    end
    @test_throws "neurons must be a positive whole number, got true" Layer(true)
    @test_throws "jacobian_penalty must be finite and not negative, got true" Problem(one_layer(); jacobian_penalty = true)
    for outputs in (0, true)
        @test_throws "outputs must be a positive whole number, got $outputs" Network(2, [Layer(3)]; outputs)
    end
    @test_throws "outputs must be at most" Network(2, [Layer(3)]; outputs = big(10)^30)
    net = one_layer()
    @test_throws "probe must be a whole number, got 1.5" loss_and_gradient(net, parameters(net), samples(net, 4), targets(net, 4); probe = 1.5)
    @test_throws "rule is :adam; expected one made by its constructor" fit!(parameters(net), net, samples(net, 4), targets(net, 4); rule = :adam)
    @test_throws "layers is 3; expected a vector of layers" Network(2, 3; outputs = 1)
    @test_throws "layers is [3]; expected a vector of layers" Network(2, [3]; outputs = 1)
    @test_throws "inputs must be a positive whole number, got 2.0" Network(2.0, [Layer(3)]; outputs = 1)
    @test_throws "constraint is Perron; expected one made by its constructor" Network(2, [Layer(3)]; outputs = 1, constraint = Perron)
end

@testset "layers and neurons are whole numbers" begin
    two = [Layer(2), Layer(2)]
    for input_skips in ([1.5], "a", (true,))
        @test_throws "expected layers, such as [2]" Network(2, two; outputs = 1, input_skips)
    end
    for outputs in ([1.5], 1.5, "a")
        @test_throws "expected a number of outputs, or neurons" Network(2, two; outputs)
    end
end

@testset "what is no array of real numbers is refused" begin
    net = one_layer()
    p, X, Y = parameters(net), samples(net, 4), targets(net, 4)
    for call in ((p, X) -> predict(net, p, X), (p, X) -> equilibrium(net, p, X), (p, X) -> loss_and_gradient(net, p, X, Y), (p, X) -> fit!(p, net, X, Y))
        @test_throws "the parameters are a named tuple of W, R" call((; W = p, R = p), X)
        @test_throws "the parameters are a tuple of $(length(net))" call(Tuple(p), X)
        @test_throws "the samples are an array of shape (3,); expected a matrix with a column for each sample" call(p, X[:, 1])
        @test_throws "the samples have entries of type ComplexF64" call(p, complex.(X))
        @test_throws "the parameters have entries of type ComplexF64" call(complex.(p), X)
        @test_throws "the samples have entries of type Union{Missing" call(p, replace(X, X[1] => missing))
        @test_throws "the parameters have dual numbers" ForwardDiff.gradient(p -> (call(p, X); 0.0), p)
    end
    for call in (w -> loss_and_gradient(net, p, X, Y; weights = w), w -> fit!(copy(p), net, X, Y; weights = w), w -> hessian_vector_product(net, p, X, Y, p; weights = w))
        @test_throws "the weights are an array of shape (1, 4); expected a vector with a number for each sample" call(ones(1, 4))
        @test_throws "the weights are a tuple of 4" call((1, 2, 3, 4))
        @test_throws "the weights have entries of type ComplexF64" call(ones(ComplexF64, 4))
    end
    @test_throws "the targets are a Nothing; expected a matrix" loss_and_gradient(net, p, X, nothing)
    @test_throws "the targets are a Nothing" hessian_vector_product(net, p, X, nothing, p)
    @test_throws "the targets are a Nothing" fit!(p, net, X, nothing)
    @test_throws "the cotangents are a Nothing" vjp(net, p, X, nothing)
    @test_throws "the directions are a Nothing" jvp(net, p, X, p, nothing)
    @test_throws "the cotangents are an array of shape (2,)" vjp(net, p, X, Y[:, 1])
    @test_throws "the states are an array of shape (5,)" read_out(net, p, zeros(5))
    for of in (:states, "state")
        @test_throws "of must be :outputs or :state, got $(repr(of))" vjp(net, p, X, Y; of)
    end
    @test_throws "the directions have dual numbers" jvp(net, p, X, p, ForwardDiff.Dual.(X))
    @test_throws "solver is :newton; expected one made by its constructor" predict(net, p, X; solver = :newton)
    @test_throws "solver is :newton; expected one made by its constructor" Equilibrium(net; solver = :newton)
    @test_throws "loss is MSE" loss_and_gradient(net, p, X, Y; loss = MSE)
    @test predict(net, big.(p), X) ≈ predict(net, p, X)
end

@testset "what is no vector or matrix is refused by what writes to the caller's arrays, too" begin
    net = one_layer()
    p, X, Y, ws, problem = parameters(net), samples(net, 4), targets(net, 4), ImplicitRNN.Workspace(net), Problem(net)
    solve(p, X, start = nothing) = ImplicitRNN.equilibrium!(Solution(net, 4), ws, problem, p, X, start)
    gradient(g, p, X, Y) = ImplicitRNN.loss_and_gradient!(g, ws, problem, p, X, Y)
    @test_throws "the vector is an array of shape ($(length(net)), 1); expected a vector of $(length(net)) numbers" solve(reshape(p, :, 1), X)
    @test_throws "the samples are an array of shape (3, 4, 1); expected a matrix" solve(p, reshape(X, 3, 4, 1))
    @test_throws "states are a tuple of 1" solve(p, X, (X,))
    @test_throws "the gradient is a Nothing; expected a vector" gradient(nothing, p, X, Y)
    @test_throws "targets are a Nothing; expected a matrix" gradient(copy(p), p, X, nothing)
    @test_throws "derivatives are a Nothing" ImplicitRNN.vjp!(copy(p), nothing, ws, problem, p, X, Y)
    @test_throws "the direction is an array of shape" ImplicitRNN.jvp!(copy(Y), ws, problem, p, X, reshape(p, 1, :), X)
end

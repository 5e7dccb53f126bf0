# The calls from Python with the common types, compiled together with the package.

@setup_workload begin
    options(; values...) = Dict{Symbol, Any}(values)
    adam = options(; learning_rate = 0.01, beta1 = 0.9, beta2 = 0.999, epsilon = 1.0e-8, weight_decay = 0.0)
    limits = options(; tol = nothing, max_iterations = 1000)
    # With the keywords of the bridge, each set of which is a method of its own.
    function exercise(
            ::Type{T}, neurons, activation, @nospecialize(constraint), @nospecialize(solver);
            samples = 3, damping = (;), products = false, nets = 1
        ) where {T}
        net = Network{T}(
            2, [Layer(neurons, activation; lateral = true)]; feedback = Pair{Int, Int}[], skips = Pair{Int, Int}[],
            input_skips = Int[], outputs = 1, constraint = constraint(0.9),
        )
        adjoint = Implicit(; merge(limits, options(; linear_solver = "auto"))...)
        problem = Problem(net; solver = solver(; merge(limits, options(; damping...))...), adjoint, loss = MSE(), jacobian_penalty = 0.0)
        # Free networks neither repel nor need the last resorts here.
        p, X, Y = map(k -> T(0.2 * sin(k^2)), 1:length(net)), ones(T, 2, samples), zeros(T, 1, samples)
        equilibrium!(Solution(net, samples), Workspace(net), problem, p, X, nothing)
        loss_and_gradient!(zeros(T, length(net)), Workspace(net), problem, p, X, Y; probe = 0, weights = nothing, report = nothing)
        for start in (products ? (nothing, zeros(T, neurons, samples)) : ())
            vjp!(zeros(T, length(net)), zero(X), Workspace(net), problem, p, X, Y; of = :outputs, start, probe = 0, report = nothing)
            jvp!(zero(Y), Workspace(net), problem, p, X, p, X; of = :outputs, start, report = nothing)
        end
        order = collect(reshape(1:samples, :, 1))
        function train(nets, size, warm_start)
            trainer = Trainer(problem, OPTIMIZERS.adam(adam); guard = Guard(), clip = Inf, nets, batch_size = 2, warm_start)
            train!(trainer, Replicas(repeat(p, 1, nets)), X, Y, order, size, fill(0.01, cld(samples, size)), zeros(1, nets), zeros(Int, 1, nets); weights = nothing)
        end
        train(1, 2, false)
        products && foreach(size -> train(1, size, true), (2, samples))
        nets > 1 && train(nets, 2, false)
        return
    end
    @compile_workload begin
        for T in (Float64, Float32)
            exercise(T, 3, "tanh", Perron, Auto; products = true)
            exercise(T, SMALL_LU + 1, "tanh", _ -> Free(), Auto; samples = 200)
            exercise(T, SMALL_LU + 1, "tanh", _ -> Free(), Chord)
        end
        exercise(Float64, 2, "tanh", Perron, Auto; nets = 2nets_side_by_side(Float64))
        exercise(Float64, 3, "sigmoid", Perron, Auto)
        exercise(Float64, 3, "tanh", Perron, Picard; damping = (; damping = 1.0))
    end
end

# What Python calls with the common types, compiled when the package is.

@setup_workload begin
    adam = OPTIMIZERS.adam(Dict(:learning_rate => 0.01, :beta1 => 0.9, :beta2 => 0.999, :epsilon => 1.0e-8, :weight_decay => 0.0))
    function exercise(::Type{T}, neurons, activation, constraint, solver; samples = 3) where {T}
        net = Network{T}(2, [Layer(neurons, activation)]; outputs = 1, constraint)
        problem = Problem(net; solver)
        p, X, Y = fill(T(0.1), length(net)), ones(T, 2, samples), zeros(T, 1, samples)
        equilibrium!(Solution(net, samples), Workspace(problem), problem, p, X)
        trainer = Trainer(problem, adam; batch_size = 2)
        loss_and_gradient!(zeros(T, length(net)), Workspace(problem), problem, p, X, Y)
        train!(trainer, Replicas(reshape(p, :, 1)), X, Y, reshape(1:samples, :, 1)[:, :], 2, fill(0.01, samples), zeros(1, 1), zeros(Int, 1, 1))
    end
    @compile_workload begin
        for T in (Float64, Float32)
            exercise(T, 3, :tanh, Perron(), Auto())
            exercise(T, SMALL_LU + 1, :tanh, Free(), Auto(); samples = 2 * PILOTS)
        end
        exercise(Float64, 3, :sigmoid, Perron(), Auto())
        exercise(Float64, 3, :tanh, Perron(), Picard())
    end
end

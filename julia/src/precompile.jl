# What Python calls with the common types, compiled when the package is.

@setup_workload begin
    adam = OPTIMIZERS.adam(Dict(:learning_rate => 0.01, :beta1 => 0.9, :beta2 => 0.999, :epsilon => 1.0e-8, :weight_decay => 0.0))
    function exercise(::Type{T}, neurons, activation, constraint, solver) where {T}
        net = Network{T}(2, [Layer(neurons, activation)]; outputs = 1, constraint)
        problem = Problem(net; solver)
        p, X, Y = fill(T(0.1), length(net)), ones(T, 2, 3), zeros(T, 1, 3)
        equilibrium!(Solution(net, 3), Workspace(problem), problem, p, X)
        trainer = Trainer(problem, adam; batch_size = 2)
        train!(trainer, Replicas(reshape(p, :, 1)), X, Y, [1; 2; 3;;], 2, [0.01, 0.01], zeros(1, 1), zeros(Int, 1, 1))
    end
    @compile_workload begin
        for T in (Float64, Float32)
            exercise(T, 3, :tanh, Perron(), Auto())
            exercise(T, SMALL_LU + 1, :tanh, Free(), Auto())
        end
        exercise(Float64, 3, :sigmoid, Perron(), Auto())
        exercise(Float64, 3, :tanh, Perron(), Picard())
    end
end

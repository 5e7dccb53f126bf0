# What Python calls with the common types, compiled when the package is.

"The problems that are compiled ahead: both precisions, with and without a constraint."
common_problems() = [
    Problem(Network{T}(2, [Layer(3)]; outputs = 1, constraint))
        for T in (Float64, Float32) for constraint in (Perron(), Free())
]

@setup_workload begin
    @compile_workload begin
        for problem in common_problems()
            net = problem.net
            T = eltype(net)
            p, X = fill(T(0.1), length(net)), ones(T, 2, 3)
            Y = zeros(T, output_size(net), 3)
            equilibrium!(Solution(net, 3), Workspace(problem), problem, p, X)
            for rule in (OPTIMIZERS.adam(Dict(:learning_rate => 0.01, :beta1 => 0.9, :beta2 => 0.999, :epsilon => 1.0e-8)),)
                trainer = Trainer(problem, rule; batch_size = 2)
                train!(trainer, reshape(p, :, 1), X, Y, [1; 2; 3;;], 2, [0.01, 0.01], zeros(1, 1), zeros(Int, 1, 1))
            end
        end
        large = Network{Float32}(2, [Layer(SMALL_LU + 1)]; outputs = 1)
        loss_and_gradient(large, zeros(Float32, length(large)), ones(Float32, 2, 2), ones(Float32, 1, 2))
    end
end

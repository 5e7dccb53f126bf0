# What every generic problem goes through whatever its function, compiled when the package is.

@setup_workload begin
    halve = (z, a) -> a .* z .+ 1
    @compile_workload begin
        for T in (Float64, Float32), solve in (fixed_point, root), z0 in (ones(T, 1), ones(T, 2, 1))
            solution = solve(halve, z0, T(0.5); solver = Auto())
            vjp(solution, one.(z0))
            jacobian!(zeros(T, size(z0, 1), 1, 1), solution.problem, reshape(solution.value, :, 1), 1)
            solve(halve, z0, T(0.5); solver = NLsolver())
        end
    end
end

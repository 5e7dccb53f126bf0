# The code that all equations share, compiled together with the package; the loops over the samples are compiled for each
# function, and NLsolve.jl at its first use.

@setup_workload begin
    halve = (z, a) -> a .* z .+ 1
    @compile_workload begin
        for z0 in (ones(1), ones(1, 2))
            solution = root(halve, z0, 0.5)
            vjp(solution, one.(z0))
            jacobian!(zeros(1, 1, length(z0)), solution.problem, solution.inverses, 1)
        end
        fixed_point(halve, [1.0], 0.5)
    end
end

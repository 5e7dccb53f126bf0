# What JET.jl finds by inference alone, without running the code: methods that do not exist, fields that are not there, conditions
# that are not Boolean. In what is called for networks, and in the solvers of equations.
#
#     julia --project=julia/test/lint -e 'using Pkg; Pkg.instantiate()'      once
#     julia --project=julia/test/lint julia/test/lint/errors.jl

using ImplicitRNN, JET
using ImplicitRNN: EquationProblem, ErasedEquation, ImplicitSolution, Iteration, Linearization, iterate!, newton!, trust_regions!

calls = map((Float64, Float32)) do T
    net, vector, matrix, start = Network{T}, Vector{T}, Matrix{T}, (Iteration{T}, ErasedEquation{T}, Float64)
    return [
        (initial_parameters, net),
        (named_weights, net, vector),
        (recurrent_weights, net, vector),
        (predict, net, vector, matrix),
        (fit!, vector, net, matrix, matrix),
        (equilibrium, net, vector, matrix),
        (loss_and_gradient, net, vector, matrix, matrix),
        (vjp, net, vector, matrix, matrix),
        (jvp, net, vector, matrix, vector, matrix),
        (hessian_vector_product, net, vector, matrix, matrix, vector),
        (Equilibrium(Network{T}(1, [Layer(1)]; outputs = 1)), vector, matrix),
        (fixed_point, typeof(cos), vector),
        (root, typeof(cos), matrix),
        (vjp, ImplicitSolution{T, matrix, ImplicitRNN.Inverses{T}}, matrix),
        (newton!, Iteration{T}, Linearization{T}, ErasedEquation{T}, Float64),
        (trust_regions!, Iteration{T}, Linearization{T}, ErasedEquation{T}, Float64),
        ((iterate!, solver, start...) for solver in (Auto, Picard, Anderson, Newton, NLsolver))...,
    ]
end

reports = map(reduce(vcat, calls)) do (f, types...)
    result = report_call(f, types; target_modules = (ImplicitRNN,))
    isempty(JET.get_reports(result)) || show(result)
    return length(JET.get_reports(result))
end
println("$(sum(reports)) reports on $(length(reports)) calls")
exit(sum(reports) == 0 ? 0 : 1)

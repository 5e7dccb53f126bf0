# The pullback of one stage, s = W x + feed z_before + R z + b: from ∂L/∂s to the weights and the drive of the stage. Training,
# the rule for ImplicitDifferentiation.jl and the Hessian products share it; they differ in how they obtain ∂L/∂s.

"""
    drive_pullback!(g, G, w, E, X, Z, threads = 1)

Given E = ∂L/∂s (n × samples), add the gradient of the external drive of a stage, W x + feed z_before + b, to `g` and to the rows
of `G` = ∂L/∂z before the stage. `X` holds the inputs, `Z` the states of all neurons.
"""
function drive_pullback!(g::StageWeights, G, w::StageWeights, E, X, Z, threads::Int = 1)
    m = size(E, 2)
    add_columns!(g.bias, E, m)
    isempty(g.input) || add_outer!(g.input, E, X, m, threads)
    before = 1:size(w.feed, 2)
    if !isempty(before)
        add_outer!(g.feed, E, view(Z, before, :), m, threads)
        gemm!('T', 'N', true, w.feed, E, true, view(G, before, 1:m))
    end
    return
end

"""
    stage_pullback!(g, G, w, E, X, Z, rows, threads = 1)

The same with the recurrent weights of the stage, whose neurons are `rows`. The contribution RᵀE of the stage's own state to
∂L/∂z is part of the adjoint equation and not added here.
"""
function stage_pullback!(g::StageWeights, G, w::StageWeights, E, X, Z, rows, threads::Int = 1)
    isempty(g.recurrent) || add_outer!(g.recurrent, E, view(Z, rows, :), size(E, 2), threads)
    return drive_pullback!(g, G, w, E, X, Z, threads)
end

# The Jacobian penalty, which favours stable equilibria where no constraint guarantees them.

"""
    JacobianPenalty(weight, probe, samples)

Adds `weight ⋅ mean_b ‖J_b‖_F² / N` to the loss, with J = D R the Jacobian of a recurrent stage at the equilibrium of
sample b and N the number of neurons of the network (Bai, Koltun, Kolter, ICML 2021), estimated by one random vector
v ∈ {-1, 1}ⁿ per sample: E‖Jᵀv‖² = ‖J‖_F² (Hutchinson). The vectors depend only on `probe`, the sample's position among the
`samples` of the batch, and the neuron.
"""
struct JacobianPenalty
    weight::Float64
    probe::UInt64
    samples::Int
end

"±1, from a hash (the finaliser of SplitMix64) of the three numbers."
@inline function rademacher(probe::UInt64, sample::Int, neuron::Int)
    x = probe + 0x9e3779b97f4a7c15 * (sample % UInt64) + 0xd1b54a32d192ed03 * (neuron % UInt64)
    x = (x ⊻ (x >> 30)) * 0xbf58476d1ce4e5b9
    x = (x ⊻ (x >> 27)) * 0x94d049bb133111eb
    x ⊻= x >> 31
    return ifelse(x >> 63 == 0, 1, -1)
end

"""
    add_penalty!(ws, penalty, net, stage, w, g, first_sample, m)

The penalty of one stage for the tile that starts at `first_sample`. With a = D v and q = Jᵀv = Rᵀa, the derivatives of
‖q‖² are 2 a qᵀ with respect to R and 2 v ∘ (R q) ∘ f″(s) with respect to s; the latter acts on the parameters
through s itself (returned, n × m) and through the equilibrium (added to `ws.G` = ∂L/∂z).
"""
function add_penalty!(ws, penalty::JacobianPenalty, net::Network{T}, stage, w, g, first_sample, m) where {T}
    rows = stage.rows
    S, Z, D, G = (view(A, rows, 1:m) for A in (ws.S, ws.Z, ws.D, ws.G))
    c = T(penalty.weight / (penalty.samples * neurons(net)))
    v = [T(rademacher(penalty.probe, first_sample + j - 1, i)) for i in rows, j in 1:m]
    a = D .* v
    q = gemm!('T', 'N', true, w.recurrent, a, false, similar(a))
    gemm!('N', 'T', 2c, a, q, true, g.recurrent)
    e = 2c .* v .* gemm!('N', 'N', true, w.recurrent, q, false, similar(a)) .* curvatures(stage.activation, S, Z)
    gemm!('T', 'N', true, w.recurrent, e, true, G)
    return Float64(c) * sum(abs2, q), e
end

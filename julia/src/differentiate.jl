# The equilibrium as a differentiable function for Julia's AD systems: an ImplicitFunction of
# ImplicitDifferentiation.jl whose conditions have an exact rule and whose linear solver is exact.

"""
    Equilibrium(net; solver = Auto())

A function `(p, X) -> Z`: the equilibria (neurons × samples) of `net` with parameters `p` for the samples `X`
(features × samples). It can be differentiated in both arguments by ForwardDiff.jl, by Zygote.jl and by any AD
system that understands ChainRules; no solver step is differentiated. Throws an `ErrorException` if a sample
does not converge, since the implicit function theorem holds at an equilibrium only.
"""
struct Equilibrium{N <: Network, I <: ImplicitFunction}
    net::N
    implicit::I
end

Equilibrium(net::Network; solver = Auto()) = Equilibrium(
    net, ImplicitFunction(StateSolve(net, solver), Conditions(net); linear_solver = BlockSolver(neurons(net)))
)

function (equilibrium::Equilibrium)(p::AbstractVector, X::AbstractMatrix)
    z, _ = equilibrium.implicit(vcat(p, vec(X)), size(X, 2))
    return reshape(z, neurons(equilibrium.net), size(X, 2))
end

# θ = (p, vec(X)), the one argument ImplicitFunction differentiates.
split_arguments(net, θ, samples) =
    view(θ, 1:length(net)), reshape(view(θ, (length(net) + 1):length(θ)), net.inputs, samples)

struct StateSolve{N, S}
    net::N
    solver::S
end
function (s::StateSolve)(θ, samples)
    solution = equilibrium(s.net, split_arguments(s.net, θ, samples)...; solver = s.solver)
    failed = count(!=(CONVERGED), solution.status)
    failed == 0 || error("$failed of $samples samples did not reach an equilibrium, largest relative residual $(maximum(solution.residual))")
    return vec(solution.state), nothing
end

"""
    Conditions(net)

`c(θ, z) = f(W x + R z + b) - z`, which vanishes at an equilibrium.
"""
struct Conditions{N}
    net::N
end
function (c::Conditions)(θ, z, _, samples)
    Z = reshape(z, :, samples)
    F, _, _ = sweep(c.net, θ, Z, samples)
    return vec(F .- Z)
end

# One evaluation of f for all stages at once: F = f(S), S, and the weights, for any element type.
function sweep(net, θ, Z, samples)
    p, X = split_arguments(net, θ, samples)
    T = promote_type(eltype(θ), eltype(Z))
    w = unpack!(Weights(net, T), net, p)
    F, S = Matrix{T}(undef, size(Z)), Matrix{T}(undef, size(Z))
    for (stage, ws) in zip(net.stages, w.stages)
        rows = stage.rows
        s = ws.bias .+ ws.feed * Z[1:(first(rows) - 1), :]
        stage.has_input && (s .+= ws.input * X)
        stage.recurrent && (s .+= ws.recurrent * Z[rows, :])
        S[rows, :] = s
        for j in 1:samples
            activate!(view(F, rows, :), stage.activation, s, view(Z, rows, :), j)
        end
    end
    return F, S, w
end

function ChainRulesCore.rrule(c::Conditions, θ, z, byproduct, samples)
    net, Z = c.net, reshape(z, :, samples)
    F, S, w = sweep(net, θ, Z, samples)
    function conditions_pullback(dc)
        C = reshape(unthunk(dc), :, samples)
        dZ, dX = Matrix(-C), zeros(eltype(S), net.inputs, samples)
        X = split_arguments(net, θ, samples)[2]
        G = Weights(net, eltype(S))
        for (stage, ws, g) in zip(net.stages, w.stages, G.stages)
            rows, before = stage.rows, 1:(first(stage.rows) - 1)
            E = slopes!(similar(S[rows, :]), stage.activation, S[rows, :], F[rows, :]) .* C[rows, :]
            g.bias .= vec(sum(E; dims = 2))
            g.feed .= E * Z[before, :]'
            dZ[before, :] .+= ws.feed' * E
            if stage.recurrent
                g.recurrent .= E * Z[rows, :]'
                dZ[rows, :] .+= ws.recurrent' * E
            end
            if stage.has_input
                g.input .= E * X'
                dX .+= ws.input' * E
            end
        end
        dp = pack_gradient!(zeros(eltype(S), length(net)), net, G, w)
        return NoTangent(), vcat(dp, vec(dX)), vec(dZ), NoTangent(), NoTangent()
    end
    return vec(F .- Z), conditions_pullback
end

"""
    BlockSolver(n)

Exact linear solver for an ImplicitFunction whose Jacobian is block-diagonal, one n × n block per sample: n
products with the operator recover all blocks at once, an LU factorisation of each solves them.
"""
struct BlockSolver <: ImplicitDifferentiation.AbstractSolver
    n::Int
end
function (s::BlockSolver)(A, _, b, _)
    n = s.n
    rhs = reshape(b, n, :)
    samples = size(rhs, 2)
    blocks = Array{eltype(b)}(undef, n, n, samples)
    for i in 1:n
        probe = zeros(eltype(b), n, samples)
        probe[i, :] .= 1
        blocks[:, i, :] = reshape(A(vec(probe)), n, samples)
    end
    solution = similar(rhs)
    for j in 1:samples
        solution[:, j] = lu!(view(blocks, :, :, j)) \ view(rhs, :, j)
    end
    return vec(solution)
end

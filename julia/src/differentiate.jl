# The equilibrium as a differentiable function for Julia's AD systems: an ImplicitFunction of
# ImplicitDifferentiation.jl whose conditions have an exact rule and whose linear solver is exact.

"""
    Equilibrium(net; solver = Auto())

A function `(p, X) -> Z`: the equilibria (neurons × samples) of `net` with parameters `p` for the samples `X`
(features × samples). It has first derivatives in both arguments by ForwardDiff.jl, by Zygote.jl and by any AD
system that supports ChainRules; no solver step is differentiated. Throws an `ErrorException` if a sample
does not converge, since the implicit function theorem holds at an equilibrium only, and errors like those of [`equilibrium`](@ref)
for arrays of the wrong size.
"""
struct Equilibrium{N <: Network, S <: Solver}
    net::N
    solver::S
end
function Equilibrium(net::Network; solver = Auto())
    check_option("solver", solver, Solver, "Auto() or Newton()")
    return Equilibrium(net, solver)
end

function (equilibrium::Equilibrium)(p, X)
    (; net, solver) = equilibrium
    ignore_derivatives() do
        check_shape("the parameters", p, 1)
        check_shape("the samples", X, 2)
        check_length(net, p)
        check_features(net, X)
    end
    foreach(refuse_unusual, (eltype(p), eltype(X)))
    # One per call, since its linear solver works at the solution of this call.
    implicit = ignore_derivatives() do
        solve = StateSolve(net, solver, Ref{Any}(nothing))
        ImplicitFunction(solve, Conditions(net); linear_solver = BlockSolver(neurons(net), () -> jacobian_blocks(solve)))
    end
    z, _ = implicit(vcat(p, vec(X)), size(X, 2))
    return reshape(copy(z), neurons(net), size(X, 2))          # the pullback is taken at z, whatever is written to it
end

refuse_unusual(::Type{<:Real}) = nothing
refuse_unusual(T::Type) = throw(ArgumentError("an Equilibrium takes arrays of real numbers; these have entries of type $T"))
refuse_unusual(::Type{<:Dual{<:Any, <:Dual}}) =
    throw(ArgumentError("an Equilibrium has first derivatives; for second ones there is hessian_vector_product"))

# θ = (p, vec(X)), the one argument ImplicitFunction differentiates.
split_arguments(net, θ, samples) =
    view(θ, 1:length(net)), reshape(view(θ, (length(net) + 1):length(θ)), net.inputs, samples)

# The solver of the ImplicitFunction, which remembers the arguments and the solution of its last call.
struct StateSolve{N, S}
    net::N
    solver::S
    last::Base.RefValue{Any}
end
function (s::StateSolve)(θ, samples)
    solution = equilibrium(s.net, split_arguments(s.net, θ, samples)...; solver = s.solver)
    check_converged(solution.status, solution.residual)
    s.last[] = (θ, solution.state)
    return vec(solution.state), nothing
end

# ∂c/∂z of each sample, from the slopes D and the weights: D R - I on the diagonal, D feed below it.
function jacobian_blocks(s::StateSolve)
    net, (θ, Z) = s.net, s.last[]
    N, samples = size(Z)
    F, S, w = sweep(net, θ, Z, samples)
    D = similar(S)
    J = zeros(eltype(S), N, N, samples)
    for (stage, ws) in zip(net.stages, w.stages)
        rows, before = stage.rows, 1:(first(stage.rows) - 1)
        slopes!(view(D, rows, :), stage.activation, view(S, rows, :), view(F, rows, :))
        for j in 1:samples
            d = view(D, rows, j)
            J[rows, before, j] = d .* ws.feed
            stage.recurrent && (J[rows, rows, j] = d .* ws.recurrent)
        end
    end
    for j in 1:samples, i in 1:N
        J[i, i, j] -= 1
    end
    return J
end

"""
    Conditions(net)

`c(θ, z) = f(W x + R z + b) - z`, which vanishes at an equilibrium.
"""
struct Conditions{N}
    net::N
end
function (c::Conditions)(θ, z, _, samples)
    Z = reshape(z, neurons(c.net), samples)
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
        activate!(view(F, rows, :), stage.activation, s)
    end
    return F, S, w
end

activate!(F, f::Activation, S) = foreach(j -> activate!(F, f, S, S, j), axes(S, 2))
# By the slope that all other derivatives take, at a kink, too.
function activate!(F, f::Activation, S::Matrix{<:Dual{G}}) where {G}
    s = ForwardDiff.value.(S)
    z = similar(s)
    activate!(z, f, s)
    map!((z, d, s) -> Dual{G}(z, d * partials(s)), F, z, slopes!(similar(s), f, s, z), S)
    return
end

function ChainRulesCore.rrule(c::Conditions, θ, z, byproduct, samples)
    net, Z = c.net, reshape(z, neurons(c.net), samples)
    F, S, w = sweep(net, θ, Z, samples)
    function conditions_pullback(dc)
        C = reshape(unthunk(dc), size(Z))
        dZ, dX = Matrix(-C), zeros(eltype(S), net.inputs, samples)
        X = split_arguments(net, θ, samples)[2]
        G = Weights(net, eltype(S))
        for (stage, ws, g) in zip(net.stages, w.stages, G.stages)
            rows = stage.rows
            E = slopes!(similar(S[rows, :]), stage.activation, S[rows, :], F[rows, :]) .* C[rows, :]
            stage_pullback!(g, dZ, ws, E, X, Z, rows)
            stage.recurrent && (dZ[rows, :] .+= ws.recurrent' * E)
            stage.has_input && (dX .+= ws.input' * E)
        end
        dp = pack_gradient!(zeros(eltype(S), length(net)), net, G, w)
        return NoTangent(), vcat(dp, vec(dX)), vec(dZ), NoTangent(), NoTangent()
    end
    return vec(F .- Z), conditions_pullback
end

"""
    BlockSolver(n, blocks)

Exact linear solver for an ImplicitFunction whose Jacobian is block-diagonal, with one n × n block per sample, by an LU factorisation
of each. `blocks()` returns the blocks (n × n × samples).
"""
struct BlockSolver{B} <: ImplicitDifferentiation.AbstractSolver
    n::Int
    blocks::B
end

function (s::BlockSolver)(A, _, b, _)
    rhs, J = reshape(b, s.n, :), s.blocks()
    solution = similar(rhs, promote_type(eltype(J), eltype(b)))
    for j in axes(rhs, 2)
        factors = lu!(view(J, :, :, j))
        solution[:, j] = (A isa ImplicitDifferentiation.VJP ? factors' : factors) \ rhs[:, j]
    end
    return vec(solution)
end

# Anderson acceleration, each sample with its own history.

"""
    Anderson(; memory = 5, damping = 1.0, ridge = 1e-10, tol = nothing, max_iterations = 500)

Anderson acceleration (Walker and Ni, SIAM J. Numer. Anal. 49, 2011): with the residual r = f(z) - z and the last
`memory` differences ΔR, ΔF, `z ← f(z) - ΔF γ` where γ minimises ‖r - ΔR γ‖². The normal equations are regularised
relative to their trace, so that the method does not degrade to Picard iteration as the residual becomes small. The
history of a sample is restarted when its residual doubles.
"""
struct Anderson <: Solver
    memory::Int
    damping::Float64
    ridge::Float64
    tol::Union{Nothing, Float64}
    max_iterations::Int
    function Anderson(; memory = 5, damping = 1.0, ridge = 1.0e-10, tol = nothing, max_iterations = 500)
        check_number("memory", memory, in(1:MAX_MEMORY), "be a whole number in 1:$MAX_MEMORY", Integer)
        check_number("damping", damping, x -> 0 < x <= 1, "lie in (0, 1]")
        check_number("ridge", ridge, >=(0), "not be negative")
        check_options(tol, max_iterations)
        return new(memory, damping, ridge, tol, max_iterations)
    end
end

const MAX_MEMORY = 10

"""
    AndersonState{T, S}(n, memory, width)

The history of each sample: the last `memory` differences of the residuals r = f(z) - z and of F = f(z), in a ring, with the Gram
matrix of the former; how many of them are in use; and r, F and ‖r‖ of the last iteration. Inner products are numbers of type S.
"""
struct AndersonState{T, S} <: SolverState
    ΔR::Array{T, 3}
    ΔF::Array{T, 3}
    gram::Array{S, 3}
    differences::Vector{Int}
    r::Matrix{T}
    F::Matrix{T}
    residual::Vector{S}
end
AndersonState{T, S}(n::Int, memory::Int, width::Int) where {T, S} = AndersonState{T, S}(
    zeros(T, n, memory, width), zeros(T, n, memory, width), zeros(S, memory, memory, width), zeros(Int, width),
    zeros(T, n, width), zeros(T, n, width), fill(S(Inf), width),
)

"The system of the normal equations of one sample, solved in place."
struct NormalEquations{S}
    γ::Vector{S}
    b::Vector{S}
    G::Matrix{S}
end
NormalEquations{S}(memory::Int) where {S} = NormalEquations{S}(zeros(S, memory), zeros(S, memory), zeros(S, memory, memory))

# --- columns ----------------------------------------------------------------------------------------------------

function iterate!(s::Anderson, c::Columns{T}, p::FixedPoint{T}, iterations::Int) where {T}
    n, width = size(c.Z)
    state = buffer!(() -> AndersonState{T, T}(n, s.memory, width), c, AndersonState{T, T}, h -> size(h.ΔR, 2) == s.memory)
    fill!(view(state.differences, 1:c.active), 0)
    fill!(view(state.residual, 1:c.active), T(Inf))
    c.state = state
    done = accelerate!(s, state, c, p, iterations)
    c.state = nothing
    return done
end

function accelerate!(s::Anderson, state::AndersonState{T}, c::Columns{T}, p::FixedPoint{T}, iterations::Int) where {T}
    equations = buffer!(() -> NormalEquations{T}(s.memory), c, NormalEquations{T}, e -> length(e.γ) == s.memory)
    newest = 0                       # position of the newest difference
    for k in 1:iterations
        evaluate_all!(c, p; check = true) && return true
        newest = k == 1 ? 0 : mod1(newest + 1, s.memory)
        for j in 1:c.active
            anderson_step!(c.Z, c.F, c.residual[j], state, j, newest, s, equations)
        end
    end
    return false
end

# --- one sample -------------------------------------------------------------------------------------------------

# The products in double precision: an equation may have any unit.
function iterate!(solver::Anderson, s::Iteration{T}, p::AbstractEquation{T}, tol) where {T}
    state, equations = AndersonState{T, Float64}(p.n, solver.memory, 1), NormalEquations{Float64}(solver.memory)
    newest = 0
    while evaluate!(s, p)
        status = assess!(s, p, tol)
        status === nothing || return finish!(s, status, p, tol, true)
        newest = isinf(state.residual[1]) ? 0 : mod1(newest + 1, solver.memory)
        anderson_step!(s.z, s.value, s.merit, state, 1, newest, solver, equations)
    end
    return MAX_ITERATIONS
end

# --- a step -----------------------------------------------------------------------------------------------------

# Column j of Z becomes the next iterate, given F = f(Z) and the size of F - Z there; the newest difference goes to the place `newest`.
function anderson_step!(Z, F, residual, state::AndersonState{T, S}, j::Int, newest::Int, s::Anderson, equations) where {T, S}
    m, n = s.memory, size(F, 1)
    differences = remember!(state, Z, F, residual, j, newest)
    if differences > 0
        pose!(equations, state, j, newest, differences)
        (; γ, b, G) = equations
        solve_regularised!(γ, G, b, differences, max(S(s.ridge), S(eps(T)))) || (differences = 0)
    end
    state.differences[j] = differences
    damping, r = T(s.damping), state.r
    @inbounds @simd for i in 1:n
        Z[i, j] = F[i, j] - (1 - damping) * r[i, j]
    end
    (; ΔR, ΔF) = state
    for l in 1:differences
        place, g = mod1(newest - l + 1, m), T(equations.γ[l])
        @inbounds @simd for i in 1:n
            Z[i, j] -= g * (ΔF[i, place, j] - (1 - damping) * ΔR[i, place, j])
        end
    end
    return
end

# Take the place `newest` for what has changed in column j since the last iteration; how many differences are to be used.
function remember!(state::AndersonState, Z, F, residual, j::Int, newest::Int)
    (; ΔR, ΔF) = state
    differences, last_r, last_F = state.differences[j], state.r, state.F
    if newest > 0
        @inbounds @simd for i in axes(F, 1)
            ΔR[i, newest, j] = (F[i, j] - Z[i, j]) - last_r[i, j]
            ΔF[i, newest, j] = F[i, j] - last_F[i, j]
        end
        differences = residual > 2 * state.residual[j] ? 0 : min(differences + 1, size(ΔR, 2))
    end
    @inbounds @simd for i in axes(F, 1)
        last_r[i, j] = F[i, j] - Z[i, j]
        last_F[i, j] = F[i, j]
    end
    state.residual[j] = residual
    return differences
end

# The normal equations of column j, to whose Gram matrix the newest row is added.
function pose!((; b, G)::NormalEquations, state::AndersonState{T, S}, j::Int, newest::Int, differences::Int) where {T, S}
    (; ΔR, gram, r) = state
    place(l) = mod1(newest - l + 1, size(ΔR, 2))
    for l in 1:differences
        k, inner, rhs = place(l), zero(S), zero(S)
        @inbounds @simd for i in axes(r, 1)
            inner = muladd(S(ΔR[i, k, j]), S(ΔR[i, newest, j]), inner)
            rhs = muladd(S(ΔR[i, k, j]), S(r[i, j]), rhs)
        end
        gram[k, newest, j] = gram[newest, k, j] = inner
        b[l] = rhs
    end
    for l in 1:differences, k in 1:differences
        G[k, l] = gram[place(k), place(l), j]
    end
    return
end

# (G + ridge ⋅ tr(G) I) γ = b for the leading k × k part, by Cholesky; false where it breaks down. γ may be b.
function solve_regularised!(γ, G, b, k::Int, ridge)
    T = eltype(G)
    trace = zero(T)
    for i in 1:k
        trace += G[i, i]
    end
    (trace > 0 && isfinite(trace)) || return false
    @inbounds for j in 1:k
        pivot = G[j, j] + ridge * trace
        for l in 1:(j - 1)
            pivot -= G[j, l]^2
        end
        pivot > 0 || return false
        G[j, j] = sqrt(pivot)
        for i in (j + 1):k
            for l in 1:(j - 1)
                G[i, j] -= G[i, l] * G[j, l]
            end
            G[i, j] /= G[j, j]
        end
    end
    @inbounds for i in 1:k
        γ[i] = b[i]
        for l in 1:(i - 1)
            γ[i] -= G[i, l] * γ[l]
        end
        γ[i] /= G[i, i]
    end
    @inbounds for i in k:-1:1
        for l in (i + 1):k
            γ[i] -= G[l, i] * γ[l]
        end
        γ[i] /= G[i, i]
    end
    return true
end

# Anderson acceleration, each sample with a history of its own.

"""
    Anderson(; memory = 5, damping = 1.0, ridge = 1e-10, tol = nothing, max_iterations = 500)

Anderson acceleration (Walker and Ni, SIAM J. Numer. Anal. 49, 2011): with the residual r = f(z) - z and the last
`memory` differences ΔR, ΔF, `z ← f(z) - ΔF γ` where γ minimises ‖r - ΔR γ‖². The normal equations are regularised
relative to their trace, so that the method does not fall back to Picard iteration as the residual becomes small. A
sample whose residual doubles starts its history anew.
"""
struct Anderson <: Solver
    memory::Int
    damping::Float64
    ridge::Float64
    tol::Union{Nothing, Float64}
    max_iterations::Int
    function Anderson(; memory = 5, damping = 1.0, ridge = 1.0e-10, tol = nothing, max_iterations = 500)
        1 <= memory <= MAX_MEMORY || throw(ArgumentError("memory must lie in 1:$MAX_MEMORY, got $memory"))
        0 < damping <= 1 || throw(ArgumentError("damping must lie in (0, 1], got $damping"))
        ridge >= 0 || throw(ArgumentError("ridge must not be negative, got $ridge"))
        check_options(tol, max_iterations)
        return new(memory, damping, ridge, tol, max_iterations)
    end
end

const MAX_MEMORY = 10

function iterate!(s::Anderson, c::Columns{T}, p::FixedPoint{T}, iterations::Int) where {T}
    m, n = s.memory, size(c.F, 1)
    # Behind the matrices of the equation: ΔR and ΔF (m each), the last residual and F, and the m × m Gram matrix.
    base = own_extra(p)
    history = extra!(c, 2m + 2, n, base + 1)
    gram = extra!(c, 1, m * m, base + 2m + 3)[1]
    size(gram, 1) == m * m || throw(DimensionMismatch("the columns serve an Anderson memory of $(isqrt(size(gram, 1)))"))
    for j in 1:c.active
        c.scalars[1, j] = 0          # differences held
        c.scalars[2, j] = Inf        # residual of the last iteration
    end
    head = 0                         # place of the newest difference
    γ, b, G = zeros(T, m), zeros(T, m), zeros(T, m, m)
    for k in 1:iterations
        evaluate_all!(c, p; check = true) && return true
        head = k == 1 ? 0 : mod1(head + 1, m)
        for j in 1:c.active
            anderson_step!(c, history, gram, j, head, s, γ, b, G)
        end
    end
    return false
end

function anderson_step!(c::Columns{T}, history, gram, j::Int, head::Int, s::Anderson, γ, b, G) where {T}
    m, n = s.memory, size(c.F, 1)
    last_r, last_F = history[2m + 1], history[2m + 2]
    Z, F = c.Z, c.F
    held = Int(c.scalars[1, j])
    if head > 0
        ΔR, ΔF = history[head], history[m + head]
        @inbounds @simd for i in 1:n
            ΔR[i, j] = (F[i, j] - Z[i, j]) - last_r[i, j]
            ΔF[i, j] = F[i, j] - last_F[i, j]
        end
        held = c.residual[j] > 2 * c.scalars[2, j] ? 0 : min(held + 1, m)
    end
    @inbounds @simd for i in 1:n
        last_r[i, j] = F[i, j] - Z[i, j]
        last_F[i, j] = F[i, j]
    end
    c.scalars[1, j] = held
    c.scalars[2, j] = c.residual[j]
    if held > 0
        for l in 1:held                     # the newest row of the Gram matrix, and the right-hand side
            place = mod1(head - l + 1, m)
            inner = rhs = zero(T)
            ΔR, newest = history[place], history[head]
            @inbounds @simd for i in 1:n
                inner = muladd(ΔR[i, j], newest[i, j], inner)
                rhs = muladd(ΔR[i, j], last_r[i, j], rhs)
            end
            gram[(head - 1) * m + place, j] = inner
            gram[(place - 1) * m + head, j] = inner
            b[l] = rhs
        end
        for l in 1:held, k in 1:held
            G[k, l] = gram[(mod1(head - l + 1, m) - 1) * m + mod1(head - k + 1, m), j]
        end
        solve_regularised!(γ, G, b, held, max(T(s.ridge), eps(T))) || (held = 0; c.scalars[1, j] = 0)
    end
    damping = T(s.damping)
    @inbounds @simd for i in 1:n
        Z[i, j] = F[i, j] - (1 - damping) * last_r[i, j]
    end
    for l in 1:held
        place = mod1(head - l + 1, m)
        ΔR, ΔF, g = history[place], history[m + place], γ[l]
        @inbounds @simd for i in 1:n
            Z[i, j] -= g * (ΔF[i, j] - (1 - damping) * ΔR[i, j])
        end
    end
    return
end

# (G + ridge ⋅ tr(G) I) γ = b for the leading k × k part, by Cholesky; false where it breaks down.
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

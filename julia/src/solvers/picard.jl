# Picard iteration, damped or not.

"""
    Picard(; damping = 1.0, tol = nothing, max_iterations = 1000)

`z ← (1 - damping) z + damping f(u + R z)`. Converges from every start under [`Perron`](@ref),
[`InfNorm`](@ref) and [`Spectral`](@ref), at the rate of the constraint or better.
"""
struct Picard <: Solver
    damping::Float64
    tol::Union{Nothing, Float64}
    max_iterations::Int
    function Picard(; damping = 1.0, tol = nothing, max_iterations = 1000)
        0 < damping <= 1 || throw(ArgumentError("damping must lie in (0, 1], got $damping"))
        check_options(tol, max_iterations)
        return new(damping, tol, max_iterations)
    end
end

function solve!(s::Picard, c::Columns{T}, p::Stationary{T}) where {T}
    for _ in 1:s.max_iterations
        evaluate_all!(c, p) && return
        s.damping == 1 || relax!(c, T(s.damping))
        c.Z, c.F = c.F, c.Z
    end
    c.Z, c.F = c.F, c.Z               # the pair (S, F = f(S)) of the last evaluation
    return give_up!(c, p)
end

function relax!(c::Columns{T}, damping::T) where {T}
    @inbounds @simd for k in 1:(size(c.F, 1) * c.active)
        c.F[k] = c.Z[k] + damping * (c.F[k] - c.Z[k])
    end
    return
end

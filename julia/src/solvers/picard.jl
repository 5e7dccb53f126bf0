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
        check_number("damping", damping, x -> 0 < x <= 1, "lie in (0, 1]")
        check_options(tol, max_iterations)
        return new(damping, tol, max_iterations)
    end
end

# --- columns ----------------------------------------------------------------------------------------------------

function iterate!(s::Picard, c::Columns{T}, p::FixedPoint{T}, iterations::Int) where {T}
    for k in 1:iterations
        # Undamped iteration ends at what attracts it, unless it starts there.
        evaluate_all!(c, p; check = k == 1 || s.damping < 1) && return true
        advance!(c, T(s.damping))
    end
    return false
end

"Z ← Z + damping (F - Z) for the active columns."
function advance!(c::Columns{T}, damping::T) where {T}
    n = size(c.F, 1)
    if damping == 1
        copyto!(c.Z, 1, c.F, 1, n * c.active)
    else
        @inbounds @simd for k in 1:(n * c.active)
            c.Z[k] = muladd(damping, c.F[k] - c.Z[k], c.Z[k])
        end
    end
    return
end

# --- one sample -------------------------------------------------------------------------------------------------

function iterate!(solver::Picard, s::Iteration{T}, p::AbstractEquation{T}, tol) where {T}
    while evaluate!(s, p)
        status = assess!(s, p, tol)
        # Undamped iteration ends at what attracts it, unless it starts there.
        status === nothing || return finish!(s, status, p, tol, solver.damping < 1 || s.evaluations == 1)
        advance!(s, T(solver.damping))
    end
    return MAX_ITERATIONS
end

@inline function advance!(s::Iteration{T}, damping::T) where {T}
    @inbounds for i in eachindex(s.z)
        s.z[i] = damping == 1 ? s.value[i] : muladd(damping, s.value[i] - s.z[i], s.z[i])
    end
    return
end

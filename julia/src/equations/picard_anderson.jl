# Iterations of z = f(z) that need no derivative.

function iterate!(solver::Picard, s::Iteration{T}, p::AbstractEquation{T}, tol) where {T}
    while evaluate!(s, p)
        status = assess!(s, p, tol)
        # Undamped iteration ends at what attracts it, unless it starts there.
        status === nothing || return finish!(s, status, p, solver.damping < 1 || s.evaluations == 1)
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

"Of a fixed point f(z), which is the better, is the solution, unless it is not finite."
@inline function finish!(s::Iteration, status::Status)
    status === NON_FINITE || copyto!(s.z, s.value)
    return status
end

"The same of a fixed point that, where it is `doubtful`, may be one that repels: that is looked at where a matrix is affordable."
function finish!(s::Iteration, status::Status, p::AbstractEquation, doubtful::Bool)
    finish!(s, status)
    return doubtful && p.n <= DENSE ? attracts(status, s, p) : status
end

"The last differences of Anderson acceleration, columns of `ΔR` and `ΔF` in turn, with its normal equations."
struct AndersonHistory{T}
    ΔR::Matrix{T}
    ΔF::Matrix{T}
    residual::Vector{T}
    value::Vector{T}
    G::Matrix{Float64}
    b::Vector{Float64}
    γ::Vector{Float64}
end
AndersonHistory{T}(n::Int, m::Int) where {T} = AndersonHistory{T}(
    zeros(T, n, m), zeros(T, n, m), zeros(T, n), zeros(T, n), zeros(m, m), zeros(m), zeros(m)
)

function iterate!(solver::Anderson, s::Iteration{T}, p::AbstractEquation{T}, tol) where {T}
    h = AndersonHistory{T}(p.n, solver.memory)
    depth, head, last = 0, 0, Inf
    while evaluate!(s, p)
        status = assess!(s, p, tol)
        status === nothing || return finish!(s, status, p, true)
        if isfinite(last)
            head = mod1(head + 1, solver.memory)
            remember!(h, s, head)
            depth = s.merit > 2 * last ? 0 : min(depth + 1, solver.memory)
        end
        last = s.merit
        copyto!(h.residual, s.c)
        copyto!(h.value, s.value)
        depth = anderson_step!(s, h, depth, head, solver)
    end
    return MAX_ITERATIONS
end

function remember!(h::AndersonHistory, s::Iteration, head::Int)
    @inbounds @simd for i in eachindex(s.c)
        h.ΔR[i, head] = s.c[i] - h.residual[i]
        h.ΔF[i, head] = s.value[i] - h.value[i]
    end
    return
end

# z = f(z) - ΔF γ where γ minimises ‖c - ΔR γ‖² over the `depth` last differences, which are forgotten where that breaks down.
function anderson_step!(s::Iteration{T}, h::AndersonHistory{T}, depth::Int, head::Int, solver::Anderson) where {T}
    m = solver.memory
    place(k) = mod1(head - k + 1, m)
    for k in 1:depth
        h.b[k] = inner(h.ΔR, place(k), s.c, 1)
        for l in k:depth
            h.G[k, l] = h.G[l, k] = inner(h.ΔR, place(k), h.ΔR, place(l))
        end
    end
    depth > 0 && !solve_regularised!(h.γ, h.G, h.b, depth, max(solver.ridge, Float64(eps(T)))) && (depth = 0)
    damping = T(solver.damping)
    advance!(s, damping)
    for k in 1:depth
        g, l = T(h.γ[k]), place(k)
        @inbounds @simd for i in eachindex(s.z)
            s.z[i] -= g * (h.ΔF[i, l] - (1 - damping) * h.ΔR[i, l])
        end
    end
    return depth
end

# Column j of A times column k of B, in double precision.
@inline function inner(A, j, B, k)
    total = 0.0
    @inbounds @simd for i in axes(A, 1)
        total += Float64(A[i, j]) * Float64(B[i, k])
    end
    return total
end

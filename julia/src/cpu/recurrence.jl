# The recurrent weights of a stage in the forms which solvers and adjoints use, prepared once for a batch.

"""
    Recurrence{T}

`R`, its transpose and, where `linearized`, the matrix `Q = (I - R D̄)⁻¹ R` with its transpose: for slopes near their mean
`slope` = diag(D̄), the part of the recurrence that is the same for all samples is solved by one product with Q. See
[`Linearized`](@ref). Where `coarse`, [`Corrections`](@ref) take products with R instead.
"""
mutable struct Recurrence{T}
    const R::Matrix{T}                # shared with the weights
    const forward::Factor{T}          # R and Rᵀ as factors of many products
    const backward::Factor{T}
    const slope::Vector{T}
    Q::Factor{T}                      # empty until there is use for them
    Q_transposed::Factor{T}
    const coarse_factors::Vector{CoarseFactor}     # of R and Rᵀ, once there is use for them
    const work::Vector{Matrix{T}}     # of `linearize!`
    linearized::Bool
    coarse::Bool
    norm::T                           # of R, estimated when first asked for; NaN before
end
function Recurrence(R::Matrix{T}) where {T}
    n = size(R, 1)
    forward = factor(T, n)
    return Recurrence{T}(
        R, forward isa Matrix ? R : forward, factor(T, n), zeros(T, n), factor(T, 0), factor(T, 0), CoarseFactor[], Matrix{T}[],
        false, false, T(NaN),
    )
end

"Call when `R` has changed."
function refresh!(r::Recurrence{T}, threads::Int = 1) where {T}
    r.forward === r.R || store!(r.forward, r.R, threads)
    store_transposed!(r.backward, r.R, threads)
    r.linearized = r.coarse = false
    r.norm = T(NaN)
    return r
end

norm_of(r::Recurrence) = isnan(r.norm) ? (r.norm = norm_estimate(r.R)) : r.norm

"""
    linearize!(r, threads = 1)

Compute Q for the slopes `r.slope`; false where I - D̄ R is singular. The factorisation takes 2/3 n³ operations, the columns of
Qᵀ another 2 n³, shared among threads.
"""
function linearize!(r::Recurrence{T}, threads::Int = 1) where {T}
    n = size(r.R, 1)
    if isempty(r.work)
        push!(r.work, zeros(T, n, n), zeros(T, n, n))
        r.Q, r.Q_transposed = factor(T, n), factor(T, n)
    end
    # Qᵀ = (I - D̄ R)⁻ᵀ Rᵀ
    (A, Qt), pivots = r.work, zeros(Int, n)
    residual_jacobian!(A, r.slope, r.R)
    r.linearized = lu_factor!(A, pivots) && !is_singular(A)
    r.linearized || return false
    transpose_into!(Qt, r.R)
    in_blocks(columns -> lu_solve_transposed_columns!(view(Qt, :, columns), A, pivots), n, threads, RIGHT_HAND_SIDES)
    store_transposed!(r.Q, Qt, threads)
    store!(r.Q_transposed, Qt, threads)
    return r.linearized = all(isfinite, Qt)
end

"Let coarse products with R and its transpose be used; false where there are none."
function multiply_coarsely!(r::Recurrence{T}, threads::Int = 1) where {T}
    if isempty(r.coarse_factors)
        n = size(r.R, 1)
        forward = coarse_factor(T, n)
        forward === nothing && return false
        push!(r.coarse_factors, forward, coarse_factor(T, n))
    end
    store!(r.coarse_factors[1], r.R, threads)
    store_transposed!(r.coarse_factors[2], r.R, threads)
    return r.coarse = true
end

# The recurrent weights of a stage in the forms which solvers and adjoints use, prepared once for a batch.

"""
    Recurrence{T}

`R`, its transpose and, where `linearized`, the matrix `Q = (I - R D̄)⁻¹ R` with its transpose: for slopes near their mean
`slope` = diag(D̄), the part of the recurrence that is the same for all samples is solved by one product with Q. With D̄ = 0, Q is R.
See [`Linearized`](@ref). Where products are `coarse`, it is the [`CoarseFactor`](@ref)s that are Q and its transpose.
"""
mutable struct Recurrence{T}
    const R::Matrix{T}                # shared with the weights
    const forward::Factor{T}          # R and Rᵀ as factors of many products
    const backward::Factor{T}
    const slope::Vector{T}
    Q::Factor{T}                      # empty until there is use for them
    Q_transposed::Factor{T}
    const coarse_factors::Vector{CoarseFactor{T}}     # none until there is use for them, or where there are none
    const work::Vector{Matrix{T}}     # of `linearize!`
    linearized::Bool
    plain::Bool                       # with D̄ = 0, which is Picard iteration
    coarse::Bool
    norm::T                           # of R, estimated when first asked for; NaN before
end
function Recurrence(R::Matrix{T}) where {T}
    n = size(R, 1)
    forward = factor(T, n)
    return Recurrence{T}(
        R, forward isa Matrix ? R : forward, factor(T, n), zeros(T, n), factor(T, 0), factor(T, 0), CoarseFactor{T}[], Matrix{T}[],
        false, false, false, T(NaN),
    )
end

"Call when `R` has changed."
function refresh!(r::Recurrence{T}, threads::Int = 1) where {T}
    r.forward === r.R || store!(r.forward, r.R, threads)
    store_transposed!(r.backward, r.R, threads)
    r.linearized = false
    r.norm = T(NaN)
    return r
end

norm_of(r::Recurrence) = isnan(r.norm) ? (r.norm = norm_estimate(r.R)) : r.norm

"""
    linearize!(r, threads = 1; coarse = false)

Compute Q for the slopes `r.slope`; false where I - D̄ R is singular. The factorisation takes 2/3 n³ operations, the columns of
Qᵀ another 2 n³, shared among threads.
"""
function linearize!(r::Recurrence{T}, threads::Int = 1; coarse::Bool = false) where {T}
    n = size(r.R, 1)
    isempty(r.work) && push!(r.work, zeros(T, n, n), zeros(T, n, n))
    # Qᵀ = (I - D̄ R)⁻ᵀ Rᵀ
    (A, Qt), pivots = r.work, zeros(Int, n)
    residual_jacobian!(A, r.slope, r.R)
    r.linearized = lu_factor!(A, pivots) && !is_singular(A)
    r.linearized || return false
    transpose_into!(Qt, r.R)
    in_blocks(columns -> lu_solve_transposed_columns!(view(Qt, :, columns), A, pivots), n, threads, RIGHT_HAND_SIDES)
    r.linearized, r.plain = all(isfinite, Qt), false
    r.coarse = r.linearized && coarse
    if coarse
        store_coarse_transposed!(r.coarse_factors[1], Qt, threads)
        store_coarse!(r.coarse_factors[2], Qt, threads)
    else
        size(r.Q, 1) == n || ((r.Q, r.Q_transposed) = (factor(T, n), factor(T, n)))
        store_transposed!(r.Q, Qt, threads)
        store!(r.Q_transposed, Qt, threads)
    end
    return r.linearized
end

"Coarse products with R and its transpose: the linearised equation for slopes of zero, which is that of Picard iteration."
function iterate_coarsely!(r::Recurrence, threads::Int = 1)
    fill!(r.slope, 0)
    store_coarse!(r.coarse_factors[1], r.R, threads)
    store_coarse_transposed!(r.coarse_factors[2], r.R, threads)
    return r.plain = r.coarse = r.linearized = true
end

"Whether there are coarse products, for which buffers are made when first asked for."
function has_coarse_products(r::Recurrence{T}) where {T}
    n = size(r.R, 1)
    while length(r.coarse_factors) < 2
        A = coarse_factor(T, n)
        A === nothing && return false
        push!(r.coarse_factors, A)
    end
    return true
end

"Q, or its transpose."
correction_factor(r::Recurrence, transposed::Bool) =
    r.coarse ? r.coarse_factors[1 + transposed] : transposed ? r.Q_transposed : r.Q

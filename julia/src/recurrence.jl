# The recurrent weights of a stage in the forms which solvers and adjoints use, prepared once for a batch.

"""
    Recurrence{T}

`R`, its transpose and, where `linearized`, the matrix `Q = (I - R D̄)⁻¹ R` with its transpose: for slopes near their mean
`slope` = diag(D̄), the part of the recurrence that is the same for all samples is solved by one product with Q. See
[`Linearized`](@ref).
"""
mutable struct Recurrence{T}
    const R::Matrix{T}                # shared with the weights
    const transposed::Matrix{T}
    const slope::Vector{T}
    Q::Matrix{T}                      # 0 × 0 until there is use for them
    Q_transposed::Matrix{T}
    linearized::Bool
    norm::T                           # of R, estimated when first asked for; NaN before
end
Recurrence(R::Matrix{T}) where {T} = Recurrence{T}(
    R, zeros(T, size(R)), zeros(T, size(R, 1)), zeros(T, 0, 0), zeros(T, 0, 0), false, T(NaN)
)

"Call when `R` has changed."
function refresh!(r::Recurrence{T}) where {T}
    transpose_into!(r.transposed, r.R)
    r.linearized = false
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
    if size(r.Q, 1) != n
        r.Q, r.Q_transposed = zeros(T, n, n), zeros(T, n, n)
    end
    # Qᵀ = (I - D̄ R)⁻ᵀ Rᵀ
    A, pivots = residual_jacobian!(r.Q, r.slope, r.R), zeros(Int, n)
    r.linearized = lu_factor!(A, pivots)
    r.linearized || return false
    copyto!(r.Q_transposed, r.transposed)
    in_blocks(columns -> lu_solve_transposed_columns!(view(r.Q_transposed, :, columns), A, pivots), n, threads)
    transpose_into!(r.Q, r.Q_transposed)
    return r.linearized = all(isfinite, r.Q)
end

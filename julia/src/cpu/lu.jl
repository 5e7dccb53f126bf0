# LU with partial pivoting for the small matrices I - D R of one sample: LAPACK's call overhead is many
# times the work below a few dozen rows.

"""
    lu_factor!(A, pivots)

Factor `A` (n × n) in place, PA = LU. Returns false where a pivot is zero or not finite.
"""
lu_factor!(A::StridedMatrix, pivots) = is_eliminated(A) ? eliminate!(A, pivots) : lapack_factor!(A, pivots)

# Or of numbers that LAPACK does not have.
is_eliminated(A::AbstractMatrix) = size(A, 1) <= SMALL_LU || !(eltype(A) <: BlasFloat)

@inline function eliminate!(A::StridedMatrix, pivots)
    n = size(A, 1)
    @inbounds for k in 1:n
        pivot = k
        largest = abs(A[k, k])
        for i in (k + 1):n
            a = abs(A[i, k])
            a > largest && ((pivot, largest) = (i, a))
        end
        pivots[k] = pivot
        (largest > 0 && isfinite(largest)) || return false
        if pivot != k
            for j in 1:n
                A[k, j], A[pivot, j] = A[pivot, j], A[k, j]
            end
        end
        inverse = inv(A[k, k])
        @simd for i in (k + 1):n
            A[i, k] *= inverse
        end
        for j in (k + 1):n
            a = A[k, j]
            @simd for i in (k + 1):n
                A[i, j] = muladd(-A[i, k], a, A[i, j])
            end
        end
    end
    return true
end

"Whether a matrix A = I - M is singular to rounding, given the factors of `lu_factor!`."
function is_singular(A::StridedMatrix{T}) where {T}
    smallest, largest = T(Inf), one(T)
    @inbounds for i in axes(A, 1)
        pivot = abs(A[i, i])
        smallest, largest = min(smallest, pivot), max(largest, pivot)
    end
    return smallest <= size(A, 1) * eps(T) * largest
end

function lapack_factor!(A, pivots)
    all(isfinite, A) || return false
    _, ipiv, info = LAPACK.getrf!(A)
    copyto!(pivots, ipiv)
    return info == 0
end

"Solve A x = b in place, given the factors of `lu_factor!`."
function lu_solve!(x, A::StridedMatrix{T}, pivots) where {T}
    n = size(A, 1)
    @inbounds for k in 1:n
        p = pivots[k]
        x[k], x[p] = x[p], x[k]
    end
    @inbounds for k in 1:n
        a = x[k]
        @simd for i in (k + 1):n
            x[i] = muladd(-A[i, k], a, x[i])
        end
    end
    @inbounds for k in n:-1:1
        x[k] /= A[k, k]
        a = x[k]
        @simd for i in 1:(k - 1)
            x[i] = muladd(-A[i, k], a, x[i])
        end
    end
    return x
end

"Solve Aᵀ x = b in place, given the factors of `lu_factor!`."
function lu_solve_transposed!(x, A::StridedMatrix{T}, pivots) where {T}
    n = size(A, 1)
    @inbounds for k in 1:n
        a = x[k]
        @simd for i in 1:(k - 1)
            a -= A[i, k] * x[i]
        end
        x[k] = a / A[k, k]
    end
    @inbounds for k in n:-1:1
        a = x[k]
        @simd for i in (k + 1):n
            a -= A[i, k] * x[i]
        end
        x[k] = a
    end
    @inbounds for k in n:-1:1
        p = pivots[k]
        x[k], x[p] = x[p], x[k]
    end
    return x
end

"A = I - D R with D = diag(d): the negative Jacobian of the residual."
function residual_jacobian!(A::StridedMatrix{T}, d, R::Matrix{T}) where {T}
    @inbounds for j in axes(R, 2)
        @simd for i in axes(R, 1)
            A[i, j] = -d[i] * R[i, j]
        end
        A[j, j] += one(T)
    end
    return A
end

"Solve Aᵀ X = B in place for all columns of B, given the factors of `lu_factor!`."
function lu_solve_transposed_columns!(B::StridedMatrix{T}, A::Matrix{T}, pivots::Vector{Int}) where {T}
    if size(A, 1) <= SMALL_LU
        foreach(j -> lu_solve_transposed!(view(B, :, j), A, pivots), axes(B, 2))
    else
        LAPACK.getrs!('T', A, pivots, B)
    end
    return B
end

"""
    Factorisations{T}(n, samples)

The LU factorisation of I - D R of each sample, as Newton's method left it, for the adjoint.
"""
struct Factorisations{T}
    LU::Array{T, 3}
    pivots::Matrix{Int}
    known::Vector{Bool}
end
Factorisations{T}(n::Int, samples::Int) where {T} = Factorisations{T}(zeros(T, n, n, samples), zeros(Int, n, samples), zeros(Bool, samples))

"Memory in bytes that the factorisations of a tile may take."
const FACTORS_LIMIT = 2^27

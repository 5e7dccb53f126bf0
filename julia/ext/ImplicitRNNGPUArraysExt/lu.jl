# One small linear system per sample, by Gaussian elimination: a workgroup for each.

"Work-items to a system."
const WORKERS = 64

"Bytes of memory for the matrices of the systems that are solved at a time."
const MATRICES = 2^28

"""
    eliminate!(X, singular, A, M, left, right, B, columns)

Solve `(I - diag(left) M diag(right)) x = b` for the `columns` of `B`, where `left` and `right` are arrays of coefficients, or
nothing for ones: x becomes that column of `X`, and `singular` tells where the matrix is, to rounding. `A` (n × n + 1 × columns) is
overwritten.
"""
@kernel function eliminate!(X, singular, A, @Const(M), left, right, @Const(B), @Const(columns))
    t = @index(Local, Linear)
    c = @index(Group, Linear)
    @uniform n = size(A, 1)
    best = @localmem eltype(X) (WORKERS,)
    place = @localmem Int32 (WORKERS,)
    pivots = @localmem eltype(X) (2,)            # the smallest and the largest

    @inbounds j = columns[c]
    e = t
    while e <= n * n
        i, k = (e - 1) % n + 1, (e - 1) ÷ n + 1
        @inbounds A[i, k, c] = eltype(X)(i == k) - coefficient(left, i, j) * M[i, k] * coefficient(right, k, j)
        e += WORKERS
    end
    i = t
    while i <= n
        @inbounds A[i, n + 1, c] = B[i, j]
        i += WORKERS
    end
    if t == 1
        @inbounds pivots[1], pivots[2] = typemax(eltype(X)), one(eltype(X))
    end
    @synchronize
    for k in 1:n
        largest, p = -one(eltype(X)), k % Int32
        i = k - 1 + t
        while i <= n
            @inbounds a = abs(A[i, k, c])
            # What is not a number is never larger, and found among the pivots.
            if a > largest
                largest, p = a, i % Int32
            end
            i += WORKERS
        end
        @inbounds best[t], place[t] = largest, p
        @synchronize
        if t == 1
            for worker in 2:WORKERS
                if @inbounds best[worker] > best[1]
                    @inbounds best[1], place[1] = best[worker], place[worker]
                end
            end
            @inbounds pivots[1], pivots[2] = min(pivots[1], abs(A[place[1], k, c])), max(pivots[2], abs(A[place[1], k, c]))
        end
        @synchronize
        @inbounds p = Int(place[1])
        q = k - 1 + t
        while q <= n + 1 && p != k
            @inbounds A[k, q, c], A[p, q, c] = A[p, q, c], A[k, q, c]
            q += WORKERS
        end
        @synchronize
        rows = n - k
        e = t
        while e <= rows * (rows + 1)
            i, q = k + (e - 1) % rows + 1, k + (e - 1) ÷ rows + 1
            @inbounds A[i, q, c] = muladd(-A[i, k, c] / A[k, k, c], A[k, q, c], A[i, q, c])
            e += WORKERS
        end
        @synchronize
    end
    for k in n:-1:1
        if t == 1
            @inbounds A[k, n + 1, c] /= A[k, k, c]
        end
        @synchronize
        i = t
        while i < k
            @inbounds A[i, n + 1, c] = muladd(-A[i, k, c], A[k, n + 1, c], A[i, n + 1, c])
            i += WORKERS
        end
        @synchronize
    end
    @inbounds j = columns[c]
    i = t
    while i <= n
        @inbounds X[i, j] = A[i, n + 1, c]
        i += WORKERS
    end
    if t == 1
        @inbounds singular[j] = !(pivots[1] > n * eps(eltype(X)) * pivots[2])
    end
end

@inline coefficient(::Nothing, i, j) = true
@inline coefficient(D, i, j) = @inbounds D[i, j]

"[`eliminate!`](@ref) for columns that the host names, as many at a time as there is memory for."
function solve_each!(X, ws::DeviceWorkspace{T}, singular, M, left, right, B, columns::Vector{Int}) where {T}
    isempty(columns) && return
    n = size(X, 1)
    count = clamp(MATRICES ÷ (n * (n + 1) * sizeof(T)), 1, length(columns))
    A = KernelAbstractions.allocate(ws.backend, T, n, n + 1, count)
    for first in 1:count:length(columns)
        check_interrupt()
        part = columns[first:min(first + count - 1, end)]
        selected = copyto!(KernelAbstractions.allocate(ws.backend, Int, length(part)), part)
        eliminate!(ws.backend, WORKERS)(X, singular, A, M, left, right, B, selected; ndrange = WORKERS * length(part))
    end
    return
end

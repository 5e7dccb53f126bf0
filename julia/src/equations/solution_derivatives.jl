# Derivatives of the solution by the implicit function theorem, in loops over the samples compiled for the function.

"The Jacobian of the conditions is singular at the solution of `sample`, which has no derivative, or so nearly that the derivative is lost in the error of the solution."
struct SingularSolution <: Exception
    sample::Int
end
Base.showerror(io::IO, e::SingularSolution) = print(
    io, "the Jacobian of the equation is singular at the solution of sample $(e.sample), which has no derivative there"
)

"Buffers of the derivative of one sample: A, its inverse, and A at the corrected solution."
struct InverseBuffers{T}
    A::Matrix{T}
    inverse::Matrix{T}
    corrected::Matrix{T}
    pivots::Vector{Int}
    z::Matrix{T}
    r::Matrix{T}
    λ::Vector{T}
end
InverseBuffers{T}(n::Int) where {T} = InverseBuffers{T}(
    (zeros(T, n, n) for _ in 1:3)..., zeros(Int, n), zeros(T, n, 1), zeros(T, n, 1), zeros(T, n)
)

# w.inverse = A⁻¹ at the solution of the sample. Throws SingularSolution where A is singular to rounding, or where it changes
# so much within the error δ = A⁻¹c of the solution that no solution need exist or be isolated: ‖A(z)⁻¹A(z - δ) - I‖ > 1/4,
# which at a double root is 1/2 (the test of Newton and Kantorovich).
@inline function invert!(w::InverseBuffers{T}, p::Pointwise{T}, sample::Int) where {T}
    A, inverse = w.A, w.inverse
    n = size(A, 1)
    conditions_jacobian!(A, p, p.Z, sample, sample)
    size_of_A = largest_column_sum(A)
    lu_factor!(A, w.pivots) || throw(SingularSolution(sample))
    fill!(inverse, zero(T))
    for k in 1:n
        inverse[k, k] = one(T)
        n == 1 ? (inverse[1] /= A[1]) : lu_solve!(view(inverse, :, k), A, w.pivots)
    end
    size_of_A * largest_column_sum(inverse) * eps(T) * n < 1 || throw(SingularSolution(sample))
    copy_column!(w.z, 1, p.Z, sample)
    apply!(w.r, p, w.z, 1, sample)
    p.root || (w.r .-= w.z)
    for k in 1:n, i in 1:n
        w.z[i] -= inverse[i, k] * w.r[k]
    end
    conditions_jacobian!(w.corrected, p, w.z, 1, sample)
    if n <= SMALL
        multiply!(A, inverse, w.corrected)
    else
        mul!(A, inverse, w.corrected)
    end
    for i in 1:n
        A[i, i] -= one(T)
    end
    largest_column_sum(A) <= T(0.25) || throw(SingularSolution(sample))
    return inverse
end

function largest_column_sum(A::Matrix{T}) where {T}
    largest = zero(T)
    @inbounds for j in axes(A, 2)
        total = zero(T)
        for i in axes(A, 1)
            total += abs(A[i, j])
        end
        largest = max(largest, total)
    end
    return largest
end

function multiply!(C::Matrix{T}, A::Matrix{T}, B::Matrix{T}) where {T}
    @inbounds for j in axes(C, 2), i in axes(C, 1)
        total = zero(T)
        for k in axes(A, 2)
            total = muladd(A[i, k], B[k, j], total)
        end
        C[i, j] = total
    end
    return C
end

"Up to this many entries of z in all samples, and of all arguments, derivatives go through ImplicitDifferentiation.jl."
const SMALL_SYSTEM = 32

is_small(problem::GenericProblem) = problem.n * problem.samples <= SMALL_SYSTEM &&
    sum(length, problem.args; init = 0) <= SMALL_SYSTEM^2

"""
    vjp!(gradients, problem, Z, v)

Write vᵀ ∂z/∂args for the solution `Z` (n × samples) to `gradients`, which has an array like each argument, and is left alone
for arguments that are not floating-point numbers. Samples with `v` zero are left out. From c(z, args) = 0 follows
∂z/∂args = -(∂c/∂z)⁻¹ ∂c/∂args. Throws [`SingularSolution`](@ref).
"""
function vjp!(gradients, problem::GenericProblem{T}, Z::Matrix{T}, v::Matrix{T}) where {T}
    p = pointwise(problem, Z, zero(T), Outcome(0))
    if is_small(problem) && all(j -> concerned(v, j), axes(v, 2))
        Base.invokelatest(check_isolated, p, v)
        Base.invokelatest(vjp_by_implicit_function!, gradients, problem, Z, v)
    else
        Base.invokelatest(vjp_by_samples!, gradients, p, v)
    end
    return gradients
end

concerned(v, j) = any(!iszero, view(v, :, j))

function check_isolated(p::Pointwise{T}, v) where {T}
    w = InverseBuffers{T}(size(p.Z, 1))
    for j in axes(p.Z, 2)
        concerned(v, j) && invert!(w, p, j)
    end
    return
end

vjp_by_samples!(gradients, p::Pointwise, v) = vjp_by_samples!((gradients...,), p, v)
function vjp_by_samples!(gradients::Tuple, p::Pointwise{T}, v) where {T}
    foreach(g -> eltype(g) <: AbstractFloat && fill!(g, 0), gradients)
    w = InverseBuffers{T}(size(p.Z, 1))
    for j in axes(p.Z, 2)
        concerned(v, j) || continue
        invert!(w, p, j)
        for k in eachindex(w.λ)
            w.λ[k] = zero(T)
            for i in eachindex(w.λ)
                @inbounds w.λ[k] -= w.inverse[i, k] * v[i, j]
            end
        end
        add_pullbacks!(gradients, p, j, w.λ, arguments(p, j), Val(length(gradients)))
    end
    return gradients
end

# gradients += λᵀ ∂f/∂argument for the arguments 1:I of sample j.
@inline add_pullbacks!(gradients, p::Pointwise, j, λ, args, ::Val{0}) = nothing
@inline function add_pullbacks!(gradients, p::Pointwise, j, λ, args, ::Val{I}) where {I}
    x, g = args[I], gradients[I]
    if eltype(x) <: AbstractFloat
        offset = p.args[I] isa PerSample ? (j - 1) * length(x) : 0
        with_argument(y) = p.f(point(p, p.Z, j), replaced(args, y, Val(I))...)
        each_derivative(with_argument, x, length(λ)) do k, y, l
            for i in eachindex(λ)
                @inbounds g[offset + k] += λ[i] * partial(y[i], l)
            end
        end
    end
    return add_pullbacks!(gradients, p, j, λ, args, Val(I - 1))
end

"The tuple with entry I replaced by x."
@inline replaced(args::Tuple, x, ::Val{1}) = (x, Base.tail(args)...)
@inline replaced(args::Tuple, x, ::Val{I}) where {I} = (first(args), replaced(Base.tail(args), x, Val(I - 1))...)

"""
    jacobian!(J, problem, Z, index, wanted = trues(samples))

Write ∂z/∂argument to `J` (n × size of the argument of one sample × samples) for the argument number `index`; NaN for samples
that are not wanted. Throws [`SingularSolution`](@ref).
"""
function jacobian!(J::Array{T, 3}, problem::GenericProblem{T}, Z::Matrix{T}, index::Int, wanted = trues(size(Z, 2))) where {T}
    p = pointwise(problem, Z, zero(T), Outcome(0))
    if is_small(problem) && all(wanted)
        Base.invokelatest(check_isolated, p, ones(T, size(Z)))
        Base.invokelatest(jacobian_by_implicit_function!, J, problem, Z, index)
    else
        Base.invokelatest(jacobian_by_samples!, J, p, Val(index), wanted)
    end
    return J
end

function jacobian_by_samples!(J::Array{T, 3}, p::Pointwise{T}, ::Val{I}, wanted) where {T, I}
    n, entries, samples = size(J)
    w = InverseBuffers{T}(n)
    B = zeros(T, n, entries)
    for j in 1:samples
        if !wanted[j]
            fill!(view(J, :, :, j), T(NaN))
            continue
        end
        invert!(w, p, j)
        args = arguments(p, j)
        derivative!(B, y -> p.f(point(p, p.Z, j), replaced(args, y, Val(I))...), args[I])
        mul!(view(J, :, :, j), w.inverse, B, -one(T), zero(T))
    end
    return J
end

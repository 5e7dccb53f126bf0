# Derivatives of the solutions of equations on a device by the implicit function theorem, each sample by a work-item.

"""
A⁻¹ at the solution z in the last K columns of A[t, :, :]; false where ∂c/∂z is singular, or changes so much within the error of the
solution that no solution need be there; see `invert!`.
"""
@inline function invert_at!(A, t, f::F, z::Short{K, T}, args, root::Val{R}) where {F, K, T, R}
    value = evaluate!(A, t, 0, f, z, args, root)
    for k in 1:K, i in 1:K
        @inbounds A[t, i, K + k] = T(i == k)
    end
    size_of_A = column_sum(A, t, 0, Val(K))
    divide!(A, t, Val(K), K)
    size_of_A * column_sum(A, t, K, Val(K)) * eps(T) * K < T(0.01) || return false          # the CPU equilibrates A
    c = in_doubt(R ? value : minus(value, z), largest_terms(f, value, z, args, Val(length(args))))
    errors = unroll(i -> reduce(+, unroll(k -> @inbounds(A[t, i, K + k]) * c[k], Val(K))), Val(K))
    evaluate!(A, t, 0, f, Short(unroll(i -> z[i] - errors[i] - beyond(z[i], errors[i], eps(T)), Val(K))), args, root)
    return deviation(A, t, Val(K)) <= T(LARGEST_CHANGE)
end

"As `ImplicitRNN.terms_of_arguments!`, of the arguments 1:I."
@inline largest_terms(f::F, value::Short{K, T}, z, args, ::Val{0}) where {F, K, T} = Short(unroll(_ -> zero(T), Val(K)))
@inline function largest_terms(f::F, value::Short{K, T}, z, args, ::Val{I}) where {F, K, T, I}
    others = largest_terms(f, value, z, args, Val(I - 1))
    perturbation = T(0x1p-10)
    moved = evaluate(f, z, unroll(i -> i == I ? perturbed(args[i], 1 + perturbation) : args[i], Val(length(args))))
    return Short(unroll(i -> largest_term(others[i], abs(moved[i] - value[i]) / perturbation), Val(K)))
end
@inline perturbed(x::AbstractFloat, factor) = x * factor
@inline perturbed(x::Short{M, <:AbstractFloat}, factor) where {M} = Short(unroll(i -> x[i] * factor, Val(M)))
@inline perturbed(x, factor) = x
@inline largest_term(a, b) = isfinite(b) ? max(a, b) : a

@inline in_doubt(c::Short{K, T}, terms::Short{K, T}) where {K, T} = Short(unroll(i -> c[i] + copysign(eps(T) * terms[i], c[i]), Val(K)))

"The largest column sum of A⁻¹A - I, for A in the first columns and A⁻¹ in the last; infinite where it is not finite."
@inline function deviation(A, t, ::Val{K}) where {K}
    largest = zero(eltype(A))
    for j in 1:K
        total = zero(eltype(A))
        for i in 1:K
            entry = -eltype(A)(i == j)
            for k in 1:K
                @inbounds entry = muladd(A[t, i, K + k], A[t, k, j], entry)
            end
            total += abs(entry)
        end
        largest = max(largest, isnan(total) ? oftype(total, Inf) : total)
    end
    return largest
end

"`use(e, y, w)` for each entry e of argument I, of which y has the derivatives as number w of its dual numbers."
@inline each_derivative(use::U, f::F, z, args, index::Val{I}) where {U, F, I} = each_derivative(use, f, z, args, index, args[I])
@inline each_derivative(use::U, f::F, z, args, index, x::AbstractFloat) where {U, F} = some_derivatives(use, f, z, args, index, 1, Val(1), 1)
@inline function each_derivative(use::U, f::F, z, args, index, x::Short{M, <:AbstractFloat}) where {U, F, M}
    first = 1
    while first <= M
        some_derivatives(use, f, z, args, index, first, Val(width_of(M)), M)
        first += width_of(M)
    end
    return
end
@inline each_derivative(use::U, f::F, z, args, index, x) where {U, F} = nothing
@inline function some_derivatives(use::U, f::F, z, args, index, first, ::Val{W}, M) where {U, F, W}
    y = duals(f, z, args, first, Val(W), index)
    unroll(w -> (first + w - 1 <= M && use(first + w - 1, y, w); nothing), Val(W))
    return
end

"P[:, j] = -(A⁻ᵀ V[:, j])ᵀ ∂f/∂args, with the entries of one argument after those of another; tells which samples are `regular`."
@kernel function pull_back_samples!(P, regular, @Const(Z), @Const(V), f, args, root, ::Val{K}, ::Val{G}) where {K, G}
    t = @index(Local, Linear)
    j = @index(Global, Linear)
    matrix = @localmem eltype(Z) (G, K, 2K)
    if j <= size(Z, 2)
        pull_back_sample!(P, regular, Z, V, matrix, t, j, f, args, root, Val(K))
    end
end

@inline function pull_back_sample!(P, regular, Z, V, A, t, j, f::F, args, root, ::Val{K}) where {F, K}
    z, v, own = column(Z, j, Val(K)), column(V, j, Val(K)), arguments_at(args, j)
    wanted = reduce(|, map(x -> !iszero(x), v.entries))
    @inbounds regular[j] = !wanted || invert_at!(A, t, f, z, own, root)
    use = wanted && @inbounds regular[j]
    λ = unroll(k -> use ? -reduce(+, unroll(i -> @inbounds(A[t, i, K + k]) * v[i], Val(K))) : zero(eltype(A)), Val(K))
    put_products!(P, j, 0, f, z, own, λ, use, own)
    return
end
# For the arguments that are left.
@inline put_products!(P, j, offset, f::F, z, args, λ, use, ::Tuple{}) where {F} = nothing
@inline function put_products!(P, j, offset, f::F, z, args::NTuple{N, Any}, λ::NTuple{K, Any}, use, left::Tuple{Any, Vararg{Any, L}}) where {F, N, K, L}
    each_derivative(f, z, args, Val(N - L)) do e, y, w
        @inline
        total = reduce(+, unroll(k -> λ[k] * derivative(eltype(P), y[k], w), Val(K)))
        @inbounds P[offset + e, j] = use ? total : zero(total)
    end
    return put_products!(P, j, offset + variables(left[1]), f, z, args, λ, use, Base.tail(left))
end

"J[:, :, j] = -A⁻¹ ∂f/∂(argument I), NaN where it is not `wanted`."
@kernel function jacobian_of_samples!(J, regular, @Const(Z), @Const(wanted), f, args, root, ::Val{K}, index, ::Val{G}) where {K, G}
    t = @index(Local, Linear)
    j = @index(Global, Linear)
    matrix = @localmem eltype(Z) (G, K, 2K)
    if j <= size(Z, 2)
        jacobian_of_sample!(J, regular, Z, wanted, matrix, t, j, f, args, root, Val(K), index)
    end
end

@inline function jacobian_of_sample!(J, regular, Z, wanted, A, t, j, f::F, args, root, ::Val{K}, index) where {F, K}
    z, own = column(Z, j, Val(K)), arguments_at(args, j)
    @inbounds regular[j] = !wanted[j] || invert_at!(A, t, f, z, own, root)
    use = @inbounds wanted[j] && regular[j]
    each_derivative(f, z, own, index) do e, y, w
        @inline
        d = unroll(k -> derivative(eltype(J), y[k], w), Val(K))
        for i in 1:K
            total = zero(eltype(J))
            for k in 1:K
                @inbounds total = muladd(-A[t, i, K + k], d[k], total)
            end
            @inbounds J[i, e, j] = use ? total : oftype(total, NaN)
        end
    end
    return
end

# --- from the solution to its derivatives ---------------------------------------------------------------------------

function ImplicitRNN.vjp!(gradients, problem::EquationProblem{T}, inverses::DeviceInverses{T}, V::AbstractMatrix{T}) where {T}
    Base.invokelatest(vjp_on_device!, gradients, problem, inverses.Z, V isa AbstractGPUArray ? V : copyto!(similar(inverses.Z), V), Val(problem.n))
    return gradients
end

function vjp_on_device!(gradients, problem::EquationProblem{T}, Z, V, unknowns) where {T}
    args, samples = arguments_of(problem), size(Z, 2)
    counts = [variables_of(x, own) for (x, own) in zip(problem.args, problem.batched)]
    P, regular = fill!(similar(Z, sum(counts), samples), 0), fill!(similar(Z, Bool, samples), false)
    each_sample(Z) do range, group
        pull_back_samples!(get_backend(Z), group)(P, regular, Z, V, problem.f, args, Val(problem.root), unknowns, Val(group); ndrange = range)
    end
    last = 0
    for (g, own, n) in zip(gradients, problem.batched, counts)
        n == 0 && continue
        rows = P[(last + 1):(last += n), :]
        copyto!(g, own ? rows : on_host(sum(rows; dims = 2)))
    end
    left = findall(on_host(.!regular))
    isempty(left) || add_left!(gradients, problem, Z, V, left)
    return
end
variables_of(x, own) = is_differentiable(x) ? entries_of(x, own) : 0

"Those of the samples whose derivative the CPU has to find, or to say that there is none."
function add_left!(gradients, problem::EquationProblem{T}, Z, V, left) where {T}
    part, z = part_of(problem, left), on_host(Z[:, left])
    found = [is_differentiable(x) ? zero(x) : x for x in part.args]
    naming_samples(() -> vjp!(found, part, ImplicitRNN.Inverses(part, z), on_host(V[:, left])), left)
    for (g, x, own) in zip(gradients, found, problem.batched)
        is_differentiable(x) || continue
        own ? put_columns!(g, x, left) : (g .+= on_kind_of(g, x))
    end
    return
end
put_columns!(g::AbstractVector, x, left) = (g[left] = on_kind_of(g, x); g)
put_columns!(g::AbstractMatrix, x, left) = (g[:, left] = on_kind_of(g, x); g)
on_kind_of(::Array, x) = x
on_kind_of(g::AbstractGPUArray, x) = copyto!(similar(g, size(x)), x)

naming_samples(work, left) = try
    work()
catch error
    error isa ImplicitRNN.SingularSolution ? throw(ImplicitRNN.SingularSolution(left[error.samples])) : rethrow()
end

function ImplicitRNN.jacobian!(J::AbstractArray{T, 3}, problem::EquationProblem{T}, inverses::DeviceInverses{T}, index::Int, wanted = trues(size(J, 3))) where {T}
    Base.invokelatest(jacobian_on_device!, J, problem, inverses.Z, Val(index), wanted, Val(problem.n))
    return J
end

function jacobian_on_device!(J, problem::EquationProblem{T}, Z, index::Val{I}, wanted, unknowns) where {T, I}
    samples = size(Z, 2)
    asked = copyto!(similar(Z, Bool, samples), Array{Bool}(wanted))
    found, regular = similar(Z, size(J)), fill!(similar(Z, Bool, samples), false)
    each_sample(Z) do range, group
        jacobian_of_samples!(get_backend(Z), group)(
            found, regular, Z, asked, problem.f, arguments_of(problem), Val(problem.root), unknowns, index, Val(group); ndrange = range
        )
    end
    copyto!(J, found)
    left = findall(on_host(.!regular))
    isempty(left) || put_left!(J, problem, Z, left, I)
    return
end

function put_left!(J, problem::EquationProblem{T}, Z, left, index::Int) where {T}
    part, columns = part_of(problem, left), zeros(T, size(J, 1), size(J, 2), length(left))
    naming_samples(() -> jacobian!(columns, part, ImplicitRNN.Inverses(part, on_host(Z[:, left])), index), left)
    J[:, :, left] = on_kind_of(J, columns)
    return
end

# Derivatives of the user's function by ForwardDiff's dual numbers.

"Marks our dual numbers among those of other differentiations by ForwardDiff."
struct Seed end
const Seeded{T, W} = ForwardDiff.Dual{ForwardDiff.Tag{Seed, T}, T, W}

"Derivatives that one evaluation with dual numbers gives."
width(::Number) = 1
width(::Short{N}) where {N} = N
width(::AbstractArray) = MAX_SHORT

# x with its entries from `first` on as independent variables.
seeded(x::T, first) where {T <: Number} = Seeded{T, 1}(x, ForwardDiff.Partials((one(T),)))
seeded(x::Short{N, T}, first) where {N, T} =
    Short(ntuple(i -> Seeded{T, N}(x[i], ForwardDiff.Partials(ntuple(k -> T(k == i), Val(N)))), Val(N)))
function seeded(x::AbstractArray{T}, first) where {T}
    unit(i) = ForwardDiff.Partials(ntuple(k -> T(k == i - first + 1), Val(MAX_SHORT)))
    return [Seeded{T, MAX_SHORT}(x[i], unit(i)) for i in LinearIndices(x)]
end

partial(y::Seeded, k) = ForwardDiff.partials(y, k)
partial(y::Number, k) = zero(y)                 # y does not depend on what was seeded

# `use(k, y, l)` for each entry k of x, where y = g(x seeded) holds the derivative as partial number l of its entries.
@inline function each_derivative(use::U, g::G, x, n::Int) where {U, G}
    for first in 1:width(x):length(x)
        y = checked(g(seeded(x, first)), n)
        for l in 1:min(width(x), length(x) - first + 1)
            use(first + l - 1, y, l)
        end
    end
    return
end

"J = ∂g/∂x."
@inline function derivative!(J, g::G, x) where {G}
    each_derivative(g, x, size(J, 1)) do k, y, l
        for i in axes(J, 1)
            @inbounds J[i, k] = partial(y[i], l)
        end
    end
    return J
end

"A = ∂c/∂z for the conditions `c = f(z, ...) - z`, or `c = f(z, ...)` of a root; NaN outside the domain of f."
@inline function conditions_jacobian!(A::Matrix{T}, p::Pointwise{T}, Z::Matrix{T}, j::Int, sample::Int) where {T}
    args = arguments(p, sample)
    try
        derivative!(A, z -> p.f(z, args...), point(p, Z, j))
    catch error
        error isa DomainError || rethrow()
        return fill!(A, T(NaN))
    end
    if !p.root
        for i in axes(A, 1)
            @inbounds A[i, i] -= one(T)
        end
    end
    return A
end

# Products of a vector with derivatives of the user's function, and its derivatives with respect to arguments, in the cheaper
# mode: forward for an argument of a few entries, reverse for one of many.

"""
    add_pullbacks!(gradients, equation, z, sample, λ)

Add λᵀ ∂f/∂argument to the gradient of every floating-point argument, in the part of the sample if the argument is batched.
"""
@inline add_pullbacks!(gradients::Tuple, p::Equation, z, sample::Int, λ) =
    add_pullbacks!(gradients, p, z, sample, λ, arguments(p, sample), Val(length(gradients)))
add_pullbacks!(gradients::Tuple, p::ErasedEquation, z, sample::Int, λ) = (add_pullbacks!(gradients, p.equation, z, sample, λ); nothing)

# Of the arguments 1:I.
@inline add_pullbacks!(gradients, p::Equation, z, sample, λ, args, ::Val{0}) = nothing
@inline function add_pullbacks!(gradients, p::Equation, z, sample, λ, args, ::Val{I}) where {I}
    x = args[I]
    if eltype(x) <: AbstractFloat
        offset = p.args[I] isa PerSample ? (sample - 1) * length(x) : 0
        add_pullback!(gradients[I], offset, of_argument(p, z, args, Val(I)), x, λ)
    end
    return add_pullbacks!(gradients, p, z, sample, λ, args, Val(I - 1))
end

"f as a function of argument number I alone."
@inline of_argument(p::Equation, z, args, index::Val) = y -> p.f(as_point(p, z), replaced(args, y, index)...)

"The tuple with entry I replaced by x."
@inline replaced(args::Tuple, x, ::Val{1}) = (x, tail(args)...)
@inline replaced(args::Tuple, x, ::Val{I}) where {I} = (first(args), replaced(tail(args), x, Val(I - 1))...)

"""
    terms_of_arguments!(terms, equation, y, z, sample)

The largest of the terms of y = f(z, ...) due to each floating-point argument, whose rounding errors y inherits.
"""
@inline function terms_of_arguments!(terms::Vector{T}, p::Equation{T}, y, z, sample::Int) where {T}
    fill!(terms, zero(T))
    args = arguments(p, sample)
    perturb_arguments!(terms, p, y, z, args, Val(length(args)))
    return
end
terms_of_arguments!(terms, p::ErasedEquation, y, z, sample::Int) = (terms_of_arguments!(terms, p.equation, y, z, sample); nothing)

# Of the arguments 1:I.
@inline perturb_arguments!(terms, p::Equation, y, z, args, ::Val{0}) = nothing
@inline function perturb_arguments!(terms, p::Equation{T}, y, z, args, ::Val{I}) where {T, I}
    if eltype(args[I]) <: AbstractFloat
        perturbation = T(2)^-10
        try
            moved = checked(p.f(as_point(p, z), replaced(args, args[I] .* (1 + perturbation), Val(I))...), p.n)
            for i in eachindex(terms)
                term = abs(moved[i] - y[i]) / perturbation
                isfinite(term) && (terms[i] = max(terms[i], term))
            end
        catch error
            outside_domain(error)
        end
    end
    return perturb_arguments!(terms, p, y, z, args, Val(I - 1))
end

"λᵀ ∂c/∂z"
function conditions_pullback(p::Equation{T}, z, sample::Int, λ) where {T}
    args = arguments(p, sample)
    product = p.root ? zeros(T, p.n) : -λ
    add_pullback!(product, 0, z -> p.f(z, args...), Array(z), λ)
    return product
end
conditions_pullback(p::ErasedEquation{T}, z, sample::Int, λ) where {T} = conditions_pullback(p.equation, z, sample, λ)::Vector{T}

"The derivative of the conditions along d."
function conditions_along(p::Equation{T}, z, sample::Int, d) where {T}
    args = arguments(p, sample)
    return along(Opaque(z -> p.f(z, args...)), Array(z), d, p.n) .- (p.root ? zero(d) : d)
end
conditions_along(p::ErasedEquation{T}, z, sample::Int, d) where {T} = conditions_along(p.equation, z, sample, d)::Vector{T}

"B = ∂f/∂argument number I of the sample."
@inline function argument_jacobian!(B, p::Equation, z, sample::Int, index::Val{I}) where {I}
    args = arguments(p, sample)
    return jacobian_of!(B, of_argument(p, z, args, index), args[I])
end
argument_jacobian!(B, p::ErasedEquation, z, sample::Int, index::Val) = (argument_jacobian!(B, p.equation, z, sample, index); nothing)

# gradient += λᵀ ∂g/∂x from `offset` on
@inline add_pullback!(gradient, offset::Int, g::G, x::Union{Number, Short}, λ) where {G} = add_forward!(gradient, offset, g, x, λ)
add_pullback!(gradient, offset::Int, g, x::AbstractArray, λ) = add_pullback!(gradient, offset, Opaque(g), x, λ)
@inline add_pullback!(gradient, offset::Int, g::Opaque, x::Short, λ) = add_forward!(gradient, offset, g, x, λ)
function add_pullback!(gradient, offset::Int, g::Opaque, x::AbstractArray, λ)
    found = length(x) < REVERSE_FROM ? nothing : reverse_pullback(g, x, λ)
    found === nothing && return add_forward!(gradient, offset, g, x, λ)
    for (k, value) in enumerate(found)
        gradient[offset + k] += value
    end
    return
end

@inline function add_forward!(gradient, offset::Int, g::G, x, λ) where {G}
    each_derivative(g, x, length(λ), Val(true)) do k, y, l
        for i in eachindex(λ)
            @inbounds gradient[offset + k] += λ[i] * partial(y[i], l)
        end
    end
    return
end

"λᵀ ∂g/∂x in reverse mode; `nothing` where g cannot be recorded, or the record contradicts the derivative along a line."
function reverse_pullback(g::Opaque, x::AbstractArray, λ)
    pull = recorded(g, x, length(λ))
    pull === nothing && return nothing
    gradient, d = pull(λ), direction(x)
    return agree(dot(gradient, d), dot(λ, along(g, x, d, length(λ))), dot(abs.(gradient), abs.(d)), x) ? gradient : nothing
end

@inline jacobian_of!(J, g::G, x::Union{Number, Short}) where {G} = derivative!(J, g, x, Val(true))
function jacobian_of!(J, g, x::AbstractArray)
    many = length(x) >= REVERSE_FROM && length(x) >= MAX_SHORT * size(J, 1)
    many && reverse_jacobian!(J, Opaque(g), x) && return J
    return derivative!(J, Opaque(g), x, Val(true))
end

"J = ∂g/∂x in reverse mode; whether that could be done."
function reverse_jacobian!(J, g::Opaque, x::AbstractArray)
    n = size(J, 1)
    pull = recorded(g, x, n)
    pull === nothing && return false
    for i in 1:n
        J[i, :] = pull(1:n .== i)
    end
    d = direction(x)
    return all(agree.(J * d, along(g, x, d, n), abs.(J) * abs.(d), Ref(x)))
end

agree(a, b, size, ::AbstractArray{T}) where {T} = abs(a - b) <= sqrt(eps(T)) * size

# Products λᵀ ∂g/∂x of the user's function, in the mode that is cheaper: forward for an x of a few entries, reverse
# (ReverseDiff.jl) for one of many.

"From this many entries on, reverse mode."
const REVERSE_FROM = 128

"Add λᵀ ∂g/∂x to the entries of `gradient` behind `offset`."
@inline add_pullback!(gradient, offset::Int, g::G, x::Union{Number, Short}, λ) where {G} = add_forward!(gradient, offset, g, x, λ)
function add_pullback!(gradient, offset::Int, g::G, x::AbstractArray, λ) where {G}
    found = length(x) < REVERSE_FROM ? nothing : reverse_pullback(g, x, λ)
    found === nothing && return add_forward!(gradient, offset, g, x, λ)
    for (k, value) in enumerate(found)
        gradient[offset + k] += value
    end
    return
end

@inline function add_forward!(gradient, offset::Int, g::G, x, λ) where {G}
    each_derivative(g, x, length(λ)) do k, y, l
        for i in eachindex(λ)
            @inbounds gradient[offset + k] += λ[i] * partial(y[i], l)
        end
    end
    return
end

"λᵀ ∂g/∂x in reverse mode, shaped like x; `nothing` where g cannot be traced, or the trace contradicts the derivative along a line."
function reverse_pullback(g, x::AbstractArray, λ)
    n = length(λ)
    gradient = traced(() -> ReverseDiff.gradient(x -> inner_product(λ, checked(g(x), n)), Array(x)))
    gradient === nothing && return nothing
    d = direction(x)
    return agree(dot(gradient, d), dot(λ, along(g, x, d, n)), dot(abs.(gradient), abs.(d))) ? gradient : nothing
end

inner_product(λ, y::AbstractVector) = dot(λ, y)
inner_product(λ, y::Tuple) = only(λ) * only(y)

"∂g/∂x (n × entries of x) in reverse mode, or `nothing`."
function reverse_jacobian(g, x::AbstractArray, n::Int)
    J = traced(() -> ReverseDiff.jacobian(x -> as_vector(checked(g(x), n)), Array(x)))
    J === nothing && return nothing
    d = vec(direction(x))
    return all(agree.(J * d, along(g, x, reshape(d, size(x)), n), abs.(J) * abs.(d))) ? J : nothing
end

as_vector(y::AbstractVector) = y
as_vector(y::Tuple) = collect(y)

# What can be differentiated forwards but not traced is no error.
function traced(trace)
    try
        return trace()
    catch error
        error isa Union{Interrupted, InterruptException} && rethrow()
        return nothing
    end
end

# No direction that a formula would single out.
direction(x::AbstractArray{T}) where {T} = reshape(T[sinpi(T(0.618034) * k) + T(0.1) for k in 1:length(x)], size(x))

agree(a, b, size) = !(abs(a - b) > sqrt(eps(typeof(size))) * size)

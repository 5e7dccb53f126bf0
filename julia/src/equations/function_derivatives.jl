# Derivatives of the user's function in forward mode, by ForwardDiff's dual numbers.

"Marks our dual numbers among those of other differentiations by ForwardDiff."
struct Seed end
const Seeded{T, W} = ForwardDiff.Dual{ForwardDiff.Tag{Seed, T}, T, W}

"Results with our dual numbers: f may have constants of another type."
const Grown = ForwardDiff.Dual{<:ForwardDiff.Tag{Seed}}

"The number of derivatives from one evaluation with dual numbers."
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

plain(y::Grown) = ForwardDiff.value(y)
plain(y::Number) = y
partial(y::Grown, k) = ForwardDiff.partials(y, k)
partial(y::Number, k) = zero(y)                 # y does not depend on what was seeded

# `use(k, y, l)` for each entry k of x, where y = g(x seeded) holds the derivative as partial number l of its entries; with `guards` see
# `derivative_at_guard`.
@inline function each_derivative(use::U, g::G, x, n::Int, ::Val{guards}) where {U, G, guards}
    for first in 1:width(x):length(x)
        y = guards ? or_nothing(() -> checked(g(seeded(x, first)), n)) : checked(g(seeded(x, first)), n)
        missed = y === nothing || guards && !all(is_differentiated, y)
        for l in 1:min(width(x), length(x) - first + 1)
            k = first + l - 1
            missed ? use(k, (@late derivative_at_guard(g, x, eachindex(x) .== k, n)), 1) : use(k, y, l)
        end
    end
    return
end

"J = ∂g/∂x."
@inline function derivative!(J, g::G, x, guards::Val) where {G}
    each_derivative(g, x, size(J, 1), guards) do k, y, l
        for i in axes(J, 1)
            @inbounds J[i, k] = partial(y[i], l)
        end
    end
    return J
end

"The derivative of the n entries of g at the array x in the direction d."
along(g, x::AbstractArray{T}, d, n::Int) where {T} = T[partial(y, 1) for y in derivative_at_guard(g, x, d, n)]

# x + h d, as it moves along d.
moved(x::T, d, h) where {T <: Number} = Seeded{T, 1}(x + h * d[1], ForwardDiff.Partials((T(d[1]),)))
moved(x::Short, d, h) = Short(ntuple(i -> moved(x[i], d[i], h), length(x)))
moved(x::AbstractArray, d, h) = reshape([moved(x[i], d[i], h) for i in eachindex(x)], size(x))

is_differentiated(y::Grown) = all(isfinite, ForwardDiff.partials(y))
is_differentiated(y::Number) = true

"""
    derivative_at_guard(g, x, d, n)

g(x) with its derivative in the direction d. A guard such as `x == 0 ? 1 : x / expm1(x)` is not seen by dual numbers, which differ from
0 by their derivatives: where g has a value, the derivative is then the mean of those on both sides, extrapolated from two distances. It
is NaN if the means differ, if the two sides or the values there do not approach each other, as at a kink or a jump, or outside the
domain of the derivative.
"""
function derivative_at_guard(g, x, d, n::Int)
    y, T = or_nothing(() -> checked(g(moved(x, d, 0)), n)), eltype(x)
    y !== nothing && all(is_differentiated, y) && return y
    step, largest = exp2(round(log2(eps(T)) / 5)), maximum(abs, x)
    tol = 4step^2
    unit(i) = iszero(x[i]) ? (iszero(largest) ? one(T) : largest) : abs(x[i])
    step /= maximum(i -> abs(d[i]) / unit(i), eachindex(x))
    try
        here = checked(g(x .+ zero(T)), n)
        for h in step ./ 64 .^ (0:5)
            far, near = (map(on_both_sides, checked(g(moved(x, d, r)), n), checked(g(moved(x, d, -r)), n), here) for r in (h, h / 2))
            all(splat((a, b) -> is_smooth(a, b, tol, h)), zip(far, near)) &&
                return [Seeded{T, 1}(b.value, ForwardDiff.Partials((T(b.mean + (b.mean - a.mean) / 3),))) for (a, b) in zip(far, near)]
        end
    catch error
        outside_domain(error)
    end
    return fill(Seeded{T, 1}(T(NaN), ForwardDiff.Partials((T(NaN),))), n)
end

function on_both_sides(right, left, value)
    a, b = partial(right, 1), partial(left, 1)
    off = (plain(right) - value) + (plain(left) - value)
    return (; value, mean = (a + b) / 2, gap = abs(a - b), off = abs(off), size = max(abs(a), abs(b)))
end
is_smooth(far, near, tol, h) = abs(far.mean - near.mean) <= tol * near.size && near.gap <= 0.75far.gap + tol * near.size &&
    near.off <= 0.75far.off + h * tol * near.size + 8eps(near.value)

# Outside the domain of a function such as sqrt Julia throws; here that affects only this sample or this trial step.
@noinline outside_domain(error) = error isa DomainError || rethrow()

"`work()`, or nothing outside the domain of f or of its derivatives: that by an exponent is outside where the base is negative."
@inline function or_nothing(work::F) where {F}
    try
        return work()
    catch error
        outside_domain(error)
        return nothing
    end
end

"""
    call!(y, equation, z, sample)

y = f(z, ...) with the arguments of the sample; NaN outside the domain of f.
"""
@inline function call!(y::Vector{T}, p::Equation{T}, z, sample::Int) where {T}
    check_interrupt()
    try
        came = checked(p.f(as_point(p, z), arguments(p, sample)...), p.n)
        for i in eachindex(y)
            @inbounds y[i] = came[i]
        end
    catch error
        outside_domain(error)
        fill!(y, T(NaN))
    end
    return
end
call!(y, p::ErasedEquation, z, sample::Int) = (call!(y, p.equation, z, sample); nothing)

"""
    call!(y, J, equation, z, sample)

The same, and for a short z also J = ∂c/∂z by the same evaluation; returns whether J was computed.
"""
@inline function call!(y::Vector{T}, J::Matrix{T}, p::Equation{T, K}, z, sample::Int) where {T, K}
    check_interrupt()
    try
        came = checked(p.f(seeded(as_point(p, z), 1), arguments(p, sample)...), K)
        for k in 1:K, i in 1:K
            @inbounds J[i, k] = partial(came[i], k)
        end
        for i in 1:K
            @inbounds y[i] = plain(came[i])
        end
    catch error
        outside_domain(error)
        fill!(y, T(NaN))
        fill!(J, T(NaN))
    end
    of_conditions!(J, p)
    return true
end
@inline call!(y::Vector{T}, ::Matrix{T}, p::Equation{T, -1}, z, sample::Int) where {T} = (call!(y, p, z, sample); false)
call!(y, J, p::ErasedEquation, z, sample::Int) = call!(y, J, p.equation, z, sample)::Bool

"""
    explaining_types(work, problem, Z)

`work()`; if f accepts numbers, but not the types that it is given here, the `ArgumentError` says what to do.
"""
function explaining_types(work, problem::EquationProblem{T}, Z) where {T}
    try
        return work()
    catch error
        if error isa Base.CanonicalIndexError && error.type <: Short
            throw(
                ArgumentError(
                    "f writes to a vector that it was given, which of up to $(MAX_SHORT) entries cannot be written to: let it write to \
                    a copy, as copy(z)"
                )
            )
        end
        error isa MethodError && any(x -> x isa Union{Dual, Short, AbstractArray{<:Dual}}, error.args) || rethrow()
        # This evaluation throws if anything else is wrong.
        checked(Base.invokelatest(problem.f, Z[:, 1], as_arrays(problem.args, problem.batched, 1)...), problem.n)
        what = any(x -> x isa Short, error.args) ? "is given vectors of up to $(MAX_SHORT) entries that are no Arrays" :
            "is differentiated by dual numbers of ForwardDiff.jl"
        throw(
            ArgumentError(
                "f $what, and takes none: declare its parameters for any numbers, as z::AbstractVector{<:Real}, and make arrays by \
                zeros(eltype(z), n); $(first(eachline(IOBuffer(sprint(showerror, error)))))"
            )
        )
    end
end

"""
    conditions_jacobian!(J, equation, z, sample, guards = Val(false))

J = ∂c/∂z for the conditions `c = f(z, ...) - z`, or `c = f(z, ...)` of a root; NaN outside the domain of f, and unless
`guards = Val(true)` at guards of f that dual numbers miss, see [`derivative_at_guard`](@ref).
"""
@inline function conditions_jacobian!(J::Matrix{T}, p::Equation{T}, z, sample::Int, guards::Val = Val(false)) where {T}
    args = arguments(p, sample)
    try
        derivative!(J, z -> p.f(z, args...), as_point(p, z), guards)
    catch error
        outside_domain(error)
        fill!(J, T(NaN))
    end
    of_conditions!(J, p)
    return
end
conditions_jacobian!(J, p::ErasedEquation, z, sample::Int, guards::Val = Val(false)) =
    (conditions_jacobian!(J, p.equation, z, sample, guards); nothing)

# ∂f/∂z → ∂c/∂z
@inline function of_conditions!(J::Matrix{T}, p::Equation) where {T}
    if !p.root
        for i in axes(J, 1)
            @inbounds J[i, i] -= one(T)
        end
    end
    return
end

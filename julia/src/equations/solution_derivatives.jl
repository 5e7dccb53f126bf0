# Derivatives of the solution by the implicit function theorem, in loops over the samples compiled for the function.

"The Jacobian of the conditions is singular at the solutions of the `samples`, or singular within its error, so that there is no derivative."
struct SingularSolution <: Exception
    samples::Vector{Int}
end
SingularSolution(sample::Int) = SingularSolution([sample])
function Base.showerror(io::IO, e::SingularSolution)
    named = join(Iterators.take(e.samples, MOST_NAMED), ", ") * (length(e.samples) > MOST_NAMED ? ", …" : "")
    return print(
        io, "the Jacobian of the equation is singular at the solution of ", length(e.samples) == 1 ? "sample " : "samples ", named,
        ", which has no derivative there",
    )
end

"Singular samples that an error names; none are looked for beyond one more."
const MOST_NAMED = 20

# An error of `work()` about singular samples is put off until `most` are known, and `throw_singular` throws one for all.
@inline function note_singular!(work::F, singular::Vector{Int}, most::Int = MOST_NAMED) where {F}
    try
        work()
    catch error
        error isa SingularSolution || rethrow()
        append!(singular, error.samples)
    end
    length(singular) > most && throw_singular(singular)
    return
end
throw_singular(singular::Vector{Int}) = isempty(singular) || throw(SingularSolution(singular))

"""
    Inverses(problem, Z, regular = zeros(Bool, samples))

The inverses of ∂c/∂z at the solution `Z` (n × samples), and for which samples it is known to be `regular`. Where samples are taken
one by one, each inverse is found when it is first needed, and kept if all of them have room; tasks take turns, by the `lock`.
"""
mutable struct Inverses{T}
    const Z::Matrix{T}
    const regular::Vector{Bool}
    kept::Array{T, 3}               # none before `make_room!`
    known::Vector{Bool}
    const lock::ReentrantLock
end
Inverses(::EquationProblem{T}, Z::Matrix{T}, regular = zeros(Bool, size(Z, 2))) where {T} =
    Inverses{T}(Z, regular, Array{T}(undef, 0, 0, 0), Bool[], ReentrantLock())

"The start of all derivatives of the solution `Z`, in host or device memory."
inverses_at(problem::EquationProblem, Z::Matrix, regular = zeros(Bool, size(Z, 2))) = Inverses(problem, Z, regular)

function make_room!(inverses::Inverses{T}) where {T}
    n, samples = size(inverses.Z)
    isempty(inverses.known) && n <= DENSE && n^2 * samples * sizeof(T) <= FACTORS_LIMIT || return
    inverses.kept, inverses.known = Array{T}(undef, n, n, samples), zeros(Bool, samples)
    return
end

"""
Buffers for the inverse of one sample: A, A at the corrected solution, the powers of two that equilibrate their rows and columns,
A⁻¹ where it is not kept, that solution, and the solution itself, `at`.
"""
struct InverseBuffers{T}
    A::Matrix{T}
    corrected::Matrix{T}
    rows::Vector{T}
    columns::Vector{T}
    inverse::Array{T, 3}
    pivots::Vector{Int}
    z::Vector{T}
    at::Vector{T}
    here::Vector{T}                # f at w.at
    way::Vector{T}                 # from w.at to w.z
    change::Vector{T}              # of the conditions on it
    r::Vector{T}
    λ::Vector{T}
end
function InverseBuffers{T}(n::Int) where {T}
    m = n <= DENSE ? n : 0
    return InverseBuffers{T}(zeros(T, m, m), zeros(T, m, m), ones(T, m), ones(T, m), zeros(T, m, m, 1), zeros(Int, m), (zeros(T, n) for _ in 1:7)...)
end

"Largest ‖A(z)⁻¹A(z - δ) - I‖ at a solution that has a derivative: at a double root it is 1/2 (the test of Newton and Kantorovich)."
const LARGEST_CHANGE = 0.25

"The factor by which an error is multiplied to tell a change of A, which grows with it, from rounding errors of A."
const FARTHER = 2^10

"""
    inverse!(inverses, w, p, sample)

A⁻¹ at the solution of the sample. Throws [`SingularSolution`](@ref) where A is singular to rounding, or where it changes so much
within the error δ = A⁻¹c of the solution (with c at least the rounding error of the arguments) that a solution may not exist or not be
isolated: by more than [`LARGEST_CHANGE`](@ref), there and farther out. A has equilibrated rows and columns, so unknowns and conditions may have any unit.
"""
@inline function inverse!(inverses::Inverses{T}, w::InverseBuffers{T}, p::AbstractEquation{T}, sample::Int) where {T}
    kept = !isempty(inverses.known)
    inverse = kept ? view(inverses.kept, :, :, sample) : view(w.inverse, :, :, 1)
    kept && inverses.known[sample] && return inverse
    copy_column!(w.at, 1, inverses.Z, sample)
    invert!(inverse, w, p, sample)
    kept && (inverses.known[sample] = true)
    return inverse
end

@inline function invert!(inverse, w::InverseBuffers{T}, p::AbstractEquation{T}, sample::Int) where {T}
    A, z, n = w.A, w.at, p.n
    conditions_jacobian!(A, p, z, sample, Val(true))
    n == 1 || equilibrate!(w.rows, w.columns, A)
    size_of_A = largest_column_sum(A)
    lu_factor!(A, w.pivots) || throw(SingularSolution(sample))
    if is_eliminated(A)
        fill!(inverse, zero(T))
        for k in 1:n
            inverse[k, k] = one(T)
            n == 1 ? (inverse[1] /= A[1]) : lu_solve!(view(inverse, :, k), A, w.pivots)
        end
    else
        copyto!(inverse, LAPACK.getri!(A, w.pivots))
    end
    size_of_A * largest_column_sum(inverse) * eps(T) * n < 1 || throw(SingularSolution(sample))
    n == 1 || scale!(inverse, w.columns, w.rows)
    call!(w.here, p, z, sample)
    copyto!(w.r, w.here)
    terms_of_arguments!(w.z, p, w.r, z, sample)
    @inbounds for i in 1:n
        p.root || (w.r[i] -= z[i])
        w.r[i] += copysign(eps(T) * w.z[i], w.r[i])
    end
    correct!(w, inverse)
    map_each!((moved, z) -> moved - beyond(z, z - moved, eps(T)), w.z, w.z, z)
    map_each!(-, w.way, w.z, z)
    n == 1 || map_each!(inv, w.rows, w.columns)
    if change!(w, inverse, p, sample) <= LARGEST_CHANGE
        is_hidden!(w, inverse, p, sample) && throw(SingularSolution(sample))
        return
    end
    doubt_rounding!(w, p, sample)
    correct!(w, inverse)
    change!(w, inverse, p, sample) <= LARGEST_CHANGE && return
    # Near to zero the derivative of x / expm1(x) is a rounding error, which vanishes farther out.
    map_each!((z, z₀) -> z₀ + T(FARTHER) * (z - z₀), w.z, w.z, w.at)
    change!(w, inverse, p, sample) <= LARGEST_CHANGE || throw(SingularSolution(sample))
    return
end

"A displacement of z beyond its error, in the same direction, to find solutions that are double roots within the rounding ε of f."
@inline beyond(z, error, ε) = copysign(8 * sqrt(ε) * z, error)

# w.z = z - A⁻¹ w.r
@inline function correct!(w::InverseBuffers, inverse)
    copyto!(w.z, w.at)
    for k in eachindex(w.z), i in eachindex(w.z)
        @inbounds w.z[i] -= inverse[i, k] * w.r[k]
    end
    return
end

# ‖A⁻¹A(w.z) - I‖ with the rows and columns in the units of `equilibrate!`.
@inline function change!(w::InverseBuffers{T}, inverse, p::AbstractEquation{T}, sample::Int) where {T}
    A, n = w.A, p.n
    conditions_jacobian!(w.corrected, p, w.z, sample, Val(true))
    n <= SMALL_LU ? multiply!(A, inverse, w.corrected) : gemm!('N', 'N', true, inverse, w.corrected, false, A)
    for i in 1:n
        @inbounds A[i, i] -= one(T)
    end
    n == 1 || scale!(A, w.rows, w.columns)
    return largest_column_sum(A)
end

# Whether the change of A is hidden from f, because the path to w.z on which A changes is lost in the rounding of f, as for cosh(z) - 1
# near zero.
@noinline function is_hidden!(w::InverseBuffers{T}, inverse, p::AbstractEquation{T}, sample::Int) where {T}
    (; way, change) = w
    while true
        change_of_conditions!(w, p, sample)
        answered = true
        for k in eachindex(way)
            off = abs(sum(i -> inverse[k, i] * change[i], eachindex(change)) - way[k])
            0 < abs(way[k]) < 2off || continue
            way[k] = copysign(max(8abs(way[k]), 2off), way[k])
            answered = false
        end
        answered && return false
        map_each!(+, w.z, w.at, way)
        change!(w, inverse, p, sample) > LARGEST_CHANGE && return true
    end
    return
end

# w.change = c(w.z) - c(w.at)
function change_of_conditions!(w::InverseBuffers, p::AbstractEquation, sample::Int)
    call!(w.change, p, w.z, sample)
    subtract!(w.change, w.here)
    p.root || subtract!(w.change, w.way)
    return
end

# Constants in f have rounding errors that no argument shows: they are estimated by the deviation of the conditions at w.z from the
# trapezoidal rule, which is exact where A is linear.
@noinline function doubt_rounding!(w::InverseBuffers{T}, p::AbstractEquation{T}, sample::Int) where {T}
    (; way, change) = w
    change_of_conditions!(w, p, sample)
    conditions_jacobian!(w.A, p, w.at, sample, Val(true))
    for i in eachindex(change)
        off = change[i]
        for k in eachindex(way)
            off -= (w.A[i, k] + w.corrected[i, k]) / 2 * way[k]
        end
        isfinite(off) && (w.r[i] += copysign(8off, w.r[i]))
    end
    return
end

"Sweeps of `equilibrate!`, each of which takes the root of the remaining scale: enough for entries from 1e-300 to 1e300."
const SWEEPS = 12

"""
    equilibrate!(rows, columns, A)

Multiply the rows and columns of A by powers of two, which are written to `rows` and `columns`, so that the largest entry of each is
about 1. Source: D. Ruiz, A scaling algorithm to equilibrate both rows and columns norms in matrices, RAL-TR-2001-034.
"""
function equilibrate!(rows::Vector{T}, columns::Vector{T}, A::Matrix{T}) where {T}
    fill!(rows, 0)
    fill!(columns, 0)
    for _ in 1:SWEEPS
        balance!(rows, columns, A) & balance!(columns, rows, transpose(A)) && break
    end
    map_each!(power_of_two, rows, rows)
    map_each!(power_of_two, columns, columns)
    scale!(A, rows, columns)
    return
end

# Halve the exponents of the largest entries of the rows of A, for the scales of its columns; whether they were small before.
function balance!(rows, columns, A::AbstractMatrix{T}) where {T}
    balanced = true
    for i in eachindex(rows)
        largest = T(-Inf)
        for j in eachindex(columns)
            largest = max(largest, size_exponent(A[i, j]) + columns[j])
        end
        largest += rows[i]
        isfinite(largest) || continue
        balanced &= abs(largest) <= 2
        rows[i] -= largest / 2
    end
    return balanced
end

size_exponent(x::T) where {T} = iszero(x) || !isfinite(x) ? T(-Inf) : T(exponent(x))
power_of_two(x::T) where {T} = exp2(clamp(round(x), T(exponent(floatmin(T))), T(exponent(floatmax(T)))))

function scale!(A::AbstractMatrix, rows, columns)
    @inbounds for j in axes(A, 2), i in axes(A, 1)
        A[i, j] *= rows[i] * columns[j]
    end
    return
end

function largest_column_sum(A::AbstractMatrix{T}) where {T}
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

function multiply!(C::AbstractMatrix{T}, A::AbstractMatrix{T}, B::AbstractMatrix{T}) where {T}
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

is_small(problem::EquationProblem) = problem.n * problem.samples <= SMALL_SYSTEM &&
    sum(length, problem.args; init = 0) <= SMALL_SYSTEM^2

"""
    vjp!(gradients, problem, inverses, v)

Write vᵀ ∂z/∂args to `gradients`, for the solution whose Jacobians are in `inverses`. `gradients` has an array like each argument;
those of arguments that are not floating-point numbers are not changed. Samples with `v` (n × samples) zero are left out. From
c(z, args) = 0 follows ∂z/∂args = -(∂c/∂z)⁻¹ ∂c/∂args. Throws [`SingularSolution`](@ref).
"""
function vjp!(gradients, problem::EquationProblem{T}, inverses::Inverses{T}, v::Matrix{T}) where {T}
    p = suited(problem)
    @lock inverses.lock explaining_types(problem, inverses.Z) do
        if is_small(problem) && all(j -> has_cotangent(v, j), axes(v, 2))
            Base.invokelatest(find_inverses!, inverses, p)
            found = or_nothing(() -> Base.invokelatest(vjp_by_implicit_function!, gradients, problem, inverses, v))
            found !== nothing && all(g -> all(isfinite, g), gradients) && return             # else f may have a guard there
        end
        Base.invokelatest(vjp_by_samples!, gradients, p, inverses, v)
    end
    return gradients
end

has_cotangent(v, j) = any(!iszero, view(v, :, j))

function find_inverses!(inverses::Inverses{T}, p::AbstractEquation{T}) where {T}
    make_room!(inverses)
    w, singular = InverseBuffers{T}(p.n), Int[]
    foreach(j -> note_singular!(() -> inverse!(inverses, w, p, j), singular), axes(inverses.Z, 2))
    throw_singular(singular)
    return
end

vjp_by_samples!(gradients, p::AbstractEquation, inverses, v) = vjp_by_samples!((gradients...,), p, inverses, v)
function vjp_by_samples!(gradients::Tuple, p::AbstractEquation{T}, inverses, v) where {T}
    differentiates_side_by_side(p, inverses) && return vjp_side_by_side!(gradients, p, inverses, v)
    return @late vjp_one_by_one!(gradients, p, inverses, v)
end

function vjp_one_by_one!(gradients::Tuple, p::AbstractEquation{T}, inverses, v) where {T}
    foreach(g -> eltype(g) <: AbstractFloat && fill!(g, 0), gradients)
    make_room!(inverses)
    w, singular = InverseBuffers{T}(p.n), Int[]
    for j in axes(inverses.Z, 2)
        has_cotangent(v, j) && note_singular!(() -> add_vjp_of_sample!(gradients, w, p, inverses, v, j), singular)
    end
    throw_singular(singular)
    return gradients
end

function add_vjp_of_sample!(gradients, w::InverseBuffers, p::AbstractEquation, inverses, v, j::Int)
    adjoint!(w, p, inverses, v, j)
    copy_column!(w.at, 1, inverses.Z, j)
    return add_pullbacks!(gradients, p, w.at, j, w.λ)
end

# w.λ = -A⁻ᵀ v for sample j; for many unknowns without a matrix.
@inline function adjoint!(w::InverseBuffers{T}, p::AbstractEquation{T}, inverses::Inverses{T}, v, j::Int) where {T}
    p.n <= DENSE || return copyto!(w.λ, adjoint_by_products(p, inverses.Z[:, j], j, v[:, j]))
    inverse = inverse!(inverses, w, p, j)
    for k in eachindex(w.λ)
        w.λ[k] = zero(T)
        for i in eachindex(w.λ)
            @inbounds w.λ[k] -= inverse[i, k] * v[i, j]
        end
    end
    return w.λ
end

@noinline function adjoint_by_products(p::AbstractEquation{T}, z, sample::Int, v) where {T}
    transposed(λ) = (check_interrupt(); conditions_pullback(p, z, sample, λ))
    return solve_by_products(transposed, -v, sample)
end

function solve_by_products(A, b::Vector{T}, sample::Int) where {T}
    iszero(b) && return zero(b)  # for an argument that f does not depend on; a Krylov space needs a direction
    x, info = @late linsolve(A, b, zero(b); rtol = 10eps(T), atol = zero(T), krylovdim = 60, maxiter = 20, verbosity = 0)
    # The last digits are the solution's own error.
    info.normres <= sqrt(eps(T)) * norm(b) || throw(SingularSolution(sample))
    return x
end

"""
    jacobian!(J, problem, inverses, index, wanted = trues(samples))

Write ∂z/∂argument to `J` (n × size of the argument of one sample × samples) for the argument number `index`; NaN for samples
that are not wanted. Throws [`SingularSolution`](@ref).
"""
function jacobian!(J::Array{T, 3}, problem::EquationProblem{T}, inverses::Inverses{T}, index::Int, wanted = trues(size(J, 3))) where {T}
    p = suited(problem)
    @lock inverses.lock explaining_types(problem, inverses.Z) do
        if is_small(problem) && all(wanted)
            Base.invokelatest(find_inverses!, inverses, p)
            found = or_nothing(() -> Base.invokelatest(jacobian_by_implicit_function!, J, problem, inverses, index))
            found !== nothing && all(isfinite, J) && return
        end
        Base.invokelatest(jacobian_by_samples!, J, p, inverses, Val(index), wanted)
    end
    return J
end

function jacobian_by_samples!(J::Array{T, 3}, p::AbstractEquation{T}, inverses, index::Val, wanted) where {T}
    differentiates_side_by_side(p, inverses) && return jacobian_side_by_side!(J, p, inverses, index, wanted)
    return @late jacobian_one_by_one!(J, p, inverses, index, wanted)
end

function jacobian_one_by_one!(J::Array{T, 3}, p::AbstractEquation{T}, inverses, index::Val, wanted) where {T}
    make_room!(inverses)
    n, entries, samples = size(J)
    w, singular = InverseBuffers{T}(n), Int[]
    B = zeros(T, n, entries)
    for j in 1:samples
        if wanted[j]
            note_singular!(() -> jacobian_of_sample!(J, w, B, p, inverses, index, j), singular)
        else
            fill!(view(J, :, :, j), T(NaN))
        end
    end
    throw_singular(singular)
    return J
end

function jacobian_of_sample!(J, w::InverseBuffers{T}, B, p::AbstractEquation{T}, inverses, index::Val, j::Int) where {T}
    copy_column!(w.at, 1, inverses.Z, j)
    argument_jacobian!(B, p, w.at, j, index)
    if p.n <= DENSE
        gemm!('N', 'N', -1, inverse!(inverses, w, p, j), B, false, view(J, :, :, j))
    else
        tangent(x) = (check_interrupt(); conditions_along(p, w.at, j, x))
        foreach(k -> J[:, k, j] = solve_by_products(tangent, -B[:, k], j), axes(J, 2))
    end
    return
end

# What all forward solvers share: how a solve ended, the samples still at work as columns of dense arrays,
# and the moves that take a finished sample out.

"""
How the solve of one sample ended: `CONVERGED`, `MAX_ITERATIONS`, `DIVERGED`, `NON_FINITE`, `UNSTABLE` (an equilibrium that
Picard iteration moves away from, the spectral radius of its Jacobian being >= 1), or `SINGULAR` (the Jacobian of the equation
has no inverse, and no step leads on).
"""
@enum Status::Int8 CONVERGED MAX_ITERATIONS DIVERGED NON_FINITE UNSTABLE SINGULAR

"""
    Solver

A configuration of the forward solve; every solver has a relative tolerance `tol` (`nothing` for the
default of the element type) and `max_iterations`, the largest number of evaluations of f. A sample has converged when
`‖f(u + R z) - z‖₂ <= tol ⋅ max(‖f(u + R z)‖₂, 10⁻³√n)`.
"""
abstract type Solver end

default_tolerance(::Type{T}) where {T} = T === Float32 ? 1.0e-6 : 1.0e-10
tolerance(s, ::Type{T}) where {T} = T(something(s.tol, default_tolerance(T)))

function check_options(tol, max_iterations)
    tol === nothing || tol > 0 || throw(ArgumentError("tol must be positive, got $tol"))
    max_iterations > 0 || throw(ArgumentError("max_iterations must be positive, got $max_iterations"))
    return
end

"""
    Outcome(samples)

How the solve of each sample ended: `status`, `iterations`, the relative `residual` reached and the
observed contraction `rate`, the quotient of the last two residuals. Stages of a layered net are merged:
the worst of each.
"""
struct Outcome
    status::Vector{Status}
    iterations::Vector{Int32}
    residual::Vector{Float64}
    rate::Vector{Float64}
end
Outcome(samples::Int) = reset!(
    Outcome(
        Vector{Status}(undef, samples), Vector{Int32}(undef, samples),
        Vector{Float64}(undef, samples), Vector{Float64}(undef, samples)
    )
)

function reset!(o::Outcome)
    fill!(o.status, CONVERGED)
    fill!(o.iterations, 0)
    fill!(o.residual, 0)
    fill!(o.rate, 0)
    return o
end

worse(a, b) = ifelse((a > b) | isnan(a), a, b)

function record!(o::Outcome, sample::Int, status::Status, iterations, residual, rate)
    @inbounds begin
        o.status[sample] = max(o.status[sample], status)
        o.iterations[sample] = max(o.iterations[sample], iterations % Int32)
        o.residual[sample] = worse(Float64(residual), o.residual[sample])
        o.rate[sample] = worse(Float64(rate), o.rate[sample])
    end
    return
end

"""
    FixedPoint{T}

An equation `z = f(u + M z)` for each of many samples, in which only `u` (and what belongs to a sample) differs: the
equilibrium of a stage ([`Stationary`](@ref)) and its adjoint system ([`AdjointSystem`](@ref)). A subtype has a method of
[`activate!`](@ref) and the fields `M`, `tol`, `floor` (the smallest size that residuals are related to), `Z` and `S` (where
results go, samples as columns), and `outcome`.
"""
abstract type FixedPoint{T} end

"""
    Columns{T}(n, width; extra = 0)

The samples of a fixed-point equation that are still at work: the first `active` columns of the drive `U`, the iterate
`Z`, the argument `S` and `F = f(S)`. Finished samples leave and the last column takes their place, so all products run
over samples that need them; `sample[j]` is the sample in column j. `extra` matrices with as many rows belong to a method
or an equation and move along; so do the `scalars` (8 per column).
"""
mutable struct Columns{T}
    U::Matrix{T}
    Z::Matrix{T}
    S::Matrix{T}
    F::Matrix{T}
    const extra::Vector{Matrix{T}}
    const scalars::Matrix{T}
    const sample::Vector{Int}
    const residual::Vector{T}        # ‖F - Z‖ of the last iteration
    const rate::Vector{T}
    const iterations::Vector{Int}
    const singular::Vector{Bool}     # whether the last Jacobian of the sample had no inverse
    const aside::Vector{Int}         # columns set aside, see `set_aside!`
    active::Int
    limit::Int                       # evaluations of f that a sample may have
    cold::Bool                       # the iterate is zero
    threads::Int                     # among which the products may be shared
    partner::Union{Nothing, Columns{T}}        # for the linearised equation
    lanes::Any                                 # Lanes{T} of a small stage, made at the first use
    factors::Union{Nothing, Factors{T}}        # of Newton's method, where the adjoint is going to use them
    const outcome::Outcome                     # of the linearised equation
end

Columns{T}(n::Int, width::Int) where {T} = Columns{T}((zeros(T, n, width) for _ in 1:4)...)
function Columns{T}(U::Matrix{T}, Z::Matrix{T}, S::Matrix{T}, F::Matrix{T}) where {T}
    width = size(Z, 2)
    return Columns{T}(
        U, Z, S, F, Matrix{T}[], zeros(T, 8, width), zeros(Int, width), zeros(T, width), zeros(T, width), zeros(Int, width),
        zeros(Bool, width), Int[], 0, typemax(Int), false, 1, nothing, nothing, nothing, Outcome(width),
    )
end

"The first `count` matrices of `c.extra` with `rows` rows each, made at the first use."
function extra!(c::Columns{T}, count::Int, rows::Int = size(c.Z, 1), first_index::Int = 1) where {T}
    while length(c.extra) < first_index + count - 1
        push!(c.extra, zeros(T, rows, size(c.U, 2)))
    end
    return view(c.extra, first_index:(first_index + count - 1))
end

"Begin with `samples` columns, whose `U` is set, and whose `Z` is unless the start is `cold`, that is zero."
function start!(c::Columns{T}, samples::Int; cold = false) where {T}
    c.active = samples
    c.limit = typemax(Int)
    c.cold = cold
    cold && fill!(view(c.Z, :, 1:samples), 0)
    empty!(c.aside)
    for j in 1:samples
        c.sample[j] = j
        c.residual[j] = T(Inf)
        c.rate[j] = zero(T)
        c.iterations[j] = 0
        c.singular[j] = false
    end
    return c
end

"""
    Stationary{T}

The equilibrium of one stage: `z = f(u + R z)`. `unique` says that a constraint guarantees there is only one; without that,
solutions found by methods which may find others than those that attract are checked.
"""
struct Stationary{T, F, V} <: FixedPoint{T}
    M::Factor{T}                 # R
    recurrence::Recurrence{T}
    f::F
    tol::T
    floor::T
    Z::V
    S::V
    outcome::Outcome
    unique::Bool
    latest::Bool                 # deliver f(u + R z) of a converged z: nearer to the equilibrium, if of unknown residual
end

"""
    activate!(c, p, j)

`F = g(S)` for column j, where z = g(u + M z) is the equation `p`; returns ‖F - Z‖² and ‖F‖².
"""
@inline activate!(c::Columns, p::Stationary, j::Int) = activate!(c.F, p.f, c.S, c.Z, j)

"    affine!(c, p)\n\n`S = U + M Z` for the active columns."
function affine!(c::Columns, p::FixedPoint)
    copyto!(c.S, 1, c.U, 1, size(c.U, 1) * c.active)
    c.cold && (c.cold = false; return c.S)
    return multiply_add!(c.S, p.M, c.Z, c.active, c.threads)
end

"Largest accepted growth of a residual; beyond it a sample counts as diverged."
const BLOW_UP = 1.0e6

scale_floor(::Type{T}, n) where {T} = T(1.0e-3) * sqrt(T(n))

# One evaluation of f for column j: how the sample stands (`nothing`: go on), and its relative residual.
@inline function evaluate!(c::Columns{T}, p::FixedPoint{T}, j::Int) where {T}
    change2, size2 = activate!(c, p, j)
    residual = sqrt(change2)
    scale = max(sqrt(size2), p.floor)
    @inbounds begin
        c.iterations[j] += 1
        isfinite(c.residual[j]) && (c.rate[j] = residual / c.residual[j])
        c.residual[j] = residual
    end
    status = !isfinite(residual) ? NON_FINITE :
        residual <= p.tol * scale ? CONVERGED :
        residual > T(BLOW_UP) * (1 + p.floor) ? DIVERGED : nothing
    return status, iszero(scale) ? zero(T) : residual / scale
end

"Write column j out as finished and let the last active column take its place."
function finish!(c::Columns, p::FixedPoint, j::Int, status::Status, residual)
    sample = c.sample[j]
    deliver!(p, sample, c, j, status)
    record!(p.outcome, sample, status, c.iterations[j], residual, c.rate[j])
    j == c.active || move_column!(c, j, c.active)
    c.active -= 1
    return
end

# The iterate whose residual is known, and the last finite one; in a gradient, where that pays, the value of the last evaluation.
function deliver!(p::FixedPoint, sample::Int, c::Columns, j::Int, status::Status)
    copy_column!(p.Z, sample, p.latest && status === CONVERGED ? c.F : c.Z, j)
    copy_column!(p.S, sample, c.S, j)
    return
end

"A[:, j] = B[:, k]"
@inline function copy_column!(A, j::Int, B, k::Int)
    @inbounds @simd for i in axes(B, 1)
        A[i, j] = B[i, k]
    end
    return
end

"Column k takes the place of column j."
function move_column!(c::Columns, j::Int, k::Int)
    for A in (c.U, c.Z, c.S, c.F, c.scalars)
        copy_column!(A, j, A, k)
    end
    for A in c.extra
        copy_column!(A, j, A, k)
    end
    @inbounds for v in (c.sample, c.iterations)
        v[j] = v[k]
    end
    @inbounds for v in (c.residual, c.rate)
        v[j] = v[k]
    end
    c.singular[j] = c.singular[k]
    return
end

"""
    evaluate_all!(c, p; check = false, rescue = false)

Evaluate every active column and take out those that are done or have no evaluation left; true when none remains. Methods that may find solutions
which do not attract ask for a `check`: such a column is `UNSTABLE`. With `rescue`, columns that blow up are set aside, to
start again from zero by another method.
"""
function evaluate_all!(c::Columns, p::FixedPoint; check = false, rescue = false)
    check_interrupt()
    stop_exhausted!(c, p)
    affine!(c, p)
    for j in c.active:-1:1          # downwards: the column which moves to j has been evaluated
        status, residual = evaluate!(c, p, j)
        if status === nothing
            continue
        elseif status === CONVERGED && check && repels(c, p, j)
            finish!(c, p, j, UNSTABLE, residual)
        elseif rescue && status !== CONVERGED && c.iterations[j] < c.limit
            fill!(view(c.Z, :, j), 0)
            c.residual[j] = Inf
            set_aside!(c, j)
        else
            finish!(c, p, j, status, residual)
        end
    end
    return c.active == 0
end

"Take column j out of the active ones, unfinished."
function set_aside!(c::Columns, j::Int)
    swap_columns!(c, j, c.active)
    push!(c.aside, c.active)
    c.active -= 1
    return
end

"Make the columns set aside active as well; returns the number of active columns."
function reclaim!(c::Columns)
    isempty(c.aside) && return c.active
    for (j, k) in enumerate(sort!(append!(c.aside, 1:c.active)))
        j == k || move_column!(c, j, k)
    end
    c.active = length(c.aside)
    empty!(c.aside)
    return c.active
end

function swap_columns!(c::Columns, j::Int, k::Int)
    j == k && return
    for A in (c.U, c.Z, c.S, c.F, c.scalars, c.extra...)
        @inbounds @simd for i in axes(A, 1)
            A[i, j], A[i, k] = A[i, k], A[i, j]
        end
    end
    for v in (c.sample, c.iterations)
        v[j], v[k] = v[k], v[j]
    end
    for v in (c.residual, c.rate)
        v[j], v[k] = v[k], v[j]
    end
    c.singular[j], c.singular[k] = c.singular[k], c.singular[j]
    return
end

"Record the columns that are left as unconverged."
give_up!(c::Columns, p::FixedPoint) = foreach(j -> give_up!(c, p, j), c.active:-1:1)

function give_up!(c::Columns, p::FixedPoint, j::Int)
    scale = max(norm(view(c.F, :, j)), p.floor)
    return finish!(c, p, j, c.singular[j] ? SINGULAR : MAX_ITERATIONS, c.residual[j] / scale)
end

# Before an evaluation, and so by any method.
function stop_exhausted!(c::Columns, p::FixedPoint)
    for j in c.active:-1:1
        c.iterations[j] < c.limit || give_up!(c, p, j)
    end
    return
end

"A solver used alone: what it leaves is unconverged."
function solve!(s::Solver, c::Columns, p::FixedPoint)
    c.limit = s.max_iterations
    iterate!(s, c, p, s.max_iterations) || give_up!(c, p)
    return
end

"""
    iterate!(solver, c, p, iterations)

Let `solver` work on the active columns for at most so many iterations; true when all are done. Those left go on from
their iterate `Z`, with `S` and `F = f(S)` those of the last evaluation.
"""
function iterate! end

# The unfinished samples of a stage, as columns of dense arrays, and the moves that remove a finished sample.

"""
    ColumnEquation{T}

An equation for each of many samples that [`evaluate_all!`](@ref) evaluates for all columns at once. A subtype has

- the fields `tol`, the relative tolerance; `floor`, the smallest size that residuals are related to; `Z`, where the results go
  (n × samples); `outcome`, how each sample ended; and `threads`, among which products may be shared;
- the methods [`affine!`](@ref)`(c, p)` for all columns, [`activate!`](@ref)`(c, p, j)` and
  [`store_result!`](@ref)`(p, sample, c, j, status)` for one of them.
"""
abstract type ColumnEquation{T} end

"""
    FixedPoint{T}

A [`ColumnEquation`](@ref) `z = f(u + M z)`, in which only `u` (and the coefficients of a sample) differs: the equilibrium of a stage
([`Stationary`](@ref)), and its adjoint system ([`AdjointSystem`](@ref)). A subtype has the field `M` as well; for `affine!` there is
a method. [`Picard`](@ref) and [`Anderson`](@ref) solve any of them; the solvers that need the Jacobian take a `Stationary`.
"""
abstract type FixedPoint{T} <: ColumnEquation{T} end

"""
    SolverState

What a method keeps of every column between its steps. All fields of a subtype are arrays whose last axis counts the columns; they
move with the column while the state is `c.state`.
"""
abstract type SolverState end

"""
    Columns{T}(n, width, coefficients = nothing)

The samples of a fixed-point equation that are still at work: the first `active` columns of the drive `U`, the iterate
`Z`, the argument `S` and `F = f(S)`. Finished samples leave and the last column takes their place, so all products run
over samples that need them; `sample[j]` is the sample in column j. What belongs to a column moves with it: see
[`per_column`](@ref).
"""
mutable struct Columns{T, D <: Union{Nothing, Matrix{T}}}
    const U::Matrix{T}
    const Z::Matrix{T}
    const S::Matrix{T}
    const F::Matrix{T}
    const coefficients::D            # of the equation, that differ between the samples
    const sample::Vector{Int}
    const residual::Vector{T}        # ‖F - Z‖ of the last iteration
    const rate::Vector{T}
    const iterations::Vector{Int}
    const singular::Vector{Bool}     # whether the last Jacobian of the sample had no inverse
    const deferred::Vector{Int}      # columns set aside, see `defer!`
    active::Int
    limit::Int                       # evaluations of f that a sample may have
    cold::Bool                       # the iterate is zero, so that S = U
    state::Union{Nothing, SolverState}     # of the method at work
    const buffers::Vector{Any}       # of all methods, see `buffer!`
end

Columns{T}(n::Int, width::Int, coefficients = nothing) where {T} =
    Columns((zeros(T, n, width) for _ in 1:4)..., coefficients)
function Columns(U::Matrix{T}, Z::Matrix{T}, S::Matrix{T}, F::Matrix{T}, coefficients::D) where {T, D}
    width = size(Z, 2)
    return Columns{T, D}(
        U, Z, S, F, coefficients, zeros(Int, width), zeros(T, width), zeros(T, width), zeros(Int, width), zeros(Bool, width),
        Int[], 0, typemax(Int), false, nothing, Any[],
    )
end

"""
    buffer!(make, c, B, fits = always)

The buffers of type `B` that a method keeps with the columns from one solve to the next; where there are none that fit, those that
`make` returns.
"""
function buffer!(make::F, c::Columns, ::Type{B}, fits::G = _ -> true) where {F, B, G}
    for buffer in c.buffers
        buffer isa B && fits(buffer)::Bool && return buffer
    end
    buffer = make()::B
    push!(c.buffers, buffer)
    return buffer
end

"Begin with `samples` columns, whose `U` is set, and whose `Z` is unless the start is `cold`, that is zero."
function start!(c::Columns{T}, samples::Int; cold = false) where {T}
    c.active = samples
    c.limit = typemax(Int)
    c.state = nothing
    c.cold = cold
    cold && fill!(view(c.Z, :, 1:samples), 0)
    empty!(c.deferred)
    copyto!(c.sample, 1:samples)
    fill!(view(c.residual, 1:samples), T(Inf))
    fill!(view(c.rate, 1:samples), zero(T))
    fill!(view(c.iterations, 1:samples), 0)
    fill!(view(c.singular, 1:samples), false)
    return c
end

"""
    Stationary{T}

The equilibrium of one stage: `z = f(u + R z)`. `unique` says that a constraint guarantees there is only one; without that,
solutions found by methods which may find others than those that attract are checked.
"""
@kwdef struct Stationary{T, F, V} <: FixedPoint{T}
    M::Factor{T}                 # R
    recurrence::Recurrence{T}
    f::F
    tol::T
    floor::T
    Z::V
    S::V
    outcome::Outcome
    unique::Bool
    latest::Bool                 # write out f(u + R z) of a converged z: nearer to the equilibrium, if of unknown residual
    factors::Union{Nothing, Factorisations{T}}    # take the last factorisations of Newton's method
    threads::Int                 # among which products may be shared
end

"""
    activate!(c, p, j)

`F = f(S)` for column j, where z = f(u + M z) is the equation `p`; returns ‖F - Z‖² and ‖F‖².
"""
@inline activate!(c::Columns, p::Stationary, j::Int) = activate!(c.F, p.f, c.S, c.Z, j)

"    affine!(c, p)\n\n`S = U + M Z` for the active columns."
function affine!(c::Columns, p::FixedPoint)
    c.cold || return multiply!(c.S, c.U, p.M, c.Z, c.active, p.threads)
    c.cold = false
    return copyto!(c.S, 1, c.U, 1, size(c.U, 1) * c.active)
end

"Largest residual of a sample that has not diverged: of a stage in units of 1 and of u, of an equation in those of z and f(z) at the start."
const BLOW_UP = 1.0e6

# Looked at where the residual is large for a u of usual size only: that of a large u is large, too, on the way to its equilibrium.
@noinline has_blown_up(c::Columns{T}, j::Int, residual) where {T} = residual > T(BLOW_UP) * euclidean_norm(view(c.U, :, j))

scale_floor(::Type{T}, n) where {T} = T(1.0e-3) * sqrt(T(n))

# ‖F - Z‖ and ‖F‖ of a column whose squares overflow.
@noinline function norms_of_large(c::Columns, ::FixedPoint, j::Int)
    z, f = view(c.Z, :, j), view(c.F, :, j)
    return euclidean_norm(f - z), euclidean_norm(f)
end
norms_of_large(::Columns{T}, ::ColumnEquation, ::Int) where {T} = (T(Inf), T(Inf))

# One evaluation of f for column j: how the sample stands (`nothing`: go on), and its relative residual.
@inline function evaluate!(c::Columns{T}, p::ColumnEquation{T}, j::Int) where {T}
    change2, size2 = activate!(c, p, j)
    residual, size = sqrt(change2), sqrt(size2)
    isfinite(residual + size) || ((residual, size) = norms_of_large(c, p, j))
    scale = max(size, p.floor)
    @inbounds begin
        c.iterations[j] += 1
        isfinite(c.residual[j]) && (c.rate[j] = residual / c.residual[j])
        c.residual[j] = residual
    end
    status = !isfinite(residual) ? NON_FINITE :
        residual <= p.tol * scale ? CONVERGED :
        residual > T(BLOW_UP) * (1 + p.floor) && has_blown_up(c, j, residual) ? DIVERGED : nothing
    return status, iszero(scale) ? zero(T) : residual / scale
end

"Write column j out as finished and let the last active column take its place."
@noinline function finish!(c::Columns, p::ColumnEquation, j::Int, status::Status, residual)
    sample = c.sample[j]
    store_result!(p, sample, c, j, status)
    record!(p.outcome, sample, status, c.iterations[j], residual, c.rate[j])
    j == c.active || move_column!(c, j, c.active)
    c.active -= 1
    return
end

"""
    store_result!(p, sample, c, j, status)

Write the solution in column j out for the sample: the iterate whose residual is known, and the last finite one; in a gradient,
where that pays, the value of the last evaluation.
"""
function store_result!(p::Stationary, sample::Int, c::Columns, j::Int, status::Status)
    copy_column!(p.Z, sample, p.latest && status === CONVERGED ? c.F : c.Z, j)
    copy_column!(p.S, sample, c.S, j)
    return
end

"A[:, j] = B[:, k]"
@inline function copy_column!(A, j::Int, B, k::Int)
    @inbounds @vectors for i in axes(B, 1)
        A[i, j] = B[i, k]
    end
    return
end

"""
    per_column(x)

The arrays of columns or of a solver's state whose last axis counts the columns.
"""
@inline per_column(c::Columns{T, Nothing}) where {T} =
    (c.U, c.Z, c.S, c.F, c.sample, c.residual, c.rate, c.iterations, c.singular)
@inline per_column(c::Columns) =
    (c.U, c.Z, c.S, c.F, c.sample, c.residual, c.rate, c.iterations, c.singular, c.coefficients)
@inline per_column(s::S) where {S <: SolverState} = ntuple(i -> getfield(s, i), Val(fieldcount(S)))

"Column k takes the place of column j."
move_column!(c::Columns, j::Int, k::Int) = each_array(A -> move_entries!(A, j, k), c)

"The columns j and k change places."
swap_columns!(c::Columns, j::Int, k::Int) = j == k || each_array(A -> swap_entries!(A, j, k), c)

@inline function each_array(change!::F, c::Columns) where {F}
    map(change!, per_column(c))
    each_array(change!, c.state)
    return
end
each_array(change!, ::Nothing) = nothing
each_array(change!::F, s::SolverState) where {F} = (map(change!, per_column(s)); nothing)

@inline entries_per_column(A::Array) = prod(Base.front(size(A)))

@noinline function move_entries!(A::Array, j::Int, k::Int)
    count = entries_per_column(A)
    to, from = (j - 1) * count, (k - 1) * count
    @inbounds @simd for i in 1:count
        A[to + i] = A[from + i]
    end
    return
end

@noinline function swap_entries!(A::Array, j::Int, k::Int)
    count = entries_per_column(A)
    a, b = (j - 1) * count, (k - 1) * count
    @inbounds for i in 1:count
        A[a + i], A[b + i] = A[b + i], A[a + i]
    end
    return
end

"""
    evaluate_all!(c, p; check = false, rescue = rescues(p))

Evaluate every active column and take out those that are done or have no evaluation left; true when none remains. Methods that
may find solutions which do not attract ask for a `check`: such a column is `UNSTABLE`. With `rescue`, columns that blow up are
set aside, to start again from zero by another method.
"""
function evaluate_all!(c::Columns, p::ColumnEquation; check = false, rescue = rescues(p))
    check_interrupt()
    stop_exhausted!(c, p)
    affine!(c, p)
    for j in c.active:-1:1          # downwards: the column which moves to j has been evaluated
        status, residual = evaluate!(c, p, j)
        if status === nothing
            # The state returned is the one whose residual is known.
            c.iterations[j] < c.limit || give_up!(c, p, j)
            continue
        elseif status === CONVERGED && check && repels(c, p, j)
            finish!(c, p, j, UNSTABLE, residual)
        elseif status === CONVERGED && is_spurious(c, p, j)
            finish!(c, p, j, SINGULAR, residual)
        elseif rescue && status !== CONVERGED && c.iterations[j] < c.limit
            fill!(view(c.Z, :, j), 0)
            c.residual[j] = Inf
            defer!(c, j)
        else
            finish!(c, p, j, status, residual)
        end
    end
    return c.active == 0
end

# Whether columns of an equation are set aside unless a caller says otherwise.
rescues(::ColumnEquation) = false

"Remove column j from the active ones, unfinished."
function defer!(c::Columns, j::Int)
    swap_columns!(c, j, c.active)
    push!(c.deferred, c.active)
    c.active -= 1
    return
end

"""
Make the columns set aside, which lie behind the active ones from right to left, active as well, but for the first so many; returns the
number of active columns.
"""
function reclaim!(c::Columns, kept::Int = 0)
    while length(c.deferred) > kept
        k = pop!(c.deferred)
        c.active += 1
        c.active == k || move_column!(c, c.active, k)
    end
    return c.active
end

"Record the columns that are left as unconverged."
give_up!(c::Columns, p::ColumnEquation) = foreach(j -> give_up!(c, p, j), c.active:-1:1)

function give_up!(c::Columns, p::ColumnEquation, j::Int)
    scale = max(euclidean_norm(view(c.F, :, j)), p.floor)
    return finish!(c, p, j, c.singular[j] ? SINGULAR : MAX_ITERATIONS, c.residual[j] / scale)
end

# Before an evaluation, and so by any method.
function stop_exhausted!(c::Columns, p::ColumnEquation)
    for j in c.active:-1:1
        c.iterations[j] < c.limit || give_up!(c, p, j)
    end
    return
end

"A solver used alone: columns that it leaves are unconverged."
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

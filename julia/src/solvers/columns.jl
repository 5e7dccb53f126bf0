# What all forward solvers share: how a solve ended, the samples still at work as columns of dense arrays,
# and the moves that take a finished sample out.

"""
How the solve of one sample ended: `CONVERGED`, `MAX_ITERATIONS`, `DIVERGED`, `NON_FINITE`, or `UNSTABLE`
(an equilibrium that Picard iteration moves away from, the spectral radius of its Jacobian being >= 1).
"""
@enum Status::Int8 CONVERGED MAX_ITERATIONS DIVERGED NON_FINITE UNSTABLE

"""
    Solver

A configuration of the forward solve; every solver has a relative tolerance `tol` (`nothing` for the
default of the element type) and `max_iterations`. A sample has converged when
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
    Columns{T}(n, width)

The samples a stage of `n` neurons still works on: the first `active` columns of the drive `U`, the iterate
`Z`, the pre-activation `S` and `F = f(S)`. Finished samples leave and the last column takes their place,
so all products run over samples that need them; `sample[j]` is the sample in column j.
"""
mutable struct Columns{T}
    U::Matrix{T}
    Z::Matrix{T}
    S::Matrix{T}
    F::Matrix{T}
    const sample::Vector{Int}
    const residual::Vector{T}        # ‖F - Z‖ of the last iteration
    const rate::Vector{T}
    const iterations::Vector{Int}
    active::Int
end

Columns{T}(n::Int, width::Int) where {T} = Columns{T}(
    zeros(T, n, width), zeros(T, n, width), zeros(T, n, width), zeros(T, n, width),
    zeros(Int, width), zeros(T, width), zeros(T, width), zeros(Int, width), 0
)

"Begin with `samples` columns, whose `U` and `Z` are set."
function start!(c::Columns{T}, samples::Int) where {T}
    c.active = samples
    for j in 1:samples
        c.sample[j] = j
        c.residual[j] = T(Inf)
        c.rate[j] = zero(T)
        c.iterations[j] = 0
    end
    return c
end

"""
    Stationary{T}

The solve of one stage: its weights `R`, activation `f`, tolerance, where results go (`Z`, `S`: the rows of
the stage, all samples of the tile) and how they ended.
"""
struct Stationary{T, F, V}
    R::Matrix{T}
    f::F
    tol::T
    Z::V
    S::V
    outcome::Outcome
end

"S[:, 1:active] = U + R Z"
function affine!(c::Columns, R::Matrix)
    return affine!(c.S, R, c.Z, c.U, c.active)
end
function affine!(S::Matrix{T}, R::Matrix{T}, Z::Matrix{T}, U::Matrix{T}, m::Int) where {T}
    n = size(R, 1)
    if n <= SMALL
        @inbounds for j in 1:m
            @simd for i in 1:n
                S[i, j] = U[i, j]
            end
            for k in 1:n
                z = Z[k, j]
                @simd for i in 1:n
                    S[i, j] = muladd(R[i, k], z, S[i, j])
                end
            end
        end
    else
        copyto!(S, 1, U, 1, n * m)
        mul!(view(S, :, 1:m), R, view(Z, :, 1:m), one(T), one(T))
    end
    return S
end

"Up to this many neurons plain loops beat a BLAS call."
const SMALL = 12

"Largest accepted growth of a residual; beyond it a sample counts as diverged."
const BLOW_UP = 1.0e6

scale_floor(::Type{T}, n) where {T} = T(1.0e-3) * sqrt(T(n))

# One evaluation of f for column j: the residual, and how the sample stands (`nothing`: go on).
@inline function evaluate!(c::Columns{T}, p::Stationary{T}, j::Int) where {T}
    change2, size2 = activate!(c.F, p.f, c.S, c.Z, j)
    residual = sqrt(change2)
    scale = max(sqrt(size2), scale_floor(T, size(c.F, 1)))
    @inbounds begin
        c.iterations[j] += 1
        isfinite(c.residual[j]) && (c.rate[j] = residual / c.residual[j])
        c.residual[j] = residual
    end
    status = residual <= p.tol * scale ? CONVERGED :
        !isfinite(residual) ? NON_FINITE :
        residual > T(BLOW_UP) * (1 + scale_floor(T, size(c.F, 1))) ? DIVERGED : nothing
    return status, residual / scale
end

"Write column j out as finished and let the last active column take its place."
function finish!(c::Columns, p::Stationary, j::Int, status::Status, residual)
    sample = c.sample[j]
    n = size(c.F, 1)
    source = status == NON_FINITE ? c.Z : c.F      # the last finite iterate is worth keeping
    @inbounds for i in 1:n
        p.Z[i, sample] = source[i, j]
        p.S[i, sample] = c.S[i, j]
    end
    record!(p.outcome, sample, status, c.iterations[j], residual, c.rate[j])
    last = c.active
    if j != last
        @inbounds for i in 1:n
            c.U[i, j] = c.U[i, last]
            c.Z[i, j] = c.Z[i, last]
            c.S[i, j] = c.S[i, last]
            c.F[i, j] = c.F[i, last]
        end
        c.sample[j] = c.sample[last]
        c.residual[j] = c.residual[last]
        c.rate[j] = c.rate[last]
        c.iterations[j] = c.iterations[last]
    end
    c.active = last - 1
    return
end

"Evaluate every active column and take out those that are done; true when none is left."
function evaluate_all!(c::Columns, p::Stationary)
    affine!(c, p.R)
    for j in c.active:-1:1          # downwards: the column which moves to j has been evaluated
        status, residual = evaluate!(c, p, j)
        status === nothing || finish!(c, p, j, status, residual)
    end
    return c.active == 0
end

"Record the columns that are left as unconverged."
function give_up!(c::Columns{T}, p::Stationary{T}) where {T}
    n = size(c.F, 1)
    for j in c.active:-1:1
        size2 = sum(abs2, view(c.F, :, j))
        finish!(c, p, j, MAX_ITERATIONS, c.residual[j] / max(sqrt(size2), scale_floor(T, n)))
    end
    return
end

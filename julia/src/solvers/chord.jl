# The chord method: Newton's method with one matrix for all samples, in one product an iteration.

"""
    Chord(; tol = nothing, max_iterations = 200)

The chord method with the mean slopes D̄ of the batch: the samples share the matrix `Q = (I - R D̄)⁻¹ R`, and the equation of
each is solved in the form ([`Linearized`](@ref)) in which only the deviation of its slopes from D̄ is left to the iteration: one
product an iteration, no factorisation per sample, and far fewer iterations than Picard's. What it finds is checked in
the equation itself, and what that does not confirm goes on by Picard iteration. The iterates of a sample depend on its
batch, its equilibrium does not. Where I - R D̄ is singular only Picard iteration is left, and what does not converge is
`SINGULAR`. Three evaluations of a few samples, from which D̄ is taken, are not counted.
"""
@kwdef struct Chord <: Solver
    tol::Union{Nothing, Float64} = nothing
    max_iterations::Int = 200
    Chord(tol, max_iterations) = (check_options(tol, max_iterations); new(tol, max_iterations))
end

"""
    Linearized{T}

The equation z = g(u + M z) with its mean linear part solved for. With s = u + M z and t = g(s) - d̄ s,

    s = (I - M D̄)⁻¹ u + Q t,    Q = (I - M D̄)⁻¹ M,

a fixed point in t which contracts at the rate of Q (D - D̄) instead of M D: an evaluation is a chord step of Newton's method in one product. In
its columns `Z` is t, `F` the change of t, and `S` is updated by Q Δt; the first change is the residual g(s) - z at which
the equation is taken up. As M Δt is what the equation itself leaves at s, an iterate with ‖Δt‖ below the tolerance solves it; one
with coarse products is as far from that as their rounding of the first change, and aims no lower.
"""
struct Linearized{T, P <: FixedPoint{T}, V} <: ColumnEquation{T}
    M::Union{Factor{T}, CoarseFactor{T}}     # Q
    equation::P
    slope::Vector{T}             # d̄
    tols::Vector{T}              # of the samples
    floor::T
    Z::V
    outcome::Outcome
    threads::Int
end

function Linearized(p::FixedPoint{T}, transposed::Bool, buffers) where {T}
    Q = correction_factor(p.recurrence, transposed)
    return Linearized{T, typeof(p), typeof(p.Z)}(
        Q, p, p.recurrence.slope, buffers.tols, p.floor, p.Z, buffers.outcome, p.threads,
    )
end

tolerance_of(p::Linearized, sample::Int) = @inbounds p.tols[sample]

function affine!(c::Columns, p::Linearized{T}) where {T}
    p.M isa Factor{T} && return multiply_add!(c.S, p.M, c.F, c.active, p.threads)
    return @late add_coarsely!(c, p)
end

function add_coarsely!(c::Columns, p::Linearized)
    buffers = buffer!(() -> coarse_buffers(p.M, size(c.S, 2)), c, CoarseBuffers)
    return multiply_add_coarsely!(c.S, p.M, c.F, c.active, p.threads, buffers)
end

@inline activate!(c::Columns, p::Linearized{T, <:Stationary}, j::Int) where {T} =
    change_deviation!(c.F, p.equation.f, p.slope, c.S, c.Z, j)

# g(s) = t + d̄ s
function store_result!(p::Linearized, sample::Int, c::Columns, j::Int, ::Status)
    @inbounds @simd for i in eachindex(p.slope)
        p.Z[i, sample] = muladd(p.slope[i], c.S[i, j], c.Z[i, j])
    end
    return
end

"Iterations in the linearised equation before something else is tried."
const LINEARIZED_PATIENCE = 40

"Times that coarse products are used for further digits."
const COARSE_PASSES = 5

"""
    iterate_linearized!(c, p, iterations; check = false)

Let the active columns, which have been evaluated, go on in the linearised equation, and evaluate the outcome in the equation
itself; true when all are done. A column whose iteration fails keeps its iterate. Without a guarantee of uniqueness a solution is
taken only if it is no farther away than the residual and the rate of the iteration before say; `check` asks whether it
attracts as well. With coarse products this is repeated while it gains digits; where it does not, the iterate is kept as well.
"""
function iterate_linearized!(c::Columns{T}, p::FixedPoint{T}, iterations::Int; check = false) where {T}
    p.recurrence.coarse || return correct!(c, p, iterations, check)
    aside = length(c.deferred)
    for _ in 1:COARSE_PASSES
        correct!(c, p, iterations, check) && break
        for j in c.active:-1:1
            linearized_buffers(c).outcome.status[c.sample[j]] === CONVERGED || defer!(c, j)
        end
        c.active == 0 && break
    end
    return reclaim!(c, aside) == 0
end

function correct!(c::Columns{T}, p::FixedPoint{T}, iterations::Int, check::Bool) where {T}
    m, buffers = c.active, linearized_buffers(c)
    q, lin = buffers.columns, linearized(p, buffers)
    begin_linearized!(q, lin, c)
    for _ in 1:iterations
        evaluate_all!(q, lin) && break
    end
    q.active == 0 || give_up!(q, lin)
    for j in 1:m
        sample = c.sample[j]
        c.iterations[j] = lin.outcome.iterations[sample]
        c.rate[j] = lin.outcome.rate[sample]
        failed = lin.outcome.status[sample] > (p.recurrence.coarse ? CONVERGED : MAX_ITERATIONS)
        failed || is_far(c, p, j, sample) || copy_column!(c.Z, j, p.Z, sample)
        c.residual[j] = Inf            # the next is no step of this iteration, and has no rate
    end
    return evaluate_all!(c, p; check)
end

"The columns of the linearised equation, which share S and F with those of the equation, its outcome, and the tolerances of its samples."
struct LinearizedBuffers{T, C <: Columns{T}}
    columns::C
    outcome::Outcome
    tols::Vector{T}
end
function LinearizedBuffers(c::C) where {T, C <: Columns{T}}
    width = size(c.U, 2)
    coefficients = c.coefficients === nothing ? nothing : zero(c.coefficients)
    return LinearizedBuffers{T, C}(Columns(zeros(T, 0, width), zero(c.Z), c.S, c.F, coefficients), Outcome(width), zeros(T, width))
end

linearized_buffers(c::Columns{T}) where {T} = buffer!(() -> LinearizedBuffers(c), c, LinearizedBuffers{T, typeof(c)})

function begin_linearized!(q::Columns{T}, lin::Linearized{T}, c::Columns{T}) where {T}
    start!(q, c.active)
    reset!(lin.outcome)
    c.limit == typemax(Int) || (q.limit = c.limit - 1)          # the last evaluation is that of the equation itself
    c.coefficients === nothing || copyto!(q.coefficients, 1, c.coefficients, 1, length(lin.slope) * c.active)
    for j in 1:c.active
        q.sample[j] = c.sample[j]
        q.iterations[j] = c.iterations[j]
        size2 = zero(T)
        @inbounds @simd for i in eachindex(lin.slope)
            z = c.F[i, j]
            q.Z[i, j] = z - lin.slope[i] * c.S[i, j]
            c.F[i, j] = z - c.Z[i, j]
            size2 = muladd(z, z, size2)
        end
        lin.tols[c.sample[j]] = tolerance_of_pass(lin, c.residual[j] / max(sqrt(size2), lin.floor))
    end
    return
end

# The tolerance of the equation itself, if coarse products come near it.
function tolerance_of_pass(p::Linearized{T}, residual) where {T}
    Q, tol = p.M, p.equation.tol
    Q isa CoarseFactor || return tol
    least = T(rounding_of(Q)) * residual
    return least > 4 * tol ? least : tol / 2
end

linearized(p::Stationary, buffers) = Linearized(p, false, buffers)

# Whether the solution found for column j may be another than the one that attracts its iterate.
is_far(c::Columns, p::FixedPoint, j::Int, sample::Int) = false
function is_far(c::Columns{T}, p::Stationary{T}, j::Int, sample::Int) where {T}
    (p.unique || p.recurrence.plain) && return false
    distance2 = zero(T)
    @inbounds @simd for i in axes(c.Z, 1)
        d = p.Z[i, sample] - c.Z[i, j]
        distance2 = muladd(d, d, distance2)
    end
    return !(sqrt(distance2) <= trust_radius(c.residual[j], c.rate[j]))
end

function iterate!(::Chord, c::Columns{T}, p::Stationary{T}, iterations::Int) where {T}
    evaluate_all!(c, p; check = true) && return true
    while p.recurrence.linearized
        iterate_linearized!(c, p, LINEARIZED_PATIENCE - 1; check = true) && return true
    end
    advance!(c, one(T))
    fill!(view(c.singular, 1:c.active), true)
    return iterate!(Picard(), c, p, iterations)
end

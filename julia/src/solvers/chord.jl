# The chord method: Newton's method with one matrix for all samples, with one product per iteration.

"""
    Chord(; tol = nothing, max_iterations = 200)

The chord method with the mean slopes D̄ of the batch: the samples share the matrix `Q = (I - R D̄)⁻¹ R`, and the equation of
each is solved in the form ([`Linearized`](@ref)) in which only the deviation of its slopes from D̄ is left to the iteration: one
product per iteration, no factorisation per sample, and far fewer iterations than Picard's. Its results are checked in
the equation itself; samples that it takes no nearer to their equilibrium continue with Picard iteration. The iterates of a
sample depend on its batch, its equilibrium does not. Where I - R D̄ is singular only Picard iteration is left, and samples that
do not converge are `SINGULAR`. Three evaluations of a few samples, from which D̄ is taken, are not counted.
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

a fixed point in t that contracts at the rate of Q (D - D̄) instead of M D: an evaluation is a chord step of Newton's method with one
product. In its columns `Z` is t, `F` the change of t, and `S` is updated by Q Δt; the first change is the residual g(s) - z at which
the iteration begins. Since M Δt is the residual of the equation itself at s, an iterate with ‖Δt‖ below the tolerance solves it.
"""
struct Linearized{T, P <: FixedPoint{T}, V} <: ColumnEquation{T}
    M::Factor{T}                 # Q
    equation::P
    slope::Vector{T}             # d̄
    tol::T
    floor::T
    Z::V
    outcome::Outcome
    threads::Int
end

function Linearized(p::FixedPoint{T}, transposed::Bool, outcome) where {T}
    r = p.recurrence
    return Linearized{T, typeof(p), typeof(p.Z)}(
        transposed ? r.Q_transposed : r.Q, p, r.slope, p.tol, p.floor, p.Z, outcome, p.threads,
    )
end

affine!(c::Columns, p::Linearized) = multiply_add!(c.S, p.M, c.F, c.active, p.threads)

@inline activate!(c::Columns, p::Linearized{T, <:Stationary}, j::Int) where {T} =
    change_deviation!(c.F, p.equation.f, p.slope, c.S, c.Z, j)

# g(s) = t + d̄ s
function store_result!(p::Linearized, sample::Int, c::Columns, j::Int, ::Status)
    @inbounds @simd for i in eachindex(p.slope)
        p.Z[i, sample] = muladd(p.slope[i], c.S[i, j], c.Z[i, j])
    end
    return
end

"Iterations in the linearised equation before another method is tried."
const LINEARIZED_PATIENCE = 40

"""
    iterate_linearized!(c, p, iterations; check = false)

Continue the active columns, which have been evaluated, in the linearised equation, and evaluate the outcome in the equation
itself; true when all are done. A column whose iteration fails keeps its iterate. Without a guarantee of uniqueness a solution is
accepted only if it is no farther away than the residual and rate of the previous iteration allow; with `check` it must also
attract.
"""
function iterate_linearized!(c::Columns{T}, p::FixedPoint{T}, iterations::Int; check = false) where {T}
    m, buffers = c.active, linearized_buffers(c)
    q, lin = buffers.columns, linearized(p, buffers.outcome)
    begin_linearized!(q, lin, c)
    for _ in 1:iterations
        evaluate_all!(q, lin) && break
    end
    q.active == 0 || give_up!(q, lin)
    for j in 1:m
        sample = c.sample[j]
        c.iterations[j] = lin.outcome.iterations[sample]
        c.rate[j] = lin.outcome.rate[sample]
        if lin.outcome.status[sample] <= MAX_ITERATIONS && distance(p.Z, sample, c.Z, j) <= trust_radius(p, c, j)
            copy_column!(c.Z, j, p.Z, sample)
        end
        c.residual[j] = Inf            # the next step does not belong to this iteration and has no rate
    end
    return evaluate_all!(c, p; check)
end

"The columns of the linearised equation, which share S and F with those of the equation, and its outcome."
struct LinearizedBuffers{T, C <: Columns{T}}
    columns::C
    outcome::Outcome
end
function LinearizedBuffers(c::C) where {T, C <: Columns{T}}
    width = size(c.U, 2)
    coefficients = c.coefficients === nothing ? nothing : zero(c.coefficients)
    return LinearizedBuffers{T, C}(Columns(zeros(T, 0, width), zero(c.Z), c.S, c.F, coefficients), Outcome(width))
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
        @inbounds @simd for i in eachindex(lin.slope)
            z = c.F[i, j]
            q.Z[i, j] = z - lin.slope[i] * c.S[i, j]
            c.F[i, j] = z - c.Z[i, j]
        end
    end
    return
end

linearized(p::Stationary, outcome) = Linearized(p, false, outcome)

# How far from its iterate a solution for column j is accepted.
trust_radius(::FixedPoint{T}, ::Columns, ::Int) where {T} = T(Inf)
trust_radius(p::Stationary{T}, c::Columns, j::Int) where {T} = p.unique ? T(Inf) : trust_radius(c.residual[j], c.rate[j])

# ‖A[:, j] - B[:, k]‖
function distance(A, j::Int, B::Matrix{T}, k::Int) where {T}
    distance2 = zero(T)
    @inbounds @vectors for i in axes(B, 1)
        d = A[i, j] - B[i, k]
        distance2 = muladd(d, d, distance2)
    end
    return sqrt(distance2)
end

function iterate!(::Chord, c::Columns{T}, p::Stationary{T}, iterations::Int) where {T}
    evaluate_all!(c, p; check = true) && return true
    before = buffer!(() -> zeros(T, size(c.Z, 2)), c, Vector{T})           # ‖F - Z‖ of each sample
    foreach(j -> before[c.sample[j]] = c.residual[j], 1:c.active)
    while p.recurrence.linearized && c.active > 0
        iterate_linearized!(c, p, LINEARIZED_PATIENCE - 1; check = true) && break
        for j in c.active:-1:1
            sample, residual = c.sample[j], c.residual[j]
            residual <= before[sample] / 2 || defer!(c, j)
            before[sample] = residual
        end
    end
    p.recurrence.linearized || fill!(view(c.singular, 1:c.active), true)
    reclaim!(c) == 0 && return true
    advance!(c, one(T))
    return iterate!(Picard(), c, p, iterations)
end

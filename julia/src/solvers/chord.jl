# The chord method: Newton's method with one matrix for all samples, in one product an iteration.

"""
    Chord(; tol = nothing, max_iterations = 200)

The chord method with the mean slopes D̄ of the batch: the samples share the matrix `Q = (I - R D̄)⁻¹ R`, and the equation of
each is solved in the form ([`Linearized`](@ref)) in which only the deviation of its slopes from D̄ is left to the iteration: one
product an iteration, no factorisation per sample, and far fewer iterations than Picard's. What it finds is checked in
the equation itself, and what that does not confirm goes on by Picard iteration. The iterates of a sample depend on its
batch, its equilibrium does not.
"""
struct Chord <: Solver
    tol::Union{Nothing, Float64}
    max_iterations::Int
    function Chord(; tol = nothing, max_iterations = 200)
        check_options(tol, max_iterations)
        return new(tol, max_iterations)
    end
end

"""
    Linearized{T}

The equation z = g(u + M z) with its mean linear part solved for. With s = u + M z and t = g(s) - d̄ s,

    s = v + Q t,    Q = (I - M D̄)⁻¹ M,    v = (I - M D̄)⁻¹ u = u + Q d̄ u,

a fixed point in t which contracts at the rate of Q (D - D̄) instead of M D: a chord step of Newton's method in one product.
As M Δt is what the equation itself leaves at s, an iterate with ‖Δt‖ below the tolerance solves it.
"""
struct Linearized{T, P <: FixedPoint{T}, V} <: FixedPoint{T}
    M::Matrix{T}                 # Q
    equation::P
    slope::Vector{T}             # d̄
    tol::T
    floor::T
    Z::V
    S::V
    outcome::Outcome
end

"t = g(s) - d̄ s; its size is that of g(s)."
@inline function activate!(c::Columns, p::Linearized{T, <:Stationary}, j::Int) where {T}
    return deviation!(c.F, p.equation.f, p.slope, c.S, c.Z, j)
end

deliver!(p::Linearized, sample::Int, c::Columns, j::Int, ::Status) = copy_column!(p.S, sample, c.S, j)

"Iterations in the linearised equation before something else is tried."
const LINEARIZED_PATIENCE = 40

"""
    iterate_linearized!(c, p, iterations; check = false)

Let the active columns go on in the linearised equation and evaluate the outcome in the equation itself; true when all
are done. A column that gets lost keeps its iterate. Without a guarantee of uniqueness a solution is taken only if it is no
farther away than the residual and the rate of the iteration before say; `check` asks whether it attracts as well.
"""
function iterate_linearized!(c::Columns{T}, p::FixedPoint{T}, iterations::Int; check = false) where {T}
    q, m, n = partner!(c), c.active, size(c.U, 1)
    lin = linearized(p, q, c)
    slope = lin.slope
    @inbounds for j in 1:m
        @simd for i in 1:n
            q.Z[i, j] = slope[i] * c.U[i, j]
        end
    end
    copyto!(q.U, 1, c.U, 1, n * m)
    multiply_add!(q.U, lin.M, q.Z, m, c.threads)
    begin_linearized!(q, lin, c, m)
    iterate!(Picard(), q, lin, iterations) || give_up!(q, lin)
    for j in 1:m
        sample = c.sample[j]
        lost = lin.outcome.status[sample] > MAX_ITERATIONS
        c.iterations[j] += lin.outcome.iterations[sample]
        lost || accept!(c, p, j, sample)
    end
    c.cold = false
    return evaluate_all!(c, p; check)
end

"The columns of the linearised equation, which share the buffers S and F with `c`."
function partner!(c::Columns{T}) where {T}
    if c.partner === nothing
        c.partner = Columns{T}(size(c.U)..., c.S, c.F)
    end
    return c.partner::Columns{T}
end

# The first t: from the last evaluation of the equation, where there is one, and else from s = v.
function begin_linearized!(q::Columns{T}, lin::Linearized{T}, c::Columns{T}, m::Int) where {T}
    fresh = all(iszero, view(c.iterations, 1:m))
    fresh && copyto!(q.S, 1, q.U, 1, size(q.U, 1) * m)
    start!(q, m)
    reset!(lin.outcome)
    q.threads = c.threads
    for j in 1:m
        q.sample[j] = c.sample[j]
        activate!(q, lin, j)
        copy_column!(q.Z, j, q.F, j)
    end
    return
end

# Column j goes on from z = f(s), s being the solution of the linearised equation.
function accept!(c::Columns{T}, p::Stationary{T}, j::Int, sample::Int) where {T}
    copy_column!(c.S, j, p.S, sample)
    distance2, _ = activate!(c, p, j)
    rate, residual = c.rate[j], c.residual[j]
    p.unique || sqrt(distance2) <= 3 * residual / (1 - min(rate, T(0.9))) || return
    copy_column!(c.Z, j, c.F, j)
    return
end

function linearized(p::Stationary{T, F, V}, q, c) where {T, F, V}
    r = p.recurrence
    return Linearized{T, typeof(p), V}(r.Q, p, r.slope, p.tol, p.floor, p.S, p.S, q.outcome)
end

function iterate!(::Chord, c::Columns{T}, p::Stationary{T}, iterations::Int) where {T}
    used = 0
    while p.recurrence.linearized && used < iterations
        block = min(LINEARIZED_PATIENCE, iterations - used)
        iterate_linearized!(c, p, block - 1; check = true) && return true
        advance!(c, one(T))
        used += block
    end
    return iterate!(Picard(), c, p, iterations - used)       # where there is no Q, the matrix being singular
end

# The solvers on generic problems. Picard and Anderson iterate as for networks; `U` of the columns, which no generic problem
# needs, holds the first residual.

function affine!(c::Columns, p::Pointwise)
    for j in 1:c.active
        apply!(c.F, p, c.Z, j, c.sample[j])
    end
    return
end

@inline function evaluate!(c::Columns{T}, p::Pointwise{T}, j::Int) where {T}
    change2 = size2 = zero(T)
    @inbounds for i in axes(c.F, 1)
        change2 += abs2(c.F[i, j] - c.Z[i, j])
        size2 += abs2(c.F[i, j])
    end
    return assess!(c, p, j, sqrt(change2), max(sqrt(size2), p.floor))
end

# As for networks, but what counts as diverged goes by the residual at the start: z may have any unit.
@inline function assess!(c::Columns{T}, p::Pointwise{T}, j::Int, residual::T, scale::T) where {T}
    @inbounds begin
        c.iterations[j] == 0 && (c.U[1, j] = residual)
        c.iterations[j] += 1
        isfinite(c.residual[j]) && (c.rate[j] = residual / c.residual[j])
        c.residual[j] = residual
        # In this order: where the norms overflow, the residual and the scale are infinite both.
        status = !isfinite(residual) ? NON_FINITE :
            residual <= p.tol * scale ? CONVERGED :
            residual > T(BLOW_UP) * max(c.U[1, j], 1 + p.floor) ? DIVERGED : nothing
    end
    return status, residual / scale
end

function finish!(c::Columns, p::Pointwise, j::Int, status::Status, residual)
    copy_column!(p.Z, c.sample[j], status == NON_FINITE ? c.Z : c.F, j)
    record!(p.outcome, c.sample[j], status, c.iterations[j], residual, c.rate[j])
    j == c.active || move_column!(c, j, c.active)
    c.active -= 1
    return
end

"Buffers of Newton's method for one sample."
struct NewtonBuffers{T}
    A::Matrix{T}
    pivots::Vector{Int}
    r::Vector{T}
    step::Vector{T}
    base::Vector{T}
end
NewtonBuffers{T}(n::Int) where {T} = NewtonBuffers{T}(zeros(T, n, n), zeros(Int, n), zeros(T, n), zeros(T, n), zeros(T, n))

function iterate!(::Newton, c::Columns{T}, p::Pointwise{T}, iterations::Int) where {T}
    w = NewtonBuffers{T}(size(c.F, 1))
    for j in c.active:-1:1
        status, residual = newton!(c, p, j, w, iterations)
        status === nothing || finish!(c, p, j, status, residual)
    end
    return c.active == 0
end

# Column j by Newton's method with a line search on the residual ‖c‖; how it ended (`nothing`: not at all), and the relative
# residual. A fixed point is judged by ‖f(z) - z‖; a root, whose f may have any unit, by the size of the Newton step, which
# estimates the error of z. Of a root column, F holds z in the end.
function newton!(c::Columns{T}, p::Pointwise{T}, j::Int, w::NewtonBuffers{T}, iterations::Int) where {T}
    sample = c.sample[j]
    size_of_residual = residual!(w.r, c, p, j)
    for _ in 1:iterations
        status, relative = nothing, T(NaN)
        if !p.root || !isfinite(size_of_residual)
            status, relative = assess!(c, p, j, size_of_residual, max(column_norm(c.F, j), p.floor))
        end
        solvable = status === nothing && newton_step!(w, p, c.Z, j, sample)
        if p.root && status === nothing
            length_of_step = solvable ? norm(w.step) : size_of_residual == 0 ? zero(T) : T(Inf)
            scale = max(column_norm(c.Z, j), p.floor)
            c.iterations[j] += 1
            isfinite(c.residual[j]) && (c.rate[j] = length_of_step / c.residual[j])
            c.residual[j] = length_of_step
            relative = length_of_step / scale
            length_of_step <= p.tol * scale && (status = CONVERGED)
        end
        if status !== nothing
            p.root && solvable && add_step!(c.Z, j, w.step)          # it is there, and as good as another iteration
            p.root && copy_column!(c.F, j, c.Z, j)
            status === CONVERGED && !p.root && repels!(w.A, p, c.Z, j, sample) && (status = UNSTABLE)
            return status, relative
        end
        p.root && !solvable && break
        size_of_residual = search_line!(w, c, p, j, size_of_residual, solvable)
        isnan(size_of_residual) && break
    end
    p.root && copy_column!(c.F, j, c.Z, j)
    return nothing, T(NaN)
end

function add_step!(Z, j, step)
    @inbounds for i in eachindex(step)
        Z[i, j] += step[i]
    end
    return
end

column_norm(A, j) = norm(view(A, :, j))

# F = f(z) and r = c(z) for column j; the norm of r.
@inline function residual!(r, c::Columns{T}, p::Pointwise{T}, j::Int) where {T}
    apply!(c.F, p, c.Z, j, c.sample[j])
    total = zero(T)
    @inbounds for i in eachindex(r)
        r[i] = p.root ? c.F[i, j] : c.F[i, j] - c.Z[i, j]
        total += abs2(r[i])
    end
    return sqrt(total)
end

# step = -A⁻¹ r; false where A is singular.
@inline function newton_step!(w::NewtonBuffers, p, Z, j, sample)
    conditions_jacobian!(w.A, p, Z, j, sample)
    lu_factor!(w.A, w.pivots) || return false
    @inbounds for i in eachindex(w.r)
        w.step[i] = -w.r[i]
    end
    lu_solve!(w.step, w.A, w.pivots)
    return all(isfinite, w.step)
end

# Move column j along the step, halved while the residual does not decrease; where that does not help, a Picard step is taken
# for a fixed point, and NaN returned for a root.
function search_line!(w::NewtonBuffers{T}, c::Columns{T}, p::Pointwise{T}, j::Int, at_base::T, solvable::Bool) where {T}
    @inbounds for i in eachindex(w.base)
        w.base[i] = c.Z[i, j]
    end
    t = one(T)
    while solvable && t >= SMALLEST_STEP
        @inbounds for i in eachindex(w.base)
            c.Z[i, j] = muladd(t, w.step[i], w.base[i])
        end
        size_of_residual = residual!(w.r, c, p, j)
        size_of_residual < (1 - T(1.0e-4) * t) * at_base && return size_of_residual
        c.iterations[j] += 1
        t /= 2
    end
    copyto!(view(c.Z, :, j), w.base)
    p.root && return T(NaN)
    residual!(w.r, c, p, j)
    copy_column!(c.Z, j, c.F, j)
    return residual!(w.r, c, p, j)
end

"Whether Picard iteration moves away from the fixed point: the spectral radius of ∂f/∂z is 1 or more. `J` is overwritten."
function repels!(J::Matrix{T}, p::Pointwise{T}, Z, j, sample) where {T}
    conditions_jacobian!(J, p, Z, j, sample)
    for i in axes(J, 1)
        J[i, i] += one(T)
    end
    length(J) == 1 && return abs(J[1]) >= 1
    return repels(J, ones(T, size(J, 1), 1))
end

function iterate!(s::NLsolver, c::Columns{T}, p::Pointwise{T}, iterations::Int) where {T}
    w = NewtonBuffers{T}(size(c.F, 1))
    for j in c.active:-1:1
        status, residual = nlsolve!(s, c, p, j, w, iterations)
        status === nothing || finish!(c, p, j, status, residual)
    end
    return c.active == 0
end

# NLsolve is compiled once, for functions it knows nothing of.
struct Erased
    call::Any
end
(e::Erased)(out, z) = (e.call(out, z); nothing)

function nlsolve!(s::NLsolver, c::Columns{T}, p::Pointwise{T}, j::Int, w::NewtonBuffers{T}, iterations::Int) where {T}
    sample = c.sample[j]
    column(z) = (copyto!(view(c.Z, :, j), z); j)
    conditions!(r, z) = residual!(r, c, p, column(z))
    jacobian!(J, z) = conditions_jacobian!(J, p, c.Z, column(z), sample)
    start = c.Z[:, j]
    target = p.tol * max(residual!(w.r, c, p, j), p.floor) / 2
    verdict = (nothing, T(NaN))
    for _ in 1:3
        result = erased_nlsolve(s.method, Erased(conditions!), Erased(jacobian!), start, target, iterations)
        result === nothing && break
        c.iterations[j] += result.f_calls
        all(isfinite, result.zero) || break
        copyto!(start, result.zero)
        # NLsolve stops on an absolute residual; the verdict, and the last digits, are Newton's.
        verdict = newton!(c, p, column(start), w, 3)
        verdict[1] === nothing || return verdict
        target /= 100
    end
    column(start)
    residual!(w.r, c, p, j)
    p.root && copy_column!(c.F, j, c.Z, j)
    return verdict
end

function erased_nlsolve(method, conditions!, jacobian!, start::Vector{T}, ftol, iterations) where {T}
    try
        return nlsolve(conditions!, jacobian!, copy(start); method, ftol, xtol = zero(T), iterations)
    catch error
        error isa Union{LinearAlgebra.SingularException, LinearAlgebra.LAPACKException, NLsolve.IsFiniteException} ||
            rethrow()
        return nothing
    end
end

# Fixed points: Picard iteration while it is fast, else Newton's method, whose result counts if it attracts; else more of
# Picard iteration, and a trust region in the end. Roots: Newton's method, then the trust region.
function iterate!(::Auto, c::Columns{T}, p::Pointwise{T}, iterations::Int) where {T}
    if p.root
        return iterate!(Newton(), c, p, min(iterations, 100)) || iterate!(NLsolver(), c, p, min(iterations, 200))
    end
    n = size(c.F, 1)
    patience = 4 * (n + 2)
    used = 0
    while used < iterations && c.active > 0
        block = min(AUTO_BLOCK, iterations - used)
        iterate!(Picard(), c, p, block) && break
        used += block
        for j in c.active:-1:1
            predicted_iterations(c, p, j) > patience && set_aside!(c, j)
        end
    end
    reclaim!(c) == 0 && return true
    start = zeros(T, n, 1)
    w = NewtonBuffers{T}(n)
    for j in c.active:-1:1
        copy_column!(start, 1, c.Z, j)
        status, residual = newton!(c, p, j, w, 50)
        status === CONVERGED ? finish!(c, p, j, status, residual) : copy_column!(c.Z, j, start, 1)
    end
    c.active == 0 && return true
    iterate!(Picard(), c, p, max(iterations - used, 1)) && return true
    return iterate!(NLsolver(), c, p, min(iterations, 200))
end

"Samples worked on together."
const GENERIC_TILE = 256

const ROOT_SOLVERS = Union{Auto, Newton, NLsolver}
const FIXED_POINT_SOLVERS = Union{Auto, Picard, Anderson, Newton, NLsolver}

"""
    solve!(Z, outcome, problem, solver)

Solve a [`GenericProblem`](@ref) from the start `Z` (n × samples), which becomes the solution; `outcome` says how each sample
ended.
"""
function solve!(Z::Matrix{T}, outcome::Outcome, problem::GenericProblem{T}, solver::Solver) where {T}
    solver isa (problem.root ? ROOT_SOLVERS : FIXED_POINT_SOLVERS) ||
        throw(ArgumentError("$(nameof(typeof(solver))) does not solve $(problem.root ? "f(z) = 0" : "z = f(z) in general")"))
    reset!(outcome)
    # `f` may be newer than this code.
    Base.invokelatest(solve_tiles!, pointwise(problem, Z, tolerance(solver, T), outcome), solver)
    return
end

function solve_tiles!(p::Pointwise{T}, solver::Solver) where {T}
    n, samples = size(p.Z)
    c = Columns{T}(n, min(samples, GENERIC_TILE))
    for first in 1:GENERIC_TILE:samples
        m = min(GENERIC_TILE, samples - first + 1)
        copyto!(c.Z, 1, p.Z, (first - 1) * n + 1, n * m)
        start!(c, m)
        for j in 1:m
            c.sample[j] = first + j - 1
        end
        solve!(solver, c, p)
    end
    return
end

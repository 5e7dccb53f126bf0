# The methods that solve z = g(u + M z) for all columns of a batch, the equilibrium of a stage or its adjoint system.

"Iterations of `Auto` on a device beyond which a sample is left to the host."
const PATIENCE = 300

"Iterations between two looks of the host at what is still running."
const LOOK = 4

"The equation z = g(U + M z): iterates, room for the arguments, drives, matrix, right-hand side and its coefficients."
struct BatchEquation{A, M, G, D}
    Z::A
    S::A
    U::A
    M::M
    g::G
    D::D
end

"S = U + M Z"
affine!(q::BatchEquation) = mul!(copyto!(q.S, q.U), q.M, q.Z, true, true)

"One evaluation for all columns that are running, see [`step!`](@ref)."
function step!(ws::DeviceWorkspace, q::BatchEquation, progress, record, rule, F = nothing)
    affine!(q)
    range = (WORK_ITEMS, cld(size(q.Z, 2), GROUP) * GROUP)
    step!(ws.backend, (WORK_ITEMS, GROUP))(q.Z, F, progress, record, q.S, q.g, q.D, rule; ndrange = range)
    return
end

"""
    iterate!(solver, ws, q, progress, record, rule)

Let the columns that are running come to their end, in `record`, or to be left to the host, `progress.abandoned`.
"""
function iterate!(::Union{Auto, Picard}, ws::DeviceWorkspace, q::BatchEquation, progress, record, rule)
    approach!(ws, q, progress, rule)
    return iterate_plainly!(ws, q, progress, record, rule)
end

function iterate_plainly!(ws::DeviceWorkspace, q::BatchEquation, progress, record, rule)
    n, samples = size(q.Z)
    if n <= FUSED_NEURONS
        tiling = Tiling(n, eltype(q.Z))
        items = work_items(tiling)
        picard!(ws.backend, items)(
            q.Z, progress, record, q.U, q.M, q.g, q.D, rule, tiling; ndrange = items * cld(samples, samples_of(tiling))
        )
        return
    end
    for k in 1:rule.limit
        step!(ws, q, progress, record, rule)
        look(progress, k) || break
    end
    return
end

"""
    approach!(ws, q, progress, rule)

Iterate in lower precision, as far as its rounding allows, where there is work enough for that to pay (`ws.coarse_first`): in single
precision where double is asked for, and with coarse products where single is, if the device has them and they are products of its
library. Columns that converge so go on in the precision asked for from where they are, the others from where they began: what is
decided of them, and how exactly they are solved, remains the same.
"""
function approach!(ws::DeviceWorkspace, q::BatchEquation, progress, rule)
    n, samples = size(q.Z)
    n^2 * samples >= ws.coarse_first && approach_coarsely!(ws, q, progress, rule)
    return
end

function approach_coarsely!(ws::DeviceWorkspace{Float64}, q::BatchEquation, progress, rule)
    Z = Float32.(q.Z)
    single = BatchEquation(Z, similar(Z), Float32.(q.U), Float32.(q.M), q.g, q.D === nothing ? nothing : Float32.(q.D))
    return approach_by!(single, tolerance(Picard(), Float32), ws, q, progress, rule)
end

function approach_coarsely!(ws::DeviceWorkspace{Float32}, q::BatchEquation, progress, rule)
    size(q.Z, 1) > FUSED_NEURONS && with_coarse_products(ws.backend) do
        approach_by!(BatchEquation(copy(q.Z), q.S, q.U, q.M, q.g, q.D), 4 * COARSE_ROUNDING, ws, q, progress, rule)
    end
    return
end

# By the iterates of `coarse`, the equation in lower precision, to the tolerance `tol`.
function approach_by!(coarse::BatchEquation, tol, ws::DeviceWorkspace, q::BatchEquation, progress, rule)
    T, samples = eltype(coarse.Z), size(q.Z, 2)
    course, record = progress_of(ws, samples, T), record_of(ws, samples, T)
    course.running .= progress.running
    (; damping, patience) = rule
    floor, limit = max(rule.floor, floatmin(T)), min(rule.limit, PATIENCE)
    rough = Rule{T}(; tol, floor, damping, limit, patience, latest = damping == 1)
    iterate_plainly!(ws, coarse, course, record, rough)
    # One that converges at once may repel, which is not to be covered up.
    near = progress.running .& .!course.abandoned .& (record.status .== CONVERGED) .& (1 .< course.count .< rule.limit)
    q.Z .= ifelse.(reshape(near, 1, :), coarse.Z, q.Z)
    foreach((to, from) -> to .= ifelse.(near, from, to), (progress.count, progress.change, progress.rate), (course.count, course.change, course.rate))
    return
end

"Whether any column is running, as far as the host knows."
function look(progress, k)
    k % LOOK == 0 || return true
    check_interrupt()
    return any(progress.running)
end

# --- Anderson acceleration ----------------------------------------------------------------------------------------------

"""
The history of every column, as on the CPU: a ring of differences of residuals `ΔR` and values `ΔF`, their Gram matrix, how many
there are, the last residual vector `R` and value `F`, and ‖F - Z‖ of the iteration before; and room for the normal equations.
"""
function history_of(Z::AbstractMatrix{T}, memory::Int) where {T}
    n, samples = size(Z)
    blank(dimensions...) = fill!(similar(Z, dimensions...), 0)
    return (;
        ΔR = blank(n, memory, samples), ΔF = blank(n, memory, samples), R = blank(n, samples), F = blank(n, samples),
        gram = blank(memory, memory, samples), G = blank(memory, memory, samples), γ = blank(memory, samples), b = blank(memory, samples),
        change = fill!(similar(Z, samples), T(Inf)), differences = fill!(similar(Z, Int32, samples), 0),
    )
end

function iterate!(s::Anderson, ws::DeviceWorkspace, q::BatchEquation, progress, record, rule)
    history, F, newest = history_of(q.Z, s.memory), similar(q.Z), 0
    range = (WORK_ITEMS, cld(size(q.Z, 2), GROUP) * GROUP)
    for k in 1:rule.limit
        step!(ws, q, progress, record, rule, F)
        look(progress, k) || break
        newest = k == 1 ? 0 : mod1(newest + 1, s.memory)
        accelerate!(ws.backend, (WORK_ITEMS, GROUP))(
            q.Z, F, history, progress.running, progress.change, Int32(newest), eltype(F)(s.damping), max(eltype(F)(s.ridge), eps(eltype(F))),
            Val(s.memory); ndrange = range
        )
    end
    return
end

"The next iterate of Anderson's method for the columns that are `running`; `newest` is the place of the newest difference."
@kernel function accelerate!(Z, @Const(F), history, @Const(running), @Const(change), newest, damping, ridge, memory::Val{m}) where {m}
    lane, column = @index(Local, NTuple)
    _, j = @index(Global, NTuple)
    @uniform n = size(Z, 1)
    @uniform samples = size(Z, 2)
    sums = @localmem eltype(Z) (2, m, WORK_ITEMS, GROUP)

    if j <= samples && @inbounds(running[j])
        i = lane
        while i <= n
            @inbounds begin
                r = F[i, j] - Z[i, j]
                if newest > 0
                    history.ΔR[i, newest, j] = r - history.R[i, j]
                    history.ΔF[i, newest, j] = F[i, j] - history.F[i, j]
                end
                history.R[i, j], history.F[i, j] = r, F[i, j]
            end
            i += WORK_ITEMS
        end
        for place in 1:m
            inner, side = zero(eltype(Z)), zero(eltype(Z))
            i = lane
            while i <= n && newest > 0
                @inbounds inner = muladd(history.ΔR[i, place, j], history.ΔR[i, newest, j], inner)
                @inbounds side = muladd(history.ΔR[i, place, j], history.R[i, j], side)
                i += WORK_ITEMS
            end
            @inbounds sums[1, place, lane, column], sums[2, place, lane, column] = inner, side
        end
    end
    @synchronize
    if lane == 1 && j <= samples && @inbounds(running[j])
        @inbounds count = history.differences[j]
        newest > 0 && (count = @inbounds change[j] > 2 * history.change[j] ? zero(count) : min(count + one(count), oftype(count, m)))
        for place in 1:(count > 0 ? m : 0)
            inner, side = zero(eltype(Z)), zero(eltype(Z))
            for l in 1:WORK_ITEMS
                @inbounds inner += sums[1, place, l, column]
                @inbounds side += sums[2, place, l, column]
            end
            @inbounds history.gram[place, newest, j] = history.gram[newest, place, j] = inner
            @inbounds history.b[place, j] = side
        end
        solved = count > 0 && solve_history!(history, j, count, newest, ridge, m)
        @inbounds history.differences[j] = solved ? count : zero(count)
        @inbounds history.change[j] = change[j]
    end
    @synchronize
    if j <= samples && @inbounds(running[j])
        i = lane
        while i <= n
            @inbounds z = history.F[i, j] - (1 - damping) * history.R[i, j]
            for l in 1:@inbounds(history.differences[j])
                place = mod1(newest - l + 1, m)
                @inbounds z -= history.γ[l, j] * (history.ΔF[i, place, j] - (1 - damping) * history.ΔR[i, place, j])
            end
            @inbounds Z[i, j] = z
            i += WORK_ITEMS
        end
    end
end

# The normal equations of column j for its `count` newest differences; false where they cannot be solved.
@inline function solve_history!(h, j, count, newest, ridge, m)
    place(l) = mod1(newest - l + 1, m)
    G, γ = view(h.G, :, :, j), view(h.γ, :, j)
    for l in 1:count
        for k in 1:count
            @inbounds G[k, l] = h.gram[place(k), place(l), j]
        end
        @inbounds γ[l] = h.b[place(l), j]
    end
    return @inline solve_regularised!(γ, G, γ, Int(count), ridge)
end

# --- Newton's method ----------------------------------------------------------------------------------------------------

"The line search of every column, as on the CPU; `fresh` columns need a direction."
function line_search_of(Z::AbstractMatrix{T}) where {T}
    filled(value) = fill!(similar(Z, typeof(value), size(Z, 2)), value)
    return (;
        base = zero(Z), picard = zero(Z), direction = zero(Z),
        step = filled(zero(T)), residual = filled(T(Inf)), fresh = filled(false), singular = filled(false),
    )
end

function iterate!(::Newton, ws::DeviceWorkspace, q::BatchEquation, progress, record, rule)
    line, F, D = line_search_of(q.Z), similar(q.Z), similar(q.Z)
    n, samples = size(q.Z)
    range = (WORK_ITEMS, cld(samples, GROUP) * GROUP)
    for _ in 1:rule.limit
        check_interrupt()
        step!(ws, q, progress, record, rule, F)
        any(progress.running) || break
        search!(ws.backend, (WORK_ITEMS, GROUP))(q.Z, F, line, progress.running, progress.change; ndrange = range)
        fresh = findall(on_host(line.fresh))
        isempty(fresh) && continue
        slopes_at!(ws.backend)(D, q.S, F, q.g.f; ndrange = (n, samples))
        picard = F .- line.base
        step = copy(picard)
        solve_each!(step, ws, line.singular, q.M, D, nothing, picard, fresh)
        # Where the matrix is singular, the direction is that of the Picard step; columns that search along theirs keep it.
        mine, solved = reshape(line.fresh, 1, :), all(isfinite, step; dims = 1) .& .!reshape(line.singular, 1, :)
        line.direction .= ifelse.(mine, ifelse.(solved, step, picard), line.direction)
        q.Z .= ifelse.(mine, line.base .+ line.direction, q.Z)
    end
    record.status .= ifelse.(progress.started .& (record.status .== MAX_ITERATIONS) .& line.singular, SINGULAR, record.status)
    return
end

"Halve the step of the columns whose residual has not decreased; the others begin a new one from where they are."
@kernel function search!(Z, @Const(F), line, @Const(running), change)
    lane, _ = @index(Local, NTuple)
    _, j = @index(Global, NTuple)
    @uniform n = size(Z, 1)
    @uniform samples = size(Z, 2)

    if j <= samples && @inbounds(running[j])
        @inbounds t, halved = line.step[j] / 2, fails(line, change, j)
        i = lane
        while i <= n
            @inbounds if halved
                Z[i, j] = t < oftype(t, SMALLEST_STEP) ? line.picard[i, j] : muladd(t, line.direction[i, j], line.base[i, j])
            else
                line.base[i, j], line.picard[i, j] = Z[i, j], F[i, j]
            end
            i += WORK_ITEMS
        end
    end
    @synchronize
    if lane == 1 && j <= samples
        @inbounds begin
            go = running[j]
            halved = go && fails(line, change, j)
            line.fresh[j] = go && !halved
            if halved
                t = line.step[j] / 2
                line.step[j] = t < oftype(t, SMALLEST_STEP) ? zero(t) : t
                change[j] = line.residual[j]
            elseif go
                line.step[j], line.residual[j] = 1, change[j]
            end
        end
    end
end
@inline fails(line, change, j) = @inbounds line.step[j] > 0 && !decreases(change[j], line.residual[j], line.step[j])

# --- the chord method ---------------------------------------------------------------------------------------------------

"""
Let the columns come to their equilibrium in the linearised equation: with t = f(s) - d̄ s,

    s = u + Q D̄ u + Q t,    Q = (I - R D̄)⁻¹ R,

which is a fixed point in t. What it finds is taken up by Picard iteration, for a few steps; the host solves what is left.
"""
function iterate!(s::Chord, ws::DeviceWorkspace{T}, q::BatchEquation, progress, record, rule) where {T}
    slope = mean_slopes(ws, q)
    Q = rule.limit > 1 ? chord_matrix(ws, q, slope) : nothing
    if Q !== nothing
        samples = size(q.Z, 2)
        value(S) = (F = similar(S); activate!(ws.backend)(F, S, q.g.f; ndrange = size(F)); F)
        F = value(affine!(q))
        linear = BatchEquation(F .- slope .* q.S, similar(F), q.U .+ Q * (slope .* q.U), Q, Deviating(q.g.f), slope)
        found, on = record_of(ws, samples), progress_of(ws, samples)
        on.running .= progress.running
        limit = min(rule.limit - 1, LINEARIZED_PATIENCE)          # one evaluation at least is that of the equation itself
        iterate!(Picard(), ws, linear, on, found, Rule{T}(; rule.tol, rule.floor, limit))
        solution = value(affine!(linear))
        # A solution that is far away may be another than the one that attracts.
        distance(A) = sqrt.(sum(abs2, A .- q.Z; dims = 1))
        near = rule.settled .| (distance(solution) .<= trust_radius.(distance(F), zero(T)))
        taken = reshape(on.started .& (found.status .== CONVERGED), 1, :) .& near
        q.Z .= ifelse.(taken, solution, q.Z)
        progress.count .= ifelse.(vec(taken), on.count, progress.count)
    end
    for _ in 1:min(rule.limit, LOOK)
        step!(ws, q, progress, record, rule)
    end
    progress.abandoned .|= progress.running
    return
end

"The mean slopes of a few samples that are spread over the batch, after a few Picard iterations, and are finite then."
function mean_slopes(ws::DeviceWorkspace, q::BatchEquation)
    samples = size(q.Z, 2)
    pilots = 1:cld(samples, PILOTS):samples
    z, u = q.Z[:, pilots], q.U[:, pilots]
    s, d = similar(z), similar(z)
    for _ in 1:PILOT_ITERATIONS
        mul!(copyto!(s, u), q.M, z, true, true)
        activate!(ws.backend)(z, s, q.g.f; ndrange = size(z))
    end
    slopes_at!(ws.backend)(d, s, z, q.g.f; ndrange = size(d))
    finite = all(isfinite, d; dims = 1)
    return vec(sum(ifelse.(finite, d, zero(eltype(d))); dims = 2) ./ sum(finite; dims = 2))
end

"Q on the device; nothing where I - R D̄ is singular."
function chord_matrix(ws::DeviceWorkspace, q::BatchEquation, slope)
    R, d = on_host(q.M), on_host(slope)
    A = lu!(I - R .* d'; check = false)
    issuccess(A) && !is_singular(A.factors) || return nothing
    Q = A \ R
    return all(isfinite, Q) ? on_device(ws, Q) : nothing
end

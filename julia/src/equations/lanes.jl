# Many samples of an equation of a few unknowns: side by side in vector registers, and on all threads. Samples that do not converge
# there within a few evaluations are solved one by one, from the start, like the samples of any other equation.

"Evaluations of f before a sample is solved on its own."
const LANE_EVALUATIONS = 30

"Buffers for samples side by side: ∂c/∂z, and right-hand sides of a linear system with it."
struct LaneBuffers
    J::Matrix{Vec}
    B::Matrix{Vec}
end
LaneBuffers(n::Int) = LaneBuffers(zeros(Vec, n, n), zeros(Vec, n, n))

# --- what f is given, and what it gives ------------------------------------------------------------------------

@inline at(x::Shared, b::Block) = x.value
@inline at(x::PerSample{0}, b::Block) = load(x.array, b)
@inline at(x::PerSample{K}, b::Block) where {K} = Short(ntuple(i -> load(x.array, b, i, K), Val(K)))
at(::PerSample{-1}, b::Block) = throw(ArgumentError("arrays do not run side by side"))
@inline arguments(p::Equation, b::Block) = map(x -> at(x, b), p.args)

has_lanes(::Shared) = true
has_lanes(x::PerSample{K}) where {K} = K >= 0 && eltype(x.array) <: Union{Float32, Float64}

@inline load_columns(Z::Matrix, b::Block, ::Val{K}) where {K} = Short(ntuple(i -> load(Z, b, i, K), Val(K)))

"f(z), and J = ∂c/∂z."
@inline function evaluate!(J::Matrix{Vec}, p::Equation{T, K}, z::Short{K, Vec}, args, root::Val) where {T, K}
    y = checked(@inline(p.f(Short(ntuple(k -> variable(z[k], k, Val(K)), Val(K))), args...)), K)
    put_derivatives!(J, y, root, Val(K))
    return Short(ntuple(i -> (@inline; value_of(@inbounds y[i])), Val(K)))
end
# Row by row: the result of f may be an array of long jets.
@inline put_derivatives!(J::Matrix{Vec}, y, root::Val, K::Val) = ntuple(i -> (@inline; put_row!(J, @inbounds(y[i]), i, root, K)), K)
@inline put_row!(J::Matrix{Vec}, y, i::Int, root::Val, K::Val) =
    (ntuple(k -> (@inline; @inbounds J[i, k] = derivative_of_condition(y, i, k, root); nothing), K); nothing)
@inline derivative_of_condition(y, i, k, ::Val{true}) = partial_of(y, k)
@inline derivative_of_condition(y, i, k, ::Val{false}) = i == k ? partial_of(y, k) - 1.0 : partial_of(y, k)

# For samples side by side.
@inline measure(x::Short{1, Vec}, weights::Vector{Float64} = NO_WEIGHTS) =
    isempty(weights) ? abs(x[1]) : abs(x[1]) * @inbounds weights[1]
@inline function measure(x::Short{K, Vec}, weights::Vector{Float64} = NO_WEIGHTS) where {K}
    y = ntuple(i -> isempty(weights) ? x[i] : x[i] * @inbounds(weights[i]), Val(K))
    total = sum(map(abs2, y))
    far = !((total > 1.0e-280) & (total < 1.0e280))
    return any(far) ? ifelse(far, measure_scaled(map(abs, y)), sqrt(total)) : sqrt(total)
end
@noinline function measure_scaled(y::NTuple{K, Vec}) where {K}
    largest = reduce(max, y)
    usual = (largest > 0.0) & (largest < Inf)
    return ifelse(usual, largest * sqrt(sum(map(x -> abs2(x / largest), y))), largest)
end

# Not written inline: a closure over variables that change is slow.
@inline choose(m::Mask, a::Short{K}, b::Short{K}) where {K} = Short(map((x, y) -> ifelse(m, x, y), a.entries, b.entries))
@inline plus(a::Short{K}, b::Short{K}, t::Vec = one(Vec)) where {K} = Short(map((x, y) -> muladd(t, y, x), a.entries, b.entries))
@inline minus(a::Short{K}, b::Short{K}) where {K} = Short(map(-, a.entries, b.entries))
@inline in_registers(x::Short) = map(in_registers, x.entries)
@inline out_of_registers(x::Register) = Vec(x)
@inline out_of_registers(x::NTuple{K, Register}) where {K} = Short(map(Vec, x))
@inline all_finite(x::Short) = reduce(&, map(isfinite, x.entries))

# --- linear systems --------------------------------------------------------------------------------------------

"B ← A⁻¹ B by elimination with partial pivoting; not finite where A has no inverse. A is overwritten."
function divide!(A::Matrix{Vec}, B::Matrix{Vec}, columns::Int)
    n = size(A, 1)
    @inbounds for k in 1:n
        for i in (k + 1):n
            larger = abs(A[i, k]) > abs(A[k, k])
            any(larger) || continue
            for j in k:n
                A[k, j], A[i, j] = ifelse(larger, A[i, j], A[k, j]), ifelse(larger, A[k, j], A[i, j])
            end
            for j in 1:columns
                B[k, j], B[i, j] = ifelse(larger, B[i, j], B[k, j]), ifelse(larger, B[k, j], B[i, j])
            end
        end
        pivot = inv(A[k, k])
        for i in (k + 1):n
            factor = -(A[i, k] * pivot)
            for j in (k + 1):n
                A[i, j] = muladd(factor, A[k, j], A[i, j])
            end
            for j in 1:columns
                B[i, j] = muladd(factor, B[k, j], B[i, j])
            end
        end
    end
    @inbounds for j in 1:columns, k in n:-1:1
        x = B[k, j] / A[k, k]
        B[k, j] = x
        for i in 1:(k - 1)
            B[i, j] = muladd(-A[i, k], x, B[i, j])
        end
    end
    return B
end

# The Newton step; not finite where there is none.
@inline newton_step!(w::LaneBuffers, c::Short{1}) = Short((-c[1] / @inbounds(w.J[1]),))
@inline function newton_step!(w::LaneBuffers, c::Short{K}) where {K}
    ntuple(i -> (@inbounds w.B[i] = -c[i]; nothing), Val(K))
    divide!(w.J, w.B, 1)
    return Short(ntuple(i -> @inbounds(w.B[i]), Val(K)))
end

# --- Newton's method -------------------------------------------------------------------------------------------

"The outcome of samples side by side: their iterates, which have converged, where ∂c/∂z is known to be regular, and their counts."
struct LaneOutcome{K}
    z::Short{K, Vec}
    converged::Mask
    regular::Mask
    evaluations::Vec
    residual::Vec
    rate::Vec
end

"""
    newton!(w, p, z, args, limit, tol, root)

Newton's method as for one sample (`newton!`, `search_line!`, `near!`); each sample is evaluated once per round. Samples that do not
converge need more than Newton steps with halving.
"""
@inline function newton!(w::LaneBuffers, p::Equation{T, K}, z::Short{K, Vec}, args, limit::Int, tol::Float64, root::Val{R}) where {T, K, R}
    if R
        ended, usual = whole_steps!(w, p, z, args, limit, tol)
        usual && return ended
        return (@late damped_steps!(w, p, z, args, limit, tol, root))::LaneOutcome{K}
    end
    return damped_steps!(w, p, z, args, limit, tol, root)
end

# Most samples need whole steps only, and come to a root that is not zero. This is what `damped_steps!` does for them; not `usual` where
# it would do something else for one of the block. The derivative of one unknown is regular at the root
# where it has changed by less than a quarter on a step that was longer than rounding, and steps have shrunk and it been steady since: so
# it is within the error of the solution.
@inline function whole_steps!(w::LaneBuffers, p::Equation{T, K}, z::Short{K, Vec}, args, limit::Int, tol::Float64) where {T, K}
    active, usual = ALL, true
    regular = NONE
    infinite, none = Vec(Inf), zero(Vec)
    kept = map(in_registers, (z, measure(z, p.weights), none, infinite, infinite, infinite, none, none))
    for k in 1:min(limit, LANE_EVALUATIONS)
        z, largest, size, merit_before, distance, last_distance, evaluations, last_derivative = map(out_of_registers, kept)
        c = evaluate!(w.J, p, z, args, Val(true))
        derivative = K == 1 ? @inbounds(w.J[1]) : none
        merit = measure(c)
        step = newton_step!(w, c)
        here, now = measure(z, p.weights), measure(step, p.weights)
        isempty(p.weights) || (here = max(here, Vec(sqrt(K))))
        usual = all(!active | (merit < (1.0 - 1.0e-4) * merit_before) & (here < Inf) & (now < Inf))
        size = ifelse(active, here, size)
        largest = ifelse(active & (here > largest), here, largest)
        last_distance, distance = ifelse(active, distance, last_distance), ifelse(active, now, distance)
        near = active & (now <= tol * here)
        settled = active & (now <= Float64(eps(T)) * largest)
        usual &= !any(settled & !near) && !any(near & (merit > LEFT_OF_CONDITIONS * merit_before))
        usual &= k > 1 || !any(near & (merit > 0.0))
        z = choose(active, plus(z, step), z)
        evaluations = ifelse(near, Vec(k), evaluations)
        if K == 1
            steady = (abs(derivative - last_derivative) <= LARGEST_CHANGE * abs(last_derivative)) & (4.0 * now <= last_distance)
            steady &= regular | (last_distance >= sqrt(Float64(eps(T))) * here)
            regular = ifelse(active, steady, regular)
        end
        active &= !near
        kept = map(in_registers, (z, largest, size, merit, distance, last_distance, evaluations, derivative))
        usual && any(active) || break
    end
    z, largest, size, _, distance, last_distance, evaluations, _ = map(out_of_registers, kept)
    usual &= !any((last_distance > far_step(tol) * largest) & (last_distance < Inf))
    related = max(size, Float64(eps(T)) / tol * largest)
    return ended_at(z, !active, regular, evaluations, distance, last_distance, related), usual && !any(active)
end

@noinline function damped_steps!(w::LaneBuffers, p::Equation{T, K}, z::Short{K, Vec}, args, limit::Int, tol::Float64, root::Val{R}) where {T, K, R}
    active = ALL
    found = NONE
    size, infinite = measure(z, p.weights), Vec(Inf)
    kept = map(in_registers, (z, z, z, zero(Vec), size, infinite, infinite, infinite, zero(Vec), one(Vec), zero(Vec)))
    for k in 1:min(limit, LANE_EVALUATIONS)
        z, base, step, largest, outset, distance, last_distance, related, evaluations, t, merit_before = map(out_of_registers, kept)
        value = evaluate!(w.J, p, z, args, root)
        c = R ? value : minus(value, z)
        merit = measure(c, R ? NO_WEIGHTS : p.weights)
        moved = k == 1 ? active & isfinite(merit) : active & decreases(merit, merit_before, t)
        k == 1 && (active = moved)

        # The state of the samples that have moved.
        new_step = newton_step!(w, c)
        size = measure(R ? z : value, p.weights)
        isempty(p.weights) || (size = max(size, Vec(sqrt(K))))
        now = R ? measure(new_step, p.weights) : merit
        valid = moved & all_finite(new_step) & isfinite(size)
        largest = ifelse(valid, max(largest, size), largest)
        last_distance, distance = ifelse(valid, distance, last_distance), ifelse(valid, now, distance)
        rounding = Float64(eps(T)) * largest
        related = ifelse(valid, max(size, rounding / tol), related)
        later = last_distance < Inf
        near = valid & ((distance <= tol * size) | (distance == 0.0))
        R || (near |= valid & (distance <= rounding) & later & (distance >= last_distance))
        lingering = valid & !near & (distance <= rounding)
        lingering &= later & (distance > SLOW * last_distance) | (distance <= Float64(eps(T)) * rounding)
        if R
            near &= t == 1.0          # after part of a step f may jump, see `jumps!`
            doubtful = near & (merit > 0.0) & ((last_distance == Inf) | (merit > LEFT_OF_CONDITIONS * merit_before))
            if any(doubtful)
                doubtful &= !is_steady!(w, p, z, new_step, args)
                near &= !doubtful
                distance = ifelse(doubtful, Vec(Inf), distance)
            end
            sudden = near & (last_distance > far_step(tol) * largest) & (last_distance < Inf)
            if any(sudden)
                sudden &= !responds!(w, p, z, base, args)
                near &= !sudden
                valid &= !sudden
            end
            z = choose(near, plus(z, new_step), z)
        else
            k == 1 && (outset = max(outset, size))
            valid &= near | (merit <= BLOW_UP * outset)
            z = choose(near, value, z)
        end
        if any(lingering)
            zero = minus(z, z)
            vanishing = lingering & (measure(evaluate!(w.J, p, zero, args, root)) == 0.0)
            valid &= vanishing | !lingering
            near |= vanishing
            z, distance = choose(vanishing, zero, z), ifelse(vanishing, Vec(0.0), distance)
        end
        found |= near
        evaluations = ifelse(near, Vec(k), evaluations)
        active &= !near & (valid | !moved)

        # Their next iterates: a whole step on, or half of the last one.
        base, step = choose(moved, z, base), choose(moved, new_step, step)
        merit_before = ifelse(moved, merit, merit_before)
        t = ifelse(moved, one(Vec), 0.5 * t)
        active &= t >= (R ? SMALLEST_ROOT_STEP : SMALLEST_STEP)
        z = choose(active, plus(base, step, t), z)
        kept = map(in_registers, (z, base, step, largest, outset, distance, last_distance, related, evaluations, t, merit_before))
        any(active) || break
    end
    z, _, _, _, _, distance, last_distance, related, evaluations, _, _ = map(out_of_registers, kept)
    return ended_at(z, found, NONE, evaluations, distance, last_distance, related)
end

@inline function ended_at(z, converged::Mask, regular::Mask, evaluations, distance, last_distance, related)
    moving = distance > 0.0
    residual = ifelse(moving, distance / related, zero(Vec))
    return LaneOutcome(z, converged, regular, evaluations, residual, ifelse(moving & (last_distance < Inf), distance / last_distance, zero(Vec)))
end

# As for one sample.
@noinline function is_steady!(w::LaneBuffers, p::Equation{T, K}, z::Short{K, Vec}, step::Short{K, Vec}, args) where {T, K}
    there = Short(ntuple(i -> z[i] + 2.0 * step[i] + Float64(8eps(T)) * z[i], Val(K)))
    evaluate!(w.J, p, there, args, Val(true))
    copyto!(w.B, w.J)
    evaluate!(w.J, p, z, args, Val(true))
    w.B .-= w.J
    divide!(w.J, w.B, K)
    return largest_column_sum(w.B) <= 0.5
end

@noinline function responds!(w::LaneBuffers, p::Equation{T, K}, z::Short{K, Vec}, base::Short{K, Vec}, args) where {T, K}
    there = plus(z, minus(base, z), Vec(BACKSTEP))
    expected = minus(there, z)
    found = evaluate!(w.J, p, there, args, Val(true))
    found = newton_step!(w, minus(evaluate!(w.J, p, z, args, Val(true)), found))
    each = reduce(&, ntuple(k -> is_response(found[k], expected[k]), Val(K)))
    return each & !(measure(found, p.weights) > RESPONSE * measure(expected, p.weights))
end

# --- solvers ---------------------------------------------------------------------------------------------------

"Whether the solver has a method for samples side by side: it begins with Newton's."
may_run_in_lanes(::Solver, ::AbstractEquation) = false
may_run_in_lanes(::Newton, ::AbstractEquation) = true
may_run_in_lanes(::Auto, p::AbstractEquation) = p.root

@inline solve_in_lanes!(::Newton, w::LaneBuffers, p, z, args, limit::Int, tol, root::Val) =
    attracting!(w, p, args, newton!(w, p, z, args, limit, tol, root), tol, root)

@inline solve_in_lanes!(::Auto, w::LaneBuffers, p, z, args, limit::Int, tol, root::Val{true}) =
    newton!(w, p, z, args, min(limit, max(ceil(Int, ATTEMPT_SHARES[1] * limit), LEAST_ATTEMPT)), tol, root)

"Those of the fixed points found that attract and are where they were found, as far as the norm of ∂f/∂z proves."
@inline attracting!(w, p, args, ended::LaneOutcome, tol, ::Val{true}) = ended
@inline function attracting!(w::LaneBuffers, p::Equation{T, K}, args, ended::LaneOutcome, tol, ::Val{false}) where {T, K}
    any(ended.converged) || return ended
    evaluate!(w.J, p, ended.z, args, Val(true))
    rate = largest_column_sum(w.J)
    attracts = (rate < 1.0) & (ended.residual <= far_step(tol) * (1.0 - rate))
    return LaneOutcome(ended.z, ended.converged & attracts, NONE, ended.evaluations, ended.residual, ended.rate)
end

"Solve the samples of a block; those that do not converge side by side one by one."
@inline function solve_block!(w::LaneBuffers, s::Iteration, Z, outcome::Outcome, regular, p::Equation{T, K}, solver, tol, b::Block, root::Val) where {T, K}
    ended = solve_in_lanes!(solver, w, p, load_columns(Z, b, Val(K)), arguments(p, b), solver.max_iterations, tol, root)
    converged = T == Float64 ? ended.converged : ended.converged & (measure(ended.z) < Float64(floatmax(T)))
    if is_full(b) && all(converged)
        ntuple(i -> store!(Z, ended.z[i], b, i, K), Val(K))
        store!(outcome.residual, ended.residual, b)
        store!(outcome.rate, ended.rate, b)
        for l in 1:LANES
            @inbounds outcome.status[b.first + l - 1] = CONVERGED
            @inbounds outcome.iterations[b.first + l - 1] = unsafe_trunc(Int32, lane(ended.evaluations, l))
            @inbounds regular[b.first + l - 1] = lane(ended.regular, l)
        end
        return
    end
    for (l, j) in enumerate(samples(b))
        if lane(converged, l)
            ntuple(i -> (@inbounds Z[i, j] = lane(ended.z[i], l); nothing), Val(K))
            regular[j] = lane(ended.regular, l)
            set_outcome!(outcome, j, CONVERGED, unsafe_trunc(Int, lane(ended.evaluations, l)), lane(ended.residual, l), lane(ended.rate, l))
        else
            @late solve_sample!(s, Z, outcome, p, solver, tol, j)
        end
    end
    return
end

"Solve all samples, and write to `regular` for which of them ∂c/∂z is known to be regular at the solution."
function solve_side_by_side!(Z::Matrix{T}, outcome::Outcome, regular, p::Equation{T, K}, solver, tol::Float64) where {T, K}
    total, threads = size(Z, 2), Threads.nthreads()
    buffers = [(LaneBuffers(K), Iteration{T}(K)) for _ in 1:threads]
    in_parallel(cld(total, PIECE), threads) do thread, k
        w, s = buffers[thread]
        range = piece(k, PIECE, total)
        solve_piece!(w, s, Z, outcome, regular, p, solver, tol, range, is_root(p))
    end
    return
end

# An error of f is thrown when it is the turn of the sample that causes it.
function solve_piece!(w::LaneBuffers, s, Z, outcome, regular, p, solver, tol, range, root)
    at = Ref(first(range))          # the current block
    while at[] <= last(range)
        try
            solve_blocks!(w, s, Z, outcome, regular, p, solver, tol, at, last(range), root)
        catch error
            error isa Union{Interrupted, InterruptException} && rethrow()
            foreach(j -> (@late solve_sample!(s, Z, outcome, p, solver, tol, j)), samples(Block(at[], last(range))))
            at[] += LANES
        end
    end
    return
end

function solve_blocks!(w::LaneBuffers, s, Z, outcome, regular, p, solver, tol, at, last, root)
    while at[] <= last
        check_interrupt()
        solve_block!(w, s, Z, outcome, regular, p, solver, tol, Block(at[], last), root)
        at[] += LANES
    end
    return
end

# --- whether f catches exceptions --------------------------------------------------------------------------------

# Code that branches on the values of samples side by side throws. Where it catches that itself, it goes on with what it has for
# failures, and is wrong for samples that have none.

const CAUGHT = Dict{Type, Tuple{UInt, Bool}}()
const CAUGHT_LOCK = ReentrantLock()

"    catches(f)\n\nWhether `f`, or a function of the same package that it calls, has a `try`; looked up anew after any method is defined."
function catches(f)
    world = Base.get_world_counter()
    return @lock CAUGHT_LOCK begin
        seen, found = get(CAUGHT, typeof(f), (zero(UInt), false))
        if seen != world
            length(CAUGHT) < 1000 || empty!(CAUGHT)
            found = has_try(typeof(f), Set{Type}())
            CAUGHT[typeof(f)] = (world, found)
        end
        found
    end
end

function has_try(F::Type, seen::Set{Type})
    F in seen && return false
    push!(seen, F)
    any(G -> G <: Function && has_try(G, seen), fieldtypes(F)) && return true
    home = Base.moduleroot(parentmodule(F))
    home in (@__MODULE__, Base, Core) && return false
    matches = Base._methods_by_ftype(Tuple{F, Vararg{Any}}, -1, Base.get_world_counter())
    return any(match -> has_try(match.method, home, seen), matches)
end

function has_try(method::Method, home::Module, seen::Set{Type})
    isdefined(method, :source) && method.source !== nothing || return false          # as that of a generated function
    return any(line -> has_try(line, home, seen), Base.uncompressed_ast(method).code)
end

has_try(line::Expr, home::Module, seen::Set{Type}) = line.head === :enter || any(part -> has_try(part, home, seen), line.args)
has_try(line, home::Module, seen::Set{Type}) = nameof(typeof(line)) === :EnterNode
function has_try(name::GlobalRef, home::Module, seen::Set{Type})
    isdefined(name.mod, name.name) || return false
    x = getglobal(name.mod, name.name)
    F = x isa Function ? typeof(x) : x isa Type && x <: Function ? x : return false
    return Base.moduleroot(parentmodule(F)) === home && has_try(F, seen)
end

# --- whether f can be evaluated so -----------------------------------------------------------------------------

"""
    runs_side_by_side(p, Z)

Whether f can be evaluated for samples side by side: tested on the first of them, by comparison with one by one.
"""
runs_side_by_side(::AbstractEquation, Z) = false
runs_side_by_side(::Equation{T, -1}, Z::Matrix{T}) where {T} = false
function runs_side_by_side(p::Equation{T, K}, Z::Matrix{T}) where {T, K}
    all(has_lanes, p.args) && !catches(p.f) || return false
    b = Block(1, size(Z, 2))
    w = LaneBuffers(K)
    try
        value = evaluate!(w.J, p, load_columns(Z, b, Val(K)), arguments(p, b), is_root(p))
        return agrees(p, Z, value, w.J, b)
    catch error
        error isa Union{Interrupted, InterruptException} && rethrow()
        return false
    end
end

# To rounding in the largest terms.
function agrees(p::Equation{T, K}, Z, value, J, b::Block) where {T, K}
    y, A, sizes = zeros(T, K), zeros(T, K, K), zeros(T, K, 2)
    worst = zeros(T, K, 2)
    for (l, j) in enumerate(samples(b))
        call!(y, A, p, view(Z, :, j), j)
        all(isfinite, y) && all(isfinite, A) || continue
        for i in 1:K
            sizes[i, 1] = max(sizes[i, 1], abs(y[i]) + sum(k -> abs(A[i, k] * Z[k, j]), 1:K))
            sizes[i, 2] = max(sizes[i, 2], maximum(abs, view(A, i, :)))
            worst[i, 1] = max(worst[i, 1], abs(lane(value[i], l) - y[i]))
            worst[i, 2] = max(worst[i, 2], maximum(k -> abs(lane(J[i, k], l) - A[i, k]), 1:K))
        end
    end
    return all(worst .<= sqrt(eps(T)) .* sizes)
end

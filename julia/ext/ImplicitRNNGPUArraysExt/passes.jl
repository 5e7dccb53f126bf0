# The forward pass of a batch on the device, stage by stage to its equilibrium.

"Bring a batch to its equilibrium; returns the outcome, on the host. `start` holds the initial guesses, zero if absent."
function forward!(ws::DeviceWorkspace, problem::Problem, X, start)
    samples = size(X, 2)
    arrays!(ws, samples)
    abandoned, record = fill!(similar(X, Bool, samples), false), record_of(ws, samples)
    for k in eachindex(ws.stages)
        forward_stage!(ws, problem, k, X, start, abandoned, record)
    end
    outcome = outcome_of(record)
    any(abandoned) && hand_over!(outcome, ws, problem, X, start, findall(on_host(abandoned)))
    return outcome
end

function forward_stage!(ws::DeviceWorkspace, problem, k, X, start, abandoned, record)
    stage, a, w, solver = ws.net.stages[k], ws.arrays[k], ws.stages[k], problem.solver
    drive!(ws, k, X)
    if !stage.recurrent
        activate!(ws.backend)(a.Z, a.U, stage.activation; ndrange = size(a.Z))
        record_evaluation!(ws.backend)(record, a.Z; ndrange = size(a.Z, 2))
        return
    end
    start === nothing ? fill!(a.Z, 0) : (a.Z .= view(start, stage.rows, :))
    q = BatchEquation(a.Z, a.S, a.U, w.recurrent, Activated(stage.activation), nothing)
    problem.adjoint isa Unrolled && return unroll!(ws, k, q, problem.adjoint.steps, record)
    progress = progress_of(ws, size(X, 2))
    progress.running .= progress.started .= .!abandoned
    rule = rule_of(ws, k, solver)
    iterate!(solver, ws, q, progress, record, rule)
    abandoned .|= progress.abandoned
    rule.checked && mark_unstable!(ws, k, q, progress, record)
    return
end

"The [`Rule`](@ref) by which a solver iterates stage k."
rule_of(ws::DeviceWorkspace{T}, k, solver) where {T} = Rule{T}(;
    tol = tolerance(solver, T), floor = scale_floor(T, length(ws.net.stages[k].rows)), limit = iterations(solver),
    damping = solver isa Picard ? solver.damping : 1, patience = solver isa Auto ? PATIENCE : Inf, rescue = true,
    settled = is_settled(ws, k), checked = !(solver isa Union{Auto, Picard}) && !guarantees_uniqueness(ws.net.constraint),
)

iterations(s) = min(s.max_iterations, typemax(Int32))

# A unique equilibrium attracts (or the iteration does not get there); and so does any of a contraction, as a norm proves.
function is_settled(ws::DeviceWorkspace, k)
    guarantees_uniqueness(ws.net.constraint) && return true
    R = ws.stages[k].recurrent
    norm2 = maximum(sum(abs, R; dims = 1)) * maximum(sum(abs, R; dims = 2))
    return maximum(ws.net.stages[k].slopes)^2 * norm2 < 1
end

"Mark the solutions that repel, which methods other than Picard's may find; their eigenvalues are computed on the host."
function mark_unstable!(ws::DeviceWorkspace, k, q::BatchEquation, progress, record)
    D = similar(q.Z)
    slopes_at!(ws.backend)(D, affine!(q), q.Z, q.g.f; ndrange = size(D))
    solved = progress.started .& .!progress.abandoned .& (record.status .== CONVERGED)
    bound = norm_of(host!(ws).recurrences[k])
    doubtful = findall(on_host(solved .& (vec(maximum(abs, D; dims = 1)) .* bound .>= 1)))
    isempty(doubtful) && return
    R, d = on_host(q.M), on_host(D[:, doubtful])
    unstable = [j for (column, j) in enumerate(doubtful) if repels(R, view(d, :, column))]
    status = on_host(record.status)
    status[unstable] .= UNSTABLE
    copyto!(record.status, status)
    return
end

"Picard steps whose states are all kept: Z₀, S₁, Z₁, S₂, Z₂, …"
function unroll!(ws::DeviceWorkspace{T}, k, q::BatchEquation, steps, record) where {T}
    chain, samples = ws.chains[k], size(q.Z, 2)
    all(A -> size(A, 2) == samples, chain) || empty!(chain)
    while length(chain) < 2steps + 1
        push!(chain, similar(ws.buffers[k].Z, size(q.Z)))
    end
    copyto!(chain[1], q.Z)
    progress = progress_of(ws, samples)
    for step in 1:steps
        check_interrupt()
        S, Z = chain[2step], chain[2step + 1]
        mul!(copyto!(S, q.U), q.M, chain[2step - 1], true, true)
        activate!(ws.backend)(Z, S, q.g.f; ndrange = size(Z))
        step == steps - 1 && (progress.change .= vec(sqrt.(sum(abs2, Z .- chain[2step - 1]; dims = 1))))
    end
    # How the last step went.
    copyto!(q.Z, chain[2steps - 1])
    step!(ws, q, progress, record, Rule{T}(; tol = tolerance(Picard(), T), floor = scale_floor(T, size(q.Z, 1)), limit = 1))
    record.iterations .= max.(record.iterations, Int32(steps))
    copyto!(q.Z, chain[2steps + 1])
    return
end

"U = input X + feeds Z + bias, of stage k."
drive!(ws::DeviceWorkspace, k, X) = (U = ws.arrays[k].U; U .= ws.stages[k].bias; add_drive!(U, ws.stages[k], X, a -> a.Z, ws.arrays))

"U += input X + feeds A, with the array A = `of(arrays)` of each stage before."
function add_drive!(U, w::DeviceStage, X, of, arrays)
    isempty(w.input) || mul!(U, w.input, X, true, true)
    foreach(((l, block),) -> mul!(U, block, of(arrays[l]), true, true), w.feeds)
    return U
end

"S = U + R Z at the states as they are, of stage k."
function evaluate!(ws::DeviceWorkspace, k, X)
    a, w = ws.arrays[k], ws.stages[k]
    copyto!(a.S, drive!(ws, k, X))
    isempty(w.recurrent) || mul!(a.S, w.recurrent, a.Z, true, true)
    return a.S
end

outcome_of((; status, iterations, residual, rate)) =
    Outcome(on_host(status), on_host(iterations), Float64.(on_host(residual)), Float64.(on_host(rate)))

"Let the CPU solve the samples that are `left`, from where the device began."
function hand_over!(outcome, ws::DeviceWorkspace, problem, X, start, left)
    net, cpu = problem.net, host!(ws)
    columns(A) = on_host(A[:, left])
    part = equilibrium!(
        Solution(net, length(left)), cpu, problem, on_host(ws.parameters), columns(X), start === nothing ? nothing : columns(start)
    )
    copy_outcome!(outcome, left, part.outcome)
    for (stage, a) in zip(net.stages, ws.arrays)
        a.Z[:, left] = on_device(ws, part.state[stage.rows, :])
    end
    return
end

function ImplicitRNN.solve_batch!(solution::Solution, ws::DeviceWorkspace, problem::Problem, p, X, start)
    check_solver(problem.solver)
    net, B = problem.net, size(X, 2)
    unpack!(ws, p)
    for columns in pieces(ws, problem, 1:B)
        x, z = on_device(ws, columns_of(X, columns)), on_device(ws, columns_of(start, columns))
        found = forward!(ws, problem, x, z)
        copy_outcome!(solution.outcome, columns, found)
        foreach((stage, a) -> put_block!(solution.state, stage.rows, columns, a.Z), net.stages, ws.arrays)
        certify!(view(solution.bound, columns), ws, x)
    end
    return solution
end

"The certified bound of each sample, as on the CPU: the error e of a stage is at most A ‖f(u + R z) - z + L |feed| e‖."
function certify!(bound, ws::DeviceWorkspace{T}, X) where {T}
    net = ws.net
    constants = [s.recurrent ? T(amplification_of(ws, k)) : one(T) for (k, s) in enumerate(net.stages)]
    any(isnan, constants) && return fill!(bound, NaN)
    in_rows = net.constraint isa Union{InfNorm, Perron}
    largest = fill!(similar(X, 1, size(X, 2)), 0)
    for (k, stage) in enumerate(net.stages)
        a, w, e = ws.arrays[k], ws.stages[k], ws.arrays[k].E
        activate!(ws.backend)(a.G, evaluate!(ws, k, X), stage.activation; ndrange = size(a.G))
        fill!(e, 0)
        foreach(((l, block),) -> mul!(e, abs.(block), ws.arrays[l].E, true, true), w.feeds)
        e .= abs.(a.G .- a.Z) .+ w.slopes .* e
        if stage.recurrent
            scaling = w.scaling
            sizes = in_rows ? maximum(scaling .* e; dims = 1) : norms(e)
            in_rows ? (e .= constants[k] .* sizes ./ scaling) : (e .= constants[k] .* sizes)
        end
        largest .= max.(largest, maximum(e; dims = 1))
    end
    return copyto!(bound, Float64.(vec(on_host(largest))))
end

# Euclidean norms of columns, also where squares vanish or overflow.
function norms(e)
    largest = clamp.(maximum(e; dims = 1), floatmin(eltype(e)), floatmax(eltype(e)))
    return largest .* sqrt.(sum(abs2, e ./ largest; dims = 1))
end

# Only that of Monotone takes the weights.
amplification_of(ws::DeviceWorkspace, k) = amplification_of(ws.net.constraint, ws, k)
amplification_of(c, ws, k) = amplification(c, nothing, nothing)
amplification_of(c::Monotone, ws, k) = amplification(c, (; recurrent = on_host(ws.stages[k].recurrent)), ws.net.stages[k].slopes)

function ImplicitRNN.read_out!(outputs, ws::DeviceWorkspace, p, Z)
    check_size("states", Z, neurons(ws.net), size(outputs, 2))
    return exclusively(() -> put_outputs!(outputs, ws, p, Z), ws)
end

function put_outputs!(outputs, ws::DeviceWorkspace, p, Z)
    unpack!(ws, p)
    ws.net.outputs > 0 ? (outputs .= ws.offset) : fill!(outputs, 0)
    for (stage, w) in zip(ws.net.stages, ws.stages)
        isempty(w.readout) || mul!(outputs, w.readout, Z[stage.rows, :], true, true)
    end
    return outputs
end

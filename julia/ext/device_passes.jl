# The way of a batch on the device, stage by stage to its equilibrium and back.

"Iterations of `Auto` on a device beyond which a sample is left to the host."
const PATIENCE = 300

"Iterations between two looks of the host at what is still running."
const LOOK = 4

"""
Picard iteration of z = g(u + M z), with `affine!(S, Z)` for S = u + M z, until no column runs. Those left to the host are
`progress.abandoned`.
"""
function iterate!(affine!, ws::DeviceWorkspace, Z, S, progress, record, g, D, rule)
    step, range = step!(ws.backend, (LANES, GROUP)), (LANES, cld(size(Z, 2), GROUP) * GROUP)
    for k in 1:rule.limit
        affine!(S, Z)
        step(Z, progress, record, S, g, D, rule; ndrange = range)
        if k % LOOK == 0
            check_interrupt()
            any(progress.running) || break
        end
    end
    return
end

# --- forward --------------------------------------------------------------------------------------------------------------

"Bring a batch to its equilibrium; returns how it went, on the host. `start` holds the first iterates, zero if absent."
function forward!(ws::DeviceWorkspace, problem::Problem, p, X, start)
    samples = size(X, 2)
    arrays!(ws, samples)
    abandoned, record = fill!(similar(X, Bool, samples), false), record_of(ws, samples)
    for k in eachindex(ws.stages)
        forward_stage!(ws, problem, k, X, start, abandoned, record)
    end
    solution = solution_of(ws, record)
    left = findall(on_host(abandoned))
    isempty(left) || hand_over!(solution, ws, problem, p, X, start, left)
    return solution
end

function forward_stage!(ws::DeviceWorkspace{T}, problem, k, X, start, abandoned, record) where {T}
    stage, a = problem.net.stages[k], ws.arrays[k]
    drive!(ws, k, X)
    if !stage.recurrent
        activate!(ws.backend)(a.Z, a.U, stage.activation; ndrange = size(a.Z))
        record_evaluation!(ws.backend)(record, a.Z; ndrange = size(a.Z, 2))
        return
    end
    start === nothing ? fill!(a.Z, 0) : (a.Z .= view(start, stage.rows, :))
    progress = progress_of(ws, size(X, 2))
    progress.running .= .!abandoned
    rule = forward_rule(problem.solver, problem.net, stage, ws.cpu.recurrences[k], T)
    iterate!(ws, a.Z, a.S, progress, record, Activated(stage.activation), nothing, rule) do S, Z
        copyto!(S, a.U)
        mul!(S, ws.stages[k].recurrent, Z, true, true)
    end
    abandoned .|= progress.abandoned
    return
end

forward_rule(s::Solver, net, stage, recurrence, ::Type{T}) where {T} = Rule{T}(
    tolerance(s, T), scale_floor(T, length(stage.rows)), damping(s), min(s.max_iterations, typemax(Int32)), patience(s),
    # A unique equilibrium attracts (or the iteration does not get there); and so does any of a contraction.
    guarantees_uniqueness(net.constraint) || maximum(stage.slopes) * norm_of(recurrence) < 1,
    s isa Auto, false,
)
damping(::Auto) = 1.0
damping(s::Picard) = s.damping
patience(::Auto) = PATIENCE
patience(::Picard) = Inf

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

# A solution without states, which stay on the device.
function solution_of(ws::DeviceWorkspace{T}, record) where {T}
    bound = fill(NaN, length(record.status))
    return Solution(
        zeros(T, 0, 0), on_host(record.status), on_host(record.iterations), Float64.(on_host(record.residual)),
        Float64.(on_host(record.rate)), bound
    )
end

"Let the CPU solve the samples that are `left`, from where the device began."
function hand_over!(solution, ws::DeviceWorkspace, problem, p, X, start, left)
    net = problem.net
    columns(A) = on_host(A[:, left])
    part = equilibrium!(
        Solution(net, length(left)), ws.cpu, problem, on_host(p), columns(X), start === nothing ? nothing : columns(start)
    )
    for name in (:status, :iterations, :residual, :rate, :bound)
        getfield(solution, name)[left] .= getfield(part, name)
    end
    for (stage, a) in zip(net.stages, ws.arrays)
        a.Z[:, left] = on_device(ws, part.state[stage.rows, :])
    end
    return
end

function ImplicitRNN.equilibrium!(solution::Solution, ws::DeviceWorkspace, problem::Problem, p, X, start = nothing)
    net, B = problem.net, size(X, 2)
    check_features(net, X)
    check_solver(problem.solver)
    start === nothing || check_size("states", start, neurons(net), B)
    unpack!(ws, p)
    x = on_device(ws, X)
    found = forward!(ws, problem, p, x, start === nothing ? nothing : on_device(ws, start))
    for name in (:status, :iterations, :residual, :rate)
        copyto!(getfield(solution, name), getfield(found, name))
    end
    foreach((stage, a) -> put_rows!(solution.state, stage.rows, a.Z), net.stages, ws.arrays)
    certify!(solution.bound, ws, x)
    return solution
end

"The certified bound of each sample, as on the CPU: the error e of a stage is at most A ‖f(u + R z) - z + L |feed| e‖."
function certify!(bound, ws::DeviceWorkspace{T}, X) where {T}
    net = ws.net
    host = ws.cpu.weights.stages
    constants = [s.recurrent ? T(amplification(net.constraint, w, s.slopes)) : one(T) for (s, w) in zip(net.stages, host)]
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
            stretch = on_device(ws, host[k].stretch)
            sizes = in_rows ? maximum(stretch .* e; dims = 1) : sqrt.(sum(abs2, e; dims = 1))
            in_rows ? (e .= constants[k] .* sizes ./ stretch) : (e .= constants[k] .* sizes)
        end
        largest .= max.(largest, maximum(e; dims = 1))
    end
    return copyto!(bound, Float64.(vec(on_host(largest))))
end

# --- backward -------------------------------------------------------------------------------------------------------------

function ImplicitRNN.loss_and_gradient!(
        g, ws::DeviceWorkspace{T}, problem::Problem, p, X, Y, probe = 0, weights = nothing, report = nothing
    ) where {T}
    net, B = problem.net, size(X, 2)
    check_features(net, X)
    check_size("targets", Y, output_size(net), B)
    weights === nothing || length(weights) == B ||
        throw(DimensionMismatch("there are $(length(weights)) weights for $B samples"))
    seed = LossSeed(problem.loss, on_device(ws, Y), weights === nothing ? nothing : on_device(ws, weights), T(1 / B))
    return pull_back!(g, nothing, ws, problem, p, X, nothing, seed, report)
end

function ImplicitRNN.vjp!(
        g, dX, ws::DeviceWorkspace, problem::Problem, p, X, V; of = :outputs, start = nothing, probe = 0, report = nothing
    )
    net, B = problem.net, size(X, 2)
    check_features(net, X)
    check_size("cotangents", V, rows_of(net, of), B)
    check_size("derivatives", dX, net.inputs, B)
    start === nothing || check_size("states", start, neurons(net), B)
    seed = of === :outputs ? OutputSeed(on_device(ws, V)) : StateSeed(on_device(ws, V))
    return pull_back!(g, dX, ws, problem, p, X, start, seed, report)
end

function ImplicitRNN.jvp!(
        tangent, ws::DeviceWorkspace{T}, problem::Problem, p, X, dp, dX; of = :outputs, start = nothing, report = nothing
    ) where {T}
    net, B = problem.net, size(X, 2)
    check_features(net, X)
    check_size("tangents", tangent, rows_of(net, of), B)
    check_size("directions", dX, net.inputs, B)
    start === nothing || check_size("states", start, neurons(net), B)
    length(dp) == length(net) ||
        throw(DimensionMismatch("the network has $(length(net)) parameters, the direction $(length(dp))"))
    check_gradient(problem)
    x, dx = on_device(ws, X), on_device(ws, dX)
    found = settle!(ws, problem, p, x, start)
    direction = unpack_tangent(net, ws.cpu.weights, on_host(dp))
    stages = upload!(device_stages(net, (sizes...) -> KernelAbstractions.zeros(ws.backend, T, sizes...)), net, direction)
    residual = zeros(B)
    for k in eachindex(ws.stages)
        push_forward_stage!(residual, ws, problem.adjoint, k, stages[k], x, dx)
    end
    if of === :state
        foreach((stage, a) -> put_rows!(tangent, stage.rows, a.E), net.stages, ws.arrays)
    else
        copyto!(tangent, read_out_tangent(ws, stages, direction, B))
    end
    report === nothing || foreach(copyto!, report, (found.status, found.residual, residual))
    return quality_of(found, residual)
end

# z′ = D (u′ + R′ z + R z′), where u is what drives the stage.
function push_forward_stage!(residual, ws::DeviceWorkspace, adjoint::Adjoint, k, t::DeviceStage, X, dX)
    w, a = ws.stages[k], ws.arrays[k]
    a.G .= t.bias
    add_drive!(a.G, t, X, b -> b.Z, ws.arrays)
    add_drive!(a.G, w, dX, b -> b.E, ws.arrays)
    if ws.net.stages[k].recurrent
        mul!(a.G, t.recurrent, a.Z, true, true)
        solve_linear!(residual, ws, adjoint, k; tangent = true)
    else
        a.E .= a.D .* a.G
    end
    return
end

function read_out_tangent(ws::DeviceWorkspace, stages, direction, samples)
    net = ws.net
    Y = fill!(similar(ws.offset, output_size(net), samples), 0)
    net.outputs > 0 && (Y .= on_device(ws, direction.d))
    for (w, t, a) in zip(ws.stages, stages, ws.arrays)
        isempty(w.readout) && continue
        mul!(Y, w.readout, a.E, true, true)
        # Outputs that are neurons have no weights of their own.
        net.outputs > 0 && mul!(Y, t.readout, a.Z, true, true)
    end
    return Y
end

ImplicitRNN.hessian_vector_product!(h, ::DeviceWorkspace, problem::Problem, p, X, Y, v, weights = nothing) =
    refused("Hessian-vector products")

function pull_back!(g, dX, ws::DeviceWorkspace, problem::Problem, p, X, start, seed, report)
    check_gradient(problem)
    x = on_device(ws, X)
    found = settle!(ws, problem, p, x, start)
    loss = begin_back!(ws, seed)
    adjoint_residual = zeros(size(X, 2))
    dx = dX === nothing ? nothing : fill!(similar(x), 0)
    for k in length(ws.stages):-1:1
        backward_stage!(adjoint_residual, ws, problem.adjoint, k, x, dx)
    end
    dX === nothing || copyto!(dX, dx)
    deliver_gradient!(g, ws)
    report === nothing || foreach(copyto!, report, (found.status, found.residual, adjoint_residual))
    return loss, quality_of(found, adjoint_residual)
end

"Put the parameters into force and bring the samples to their equilibrium, with the slopes there."
function settle!(ws::DeviceWorkspace, problem, p, X, start)
    unpack!(ws, p)
    found = forward!(ws, problem, p, X, start === nothing ? nothing : on_device(ws, start))
    status = copyto!(KernelAbstractions.allocate(ws.backend, Status, length(found.status)), found.status)
    foreach(k -> last_evaluation!(ws, k, X, status), eachindex(ws.stages))
    return found
end

"""
The last evaluation, which gives the slopes. The states become its values, which are nearer to the equilibrium where the equation
contracts, as monotone ones need not.
"""
function last_evaluation!(ws::DeviceWorkspace, k, X, status)
    a, stage = ws.arrays[k], ws.net.stages[k]
    latest = !(ws.net.constraint isa Monotone) || !stage.recurrent
    slopes!(ws.backend)(a.D, a.Z, evaluate!(ws, k, X), stage.activation, status, latest; ndrange = size(a.Z))
    return
end

"Set ∂L/∂z of all stages and the gradient of the readout; returns the loss."
function begin_back!(ws::DeviceWorkspace, seed::LossSeed)
    outputs = fill!(similar(seed.targets), 0)
    ws.net.outputs > 0 && (outputs .= ws.offset)
    foreach((w, a) -> isempty(w.readout) || mul!(outputs, w.readout, a.Z, true, true), ws.stages, ws.arrays)
    GY = similar(outputs)
    loss = loss_gradient!(GY, seed.loss, outputs, seed.targets, seed.weights, seed.scale)
    read_out_adjoint!(ws, GY)
    return loss
end
begin_back!(ws::DeviceWorkspace, seed::OutputSeed) = (read_out_adjoint!(ws, seed.V); 0.0)
function begin_back!(ws::DeviceWorkspace, seed::StateSeed)
    clear!(ws.gradient)
    foreach((stage, a) -> a.G .= view(seed.V, stage.rows, :), ws.net.stages, ws.arrays)
    return 0.0
end

function read_out_adjoint!(ws::DeviceWorkspace, GY)
    net, gradient = ws.net, clear!(ws.gradient)
    for (stage, w, a) in zip(net.stages, ws.stages, ws.arrays)
        isempty(w.readout) ? fill!(a.G, 0) : mul!(a.G, w.readout', GY)
        net.outputs == 0 || isempty(w.readout) ||
            copyto!(gradient.C, on_host(GY * a.Z')[:, net.readout .- (first(stage.rows) - 1)])
    end
    net.outputs == 0 || copyto!(gradient.d, on_host(sum(GY; dims = 2)))
    return
end

"The loss of outputs on a device and its derivative; their sum is taken in double precision, as on the CPU."
function loss_gradient!(G, loss::ElementwiseLoss, Y, targets, weights, scale)
    w = (scale / size(targets, 1)) .* across(weights)
    G .= w .* slope.(Ref(loss), Y, targets)
    return sum(w .* value.(Ref(loss), Float64.(Y), Float64.(targets)))
end
function loss_gradient!(G, ::CrossEntropy, Y, targets, weights, scale)
    w = scale .* across(weights)
    logits = Y .- maximum(Y; dims = 1)
    partition = sum(exp, logits; dims = 1)
    G .= w .* (sum(targets; dims = 1) .* exp.(logits) ./ partition .- targets)
    return sum(w .* targets .* (Float64.(log.(partition)) .- logits))
end
across(::Nothing) = true
across(weights) = reshape(weights, 1, :)

function backward_stage!(adjoint_residual, ws::DeviceWorkspace, adjoint::Adjoint, k, X, dX)
    stage, w, a, g = ws.net.stages[k], ws.stages[k], ws.arrays[k], ws.gradient.stages[k]
    if stage.recurrent
        solve_linear!(adjoint_residual, ws, adjoint, k)
        copyto!(g.recurrent, on_host(a.E * a.Z'))
    else
        a.E .= a.D .* a.G
    end
    copyto!(g.bias, on_host(sum(a.E; dims = 2)))
    if !isempty(w.input)
        copyto!(g.input, on_host(a.E * X'))
        dX === nothing || mul!(dX, w.input', a.E, true, true)
    end
    for (l, block) in w.feeds
        before = ws.arrays[l]
        g.feed[:, ws.net.stages[l].rows] .= on_host(a.E * before.Z')
        mul!(before.G, block', a.E, true, true)
    end
    return
end

"""
    solve_linear!(residual, ws, adjoint, k; tangent = false)

E = D (G + RᵀE) of stage k, or E = D (G + R E) for a `tangent`, by Picard iteration, the Neumann series; each column to its own
relative residual, which is merged into `residual`, and by the CPU where the series does not lead there.
"""
function solve_linear!(merged, ws::DeviceWorkspace, ::JacobianFree, k; tangent = false)
    a = ws.arrays[k]
    a.E .= a.D .* a.G
    return
end
function solve_linear!(merged, ws::DeviceWorkspace{T}, s::Implicit, k; tangent = false) where {T}
    a, R, samples = ws.arrays[k], ws.stages[k].recurrent, size(ws.arrays[k].Z, 2)
    latest = !(ws.net.constraint isa Monotone)
    rule = Rule{T}(tolerance(s, T), floatmin(T), one(T), min(s.max_iterations, typemax(Int32)), Inf, true, true, latest)
    progress, record = progress_of(ws, samples), record_of(ws, samples)
    fill!(a.E, 0)
    iterate!(ws, a.E, a.S, progress, record, Scaled(), a.D, rule) do S, E
        copyto!(S, a.G)
        mul!(S, tangent ? R : R', E, true, true)
    end
    residual, status = Float64.(on_host(record.residual)), on_host(record.status)
    left = findall(on_host(progress.abandoned) .| (status .!= CONVERGED))
    isempty(left) || (residual[left] .= hand_over_linear!(ws, s, k, left, tangent))
    merged .= worse.(residual, merged)
    return
end

"Let the CPU solve the linear systems of some samples, by iteration or by LU; returns their residuals."
function hand_over_linear!(ws::DeviceWorkspace{T}, s::Implicit, k, left, tangent) where {T}
    a, m = ws.arrays[k], length(left)
    D, G = on_host(a.D[:, left]), on_host(a.G[:, left])
    n = size(D, 1)
    columns, outcome, E = Columns{T}(n, m, zeros(T, n, m)), Outcome(m), zeros(T, n, m)
    solve_adjoint!(E, s, columns, ws.cpu.recurrences[k], D, G; outcome, tangent)
    a.E[:, left] = on_device(ws, E)
    return outcome.residual
end

function deliver_gradient!(g, ws::DeviceWorkspace{T}) where {T}
    packed = g isa Array ? g : zeros(T, length(g))
    pack_gradient!(packed, ws.net, ws.gradient, ws.cpu.weights)
    g === packed || copyto!(g, packed)
    return
end

function quality_of(found::Solution, adjoint_residual)
    failed = count(j -> found.status[j] != CONVERGED || !(adjoint_residual[j] < WORST_ADJOINT), eachindex(adjoint_residual))
    return Quality(failed, reduce(worse, found.residual; init = 0.0), reduce(worse, adjoint_residual; init = 0.0))
end

# The backward pass on the device: gradients of a loss or of products, and products with tangents.

function ImplicitRNN.push_forward!(tangent, ws::DeviceWorkspace, problem::Problem, p, X, dp, dX, of, start, report)
    check_options(problem)
    net, B = problem.net, size(X, 2)
    unpack!(ws, p)
    direction, quality = tangent_weights(ws, dp), Quality()
    for columns in pieces(ws, problem, 1:B)
        x, dx = on_device(ws, columns_of(X, columns)), on_device(ws, columns_of(dX, columns))
        found = forward_with_slopes!(ws, problem, x, columns_of(start, columns))
        residual = zeros(length(columns))
        for k in eachindex(ws.stages)
            push_forward_stage!(residual, ws, problem.adjoint, k, direction.stages[k], x, dx)
        end
        if of === :state
            foreach((stage, a) -> put_block!(tangent, stage.rows, columns, a.E), net.stages, ws.arrays)
        else
            put_block!(tangent, axes(tangent, 1), columns, read_out_tangent(ws, direction, length(columns)))
        end
        report!(report, columns, found, residual)
        quality = merge(quality, Quality(found, residual, problem.adjoint))
    end
    return quality
end

"The derivative of the weights in force along a direction of the parameters; the constraints are differentiated on the host."
function tangent_weights(ws::DeviceWorkspace{T}, dp) where {T}
    net, make = ws.net, (sizes...) -> KernelAbstractions.zeros(ws.backend, T, sizes...)
    stages, offset = device_stages(net, make), make(net.outputs)
    unpack_stages!(stages, offset, net, on_device(ws, dp), Free())
    host = unpack_tangent(net, host!(ws).weights, on_host(dp))
    foreach((w, h) -> copyto!(w.recurrent, h.recurrent), stages, host.stages)
    return (; stages, offset)
end

# z′ = D (u′ + R′ z + R z′), where u is what drives the stage.
function push_forward_stage!(residual, ws::DeviceWorkspace, adjoint::Adjoint, k, t::DeviceStage, X, dX)
    w, a = ws.stages[k], ws.arrays[k]
    a.G .= t.bias
    add_drive!(a.G, t, X, b -> b.Z, ws.arrays)
    add_drive!(a.G, w, dX, b -> b.E, ws.arrays)
    if ws.net.stages[k].recurrent
        adjoint isa Unrolled && return unroll_tangent!(ws, k, adjoint.steps, t.recurrent)
        mul!(a.G, t.recurrent, a.Z, true, true)
        solve_linear!(residual, ws, adjoint, k; tangent = true)
    else
        a.E .= a.D .* a.G
    end
    return
end

# Along the chain of `unroll!`: z′ₖ = Dₖ (u′ + R′ zₖ₋₁ + R z′ₖ₋₁), from z′₀ = 0.
function unroll_tangent!(ws::DeviceWorkspace, k, steps, dR)
    a, R, chain, f = ws.arrays[k], ws.stages[k].recurrent, ws.chains[k], ws.net.stages[k].activation
    fill!(a.E, 0)
    for step in 1:steps
        check_interrupt()
        copyto!(a.S, a.G)
        mul!(a.S, dR, chain[2step - 1], true, true)
        mul!(a.S, R, a.E, true, true)
        slopes_at!(ws.backend)(a.D, chain[2step], chain[2step + 1], f; ndrange = size(a.D))
        a.E .= a.D .* a.S
    end
    return
end

function read_out_tangent(ws::DeviceWorkspace, direction, samples)
    net = ws.net
    Y = fill!(similar(ws.offset, output_size(net), samples), 0)
    net.outputs > 0 && (Y .= direction.offset)
    for (w, t, a) in zip(ws.stages, direction.stages, ws.arrays)
        isempty(w.readout) && continue
        mul!(Y, w.readout, a.E, true, true)
        # Outputs that are neurons have no weights of their own.
        net.outputs > 0 && mul!(Y, t.readout, a.Z, true, true)
    end
    return Y
end

ImplicitRNN.hessian_vector_product!(h, ::DeviceWorkspace, problem::Problem, p, X, Y, v, weights = nothing) =
    refused("Hessian-vector products")

# The gradient goes to `g`, that of the samples to `dX` and the states found to `states` if these are not nothing.
function ImplicitRNN.pull_back!(
        g, ws::DeviceWorkspace, problem::Problem, p, X, seed; dX = nothing, start = nothing, probe = 0, report, states = nothing
    )
    check_options(problem)
    unpack!(ws, p)
    penalty = JacobianPenalty(problem.jacobian_penalty, probe % UInt64, size(X, 2))
    total, summary = fill!(similar(ws.gradient), 0), Summary()
    for columns in pieces(ws, problem, axes(X, 2))
        left = columns
        if is_fused(ws, problem, seed, length(columns))
            found, left = pull_back_fused!(total, ws, problem, X, seed, columns; start, report, states)
            summary = merge(summary, found)
        end
        isempty(left) && continue
        summary = merge(summary, pull_back_columns!(total, ws, problem, X, seed, penalty, left; dX, start, report, states))
    end
    copyto!(g, total)
    return summary
end

# For some of the columns, in as many launches as it takes; their gradient is added to `total`.
function pull_back_columns!(total, ws::DeviceWorkspace, problem, X, seed, penalty, columns; dX = nothing, start, report, states)
    x = on_device(ws, columns_of(X, columns))
    found = forward_with_slopes!(ws, problem, x, columns_of(start, columns))
    states === nothing || keep_states!(states, ws, found, columns)
    loss, residual = begin_back!(ws, seed, columns), zeros(length(columns))
    dx = dX === nothing ? nothing : fill!(similar(x), 0)
    for k in length(ws.stages):-1:1
        loss += backward_stage!(residual, ws, problem.adjoint, k, x, dx, penalty, first(columns))
    end
    total .+= ws.gradient
    dX === nothing || put_block!(dX, axes(dX, 1), columns, dx)
    report!(report, columns, found, residual)
    return Summary(loss, Quality(found, residual, problem.adjoint))
end

"Bring the samples to their equilibrium with the parameters in force, with the slopes there."
function forward_with_slopes!(ws::DeviceWorkspace, problem, X, start)
    found = forward!(ws, problem, X, on_device(ws, start))
    status = copyto!(KernelAbstractions.allocate(ws.backend, Status, length(found.status)), found.status)
    for (k, stage) in enumerate(ws.net.stages)
        # Unrolled steps have slopes of their own.
        stage.recurrent && problem.adjoint isa Unrolled || last_evaluation!(ws, k, X, status)
    end
    return found
end

"The last evaluation, which gives the slopes. The states become its values where these are nearer."
function last_evaluation!(ws::DeviceWorkspace, k, X, status)
    a, stage = ws.arrays[k], ws.net.stages[k]
    latest = evaluation_contracts(ws.net.constraint) || !stage.recurrent
    slopes!(ws.backend)(a.D, a.Z, evaluate!(ws, k, X), stage.activation, status, latest; ndrange = size(a.Z))
    return
end

"The states found become these columns of `states`, zero where there is no equilibrium: a solver starts anew from there."
function keep_states!(states, ws::DeviceWorkspace, found, columns)
    foreach((stage, a) -> put_block!(states, stage.rows, columns, a.Z), ws.net.stages, ws.arrays)
    failed = columns[found.status .!= CONVERGED]
    isempty(failed) || (states[:, failed] .= 0)
    return
end

"Set ∂L/∂z of all stages and the gradient of the readout, for some columns of the batch; returns their loss."
function begin_back!(ws::DeviceWorkspace, seed::LossSeed, columns)
    targets, weights = (on_device(ws, columns_of(A, columns)) for A in (seed.targets, seed.weights))
    outputs = fill!(similar(targets), 0)
    ws.net.outputs > 0 && (outputs .= ws.offset)
    foreach((w, a) -> isempty(w.readout) || mul!(outputs, w.readout, a.Z, true, true), ws.stages, ws.arrays)
    GY = similar(outputs)
    loss = loss_gradient!(GY, seed.loss, outputs, targets, weights, seed.scale)
    read_out_adjoint!(ws, GY)
    return loss
end
begin_back!(ws::DeviceWorkspace, seed::OutputSeed, columns) = (read_out_adjoint!(ws, on_device(ws, columns_of(seed.V, columns))); 0.0)
function begin_back!(ws::DeviceWorkspace, seed::StateSeed, columns)
    fill!(ws.gradient, 0)
    V = on_device(ws, columns_of(seed.V, columns))
    foreach((stage, a) -> a.G .= view(V, stage.rows, :), ws.net.stages, ws.arrays)
    return 0.0
end

function read_out_adjoint!(ws::DeviceWorkspace, GY)
    fill!(ws.gradient, 0)
    for (k, (w, a)) in enumerate(zip(ws.stages, ws.arrays))
        isempty(w.readout) ? fill!(a.G, 0) : mul!(a.G, w.readout', GY)
        ws.net.outputs == 0 || isempty(w.readout) || pack_readout!(ws.gradient, ws.net, k, GY * a.Z', sum(GY; dims = 2))
    end
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

"The way back through stage k: its part of the gradient, and ∂L/∂z of what drives it; returns its Jacobian penalty."
function backward_stage!(adjoint_residual, ws::DeviceWorkspace, adjoint::Adjoint, k, X, dX, penalty, first_sample)
    stage, w, a = ws.net.stages[k], ws.stages[k], ws.arrays[k]
    total, recurrent = 0.0, nothing
    if !stage.recurrent
        a.E .= a.D .* a.G
    elseif adjoint isa Unrolled
        recurrent = unroll_back!(ws, k, adjoint.steps)
    else
        recurrent, direct = fill!(similar(w.recurrent), 0), nothing
        penalty.weight > 0 && ((total, direct) = add_penalty!(recurrent, ws, k, penalty, first_sample))
        solve_linear!(adjoint_residual, ws, adjoint, k)
        direct === nothing || (a.E .+= direct)
        mul!(recurrent, a.E, a.Z', true, true)
    end
    input = isempty(w.input) ? w.input : a.E * X'
    dX === nothing || isempty(w.input) || mul!(dX, w.input', a.E, true, true)
    feeds = map(w.feeds) do (l, block)
        before = ws.arrays[l]
        mul!(before.G, block', a.E, true, true)
        l => a.E * before.Z'
    end
    pack_stage!(ws.gradient, ws, k, input, feeds, recurrent, sum(a.E; dims = 2))
    return total
end

"Backpropagation through the chain of [`unroll!`](@ref): E = Σₖ ∂L/∂sₖ; returns ∂L/∂R = Σₖ ∂L/∂sₖ zₖ₋₁ᵀ."
function unroll_back!(ws::DeviceWorkspace, k, steps)
    a, R, chain, f = ws.arrays[k], ws.stages[k].recurrent, ws.chains[k], ws.net.stages[k].activation
    gradient, λ = fill!(similar(R), 0), copy(a.G)
    fill!(a.E, 0)
    for step in steps:-1:1
        check_interrupt()
        slopes_at!(ws.backend)(a.D, chain[2step], chain[2step + 1], f; ndrange = size(a.D))
        a.D .*= λ
        a.E .+= a.D
        mul!(gradient, a.D, chain[2step - 1]', true, true)
        mul!(λ, R', a.D)
    end
    return gradient
end

"The [`JacobianPenalty`](@ref ImplicitRNN.JacobianPenalty) of stage k, as on the CPU: see `add_penalty!` there."
function add_penalty!(gradient, ws::DeviceWorkspace{T}, k, penalty, first_sample) where {T}
    stage, a, R = ws.net.stages[k], ws.arrays[k], ws.stages[k].recurrent
    c = T(penalty.weight / (penalty.samples * neurons(ws.net)))
    v, curvature = similar(a.Z), similar(a.Z)
    signs!(ws.backend)(v, penalty.probe, first(stage.rows) - 1, first_sample - 1; ndrange = size(v))
    curvatures!(ws.backend)(curvature, a.S, a.Z, stage.activation; ndrange = size(v))
    A = a.D .* v
    q = R' * A
    mul!(gradient, A, q', 2c, true)
    e = 2c .* v .* (R * q) .* curvature
    mul!(a.G, R', e, true, true)
    return Float64(c) * sum(abs2, q), e
end

"""
    solve_linear!(residual, ws, adjoint, k; tangent = false)

E = D (G + RᵀE) of stage k, or E = D (G + R E) for a `tangent`: by iteration, each column to its own relative residual, which is
merged into `residual`; and by LU what is left, or where that is asked for.
"""
function solve_linear!(merged, ws::DeviceWorkspace, ::JacobianFree, k; tangent = false)
    a = ws.arrays[k]
    a.E .= a.D .* a.G
    return
end
function solve_linear!(merged, ws::DeviceWorkspace, s::Implicit, k; tangent = false)
    a, w, samples = ws.arrays[k], ws.stages[k], size(ws.arrays[k].Z, 2)
    q = BatchEquation(a.E, a.S, a.G, tangent ? w.recurrent : w.transposed, Scaled(), a.D)
    record = record_of(ws, samples)
    left = collect(1:samples)
    # Squares of tiny numbers vanish, those of huge ones overflow, and residuals with them: such columns are solved for a multiple.
    multiples = multiple_of.(maximum(abs, a.G; dims = 1), tiny_size(ws, s))
    a.G .*= multiples
    fill!(a.E, 0)
    if s.linear_solver !== :lu
        progress = progress_of(ws, samples)
        iterate!(s.linear_solver === :anderson ? Anderson() : Picard(), ws, q, progress, record, adjoint_rule(ws, s))
        left = findall(on_host(progress.abandoned .| (record.status .!= CONVERGED)))
    end
    residual = Float64.(on_host(record.residual))
    isempty(left) || (residual[left] .= eliminate_columns!(ws, q, left, tangent, adjoint_rule(ws, s, 1; rescue = false)))
    merged .= worse.(residual, merged)
    a.E ./= multiples
    return
end

"The largest number of a column below which its square, to the tolerance, would vanish; beyond its inverse squares might overflow."
tiny_size(::DeviceWorkspace{T}, s::Implicit) where {T} = 16 * sqrt(floatmin(T)) / T(tolerance(s, T))

@inline multiple_of(largest::T, tiny) where {T} =
    0 < largest < tiny || inv(tiny) < largest < T(Inf) ? max(inv(max(largest, floatmin(T))), floatmin(T)) : one(T)

"The [`Rule`](@ref) by which adjoint systems are iterated."
adjoint_rule(ws::DeviceWorkspace{T}, s::Implicit, limit = iterations(s); rescue = true, least = 0) where {T} =
    Rule{T}(; tol = tolerance(s, T), floor = floatmin(T), limit, rescue, least, latest = evaluation_contracts(ws.net.constraint))

"Solve the systems of some columns by LU; returns their residuals, NaN for a singular system."
function eliminate_columns!(ws::DeviceWorkspace, q::BatchEquation, left, tangent, rule)
    singular = fill!(similar(q.Z, Bool, size(q.Z, 2)), false)
    # (I - Rᵀ D) λ = G with E = D λ, or (I - D R) E = D G
    if tangent
        solve_each!(q.Z, ws, singular, q.M, q.D, nothing, q.D .* q.U, left)
    else
        solve_each!(q.Z, ws, singular, q.M, nothing, q.D, q.U, left)
        q.Z[:, left] = q.D[:, left] .* q.Z[:, left]
    end
    progress, record = progress_of(ws, size(q.Z, 2)), record_of(ws, size(q.Z, 2))
    step!(ws, q, progress, record, rule)
    return ifelse.(on_host(singular)[left], NaN, Float64.(on_host(record.residual)[left]))
end

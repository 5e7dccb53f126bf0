# The gradient of a small net in one launch, except its products: a workgroup takes its samples to the equilibrium, and through the
# loss and the adjoint system. Samples that it does not solve are left to the passes with separate launches.

"The results of a sample that the host reads: whether it is solved, its residual, that of its adjoint system, and its loss."
const SOLVED, RESIDUAL, ADJOINT_RESIDUAL, LOSS = 1:4

"""
Whether the gradient is one of [`differentiate!`](@ref): of a loss, for a net of one stage that [`picard!`](@ref) takes, by iteration
that is not done in lower precision first.
"""
function is_fused(ws::DeviceWorkspace{T}, problem::Problem, seed, samples) where {T}
    stage, n = first(ws.net.stages), neurons(ws.net)
    return seed isa LossSeed && length(ws.net.stages) == 1 && stage.recurrent && n <= FUSED_NEURONS && problem.jacobian_penalty == 0 &&
        problem.solver isa Union{Auto, Picard} && is_iterated(problem.adjoint) && (T == Float32 || n^2 * samples < ws.coarse_first)
end
is_iterated(::Adjoint) = false
is_iterated(s::Implicit) = s.linear_solver in (:auto, :neumann)

"The gradient of the columns that are solved is added to `total`; returns their [`Summary`](@ref ImplicitRNN.Summary), and the others."
function pull_back_fused!(total, ws::DeviceWorkspace{T}, problem, X, seed::LossSeed, columns; start, report, states) where {T}
    samples, w, stage, a = length(columns), only(ws.stages), only(ws.net.stages), only(arrays!(ws, length(columns)))
    here(array) = on_device(ws, columns_of(array, columns))
    x, targets, z = here(X), here(seed.targets), here(start)
    drive!(ws, 1, x)
    z === nothing ? fill!(a.Z, 0) : copyto!(a.Z, z)
    n, inputs, tiling = size(a.Z, 1), size(w.input, 2), Tiling(size(a.Z, 1), T)
    A, B = similar(a.Z, n + size(targets, 1), samples), fill!(similar(a.Z, n + inputs + 1, samples), 1)
    inputs > 0 && (B[(n + 1):(n + inputs), :] = x)
    room(values) = room_for(values, ws, samples)
    solves = (;
        progress = room(initial_progress(T)), record = room(initial_record(T)),
        adjoint_progress = room(initial_progress(T)), adjoint_record = room(initial_record(T)),
        results = KernelAbstractions.allocate(ws.backend, Float64, 4, samples),
    )
    outputs = (; Y = similar(targets), targets, weights = here(seed.weights), seed.loss, seed.scale)
    differentiate!(ws.backend, work_items(tiling))(
        A, B, a.D, solves, outputs, a.Z, a.U, w.recurrent, w.transposed, w.readout, ws.offset, Activated(stage.activation),
        rule_of(ws, 1, problem.solver), adjoint_rule(ws, problem.adjoint; least = tiny_size(ws, problem.adjoint)), tiling;
        ndrange = work_items(tiling) * cld(samples, samples_of(tiling))
    )
    pack_products!(ws, A * B', n, inputs)
    total .+= ws.gradient

    results = on_host(solves.results)
    solved, left = findall(==(1), view(results, SOLVED, :)), findall(!=(1), view(results, SOLVED, :))
    found, residual = (; status = fill(CONVERGED, length(solved)), residual = results[RESIDUAL, solved]), results[ADJOINT_RESIDUAL, solved]
    report!(report, columns[solved], found, residual)
    states === nothing || put_block!(states, stage.rows, columns[solved], B[1:n, solved])
    return Summary(sum(view(results, LOSS, :)), Quality(found, residual, problem.adjoint)), columns[left]
end

"The gradient of the parameters from [∂L/∂s; ∂L/∂y] [z; x; 1]ᵀ."
function pack_products!(ws::DeviceWorkspace, G, n, inputs)
    fill!(ws.gradient, 0)
    z, x, outputs, last = 1:n, (n + 1):(n + inputs), (n + 1):size(G, 1), size(G, 2)
    pack_stage!(ws.gradient, ws, 1, G[z, x], Pair{Int, typeof(G)}[], G[z, z], G[z, last])
    ws.net.outputs == 0 || pack_readout!(ws.gradient, ws.net, 1, G[outputs, z], G[outputs, last])
    return
end

# --- the steps of a work-item -------------------------------------------------------------------------------------------

@inline function start_column!(progress, record, j, running)
    set!(array, value) = (@inbounds array[j] = value; nothing)
    T = eltype(progress.change)
    map(set!, values(progress), values(initial_progress(T)))
    map(set!, values(record), values(initial_record(T)))
    @inbounds progress.running[j] = progress.started[j] = running
    return
end

@inline is_solved(progress, record, j) = @inbounds !progress.abandoned[j] && record.status[j] == CONVERGED

# The states after the last evaluation, whose slopes go to D.
@inline function settle_block!(D, f, s, z, t, first, latest, n, samples, ::Tiling{P}) where {P}
    return block() do r, c
        i, column = row_of(t, r, P), column_of(t, c, P)
        argument, state = s[(c - 1) * BLOCK + r], @inbounds(z[i, column])
        if i <= n && first + column <= samples
            latest && (state = value_at(f, i, argument))
            @inbounds D[i, first + column] = slope_at(f, i, argument, state)
        end
        state
    end
end

# A work-item has one sample, and every so many of its outputs.
@inline function read_out_columns!(Y, readout, offset, z, t, first, samples, tiling::Tiling{P, C}) where {P, C}
    column, o = (t - 1) % C + 1, (t - 1) ÷ C + 1
    while o <= size(Y, 1) && first + column <= samples
        y = o <= length(offset) ? @inbounds(offset[o]) : zero(eltype(Y))
        for i in axes(readout, 2)
            @inbounds y = muladd(readout[o, i], z[i, column], y)
        end
        @inbounds Y[o, first + column] = y
        o += work_items(tiling) ÷ C
    end
    return
end

# The loss of sample j and its derivative, as on the CPU; none where it is not at its equilibrium.
@inline function begin_back!(results, A, B, (; Y, targets, weights, loss, scale), solved, j, n)
    solved || return leave_out!(results, A, B, j)
    own(array, rows) = @inbounds view(array, rows, j:j)
    outputs, w = axes(Y, 1), weights === nothing ? scale : scale * @inbounds(weights[j])
    value = @inline ImplicitRNN.loss_gradient!(own(A, n .+ outputs), loss, own(Y, outputs), own(targets, outputs), nothing, w)
    @inbounds results[LOSS, j] = value
    return
end
# Neither has it a part in the products, where even zero times a state would be NaN if that is not finite.
@inline function leave_out!(results, A, B, j)
    @inbounds results[LOSS, j] = 0
    clear!(A, j)
    clear!(B, j)
    return
end
@inline function clear!(A, j)
    for i in axes(A, 1)
        @inbounds A[i, j] = 0
    end
    return
end

# What the host reads of sample j, which is left out where its adjoint system is not solved.
@inline function conclude_sample!((; results, record, adjoint_progress, adjoint_record), A, B, j)
    solved = @inbounds(adjoint_progress.started[j]) && is_solved(adjoint_progress, adjoint_record, j)
    @inbounds results[SOLVED, j] = solved
    @inbounds results[RESIDUAL, j], results[ADJOINT_RESIDUAL, j] = record.residual[j], adjoint_record.residual[j]
    solved || leave_out!(results, A, B, j)
    return
end

# The block of readoutᵀ ∂L/∂y.
@inline function drive_adjoint(readout, A, t, first, n, samples, ::Tiling{P}) where {P}
    rows, columns = four(r -> min(row_of(t, r, P), n)), four(c -> min(first + column_of(t, c, P), samples))
    s = block((r, c) -> zero(eltype(A)))
    for o in axes(readout, 1)
        s = add_outer(s, four(r -> @inbounds(readout[o, rows[r]])), four(c -> @inbounds(A[n + o, columns[c]])))
    end
    return s
end

# --- the kernel ---------------------------------------------------------------------------------------------------------

# From the first iterates `Z`, with the drives `U`, to A = [∂L/∂s; ∂L/∂y] and B = [z; x; 1], whose product A Bᵀ is the gradient of the
# weights in force; x and 1 are there already.
@eval @kernel function differentiate!(
        A, B, D, solves, outputs, @Const(Z), @Const(U), @Const(R), @Const(transposed), @Const(readout), @Const(offset), g, rule, adjoint_rule,
        tiling::Tiling{P, C, Q}
    ) where {P, C, Q}
    # To the equilibrium.
    $(begin_group(:R).args...)
    if t <= C && first[1] + t <= samples
        start_column!(solves.progress, solves.record, first[1] + t, true)
    end
    @synchronize
    $(picard_loop(:(solves.progress), :(solves.record), :R, :g, :nothing, :rule))
    @inbounds f[1] = settle_block!(
        D, g.f, affine_block(u[1], matrix, R, z, t, n, tiling), z, t, first[1], adjoint_rule.latest, n, samples, tiling
    )
    @synchronize

    # Through the loss.
    store_block!(z, @inbounds(f[1]), t, tiling)
    write_block!(B, z, t, first[1], n, samples, tiling)
    load_matrix!(matrix, transposed, t, n, tiling)
    @synchronize
    read_out_columns!(outputs.Y, readout, offset, z, t, first[1], samples, tiling)
    @synchronize
    if t <= C && first[1] + t <= samples
        solved = is_solved(solves.progress, solves.record, first[1] + t)
        start_column!(solves.adjoint_progress, solves.adjoint_record, first[1] + t, solved)
        begin_back!(solves.results, A, B, outputs, solved, first[1] + t, n)
    end
    @synchronize

    # Through the adjoint system.
    @inbounds u[1] = drive_adjoint(readout, A, t, first[1], n, samples, tiling)
    store_block!(z, block((r, c) -> zero(eltype(Z))), t, tiling)
    if t == 1
        @inbounds going[1] = 1
    end
    @synchronize
    $(picard_loop(:(solves.adjoint_progress), :(solves.adjoint_record), :transposed, :(Scaled()), :D, :adjoint_rule))
    write_block!(A, z, t, first[1], n, samples, tiling)
    @synchronize
    if t <= C && first[1] + t <= samples
        conclude_sample!(solves, A, B, first[1] + t)
    end
end

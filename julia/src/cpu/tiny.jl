# Tiny nets: one recurrent stage that is computed in the lanes of the vector registers from its drive to its gradient. A lane is a sample
# of one net, as here, or one of several nets (side_by_side.jl). The operations and their order are those of the passes by tiles, so the
# results are identical to the bit; the overhead of tiles and columns would exceed these operations.

"""
    is_tiny(problem)

Whether a net can go through the lanes as a whole: one recurrent stage whose products are summed term by term, and a method that the
lanes have.
"""
function is_tiny(problem::Problem)
    (; net, solver, adjoint, loss, jacobian_penalty) = problem
    length(net.stages) == 1 && first(net.stages).recurrent || return false       # only(…) allocates in Julia 1.10
    return max(neurons(net), net.inputs, net.outputs) <= SMALL && net.constraint isa Union{Free, Perron, InfNorm} &&
        solver isa Auto && solver.max_iterations >= LANE_ITERATIONS && adjoint isa Implicit && adjoint.linear_solver === :auto &&
        loss isa ElementwiseLoss && jacobian_penalty == 0
end

"When the lanes are done with a tiny problem whose activation is f: their criterion forward, and the tolerance of the adjoint."
function lane_criteria(problem::Problem{T}, f::Activation) where {T}
    (; net, solver, adjoint) = problem
    tol, adjoint_tol = (@usual solver Auto tolerance(solver, T)::T), (@usual adjoint Implicit tolerance(adjoint, T)::T)
    forward = LaneCriterion(f, tol, scale_floor(T, neurons(net)), guarantees_uniqueness(net.constraint)::Bool)
    return forward, adjoint_tolerance(adjoint_tol)
end

# --- one net, a sample in each lane -------------------------------------------------------------------------------

"The buffers for the gradient of a tiny net on up to L samples."
struct SampleLanes{T, L}
    lanes::Lanes{T, L}
    X::Matrix{T}                   # samples × inputs
    Y::Matrix{T}                   # samples × outputs
    GY::Matrix{T}
end
function SampleLanes{T, L}(net::Network{T}) where {T, L}
    k = output_size(net)
    return SampleLanes{T, L}(Lanes{T, L}(neurons(net)), zeros(T, L, net.inputs), zeros(T, L, k), zeros(T, L, k))
end

"""
    gradient_in_lanes!(g, ws, problem, X, seed)

The gradient of a loss and its [`Summary`](@ref) by the weights in force, or nothing where the net or the batch is not small enough or
the lanes do not do for a sample.
"""
function gradient_in_lanes!(g, ws::CPUWorkspace{T}, problem::Problem{T}, X, seed) where {T}
    1 <= size(X, 2) <= lane_count(T, 1) && is_tiny(problem) || return nothing
    isempty(ws.sample_lanes) && push!(ws.sample_lanes, SampleLanes{T, lane_count(T, 1)}(problem.net))
    s, f = ws.sample_lanes[1]::SampleLanes{T, lane_count(T, 1)}, only(problem.net.stages).activation
    return @usual f Tanh gradient_in_lanes!(g, ws, s, problem, f, X, seed)
end

function gradient_in_lanes!(g, ws, s::SampleLanes{T, L}, problem::Problem{T}, f::Activation, X, seed) where {T, L}
    (; net, loss) = problem
    w, lanes, B = s.lanes, Val(L), size(X, 2)
    weights, C, d, G = only(ws.weights.stages), ws.weights.C, ws.weights.d, clear!(ws.gradients[1])
    criterion, adjoint_tol = lane_criteria(problem, f)
    load!(s.X, X, 1, B)
    drive_lanes!(w.U, weights.input, weights.bias, s.X, lanes)
    newton_lanes!(w, weights.recurrent, criterion, true, LANE_ITERATIONS)
    w.failed & bits_up_to(B) == 0 || return nothing
    relate_residuals!(w, criterion.floor^2)
    residual = worst(w.residual, B)
    slopes_lanes!(w, f)
    read_out_lanes!(s.Y, w.F, net, C, d, lanes)
    total = (@usual loss MSE loss_gradient!(transpose(s.GY), loss, transpose(s.Y), seed.targets, seed.weights, seed.scale))::Float64
    read_out_adjoint_lanes!(w.U, s.GY, net, C, lanes)
    adjoint_lanes!(w, only(ws.recurrences).backward::Matrix{T}, adjoint_tol)
    w.failed & bits_up_to(B) == 0 || return nothing
    (; input, recurrent, bias) = only(G.stages)
    add_pullback_lanes!((; input, recurrent, bias, G.C, G.d), w, s.X, s.GY, net, B)
    pack_gradient!(g, net, G, ws.weights)
    return Summary(total, Quality(0, residual, worst(w.residual, B)))
end

worst(residuals, count) = foldl((a, l) -> worse(Float64(residuals[l]), a), 1:count; init = 0.0)

# --- the passes, of samples or of nets ----------------------------------------------------------------------------

# Entry i of a vector of all lanes, or of each.
@inline vector_entry(v::AbstractVector, i::Int, lanes) = same_in_all(@inbounds(v[i]), lanes)
@inline vector_entry(V::Matrix, i::Int, lanes) = vector(V, i, lanes)

"U = bias + input x"
function drive_lanes!(U, input, bias, x, lanes)
    for i in axes(U, 2)
        drive = vector_entry(bias, i, lanes)
        for k in 1:size(input, ndims(input))
            drive = muladd_lanes(matrix_entry(input, i, k, lanes), vector_entry(x, k, lanes), drive)
        end
        put_vector!(U, i, drive)
    end
    return
end

"Y = C z + d, or the neurons read."
function read_out_lanes!(Y, Z, net, C, d, lanes)
    offset = first(net.readout) - 1
    for i in axes(Y, 2)
        net.outputs == 0 && (put_vector!(Y, i, vector(Z, net.readout[i], lanes)); continue)
        y = vector_entry(d, i, lanes)
        for q in 1:size(C, ndims(C))
            y = muladd_lanes(matrix_entry(C, i, q, lanes), vector(Z, offset + q, lanes), y)
        end
        put_vector!(Y, i, y)
    end
    return
end

"G = ∂L/∂z from GY = ∂L/∂y."
function read_out_adjoint_lanes!(G::Matrix{T}, GY, net, C, lanes) where {T}
    offset = first(net.readout) - 1
    fill!(G, 0)
    if net.outputs == 0
        for i in axes(GY, 2), l in axes(G, 1)
            @inbounds G[l, net.readout[i]] += GY[l, i]
        end
        return
    end
    for q in 1:size(C, ndims(C))
        g = same_in_all(zero(T), lanes)
        for i in axes(GY, 2)
            g = muladd_lanes(matrix_entry(C, i, q, lanes), vector(GY, i, lanes), g)
        end
        put_vector!(G, offset + q, g)
    end
    return
end

"Add the gradient of the weights, given w.F = z, w.Z = ∂L/∂s and GY = ∂L/∂y: of each net in `lanes`, or the sum over so many of them."
function add_pullback_lanes!(sum, w::Lanes, x, GY, net, lanes)
    add_outer_lanes!(sum.recurrent, w.Z, w.F, 0, lanes)
    add_outer_lanes!(sum.input, w.Z, x, 0, lanes)
    add_columns_lanes!(sum.bias, w.Z, lanes)
    net.outputs == 0 && return
    add_outer_lanes!(sum.C, GY, w.F, first(net.readout) - 1, lanes)
    add_columns_lanes!(sum.d, GY, lanes)
    return
end

# G += a bᵀ for the entries of b behind the offset.
function add_outer_lanes!(G::Array{<:Any, 3}, A, B, offset::Int, lanes::Val)
    n = size(G, 2)
    for i in 1:n
        a = vector(A, i, lanes)
        for q in axes(G, 3)
            k = (q - 1) * n + i
            put_vector!(G, k, muladd_lanes(a, vector_entry(B, offset + q, lanes), vector(G, k, lanes)))
        end
    end
    return
end
function add_outer_lanes!(G::Matrix, A, B, offset::Int, samples::Int)
    @inbounds for q in axes(G, 2), i in axes(G, 1)
        sum = G[i, q]
        for l in 1:samples
            sum = muladd(A[l, i], B[l, offset + q], sum)
        end
        G[i, q] = sum
    end
    return
end

# g += a
add_columns_lanes!(g::Matrix, A, ::Val) = add!(g, A)
function add_columns_lanes!(g::Vector, A, samples::Int)
    @inbounds for i in eachindex(g), l in 1:samples
        g[i] += A[l, i]
    end
    return
end

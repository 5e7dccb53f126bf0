# What a first use from Python needs with the common types, inferred and compiled together with the package. Nothing of it runs: what
# runs while a package is compiled is compiled twice. Inference ends where a call is dispatched at run time, so the methods behind
# such calls are named here, and those within before those around them, as it also ends where shared work shares work. A test tells
# which are missing.

"Compile `f` for arguments and keyword arguments of these types."
function compile_ahead(f, arguments::Type...; keywords...)
    isempty(keywords) && return precompile(f, arguments)
    return precompile(Core.kwcall, (NamedTuple{keys(keywords), Tuple{values(keywords)...}}, Core.Typeof(f), arguments...))
end

function compile_options_ahead()
    compile_ahead(Layer, Int, String; lateral = Bool)
    for f in (Tanh, Sigmoid)
        compile_ahead(Stage, UnitRange{Int}, Bool, Bool, f, Vector{Float64}, Vector{Connection}, UnitRange{Int})
    end
    compile_ahead(Perron, Float64)
    for solver in (Auto, Chord)
        compile_ahead(solver; max_iterations = Int, tol = Nothing)
    end
    compile_ahead(Picard; max_iterations = Int, tol = Nothing, damping = Float64)
    compile_ahead(Implicit; max_iterations = Int, tol = Nothing, linear_solver = String)
    return
end

function compile_passes_ahead(::Type{T}) where {T}
    vector, matrix, columns = Vector{T}, Matrix{T}, typeof(view(zeros(T, 0, 0), :, 1:0))
    net, problem, workspace, tile, weights = Network{T}, Problem{T}, CPUWorkspace{T}, Tile{T}, StageWeights{T}
    for constraint in (Perron, Free)
        compile_ahead(
            net, Int, Vector{Layer}; feedback = Vector{Pair{Int, Int}}, skips = Vector{Pair{Int, Int}}, input_skips = Vector{Int},
            outputs = Int, constraint
        )
        compile_ahead(constrain!, weights, constraint, Vector{Float64})
        compile_ahead(constrain_pullback!, weights, constraint, weights, Vector{Float64})
    end
    compile_ahead(constrain!, StageWeights{Dual{Nothing, T, 1}}, Perron, Vector{Float64})
    compile_ahead(amplification, Perron, weights, Vector{Float64})
    for solver in (Auto, Chord, Picard)
        compile_ahead(Problem, net; solver, adjoint = Implicit, loss = MSE, jacobian_penalty = Float64)
    end
    compile_ahead(Workspace, net)

    compile_ahead(slopes!, matrix, Tanh, matrix, matrix)
    compile_ahead(repels, matrix, matrix)
    compile_ahead(products, Float64, Float64)
    stationary = Stationary{T, Tanh, typeof(view(zeros(T, 0, 0), 1:0, :))}
    for solver in (Picard, Chord)
        compile_ahead(tolerance, solver, Type{T})
        compile_ahead(solve!, solver, Columns{T, Nothing}, stationary)
    end
    coarse = coarse_factor(T, max(COARSE_NEURONS, SINGLE_NEURONS))
    if coarse !== nothing
        A, buffers = typeof(coarse), typeof(coarse_buffers(coarse, 0, 0))
        foreach(f -> compile_ahead(f, A, matrix, Int), (store!, store_transposed!))
        compile_ahead(Corrections, A, Int, Int)
        compile_ahead(solve_corrections!, Corrections, A, buffers, Int, Float32, Int)
    end
    compile_ahead(solve_stage!, tile, problem, UnitRange{Int}, Tanh, Int)
    block = typeof(view(zeros(T, 0, 0), 1:0, 1:0))
    compile_ahead(
        solve_adjoint!, block, Implicit, Columns{T, matrix}, Recurrence{T}, block, block;
        outcome = Outcome, factors = Nothing, latest = Bool, threads = Int
    )
    compile_ahead(backward_stage!, tile, problem, Stage, Tanh, Int, columns, JacobianPenalty, Int)
    compile_ahead(push_forward_stage!, tile, problem, Stage, Tanh, Int, weights, columns, columns)

    compile_ahead(fill_arrays!, Tuple{Vector{Status}, Vector{Float64}, Vector{Float64}}, UnitRange{Int}, Outcome, Vector{Float64})
    compile_ahead(equilibrium!, Solution{T, matrix}, workspace, problem, vector, matrix)
    compile_ahead(loss_and_gradient!, vector, workspace, problem, vector, matrix, matrix; probe = Int, weights = Nothing, report = Nothing)
    for start in (Nothing, matrix)
        compile_ahead(vjp!, vector, matrix, workspace, problem, vector, matrix, matrix; of = Symbol, start, probe = Int, report = Nothing)
        compile_ahead(jvp!, matrix, workspace, problem, vector, matrix, vector, matrix; of = Symbol, start, report = Nothing)
    end
    return
end

function compile_training_ahead(::Type{T}) where {T}
    vector, matrix, rule = Vector{T}, Matrix{T}, typeof(Optimisers.Adam(0.01, (0.9, 0.999), 1.0e-8))
    workspace, state = CPUWorkspace{T}, Tuple{vector, vector, Tuple{T, T}}
    buffers = StepBuffers{T, rule, workspace, vector, matrix}
    trainer = Trainer{T, rule, state, buffers}
    nets, batches = Replicas{matrix, matrix}, Batches{matrix, matrix, Nothing, Matrix{Int}, Vector{Float64}}
    compile_ahead(OPTIMIZERS.adam, Dict{Symbol, Any})
    compile_ahead(decaying, rule, Dict{Symbol, Any})
    compile_ahead(
        Trainer, Problem{T}, rule; workspace, guard = Guard, clip = Float64, nets = Int, batch_size = Int, warm_start = Bool
    )
    column(S) = typeof(view(zeros(S, 0, 1), :, 1))
    for equilibria in (Nothing, matrix)
        compile_ahead(train_net!, trainer, buffers, nets, Int, batches, equilibria, column(Float64), column(Int))
    end
    T === Float64 && compile_side_by_side_ahead(trainer, buffers, nets, batches, state)
    compile_ahead(train!, trainer, nets, matrix, matrix, Matrix{Int}, Int, Vector{Float64}, Matrix{Float64}, Matrix{Int}; weights = Nothing)
    foreach(entry -> compile_ahead(flatten!, Vector{Float64}, entry), (fieldtypes(state)..., state))
    compile_ahead(optimizer_state, trainer)
    return
end

function compile_side_by_side_ahead(trainer, buffers, nets, batches, state)
    lanes = SideBySide{Float64, nets_side_by_side(Float64), Tanh, Perron, MSE}
    compile_ahead(SideBySide, Network{Float64}, Tanh, Perron, MSE, LaneCriterion{Float64, Tanh}, Float64)
    foreach(entry -> compile_ahead(stacked, Vector{entry}, Int), fieldtypes(state))
    compile_ahead(NetGroup, lanes, trainer, nets, typeof(view([1], 1:1)))
    compile_ahead(train_group!, NetGroup{Float64, state}, lanes, buffers, trainer, nets, batches, Matrix{Float64}, Matrix{Int})
    return
end

# A less common activation, in one precision.
function compile_sigmoid_ahead()
    matrix, columns = Matrix{Float64}, typeof(view(zeros(0, 0), :, 1:0))
    tile, problem = Tile{Float64}, Problem{Float64}
    compile_ahead(solve_stage!, tile, problem, UnitRange{Int}, Sigmoid, Int)
    lanes = SampleLanes{Float64, lane_count(Float64, 1)}
    compile_ahead(backward_stage!, tile, problem, Stage, Sigmoid, Int, columns, JacobianPenalty, Int)
    for samples in (matrix, columns)
        seed = LossSeed{samples, Vector{Float64}, Float64}
        compile_ahead(gradient_in_lanes!, Vector{Float64}, CPUWorkspace{Float64}, lanes, problem, Sigmoid, samples, seed)
    end
    return
end

if PrecompileTools.workload_enabled(@__MODULE__)
    compile_options_ahead()
    foreach(compile_passes_ahead, (Float64, Float32))
    foreach(compile_training_ahead, (Float64, Float32))
    compile_sigmoid_ahead()
end

# The engine on device arrays, on the reference ones, which live on the CPU and refuse access to single entries.

const DEVICE_PACKAGES = ("GPUArraysCore", "JLArrays", "KernelAbstractions")

if !all(name -> Base.find_package(name) !== nothing, DEVICE_PACKAGES)
    @info "Skipped: the tests on device arrays need $(join(DEVICE_PACKAGES, ", ")) in the environment"
    @test_skip "device arrays"
elseif Base.JLOptions().opt_level > 0
    # Kernels take long to compile for the CPU, which the reference device is: without optimisation half as long. In a process of its
    # own, also since exceptions take long to be thrown where much has been compiled.
    command = `$(Base.julia_cmd()) -O0 -t$(Threads.nthreads()) --project=$(Base.active_project()) runtests.jl device`
    @test success(pipeline(Cmd(command; dir = @__DIR__); stdout, stderr))
else
    @eval using JLArrays: JLArray, JLArrays, JLBackend
    JLArrays.allowscalar(false)

    on_device(net) = ImplicitRNN.Workspace(net, JLBackend())

    function solved(ws, p, X; start = nothing, options...)
        return ImplicitRNN.equilibrium!(Solution(ws.net, size(X, 2)), ws, Problem(ws.net; options...), p, X, start)
    end

    function gradient(ws, p, X, Y; weights = nothing, options...)
        g = zero(p)
        loss, quality = ImplicitRNN.loss_and_gradient!(g, ws, Problem(ws.net; options...), p, X, Y; weights)
        return (; loss, g, quality)
    end

    "More samples than a workgroup takes, and few for large nets, whose products are slow on the reference device."
    samples_and_targets(net) = (count = neurons(net) > 128 ? 11 : 45; (samples(net, count), targets(net, count)))

    agreement(::Type{Float64}) = 1.0e-9
    agreement(::Type{Float32}) = 1.0e-5

    # A kernel takes long to compile for the CPU, a fused one longest, and once for each type of its arguments: so all activations are in
    # one stage, of more neurons than the fused kernel takes, and each constraint is in one precision.
    nets_of(::Type{T}) where {T} = (
        (T === Float64 ? (Network(3, [Layer(17, f) for f in keys(ACTIVATIONS)]; feedback = true, outputs = 2, constraint = Perron(0.5)),) : ())...,
        (one_layer(; T, constraint) for constraint in (T === Float64 ? CONSTRAINED : CONSTRAINED[2:2]))...,
        one_layer(; T, lateral = false),
        Network{T}(3, [Layer(4, :tanh), Layer(3, :sigmoid; lateral = false), Layer(5, :softplus)]; feedback = true, outputs = 2),
        Network{T}(3, [Layer(4), Layer(3; lateral = false), Layer(5)]; outputs = [1, 6, 12], constraint = InfNorm(0.9)),
        Network{T}(3, [Layer(4), Layer(3), Layer(2)]; outputs = 2, skips = [1 => 3], input_skips = [3], feedback = [3 => 2]),
    )

    @testset "the device agrees with the CPU: $T" for T in (Float64, Float32)
        tol = agreement(T)
        for net in nets_of(T)
            p, X, Y = parameters(net; gain = 0.25), samples(net, 21), targets(net, 21)
            cpu, device = ImplicitRNN.Workspace(net), on_device(net)
            @testset "states" begin
                here, there = solved(cpu, p, X; solver = Picard()), solved(device, p, X; solver = Picard())
                @test relative_error(there.state, here.state) < tol
                @test there.status == here.status
                @test maximum(abs, there.iterations - here.iterations) <= 1         # where rounding decides
                @test isnan.(there.bound) == isnan.(here.bound)
                @test all(<=(1), there.rate) && all(<=(T == Float32 ? 1.0e-6 : 1.0e-10), there.residual)
                @test relative_error(solved(device, p, X).state, here.state) < tol
            end
            @testset "gradients" begin
                here, there = gradient(cpu, p, X, Y), gradient(device, p, X, Y)
                @test there.loss ≈ here.loss rtol = tol
                @test relative_error(there.g, here.g) < tol
                @test there.quality.unconverged == here.quality.unconverged == 0
                @test there.quality.adjoint_residual < 1.0e-5
            end
        end
    end

    # The kernel that takes the loss itself takes long to compile for the CPU: a few losses by that, all of them by many launches.
    @testset "losses and weights: $loss, $(length(net.stages)) stages" for (net, loss) in (
            (one_layer(), BinaryCrossEntropy()), (one_layer(), CrossEntropy()),
            ((layered(; feedback = false), loss) for loss in (MSE(), MAE(), Huber(0.3), BinaryCrossEntropy(), CrossEntropy()))...,
        )
        p, X, Y = parameters(net), samples(net, 20), abs.(targets(net, 20))
        for weights in (length(net.stages) == 1 ? (rand(Xoshiro(5), 20),) : (nothing, rand(Xoshiro(5), 20)))
            options = (; loss, weights, solver = Picard(tol = 1.0e-13))
            here, there = (gradient(ws, p, X, Y; options...) for ws in (ImplicitRNN.Workspace(net), on_device(net)))
            @test there.loss ≈ here.loss rtol = 1.0e-12
            @test relative_error(there.g, here.g) < 1.0e-9
        end
    end

    @testset "the bound is certified" begin
        for net in (one_layer(; constraint = Perron(0.9)), layered(; constraint = Spectral(0.9), feedback = false))
            p, X = parameters(net; gain = 0.8), samples(net, 20)
            rough = solved(on_device(net), p, X; solver = Picard(tol = 1.0e-3))
            exact = equilibrium(net, p, X; solver = Picard(tol = 1.0e-14))
            @test all(maximum(abs, rough.state - exact.state; dims = 1)[:] .<= rough.bound)
            @test rough.bound ≈ solved(ImplicitRNN.Workspace(net), p, X; solver = Picard(tol = 1.0e-3)).bound rtol = 1.0e-6
        end
    end

    @testset "samples that Picard iteration leaves are those of the CPU" begin
        # At this gain some samples have no equilibrium that attracts, and some approach theirs slowly.
        net = one_layer(; constraint = Free(), neurons = 6)
        p, X, Y = parameters(net; gain = 0.6), samples(net, 60), targets(net, 60)
        cpu, device = ImplicitRNN.Workspace(net), on_device(net)
        for solver in (Auto(), Picard(max_iterations = 150), Picard(damping = 0.5))
            here, there = solved(cpu, p, X; solver), solved(device, p, X; solver)
            settled = converged(here)
            @test converged(there) == settled
            @test 0 < count(settled) < 60
            @test relative_error(there.state[:, settled], here.state[:, settled]) < 1.0e-7
            @test all(<=(1.0e-10), there.residual[settled])
        end
        # Where the series of the adjoint does not converge, the CPU solves the system.
        steep = one_layer(; constraint = Monotone(0.05), neurons = 6)
        q = parameters(steep; gain = 3.0)
        here, there = gradient(ImplicitRNN.Workspace(steep), q, X, Y), gradient(on_device(steep), q, X, Y)
        @test there.quality.unconverged == here.quality.unconverged == 0
        @test relative_error(there.g, here.g) < 1.0e-7
        @test there.quality.adjoint_residual < 1.0e-8
    end

    @testset "samples whose squares overflow are those of the CPU" begin
        net = one_layer(; constraint = InfNorm(0.9), activation = :relu)
        p, X = parameters(net), 1.0e160 .* samples(net, 20)
        here, there = solved(ImplicitRNN.Workspace(net), p, X), solved(on_device(net), p, X)
        @test all(converged(there)) && all(converged(here))
        @test relative_error(there.state ./ 1.0e160, here.state ./ 1.0e160) < 1.0e-9
    end

    @testset "samples of huge drives have not blown up: $(nameof(typeof(solver)))" for solver in (Picard(), Anderson(), Newton(), Chord())
        net = one_layer(; constraint = InfNorm(0.9), activation = :relu)
        p, X = parameters(net), 1.0e30 .* samples(net, 20)
        here, there = (solved(ws, p, X; solver) for ws in (ImplicitRNN.Workspace(net), on_device(net)))
        @test there.status == here.status == fill(CONVERGED, 20)
        @test relative_error(there.state, here.state) < 1.0e-8
    end

    @testset "adjoint residuals are told where squares overflow or vanish: $linear_solver" for linear_solver in (:auto, :lu, :anderson)
        net = one_layer()
        p, X, problem = parameters(net), samples(net, 9), Problem(net; adjoint = Implicit(; linear_solver))
        for size in (1.0e160, 1.0e-160)
            V, report = size .* randn(Xoshiro(4), 2, 9), (Vector{Status}(undef, 9), zeros(9), zeros(9))
            here, there = map((ImplicitRNN.Workspace(net), on_device(net))) do ws
                g = zero(p)
                ImplicitRNN.vjp!(g, zero(X), ws, problem, p, X, V; report)
                g ./ size
            end
            @test relative_error(there, here) < 1.0e-9
            @test all(residual -> 0 < residual < 1.0e-9, report[3])
        end
    end

    @testset "a report per sample" begin
        net = one_layer(; constraint = Free(), neurons = 6)
        p, X, Y = parameters(net; gain = 0.6), samples(net, 60), targets(net, 60)
        reports = map((ImplicitRNN.Workspace(net), on_device(net))) do ws
            report = (Vector{Status}(undef, 60), zeros(60), zeros(60))
            ImplicitRNN.loss_and_gradient!(zero(p), ws, Problem(net), p, X, Y; report)
            report
        end
        @test (reports[1][1] .== CONVERGED) == (reports[2][1] .== CONVERGED)
        @test all(reports[2][2] .<= 1.0e-10 .|| reports[2][1] .!= CONVERGED)
    end

    @testset "the start, and arrays on the device" begin
        net = one_layer()
        p, X, Y = parameters(net), samples(net, 20), targets(net, 20)
        device = on_device(net)
        z = solved(device, p, X).state
        again = solved(device, p, X; solver = Picard(), start = z)
        @test all(==(1), again.iterations)
        g = JLArray(zero(p))
        ImplicitRNN.loss_and_gradient!(g, ImplicitRNN.Workspace(net, JLArray), Problem(net), JLArray(p), JLArray(X), JLArray(Y))
        @test Array(g) == gradient(device, p, X, Y).g
        state = JLArray(zero(z))
        ImplicitRNN.equilibrium!(Solution(state, ImplicitRNN.Outcome(20), zeros(20)), device, Problem(net), JLArray(p), JLArray(X), JLArray(z))
        @test Array(state) ≈ z rtol = 1.0e-9
    end

    @testset "the same bits each time" begin
        net = layered()
        p, X, Y = parameters(net), samples(net, 100), targets(net, 100)
        @test gradient(on_device(net), p, X, Y).g == gradient(on_device(net), p, X, Y).g
    end

    @testset "the states found are kept for a warm start, zero where there is no equilibrium" begin
        net = Network(1, [Layer(1)]; outputs = [1], constraint = Free())
        p, X, problem = [1.0, -3.0, 0.0], [5.0 0.5 6.0], Problem(net; solver = Picard())        # z = tanh(x - 3 z)
        here, there = map((ImplicitRNN.Workspace(net), on_device(net))) do workspace
            states = zeros(1, 3)
            ImplicitRNN.loss_and_gradient!(zero(p), workspace, problem, p, X, zero(X); states)
            states
        end
        @test here[2] == there[2] == 0 < there[1]
        @test there ≈ here
    end

    @testset "training stays on the device: $(nameof(typeof(rule))), warm start $warm_start" for
        (rule, warm_start) in ((ImplicitRNN.Optimisers.Adam(0.01), false), (ImplicitRNN.Optimisers.Momentum(0.01), true))

        net = layered()
        P = hcat(parameters(net), parameters(net; seed = 9))
        X, Y, weights = samples(net, 30), targets(net, 30), rand(Xoshiro(7), 30)
        order = reduce(hcat, shuffle(Xoshiro(e), 1:30) for e in 1:4)
        results = map((ImplicitRNN.Workspace(net), on_device(net))) do workspace
            nets, losses, unconverged = Replicas(copy(P)), zeros(4, 2), zeros(Int, 4, 2)
            trainer = Trainer(Problem(net), rule; workspace, batch_size = 8, nets = 2, clip = 0.5, warm_start)
            train!(trainer, nets, X, Y, order, 8, fill(0.01, 16), losses, unconverged; weights)
            state = ImplicitRNN.optimizer_state(trainer)
            again = Trainer(Problem(net), rule; workspace, batch_size = 8, nets = 2)
            ImplicitRNN.restore_optimizer_state!(again, state)
            @test ImplicitRNN.optimizer_state(again) == state
            nets.parameters, losses, state, unconverged, trainer.equilibria
        end
        @test all(relative_error(results[2][k], results[1][k]) < 1.0e-8 for k in 1:3)
        @test results[2][4] == results[1][4]
        @test all(E -> E isa JLArray, results[2][5])
        @test all(relative_error(Array(there), here) < 1.0e-8 for (here, there) in zip(results[1][5], results[2][5]))
        @test on_device(net) isa ImplicitRNN.AbstractWorkspace && first(Trainer(Problem(net), rule; workspace = on_device(net)).buffers).gradient isa JLArray
    end

    @testset "a norm, as of a gradient, is taken there: $n numbers" for n in (3, 100), T in (Float32, Float64), size in (0, 1, sqrt(floatmax(T)))
        x = T(size) .* rand(Xoshiro(n), T, n)
        @test ImplicitRNN.euclidean_norm(JLArray(x)) ≈ ImplicitRNN.euclidean_norm(x)
    end

    @testset "a net of few parameters is trained there, also on a batch of no weight" begin
        net = one_layer(; neurons = 3)
        X, Y, weights, order = samples(net, 4), targets(net, 4), [0.0, 0.0, 1.0, 1.0], reshape(1:4, :, 1)
        results = map((ImplicitRNN.Workspace(net), on_device(net))) do workspace
            nets, losses = Replicas(reshape(parameters(net), :, 1)), zeros(1, 1)
            trainer = Trainer(Problem(net), ImplicitRNN.Optimisers.Adam(0.01); workspace, batch_size = 2)
            train!(trainer, nets, X, Y, collect(order), 2, [0.01, 0.01], losses, zeros(Int, 1, 1); weights)
            [nets.parameters; losses]
        end
        @test results[2] ≈ results[1] rtol = 1.0e-8
    end

    @testset "Adam bounds huge slopes and leaves no subnormal averages" begin
        rules = (
            ImplicitRNN.Optimisers.Adam(0.01), ImplicitRNN.Optimisers.AdamW(0.01, (0.9, 0.999), 0.1),
            ImplicitRNN.Optimisers.OptimiserChain(ImplicitRNN.Optimisers.WeightDecay(0.1), ImplicitRNN.Optimisers.Adam(0.01)),
        )
        for rule in rules, T in (Float32, Float64), slope in T.((1.0e-3, 1.0e30, -1.0e30, floatmin(T), sqrt(floatmin(T))))
            found = map((Array, JLArray)) do A
                p, g = A(T[1, 2]), A(T[slope, slope])
                state = ImplicitRNN.Optimisers.init(rule, p)
                for _ in 1:3
                    state = ImplicitRNN.descend!(rule, state, p, copy(g))
                end
                numbers = Float64.(Array(p))
                ImplicitRNN.flatten!(numbers, state)
                numbers
            end
            @test found[2] ≈ found[1] rtol = 4eps(T)
            @test all(isfinite, found[2]) && !any(x -> issubnormal(T(x)), found[2])
        end
    end

    @testset "a batch larger than the memory is done in pieces" begin
        net = layered()
        p, X, Y, V = parameters(net), samples(net, 50), targets(net, 50), randn(Xoshiro(6), 2, 50)
        small = ImplicitRNN.Workspace(net, JLBackend(); budget = 20_000)
        @test 2 < length(Base.get_extension(ImplicitRNN, :ImplicitRNNGPUArraysExt).pieces(small, Problem(net), 1:50)) < 50
        here, there = (solved(ws, p, X; start = fill(0.1, 12, 50)) for ws in (on_device(net), small))
        @test here.status == there.status && here.iterations == there.iterations
        @test there.state ≈ here.state && there.bound ≈ here.bound
        results = map((on_device(net), small)) do ws
            g, h, dX, tangent = zero(p), zero(p), zero(X), zeros(2, 50)
            report = (Vector{Status}(undef, 50), zeros(50), zeros(50))
            problem = Problem(net; jacobian_penalty = 0.3)
            loss, _ = ImplicitRNN.loss_and_gradient!(g, ws, problem, p, X, Y; probe = 3, weights = rand(Xoshiro(5), 50), report)
            ImplicitRNN.vjp!(h, dX, ws, problem, p, X, V)
            ImplicitRNN.jvp!(tangent, ws, problem, p, X, p, X)
            [loss; g; h; vec(dX); vec(tangent); report[2]; report[3]]
        end
        @test results[2] ≈ results[1] rtol = 1.0e-10
    end

    @testset "every solver: $(nameof(typeof(solver)))" for solver in (Picard(), Anderson(memory = 3, damping = 0.8), Newton(), Chord())
        for net in (one_layer(), layered(), one_layer(; constraint = Monotone(0.1)), one_layer(; T = Float32))
            gain = 0.4
            p, X, Y = parameters(net; gain), samples(net, 37), targets(net, 37)
            here, there = (solved(ws, p, X; solver) for ws in (ImplicitRNN.Workspace(net), on_device(net)))
            tol = 10 * agreement(eltype(net))
            @test converged(here) == converged(there)
            @test relative_error(there.state[:, converged(here)], here.state[:, converged(here)]) < tol
            @test maximum(there.residual[converged(there)]) <= (eltype(net) == Float32 ? 1.0e-6 : 1.0e-10)
            here, there = (gradient(ws, p, X, Y; solver) for ws in (ImplicitRNN.Workspace(net), on_device(net)))
            unsolved = solver isa Picard && net.constraint isa Monotone ? 6 : 0          # which Picard iteration circles about
            @test here.quality.unconverged == there.quality.unconverged == unsolved
            unsolved == 0 && @test relative_error(there.g, here.g) < tol
        end
    end

    @testset "the iterations are those of the CPU: $(nameof(typeof(solver)))" for solver in (Picard(), Anderson(), Newton())
        net = one_layer(; neurons = 40)
        p, X = parameters(net; gain = 0.3), samples(net, 50)
        here, there = (solved(ws, p, X; solver) for ws in (ImplicitRNN.Workspace(net), on_device(net)))
        @test maximum(abs, there.iterations - here.iterations) <= 1
        @test there.rate ≈ here.rate rtol = 1.0e-2 atol = 1.0e-8      # Newton's are rounding
    end

    @testset "a column that halves its step is left alone by those that begin one" begin
        net = Network(1, [Layer(1)]; outputs = [1], constraint = Free())
        p, start = [1.0, 0.9, 0.0], [-0.5 1.0]                         # z = tanh(0.9 z + 0.5): the first step is halved twice
        here, there = (solved(ws, p, [0.5 0.5]; solver = Newton(), start) for ws in (ImplicitRNN.Workspace(net), on_device(net)))
        @test there.iterations == here.iterations && here.iterations[1] == 6
        @test there.state ≈ here.state
        net = one_layer(; constraint = Free(), neurons = 6)            # many columns, many halvings
        p, X = parameters(net; gain = 1.0), samples(net, 60)
        here, there = (solved(ws, p, X; solver = Newton()) for ws in (ImplicitRNN.Workspace(net), on_device(net)))
        @test there.iterations == here.iterations
        @test there.status == here.status
    end

    @testset "max_iterations is kept: $(nameof(Solver))" for Solver in (Auto, Picard, Anderson, Newton, Chord)
        net = one_layer()
        p, X = parameters(net), samples(net, 20)
        for max_iterations in 1:16
            there = solved(on_device(net), p, X; solver = Solver(; max_iterations))
            @test all(<=(max_iterations), there.iterations)
        end
    end

    @testset "statuses of free nets: $(nameof(typeof(solver)))" for solver in (Anderson(), Newton(), Chord())
        # Some equilibria repel, some samples have none that the method finds.
        net = one_layer(; constraint = Free(), neurons = 6)
        p, X = parameters(net; gain = 0.6), samples(net, 60)
        here, there = (solved(ws, p, X; solver) for ws in (ImplicitRNN.Workspace(net), on_device(net)))
        # Where there are several equilibria, the chord method may find another, as its matrix is that of the batch.
        same = there.status .== here.status
        @test all(same) || solver isa Chord && count(!, same) <= 3
        @test 0 < count(converged(here)) < 60
        both = same .& converged(here)
        @test relative_error(there.state[:, both], here.state[:, both]) < 1.0e-7
        @test all(<=(1.0e-10), there.residual[converged(there)])
    end

    @testset "samples that are not finite do not spoil the mean slopes of the others" begin
        E, net = Base.get_extension(ImplicitRNN, :ImplicitRNNGPUArraysExt), one_layer()
        ws, R, U = on_device(net), 0.3 .* randn(Xoshiro(1), 5, 5), randn(Xoshiro(2), 5, 3)
        slopes(U) = Array(E.mean_slopes(ws, E.BatchEquation(JLArray(zero(U)), JLArray(zero(U)), JLArray(U), JLArray(R), E.Activated(only(net.stages).activation), nothing)))
        @test slopes([U fill(NaN, 5)]) ≈ slopes(U)
    end

    @testset "exponentials are bounded as on the CPU: $T" for T in (Float64, Float32)
        scales = T[-1000, 0, 1, 1000]
        here, there = ImplicitRNN.exponentials!(zeros(T, 4), scales), ImplicitRNN.exponentials!(JLArray(zeros(T, 4)), JLArray(scales))
        @test all(isfinite, here) && Array(there) ≈ here
    end

    @testset "where I - D R is singular" begin
        # z = x + z has no solution: f is the identity, R = 1.
        net = Network(1, [Layer(1, :identity)]; outputs = [1], constraint = Free())
        there = solved(on_device(net), [1.0, 1.0, 0.0], [1.0 -0.5]; solver = Newton())
        @test there.status == solved(ImplicitRNN.Workspace(net), [1.0, 1.0, 0.0], [1.0 -0.5]; solver = Newton()).status
    end

    @testset "every adjoint: $adjoint" for
        adjoint in (map(linear_solver -> Implicit(; linear_solver), (:lu, :neumann, :anderson))..., JacobianFree(), Unrolled(1), Unrolled(7))

        for net in (one_layer(), layered(), layered(; feedback = false), one_layer(; T = Float32))
            p, X, Y = parameters(net), samples(net, 20), targets(net, 20)
            cpu, device, tol = ImplicitRNN.Workspace(net), on_device(net), 10 * agreement(eltype(net))
            here, there = (gradient(ws, p, X, Y; adjoint) for ws in (cpu, device))
            @test there.loss ≈ here.loss rtol = tol
            @test relative_error(there.g, here.g) < tol
            dp, dX = parameters(net; seed = 5), samples(net, 20; seed = 6)
            products = map((cpu, device)) do ws
                tangent = zeros(eltype(net), 2, 20)
                ImplicitRNN.jvp!(tangent, ws, Problem(net; adjoint), p, X, dp, dX)
                tangent
            end
            @test relative_error(products[2], products[1]) < tol
        end
        adjoint isa Unrolled || continue
        net = one_layer()
        here, there = (solved(ws, parameters(net), samples(net, 20); adjoint) for ws in (ImplicitRNN.Workspace(net), on_device(net)))
        @test there.iterations == here.iterations
        @test there.status == here.status
        @test there.residual ≈ here.residual rtol = 1.0e-6
        @test there.rate ≈ here.rate rtol = 1.0e-6
    end

    @testset "the Jacobian penalty" begin
        for net in (one_layer(; constraint = Free()), layered(), one_layer(; activation = :gelu), one_layer(; lateral = false))
            p, X, Y = parameters(net), samples(net, 20), targets(net, 20)
            results = map((ImplicitRNN.Workspace(net), on_device(net))) do ws
                g = zero(p)
                loss, _ = ImplicitRNN.loss_and_gradient!(g, ws, Problem(net; jacobian_penalty = 0.5), p, X, Y; probe = 3)
                loss, g
            end
            @test results[2][1] ≈ results[1][1] rtol = 1.0e-9
            @test relative_error(results[2][2], results[1][2]) < 1.0e-8
        end
    end

    @testset "states and outputs stay on the device: $(size(p))" for (net, p) in ((net, parameters(net)) for net in (layered(), one_layer(; T = Float32)))
        X, ws = samples(net, 20), on_device(net)
        solution = Solution(JLArray(zeros(eltype(net), neurons(net), 20)), ImplicitRNN.Outcome(20), zeros(20))
        ImplicitRNN.equilibrium!(solution, ws, Problem(net), p, JLArray(X))
        outputs = ImplicitRNN.read_out!(JLArray(zeros(eltype(net), 2, 20)), ws, p, solution.state)
        @test relative_error(Array(outputs), predict(net, p, X)) < agreement(eltype(net))
        @test ImplicitRNN.find_nonfinite(outputs) == (0, 0)
        X[2, [5, 9]] .= NaN
        @test ImplicitRNN.find_nonfinite(JLArray(X)) == (2, 5)
        @test_throws DimensionMismatch ImplicitRNN.read_out!(outputs, ws, p, JLArray(X))
    end

    @testset "one launch or many: $n neurons, $T" for (n, T) in ((1, Float64), (16, Float64), (33, Float64), (128, Float64), (129, Float64), (70, Float32), (129, Float32))
        net = one_layer(; T, neurons = n, constraint = Perron(0.8))
        p, X, Y = parameters(net; gain = 0.3), samples_and_targets(net)...
        here, there = (solved(ws, p, X; solver = Picard()) for ws in (ImplicitRNN.Workspace(net), on_device(net)))
        @test relative_error(there.state, here.state) < agreement(T)
        @test maximum(abs, there.iterations - here.iterations) <= 1
        here, there = (gradient(ws, p, X, Y) for ws in (ImplicitRNN.Workspace(net), on_device(net)))
        @test relative_error(there.g, here.g) < agreement(T)
    end

    @testset "one launch and many give the same gradient: $(neurons(net)) neurons, $(eltype(net))" for net in (
            one_layer(; neurons = 6, constraint = Free()), one_layer(; neurons = 6, outputs = [2, 5]), layered(; outputs = [12, 1]),
            one_layer(; T = Float32, neurons = 70, constraint = Perron(0.5)),
        )
        E, T = Base.get_extension(ImplicitRNN, :ImplicitRNNGPUArraysExt), eltype(net)
        free = net.constraint isa Free                                 # some of its samples have no equilibrium, some repel
        p, X, Y = parameters(net; gain = free ? 0.6 : 0.2), samples(net, 60), targets(net, 60)
        free && (X[1, 7] = NaN)                                        # left as well, and not to be seen in the gradient of others
        seed = ImplicitRNN.LossSeed(MSE(), Y, nothing, T(0.1))
        problem, ws, total, expected = Problem(net), on_device(net), JLArray(zero(p)), JLArray(zero(p))
        @test E.is_fused(ws, problem, seed, 60)
        unpack!(ws, p)
        reports = Tuple((fill(ImplicitRNN.SINGULAR, 60), fill(NaN, 60), fill(NaN, 60)) for _ in 1:2)
        states = Tuple(zeros(T, neurons(net), 60) for _ in 1:2)
        found, left = E.pull_back_fused!(total, ws, problem, X, seed, 1:60; start = nothing, report = ImplicitRNN.Report(reports[1]), states = states[1])
        solved = setdiff(1:60, left)
        @test free ? 7 in left && 1 < length(left) < 60 : isempty(left)
        @test all(isnan, reports[1][2][left]) && iszero(states[1][:, left])
        penalty = ImplicitRNN.JacobianPenalty(0.0, UInt64(0), 60)
        summary = E.pull_back_columns!(expected, ws, problem, X, seed, penalty, solved; start = nothing, report = ImplicitRNN.Report(reports[2]), states = states[2])
        @test found.loss ≈ summary.loss rtol = agreement(T)
        @test relative_error(Array(total), Array(expected)) < agreement(T)
        @test found.quality.unconverged == summary.quality.unconverged == 0
        @test reports[1][1][solved] == reports[2][1][solved] == fill(CONVERGED, length(solved))
        @test reports[1][2][solved] ≈ reports[2][2][solved] rtol = 1.0e-2
        @test maximum(reports[1][3][solved]) < (T == Float32 ? 1.0e-6 : 1.0e-10)
        @test states[1][:, solved] ≈ states[2][:, solved] rtol = agreement(T)
        free && continue                                              # what converges at once may repel, and is left
        again = JLArray(zero(p))
        E.pull_back_fused!(again, ws, problem, X, seed, 1:60; start = states[1], report = ImplicitRNN.Report(nothing), states = nothing)
        @test relative_error(Array(again), Array(total)) < 10 * agreement(T)
    end

    @testset "single precision first: $(neurons(net)) neurons" for net in (one_layer(), one_layer(; neurons = 130, constraint = Perron(0.5)), one_layer(; neurons = 6, constraint = Free()))
        gain = net.constraint isa Free ? 0.6 : 0.3                      # of the free net some samples have no equilibrium
        p, X, Y = parameters(net; gain), samples_and_targets(net)...
        first_single, plain = (ImplicitRNN.Workspace(net, JLBackend(); coarse_first) for coarse_first in (0, typemax(Int)))
        for solver in (Auto(), Picard(damping = 0.7), Picard(max_iterations = 12))
            here, there = (solved(ws, p, X; solver) for ws in (plain, first_single))
            @test there.status == here.status
            @test there.state[:, converged(here)] ≈ here.state[:, converged(here)] rtol = 1.0e-9
            # Where the iteration need not contract, rounding decides how it goes.
            @test net.constraint isa Free || maximum(abs, there.iterations - here.iterations) <= 2
            @test all(<=(1.0e-10), there.residual[converged(here)])
        end
        net.constraint isa Free && continue
        @test solved(first_single, p, X).state != solved(plain, p, X).state
        here, there = (gradient(ws, p, X, Y) for ws in (plain, first_single))
        @test relative_error(there.g, here.g) < 1.0e-9
        @test there.quality.adjoint_residual <= 1.0e-10
    end

    # The reference device has no coarse products; these stand in for them, with factors of no fewer digits.
    @testset "coarse products first: $(neurons(net)) neurons" for net in (one_layer(; T = Float32, neurons = 130, constraint = Perron(0.5)), one_layer(; T = Float32))
        p, X, Y, calls = parameters(net; gain = 0.3), samples_and_targets(net)..., Ref(0)
        without = ImplicitRNN.Workspace(net, JLBackend(); coarse_first = 0)
        here = solved(without, p, X)
        ImplicitRNN.with_coarse_products(work, ::JLBackend) = (calls[] += 1; work())
        first_coarse, plain = (ImplicitRNN.Workspace(net, JLBackend(); coarse_first) for coarse_first in (0, typemax(Int)))
        try
            there = Base.invokelatest(solved, first_coarse, p, X)
            @test calls[] == (neurons(net) > 128)                 # smaller stages take no products of a library
            @test all(converged(here)) && all(converged(there))
            @test there.state ≈ here.state rtol = 1.0e-5
            @test all(<=(1.0e-6), there.residual)
            @test relative_error(Base.invokelatest(gradient, first_coarse, p, X, Y).g, Base.invokelatest(gradient, plain, p, X, Y).g) < 1.0e-4
            @test calls[] == 3 * (neurons(net) > 128)
        finally
            Base.delete_method(which(ImplicitRNN.with_coarse_products, (Any, JLBackend)))
        end
        @test solved(without, p, X).state == here.state
    end

    @testset "small systems by elimination: $T, $n rows" for T in (Float64, Float32), n in (1, 3, 64, 65, 90)
        E = Base.get_extension(ImplicitRNN, :ImplicitRNNGPUArraysExt)
        rng = Xoshiro(n)
        R, D, B = T.(randn(rng, n, n) ./ sqrt(n)), rand(rng, T, n, 4), randn(rng, T, n, 4)
        X, singular = JLArray(zeros(T, n, 4)), JLArray(fill(false, 4))
        ws, columns = on_device(one_layer(; T)), [1, 2, 4]
        on_jl = map(JLArray, (R, D, B))
        E.solve_each!(X, ws, singular, on_jl[1], on_jl[2], nothing, on_jl[3], columns)
        for j in columns
            @test norm(Array(X)[:, j] - D[:, j] .* (R * Array(X)[:, j]) - B[:, j]) < 1.0e4 * eps(T) * n * norm(Array(X)[:, j])
        end
        @test iszero(Array(X)[:, 3]) && !any(Array(singular))
        E.solve_each!(X, ws, singular, JLArray(Matrix{T}(I, n, n)), JLArray(fill(one(T), n, 4)), nothing, on_jl[3], columns)
        @test Array(singular) == [true, true, false, true]
    end

    @testset "numbers of any type on a device become those of the network" begin
        net = one_layer(; neurons = 20)
        p, X, Y = parameters(net; gain = 0.1), rand(Xoshiro(1), -3:3, 3, 6), rand(Xoshiro(2), -3:3, 2, 6)
        device, problem = on_device(net), Problem(net; solver = Picard(tol = 1.0e-14))
        derivatives(ws, p, X, Y) = (g = zeros(length(net)); dX = zeros(3, 6); ImplicitRNN.vjp!(g, dX, ws, problem, p, X, Y); [g; vec(dX)])
        for T in (Int, Float32)
            here = (Float64.(T.(p .* (T === Float32))), Float64.(T.(X)), Float64.(T.(Y)))
            there = (JLArray(T.(here[1])), JLArray(T.(X)), JLArray(T.(Y)))
            @test relative_error(solved(device, there[1:2]...).state, solved(device, here[1:2]...).state) < 1.0e-12 || all(iszero, here[1])
            @test relative_error(derivatives(device, there...), derivatives(device, here...)) < 1.0e-12
        end
    end

    @testset "an order of any kind, outputs of device arrays, and arrays of a device for the CPU" begin
        net = one_layer(; neurons = 20)
        p, X, Y = parameters(net; gain = 0.1), samples(net, 6), targets(net, 6)
        function trained(order)
            nets = Replicas(reshape(copy(p), :, 1))
            trainer = Trainer(Problem(net), ImplicitRNN.Optimisers.Descent(0.1); workspace = on_device(net))
            train!(trainer, nets, X, Y, order, 6, [0.1], zeros(1, 1), zeros(Int, 1, 1))
            return nets.parameters
        end
        @test trained(reshape(1:6, :, 1)) == trained([1; 2; 3; 4; 5; 6;;])
        Z = equilibrium(net, p, X).state
        @test Array(read_out(net, JLArray(p), JLArray(Z))) ≈ predict(net, p, X)
        @test_throws "the parameters are on a device; give them as an Array" predict(net, JLArray(p), X)
        @test_throws "the samples are on a device" loss_and_gradient(net, p, JLArray(X), Y)
        @test_throws "the parameters are on a device" fit!(JLArray(p), net, X, Y)
    end

    @testset "what a device does not offer is refused by name" begin
        net = one_layer()
        p, X, Y = parameters(net), samples(net, 5), targets(net, 5)
        device = on_device(net)
        refused = "does not offer the solver NLsolve; choose Auto, Picard, Anderson, Newton or Chord, or use the CPU"
        @test_throws refused solved(device, p, X; solver = NLsolver())
        @test_throws refused gradient(device, p, X, Y; solver = NLsolver())
        @test_throws "does not offer the linear solver :gmres of the adjoint Implicit; choose :auto, :lu, :neumann or :anderson" gradient(
            device, p, X, Y; adjoint = Implicit(linear_solver = :gmres)
        )
        @test_throws "does not offer Hessian-vector products" ImplicitRNN.hessian_vector_product!(zero(p), device, Problem(net), p, X, Y, p)
        @test_throws DimensionMismatch solved(device, p, X[1:2, :])
        @test_throws DimensionMismatch solved(device, p[2:end], X)
        @test_throws DimensionMismatch gradient(device, p, X, Y[:, 1:4])
        @test_throws DimensionMismatch gradient(device, p, X, Y; weights = ones(4))
        @test_throws "the gradient 2" ImplicitRNN.loss_and_gradient!(zeros(2), device, Problem(net), p, X, Y)
        @test_throws "the gradient 2" ImplicitRNN.vjp!(zeros(2), zero(X), device, Problem(net), p, X, Y)
    end

    include("device_equations.jl")

    if Base.find_package("GPUCompiler") === nothing || Sys.which("ptxas") === nothing
        @info "Skipped: the kernels as machine code need GPUCompiler in the environment and CUDA's ptxas on the PATH"
        @test_skip "machine code"
    else
        include("kernels.jl")
    end
end

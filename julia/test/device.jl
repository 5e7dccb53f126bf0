# The engine on device arrays, on the reference ones, which live on the CPU and refuse access to single entries.

const DEVICE_PACKAGES = ("GPUArraysCore", "JLArrays", "KernelAbstractions")

if !all(name -> Base.find_package(name) !== nothing, DEVICE_PACKAGES)
    @info "Skipped: the tests on device arrays need $(join(DEVICE_PACKAGES, ", ")) in the environment"
    @test_skip "device arrays"
else
    @eval using JLArrays: JLArray, JLArrays, JLBackend
    JLArrays.allowscalar(false)

    on_device(net) = ImplicitRNN.Workspace(net, JLBackend())

    function solved(ws, p, X; solver = Auto(), start = nothing)
        return ImplicitRNN.equilibrium!(Solution(ws.net, size(X, 2)), ws, Problem(ws.net; solver), p, X, start)
    end

    function gradient(ws, p, X, Y; weights = nothing, options...)
        g = zero(p)
        loss, quality = ImplicitRNN.loss_and_gradient!(g, ws, Problem(ws.net; options...), p, X, Y, 0, weights)
        return (; loss, g, quality)
    end

    agreement(::Type{Float64}) = 1.0e-9
    agreement(::Type{Float32}) = 1.0e-5

    nets_of(::Type{T}) where {T} = (
        [one_layer(; T, activation) for activation in keys(ACTIVATIONS)]...,
        [one_layer(; T, constraint) for constraint in CONSTRAINED]...,
        one_layer(; T, neurons = 40, constraint = Spectral(0.9)),
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

    @testset "losses and weights: $loss" for loss in (MSE(), MAE(), Huber(0.3), BinaryCrossEntropy(), CrossEntropy())
        net = one_layer()
        p, X, Y = parameters(net), samples(net, 20), abs.(targets(net, 20))
        for weights in (nothing, rand(Xoshiro(5), 20))
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

    @testset "vector-Jacobian products of $of" for of in (:outputs, :state)
        for net in (one_layer(), layered(), layered(; feedback = false))
            p, X = parameters(net), samples(net, 20)
            V = randn(Xoshiro(6), ImplicitRNN.rows_of(net, of), 20)
            cpu, device, problem = ImplicitRNN.Workspace(net), on_device(net), Problem(net)
            for start in (nothing, equilibrium(net, p, X).state)
                (g, dX), (h, dZ) = ((zero(p), zero(X)) for _ in 1:2)
                ImplicitRNN.vjp!(g, dX, cpu, problem, p, X, V; of, start)
                ImplicitRNN.vjp!(h, dZ, device, problem, p, X, V; of, start)
                @test relative_error(h, g) < 1.0e-9
                @test relative_error(dZ, dX) < 1.0e-9
            end
        end
    end

    @testset "Jacobian-vector products of $of" for of in (:outputs, :state)
        for net in (one_layer(), layered(), layered(; feedback = false), Network(3, [Layer(4), Layer(3)]; outputs = [1, 6, 1]))
            p, X, dp, dX = parameters(net), samples(net, 20), parameters(net; seed = 5), samples(net, 20; seed = 6)
            for adjoint in (Implicit(), JacobianFree())
                here, there = map((ImplicitRNN.Workspace(net), on_device(net))) do ws
                    tangent = zeros(ImplicitRNN.rows_of(net, of), 20)
                    ImplicitRNN.jvp!(tangent, ws, Problem(net; adjoint), p, X, dp, dX; of)
                    tangent
                end
                @test relative_error(there, here) < 1.0e-8
            end
        end
    end

    @testset "the Jacobian-free gradient, and Neumann's series by name" begin
        net = one_layer()
        p, X, Y = parameters(net), samples(net, 20), targets(net, 20)
        for adjoint in (JacobianFree(), Implicit(linear_solver = :neumann))
            here, there = (gradient(ws, p, X, Y; adjoint) for ws in (ImplicitRNN.Workspace(net), on_device(net)))
            @test relative_error(there.g, here.g) < 1.0e-9
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

    @testset "a report per sample" begin
        net = one_layer(; constraint = Free(), neurons = 6)
        p, X, Y = parameters(net; gain = 0.6), samples(net, 60), targets(net, 60)
        reports = map((ImplicitRNN.Workspace(net), on_device(net))) do ws
            report = (Vector{Status}(undef, 60), zeros(60), zeros(60))
            ImplicitRNN.loss_and_gradient!(zero(p), ws, Problem(net), p, X, Y, 0, nothing, report)
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
        columns = (Vector{Status}(undef, 20), zeros(Int32, 20), zeros(20), zeros(20), zeros(20))
        ImplicitRNN.equilibrium!(Solution(state, columns...), device, Problem(net), JLArray(p), JLArray(X), JLArray(z))
        @test Array(state) ≈ z rtol = 1.0e-9
    end

    @testset "the same bits each time" begin
        net = layered()
        p, X, Y = parameters(net), samples(net, 100), targets(net, 100)
        @test gradient(on_device(net), p, X, Y).g == gradient(on_device(net), p, X, Y).g
    end

    @testset "training" begin
        net = one_layer()
        p, X, Y = parameters(net), samples(net, 30), targets(net, 30)
        trained = map((ImplicitRNN.Workspace(net), on_device(net))) do workspace
            nets, order = Replicas(reshape(copy(p), :, 1)), repeat(1:30, 1, 5)
            trainer = Trainer(Problem(net), ImplicitRNN.Optimisers.Adam(0.01); workspace, batch_size = 8)
            losses = train!(trainer, nets, X, Y, order, 8, fill(0.01, 4 * 5), zeros(5, 1), zeros(Int, 5, 1))
            vec(nets.parameters), losses
        end
        @test relative_error(trained[2][1], trained[1][1]) < 1.0e-8
        @test trained[2][2] ≈ trained[1][2] rtol = 1.0e-8
    end

    @testset "what a device does not offer is refused by name" begin
        net = one_layer()
        p, X, Y = parameters(net), samples(net, 5), targets(net, 5)
        device = on_device(net)
        for solver in (Anderson(), Newton(), Chord(), NLsolver())
            name = String(nameof(typeof(solver)))
            @test_throws "does not offer the solver $name" solved(device, p, X; solver)
            @test_throws "does not offer the solver $name" gradient(device, p, X, Y; solver)
        end
        @test_throws "does not offer the adjoint Unrolled" gradient(device, p, X, Y; adjoint = Unrolled(3))
        @test_throws "does not offer the linear solver :lu" gradient(device, p, X, Y; adjoint = Implicit(linear_solver = :lu))
        @test_throws "does not offer the Jacobian penalty" gradient(device, p, X, Y; jacobian_penalty = 1.0)
        @test_throws "does not offer Hessian-vector products" ImplicitRNN.hessian_vector_product!(zero(p), device, Problem(net), p, X, Y, p)
        @test_throws DimensionMismatch solved(device, p, X[1:2, :])
        @test_throws DimensionMismatch gradient(device, p, X, Y[:, 1:4])
        @test_throws DimensionMismatch gradient(device, p, X, Y; weights = ones(4))
    end

    if Base.find_package("GPUCompiler") === nothing || Sys.which("ptxas") === nothing
        @info "Skipped: the kernels as machine code need GPUCompiler in the environment and CUDA's ptxas on the PATH"
        @test_skip "machine code"
    else
        include("kernels.jl")
    end
end

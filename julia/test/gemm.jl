# Products of matrices, and work shared among threads.

using ImplicitRNN: add!, in_parallel, @late, LANE_NEURONS, multiply_each!

"The products as they are on a processor with registers of another size."
module OtherRegisters
    using Base.Cartesian: @nexprs
    using ImplicitRNN: BLOCK, copy_column!, in_parallel, LANE_NEURONS, piece, SMALL
    using ImplicitRNN, LinearAlgebra
    using LinearAlgebra: BlasFloat
    const BYTES = ImplicitRNN.REGISTER == 64 ? 32 : 64
    of_other_size(code) = occursin("const REGISTER =", string(code)) ? :(const REGISTER = BYTES) : code
    include(of_other_size, joinpath(pkgdir(ImplicitRNN), "src", "cpu", "registers.jl"))
    include(joinpath(pkgdir(ImplicitRNN), "src", "cpu", "gemm.jl"))
end

@testset "registers of $(Products.REGISTER) bytes" for Products in (ImplicitRNN, OtherRegisters)

    (; add_columns!, add_outer!, COLUMNS_AT_ONCE, factor, multiply!, multiply_add!, Panels, register_lanes, store!, store_transposed!) = Products

    # A few rows, half a register of them, one, and what does not fill the last.
    rows_to_try(T) =
        filter(>(0), (1, 2, 3, register_lanes(T) ÷ 2 - 1, register_lanes(T) ÷ 2, register_lanes(T) - 1, register_lanes(T), 33, 40, 63, 300))
    columns_to_try = (0, 1, 3, COLUMNS_AT_ONCE, COLUMNS_AT_ONCE + 1, 3 * COLUMNS_AT_ONCE - 1)

    # What lies around the matrices in memory must stay as it is.
    function within(A::Matrix{T}) where {T}
        surroundings = fill(T(7), size(A) .+ (3, 2))
        inner = view(surroundings, 2:(size(A, 1) + 1), 2:(size(A, 2) + 1))
        inner .= A
        return inner, () -> count(==(T(7)), surroundings) >= length(surroundings) - length(A)
    end

    @testset "products are those of the definition, whatever the shape ($T, $n x $k)" for T in (Float32, Float64), n in rows_to_try(T),
            k in (0, 1, 5, 16, 40)

        rng = Xoshiro(1)
        A, B = randn(rng, T, n, k), randn(rng, T, k, 30)
        for m in columns_to_try
            U, u = randn(rng, T, n, 30), randn(rng, T, n)
            product = A * B[:, 1:m]
            close(a, b) = isapprox(a, b; rtol = 20 * eps(T), atol = 20 * eps(T))
            for (given, expected) in ((U, U[:, 1:m] .+ product), (u, u .+ product))
                S, untouched = within(zeros(T, n, 30))
                multiply!(S, given, A, B, m)
                @test close(S[:, 1:m], expected)
                @test untouched() && iszero(S[:, (m + 1):30])
            end
            S, untouched = within(U)
            multiply_add!(S, A, view(B, :, 1:m), m)
            @test close(S, hcat(U[:, 1:m] .+ product, U[:, (m + 1):30])) && untouched()
        end
    end

    @testset "sums of columns are taken one after the other ($T, $n rows)" for T in (Float32, Float64), n in rows_to_try(T)
        A, g = randn(Xoshiro(4), T, n, 30), randn(Xoshiro(5), T, n)
        for m in (0, 1, 7, 30), B in (A, view(vcat(A, A), 1:n, :))
            @test add_columns!(copy(g), B, m) == foldl(+, eachcol(A)[1:m]; init = g)
        end
        @test_throws DimensionMismatch add_columns!(g, A, 31)
        @test_throws DimensionMismatch add_columns!(g, vcat(A, A), 3)
    end

    @testset "outer products likewise ($T, $n x $k)" for T in (Float32, Float64), n in rows_to_try(T), k in (1, 9, 64)
        rng = Xoshiro(2)
        for m in columns_to_try
            A, B, G0 = randn(rng, T, n, 30), randn(rng, T, k, 30), randn(rng, T, n, k)
            G, untouched = within(G0)
            add_outer!(G, A, B, m)
            @test isapprox(G, G0 .+ A[:, 1:m] * B[:, 1:m]'; rtol = 20 * eps(T), atol = 20 * eps(T)) && untouched()
        end
    end

    @testset "a column's bits do not depend on the others, nor on threads ($T, $n rows)" for T in (Float32, Float64), n in (1, 2, 3, 7, 33, 300)
        rng = Xoshiro(3)
        A, B, U = randn(rng, T, n, 50), randn(rng, T, 50, 20), randn(rng, T, n, 20)
        together = multiply!(zeros(T, n, 20), U, A, B, 20)
        @test all(j -> multiply!(zeros(T, n, 1), U[:, [j]], A, B[:, [j]], 1) == together[:, [j]], 1:20)
        @test multiply!(zeros(T, n, 20), U, A, B, 20, 2) == together
    end

    @testset "panels multiply like the matrix they hold ($T, $n x $n, $threads threads)" for T in (Float32, Float64),
            n in (LANE_NEURONS + 1, 33, 40, 300), threads in (1, 2)

        rng = Xoshiro(4)
        A, B, U = randn(rng, T, n, n), randn(rng, T, n, 30), randn(rng, T, n, 30)
        P = factor(T, n)
        @test P isa Panels
        for (put!, matrix) in ((store!, A), (store_transposed!, collect(transpose(A))))
            put!(P, A, threads)
            @test multiply!(zero(U), U, P, B, 30, threads) == multiply!(zero(U), U, matrix, B, 30, threads)
        end
    end

    @testset "matrices too small for a product are refused before any is read" begin
        S, A, B = zeros(40, 4), zeros(40, 6), zeros(6, 4)
        P = factor(Float64, 40)
        for (product!, arguments) in (
                (multiply!, (S, S, A, B, 5)), (multiply!, (S, S, A, zeros(5, 4), 4)), (multiply!, (S, zeros(39), A, B, 4)),
                (multiply!, (S, S, P, zeros(39, 4), 4)), (add_outer!, (zeros(40, 7), A, zeros(6, 6), 6)), (add_outer!, (zeros(40, 6), A, B, 5)),
            )
            @test_throws DimensionMismatch product!(arguments...)
        end
    end

    @testset "other numbers" begin
        A, B, U = big.(randn(33, 33)), big.(randn(33, 4)), big.(randn(33, 4))
        @test multiply!(zero(U), U, A, B, 4) ≈ U + A * B
        @test add_outer!(zero(A), U, B, 4) ≈ U * B'
        @test multiply!(zeros(33, 4), zeros(33), Float64.(A), Float32.(B), 4) ≈ A * Float32.(B)
    end

end

@testset "threads leave each other's rows alone" begin
    # Half a register above the last pair: its register begins within the rows of another thread.
    code = """
    using ImplicitRNN: factor, multiply!, store!
    for T in (Float32, Float64), n in (260, 276)
        A, B, u = randn(T, n, n), randn(T, n, 64), randn(T, n)
        P = store!(factor(T, n), A, 1)
        S, expected = zeros(T, n, 64), multiply!(zeros(T, n, 64), u, P, B, 64)
        all(_ -> multiply!(fill!(S, NaN), u, P, B, 64, 2) == expected, 1:2000) || exit(1)
    end"""
    @test success(`$(Base.julia_cmd()) -t2 --startup-file=no --project=$(Base.active_project()) -e $code`)
end

@testset "sharing work" begin
    @testset "every piece is done once, by threads that do not overlap" begin
        for pieces in (1, 2, 7, 100), threads in (1, 2, 5), _ in 1:50
            done, at_work, overlaps = zeros(Int, pieces), zeros(Int, threads), Threads.Atomic{Int}(0)
            in_parallel(pieces, threads) do thread, piece
                (at_work[thread] += 1) == 1 || Threads.atomic_add!(overlaps, 1)
                done[piece] += 1
                at_work[thread] -= 1
            end
            @test all(==(1), done) && overlaps[] == 0
        end
    end

    @testset "an exception reaches the caller, and the next call is as good as ever" begin
        for piece_that_fails in (1, 5, 100)
            @test_throws ArgumentError in_parallel((_, piece) -> piece == piece_that_fails && throw(ArgumentError("")), 100, 2)
            total = Threads.Atomic{Int}(0)
            in_parallel((_, piece) -> Threads.atomic_add!(total, piece), 100, 2)
            @test total[] == 5050
        end
    end

    @testset "callers within and beside each other do all their work" begin
        total = Threads.Atomic{Int}(0)
        count_to(n) = in_parallel((_, _) -> Threads.atomic_add!(total, 1), n, 2)
        callers = [Threads.@spawn(foreach(_ -> in_parallel((_, _) -> count_to(10), 10, 2), 1:20)) for _ in 1:4]
        foreach(wait, callers)
        @test total[] == 4 * 20 * 10 * 10
    end

    @testset "a thread that is still at work when its caller was interrupted takes up the next job" begin
        helper, begun, go_on = ImplicitRNN.Helper(2, :absent), Base.Event(), Base.Event()
        first_job = ImplicitRNN.Job((_, _) -> (notify(begun); wait(go_on)), 1, 1)
        next_job = ImplicitRNN.Job((_, _) -> nothing, 1, 1)
        ImplicitRNN.hand_out!(helper, first_job)
        wait(begun)
        ImplicitRNN.hand_out!(helper, next_job)
        notify(go_on)
        @test timedwait(() -> (@atomic next_job.helpers) == 0, 20) === :ok
    end

    @testset "threads that are looking out take up functions younger than they" begin
        total = Threads.Atomic{Int}(0)
        for k in 1:20
            in_parallel((_, _) -> sleep(0.0001), 4, 2)
            younger = @eval (_, piece) -> Threads.atomic_add!($total, piece + 0 * $k)
            Base.invokelatest(in_parallel, younger, 100, 2)
        end
        @test total[] == 20 * 5050
    end
end

# --- elementwise ----------------------------------------------------------------------------------------------

@testset "sums and products of entries are those of broadcasts, also of views ($T)" for T in (Float32, Float64)
    rng = Xoshiro(3)
    A, B, C = (randn(rng, T, 5, 7) for _ in 1:3)
    rows, columns = 2:4, 3:6
    part(M) = view(M, rows, columns)
    @test add!(copy(A), B) == A .+ B
    @test add!(A[:, 1], B[:, 1]) == A[:, 1] .+ B[:, 1]
    @test add!(part(copy(A)), B[rows, columns]) == part(A) .+ part(B)
    @test multiply_each!(copy(C), A, B) == A .* B
    @test multiply_each!(part(copy(C)), part(A), part(B)) == part(A) .* part(B)
    @test_throws DimensionMismatch add!(copy(A), B[:, 1:6])
    @test_throws DimensionMismatch add!(part(copy(A)), B)
    @test_throws DimensionMismatch multiply_each!(copy(C), A, part(B))
end

@testset "a call that is compiled late is that call" begin
    @test @late(hypot(3.0, 4.0)) === 5.0
    @test @late(sum([3, -4]; init = 0.5)) === -0.5
    @test_throws "takes a call" macroexpand(@__MODULE__, :(@late x))
end

# Products of matrices, and work shared among threads.

using ImplicitRNN: LARGE, PANEL, Panels, factor, in_parallel, multiply_add!, store!, store_transposed!

@testset "panels multiply like the matrix they hold ($T, $n x $n, $m of $width columns, $threads threads)" for T in
        (Float32, Float64), n in (LARGE + 1, 2 * PANEL[1] + PANEL[2] + 5), (m, width) in ((1, 3), (40, 40)), threads in (1, 2)

    rng = Xoshiro(1)
    A, B, S = randn(rng, T, n, n), randn(rng, T, n, width), randn(rng, T, n, width)
    P = factor(T, n)
    @test P isa Panels
    for (fill_panels!, matrix) in ((store!, A), (store_transposed!, transpose(A)))
        fill_panels!(P, A, threads)
        expected = copy(S)
        expected[:, 1:m] .+= matrix * B[:, 1:m]
        @test multiply_add!(copy(S), P, B, m, threads) ≈ expected rtol = 100 * eps(T)
        @test multiply_add!(copy(S), P, B, m, 1) == multiply_add!(copy(S), P, B, m, 2)
    end
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

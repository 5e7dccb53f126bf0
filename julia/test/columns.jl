# What belongs to a sample stays with it, whatever columns move.

using ImplicitRNN: AndersonState, Columns, NewtonState, RefinementState, SolverState, move_column!, per_column, reclaim!,
    set_aside!, swap_columns!

mark(A::Array{Bool}, sample) = isodd(sample)
mark(A::Array, sample) = sample
column(A::Array, j) = selectdim(A, ndims(A), j)

states(n, width) = (AndersonState{Float64}(n, 3, width), NewtonState{Float64}(n, width), RefinementState{Float64}(zeros(n, width)))

@testset "all arrays of a column move with it ($(nameof(typeof(state))), $(nameof(typeof(coefficients))))" for
        state in (nothing, states(3, 11)...), coefficients in (nothing, zeros(3, 11))

    n, width, rng = 3, 11, Xoshiro(1)
    c = Columns{Float64}(n, width, coefficients)
    ImplicitRNN.start!(c, width)
    c.state = state
    arrays = (per_column(c)..., (state === nothing ? () : per_column(state))...)
    for j in 1:width, A in arrays
        column(A, j) .= mark(A, j)
    end
    c.sample .= 1:width
    for step in 1:200
        c.active > 1 || reclaim!(c)
        j, k = rand(rng, 1:c.active, 2)
        isodd(step) ? swap_columns!(c, j, k) : set_aside!(c, j)
        step % 7 == 0 && reclaim!(c)
    end
    reclaim!(c)
    @test sort(c.sample) == 1:width
    @test all(all(==(mark(A, c.sample[j])), column(A, j)) for A in arrays, j in 1:width)
    move_column!(c, 2, 5)
    @test all(column(A, 2) == column(A, 5) for A in arrays)
end

@testset "no array of the columns is left behind" begin
    c = Columns{Float64}(3, 11, zeros(3, 11))
    arrays = [getfield(c, name) for name in fieldnames(Columns) if getfield(c, name) isa Array && name ∉ (:aside, :buffers)]
    @test all(A -> any(B -> A === B, per_column(c)), arrays)
    @test all(state -> all(A -> A isa Array && size(A)[end] == 11, per_column(state)), states(3, 11))
end

@testset "a method that goes on after others were set aside uses the history of its own sample" begin
    net = one_layer(; neurons = 30, constraint = Free())
    p, X = parameters(net; gain = 0.7), samples(net, 40)
    together = equilibrium(net, p, X; solver = Auto(tol = 1.0e-12))
    for j in 1:40
        alone = equilibrium(net, p, X[:, j:j]; solver = Auto(tol = 1.0e-12))
        @test alone.status == together.status[j:j] && alone.state[:, 1] ≈ together.state[:, j] rtol = 1.0e-9
    end
end

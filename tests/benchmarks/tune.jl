# Measures again what julia/src/cpu/tuning.jl has as numbers.

using ImplicitRNN, LinearAlgebra, Random
using ImplicitRNN: Problem, SMALL_LU, WORTH_A_THREAD, Workspace, eliminate!, lapack_factor!, linearization_work,
    linearize!, loss_and_gradient!, multiply_add!, unpack!, work_per_sample

"Nanoseconds of a call of `f` after `prepare`, the least of several."
function nanoseconds(f, prepare = () -> nothing; seconds = 0.1)
    prepare()
    f()
    least, begin_ = Inf, time_ns()
    while time_ns() - begin_ < 1.0e9 * seconds
        prepare()
        start = time_ns()
        f()
        least = min(least, Float64(time_ns() - start))
    end
    return least
end

"The size up to which the first way is to be taken: that with the least time lost over all sizes, relative to the faster way."
function crossover(sizes, first_way, second_way)
    lost(t) = sum(((n, a, b),) -> (n <= t ? a : b) / min(a, b), zip(sizes, first_way, second_way))
    return argmin(lost, [0; sizes])
end

"The coefficients of the columns of `A` that fit the `times` best, relative to each."
fit(A, times) = (A ./ times) \ ones(length(times))

function own_or_lapack()
    sizes = 8:4:48
    times = map(sizes) do n
        M, A, pivots = I - 0.5 * randn(n, n) / sqrt(n), zeros(n, n), zeros(Int, n)
        return Tuple(nanoseconds(() -> f(A, pivots), () -> copyto!(A, M)) for f in (eliminate!, lapack_factor!))
    end
    return crossover(sizes, first.(times), last.(times))
end

"A workspace of a network with one layer, its problem, parameters, samples and targets."
function prepared(n, samples)
    net = Network(4, [Layer(n)]; outputs = 1)
    rng = Xoshiro(n)
    return Workspace(net), Problem(net), initial_parameters(rng, net), randn(rng, 4, samples), randn(rng, 1, samples)
end

function sample_times()
    sizes = [2, 4, 8, 12, 16, 24, 32, 48, 64]
    times = map(sizes) do n
        samples = max(1, (WORTH_A_THREAD - 1) ÷ work_per_sample(n))      # on one thread
        ws, problem, p, X, Y = prepared(n, samples)
        g = zero(p)
        return nanoseconds(() -> loss_and_gradient!(g, ws, problem, p, X, Y)) / samples
    end
    return fit([sizes .^ 2 sizes], times)
end

function linearization_times()
    sizes, B = [32, 48, 64, 96, 128, 192, 256], 256
    times = map(sizes) do n
        ws, _, p, _, _ = prepared(n, 1)
        unpack!(ws, p)
        r = only(ws.recurrences)
        fill!(r.slope, 0.5)
        S, Z = zeros(n, B), randn(n, B)
        return nanoseconds(() -> linearize!(r, Threads.nthreads())), nanoseconds(() -> multiply_add!(S, r.forward, Z, B, Threads.nthreads()))
    end
    operation = exp(sum(log.(last.(times) ./ (B .* sizes .* (sizes .+ 50)))) / length(sizes))
    return fit([ones(length(sizes)) sizes .^ 2 sizes .^ 3], first.(times) ./ operation)
end

"For each number its name, what tuning.jl has, and what is measured."
function tune()
    rounded(x) = round(x; sigdigits = 2)
    a, b = rounded.(sample_times())
    c, d, e = rounded.(linearization_times())
    return [
        ("SMALL_LU", "$SMALL_LU", "$(own_or_lapack())"),
        ("work_per_sample(N)", "N²/9 + 35 N", "$a N² + $b N"),
        ("linearization_work(n)", "1.5e6 + 2200 n² + 1.4 n³", "$c + $d n² + $e n³"),
    ]
end

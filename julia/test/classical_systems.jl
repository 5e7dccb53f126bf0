# The systems of nonlinear equations of Moré, Garbow and Hillstrom, Testing unconstrained optimization software, ACM TOMS 7 (1981),
# and some more that are well known, with their standard starts.

rosenbrock(x) = [1 - x[1], 10 * (x[2] - x[1]^2)]
powell_singular(x) = [x[1] + 10x[2], sqrt(5) * (x[3] - x[4]), (x[2] - 2x[3])^2, sqrt(10) * (x[1] - x[4])^2]
powell_badly_scaled(x) = [1.0e4 * x[1] * x[2] - 1, exp(-x[1]) + exp(-x[2]) - 1.0001]
function wood(x)
    a, b = x[2] - x[1]^2, x[4] - x[3]^2
    return [
        -200 * x[1] * a - (1 - x[1]), 200a + 20.2 * (x[2] - 1) + 19.8 * (x[4] - 1),
        -180 * x[3] * b - (1 - x[3]), 180b + 20.2 * (x[4] - 1) + 19.8 * (x[2] - 1),
    ]
end
function helical_valley(x)
    angle = atan(x[2] / x[1]) / 2π + (x[1] < 0 ? 0.5 : 0.0)
    return [10 * (x[3] - 10angle), 10 * (sqrt(x[1]^2 + x[2]^2) - 1), x[3]]
end
function watson(x)
    n = length(x)
    f = zeros(eltype(x), n)
    for i in 1:29
        t = i / 29
        slope = sum((j - 1) * t^(j - 2) * x[j] for j in 2:n)
        value = sum(t^(j - 1) * x[j] for j in 1:n)
        r = slope - value^2 - 1
        for k in 1:n
            f[k] += t^(k - 2) * (k - 1 - 2t * value) * r
        end
    end
    r = x[2] - x[1]^2 - 1
    f[1] += x[1] * (1 - 2r)
    f[2] += r
    return f
end
function chebyquad(x)
    n = length(x)
    f = zeros(eltype(x), n)
    for j in 1:n
        before, last = one(x[j]), 2x[j] - 1
        for i in 1:n
            f[i] += last / n
            before, last = last, 2 * (2x[j] - 1) * last - before
        end
    end
    for i in 2:2:n
        f[i] += 1 / (i^2 - 1)
    end
    return f
end
brown_almost_linear(x) = [x[1:(end - 1)] .+ sum(x) .- (length(x) + 1); prod(x) - 1]
function discrete_boundary_value(x)
    n = length(x)
    h, y = 1 / (n + 1), [0; x; 0]
    return [2x[i] - y[i] - y[i + 2] + h^2 * (x[i] + i * h + 1)^3 / 2 for i in 1:n]
end
function discrete_integral(x)
    n = length(x)
    h = 1 / (n + 1)
    c(j) = (x[j] + j * h + 1)^3
    return [
        x[i] + h / 2 * ((1 - i * h) * sum(j * h * c(j) for j in 1:i) + i * h * sum((1 - j * h) * c(j) for j in (i + 1):n; init = 0.0))
            for i in 1:n
    ]
end
trigonometric(x) = [length(x) - sum(cos, x) + i * (1 - cos(x[i])) - sin(x[i]) for i in eachindex(x)]
function variably_dimensioned(x)
    s = sum(j * (x[j] - 1) for j in eachindex(x))
    return [x[j] - 1 + j * s * (1 + 2s^2) for j in eachindex(x)]
end
function broyden_tridiagonal(x)
    y = [0; x; 0]
    return [(3 - 2x[i]) * x[i] - y[i] - 2y[i + 2] + 1 for i in eachindex(x)]
end
broyden_banded(x) = [
    x[i] * (2 + 5x[i]^2) + 1 - sum(x[j] * (1 + x[j]) for j in max(1, i - 5):min(length(x), i + 1) if j != i) for i in eachindex(x)
]
freudenstein_roth(x) = [-13 + x[1] + ((5 - x[2]) * x[2] - 2) * x[2], -29 + x[1] + ((x[2] + 1) * x[2] - 14) * x[2]]
himmelblau(x) = [x[1]^2 + x[2] - 11, x[1] + x[2]^2 - 7]
box_three(x) = [exp(-t * x[1]) - exp(-t * x[2]) - x[3] * (exp(-t) - exp(-10t)) for t in (0.1, 0.2, 0.3)]
boggs(x) = [x[1]^2 - x[2] + 1, x[1] - cos(π / 2 * x[2])]
beale(x) = [1.5 - x[1] * (1 - x[2]), 2.25 - x[1] * (1 - x[2]^2)]

# Name, function, start, and the multiples of the start (of a start of zero: what stands in its place) from which SciPy's
# `root(method="hybr")` of MINPACK finds a root, with or without the Jacobian.
const GRID = (1:10) ./ 11
const CLASSICAL_SYSTEMS = (
    ("Rosenbrock", rosenbrock, [-1.2, 1], (1, 10, 100)),
    ("Powell singular", powell_singular, [3.0, -1, 0, 1], (1, 10, 100)),          # hybr gives up at a distance of 1e-17
    ("Powell badly scaled", powell_badly_scaled, [0.0, 1], (1, 10)),
    ("Wood", wood, [-3.0, -1, -3, -1], (1, 10)),
    ("helical valley", helical_valley, [-1.0, 0, 0], (1, 10)),
    ("Watson 2", watson, zeros(2), (1, 10, 100)),
    ("Watson 6", watson, zeros(6), (1, 10, 100)),
    ("Watson 9", watson, zeros(9), (1, 10)),
    ("Chebyquad 5", chebyquad, (1:5) ./ 6, (1, 10)),
    ("Chebyquad 6", chebyquad, (1:6) ./ 7, (1, 100)),
    ("Chebyquad 7", chebyquad, (1:7) ./ 8, (1,)),
    ("Chebyquad 9", chebyquad, (1:9) ./ 10, (1,)),
    ("Brown almost linear 10", brown_almost_linear, fill(0.5, 10), (1, 10, 100)),
    ("Brown almost linear 30", brown_almost_linear, fill(0.5, 30), (1,)),
    ("Brown almost linear 40", brown_almost_linear, fill(0.5, 40), (1,)),
    ("discrete boundary value", discrete_boundary_value, GRID .* (GRID .- 1), (1, 10, 100)),
    ("discrete integral 1", discrete_integral, [-0.25], (1, 10, 100)),
    ("discrete integral 10", discrete_integral, GRID .* (GRID .- 1), (1, 10, 100)),
    ("trigonometric", trigonometric, fill(0.1, 10), (100,)),
    ("variably dimensioned", variably_dimensioned, 1 .- (1:10) ./ 10, (1, 10, 100)),
    ("Broyden tridiagonal", broyden_tridiagonal, fill(-1.0, 10), (1, 10, 100)),
    ("Broyden banded", broyden_banded, fill(-1.0, 10), (1, 10, 100)),
    ("Himmelblau", himmelblau, [0.0, 0], (1, 10, 100)),
    ("Himmelblau from 1", himmelblau, [1.0, 1], (1, 10, 100)),
    ("Box", box_three, [0.0, 10, 20], (1,)),
    ("Boggs", boggs, [1.0, 0], (1, 10, 100)),
    ("Beale", beale, [1.0, 1], (1,)),
)
far_start(x, factor) = all(iszero, x) ? fill(factor == 1 ? 0.0 : float(factor), length(x)) : factor .* x

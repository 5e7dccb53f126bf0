"""Equations are never silently wrong: units, memory that f reuses, derivatives of every row, the count of evaluations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import implicit_rnn as irnn
from implicit_rnn import Anderson, Auto, Newton, NLsolve, Picard, Status, fixed_point, root
from implicit_rnn.errors import DerivativeWarning

KINDS = ["python", pytest.param("julia", marks=pytest.mark.julia)]
MANY = {"python": {"vectorized": True}, "julia": {}}
"""How a function of many samples is given."""


def either(kind: str, function: Callable[..., Any], code: str) -> Any:
    return function if kind == "python" else irnn.julia(code)


# --- units ---------------------------------------------------------------------------------------------------

FIXED_POINT_SOLVERS = [Auto(), Picard(), Anderson(), Newton()]
ROOT_SOLVERS = [Auto(), Newton()]


IN_UNITS = {
    "fixed point": (
        fixed_point,
        FIXED_POINT_SOLVERS,
        [0.5, 2.0],
        lambda z, u: u * np.cos(z[::-1] / u) / 2 + 0.3 * z,
        "(z, u) -> u .* cos.(reverse(z) ./ u) ./ 2 .+ oftype(u, 0.3) .* z",
    ),
    "root": (
        root,
        ROOT_SOLVERS,
        [3.0],
        lambda z, u: (z / u) ** 3 + z / u - 5,
        "(z, u) -> (z ./ u) .^ 3 .+ z ./ u .- 5",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", IN_UNITS)
def test_solution_does_not_depend_on_the_unit(kind, dtype, name):
    solve, solvers, start, *f = IN_UNITS[name]
    f, start = either(kind, *f), np.array(start, dtype)
    tolerance = 1e-8 if dtype == np.float64 else 2e-6
    for solver in [*solvers, *([NLsolve()] if kind == "julia" else [])]:
        expected = solve(f, start, args=(dtype(1),), solver=solver).value
        for k in range(-18, 19, 4):
            unit = dtype(10.0) ** dtype(k)
            sol = solve(f, start * unit, args=(unit,), solver=solver)
            np.testing.assert_allclose(sol.value / unit, expected, rtol=tolerance, err_msg=f"{solver} at 10^{k}")


@pytest.mark.parametrize("samples", [1, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_far_start_costs_no_digits(kind, samples):
    square = either(kind, lambda z, a: z * z - a, "(z, a) -> z .* z .- a")
    half = either(kind, lambda z, a: z / 2 + a, "(z, a) -> z ./ 2 .+ a")
    for solver in ROOT_SOLVERS:
        start = np.full((samples, 1), 1e20)
        far = root(square, start, args=(2.0,), solver=solver, vectorized=kind == "python")
        np.testing.assert_allclose(far.value, 2**0.5, rtol=1e-14)
        soluble = root(square, start / 1e20, args=(1e-52,), solver=solver, vectorized=kind == "python")  # as HgS
        np.testing.assert_allclose(soluble.value, 1e-26, rtol=1e-14)
    for solver in FIXED_POINT_SOLVERS:
        far = fixed_point(half, start, args=(1.0,), solver=solver, vectorized=kind == "python")
        np.testing.assert_allclose(far.value, 2, rtol=1e-9)
    far = root(square, start * 1e20, args=(2.0,), vectorized=kind == "python")
    np.testing.assert_allclose(far.value, 2**0.5, rtol=1e-14)
    far = root(square, start * 1e20, args=(2.0,), solver=Newton(), on_failure="ignore", vectorized=kind == "python")
    assert set(far.status) == {Status.MAX_ITERATIONS}


@pytest.mark.parametrize("samples", [1, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_go_to_zero_end_there(kind, samples):
    many = {"vectorized": kind == "python", "args": (1.0,)}
    start = np.ones((samples, 1))
    powers = ((lambda z, a: a * z**2, "(z, a) -> a .* z .^ 2"), (lambda z, a: a * z**3, "(z, a) -> a .* z .^ 3"))
    for f in powers:
        for solver in ROOT_SOLVERS:
            sol = root(either(kind, *f), start, solver=solver, **many)
            assert not sol.value.any()
            assert sol.iterations.max() < 100
    shrink = either(kind, lambda z, a: 0.7 * a * np.tanh(z), "(z, a) -> 0.7 .* a .* tanh.(z)")
    for solver in FIXED_POINT_SOLVERS:
        sol = fixed_point(shrink, start, solver=solver, **many)
        assert not sol.value.any()
        assert sol.iterations.max() < 110
        np.testing.assert_array_equal(sol.jacobian("a"), 0)


@pytest.mark.julia
@pytest.mark.parametrize("solver", [Auto(), Picard(), Anderson()], ids=str)
def test_zero_is_left_where_it_repels(solver):
    f = irnn.julia("(z, k) -> z .* (0.5 .+ 1 ./ (1 .+ z ./ k))")
    assert fixed_point(f, [1.0], args=(1e-22,), solver=solver).value == pytest.approx([1e-22], rel=1e-9, abs=0)


@pytest.mark.parametrize("kind", KINDS)
def test_newton_tells_that_a_zero_it_came_to_repels(kind):
    f = either(kind, lambda z: np.tanh(1.5 * z + 0.01 * z[::-1]), "z -> tanh.(1.5 .* z .+ 0.01 .* reverse(z))")
    sol = fixed_point(f, [1e-9, 2e-9], solver=Newton(), on_failure="ignore")
    assert sol.status[0] == Status.UNSTABLE


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_root_is_found_where_f_has_no_value_at_zero(kind):
    def only_positive(z, a):
        if not (z > 0).all():
            raise ValueError("z must be positive")
        return z * z - a

    code = 'function (z, a) any(z .<= 0) && error("z must be positive"); z .* z .- a end'
    sol = root(either(kind, only_positive, code), [1.0], args=(1e-40,))
    np.testing.assert_allclose(sol.value, 1e-20, rtol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", FIXED_POINT_SOLVERS, ids=str)
def test_zero_is_found_where_f_has_no_derivative(kind, solver):
    f = either(kind, lambda z: 0.5 * np.sqrt(z) ** 2, "z -> 0.5 .* sqrt.(z) .^ 2")
    for start in (np.ones(2), np.zeros(2)):
        assert not fixed_point(f, start, solver=solver).value.any()


@pytest.mark.parametrize("kind", KINDS)
def test_roots_that_rounding_hides_are_found(kind):
    for function, code in (
        (lambda z: np.sin(z + np.pi), "z -> sin.(z .+ pi)"),
        (lambda z: ((z + 0.3) - 0.1) - 0.2, "z -> ((z .+ 0.3) .- 0.1) .- 0.2"),
    ):
        for solver in ROOT_SOLVERS:
            sol = root(either(kind, function, code), [1.0], solver=solver)
            assert abs(sol.value[0]) < 1e-15
            assert sol.iterations[0] < 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_condition_that_others_outweigh_is_not_taken_for_zero(kind):
    f = either(
        kind,
        lambda z: np.array(
            [
                0.8003 * z[0] + 129.9161 * np.exp(-55.911 * z[1]) - 1.601276 * np.abs(-0.017397 * z[2]) + 7.89824e-05,
                0.9398 * z[1] - 650.5384 * np.tanh(0.36963 * z[0]) + 0.0690827,
                0.5531 * z[2] + 851.6983 * np.tanh(2.4298 * z[0]) + 24.60395 / (1 + (-0.028383 * z[1]) ** 2) + 4.32125,
            ]
        ),
        "z -> [0.8003z[1] + 129.9161exp(-55.911z[2]) - 1.601276abs(-0.017397z[3]) + 7.89824e-05, "
        "0.9398z[2] - 650.5384tanh(0.36963z[1]) + 0.0690827, "
        "0.5531z[3] + 851.6983tanh(2.4298z[1]) + 24.60395 / (1 + (-0.028383z[2])^2) + 4.32125]",
    )  # which has a first entry of 1e150 at the start
    sol = root(f, [-13.243861926251029, -6.33443106965219, 16.245894734483727], on_failure="ignore")
    assert not sol.converged[0] or np.abs(sol.value).max() < 1e4


@pytest.mark.parametrize("kind", KINDS)
def test_auto_gives_newtons_method_the_time_for_a_long_way(kind):
    carriers = either(
        kind,
        lambda z, doping: np.array([z[0] - z[1] - doping, z[0] * z[1] - 1e20]),
        "(z, doping) -> [z[1] - z[2] - doping, z[1] * z[2] - 1e20]",
    )
    np.testing.assert_allclose(root(carriers, [1e10, 1e10], args=(1e17,)).value, [1e17, 1e3], rtol=1e-6)
    salt = either(
        kind,
        lambda z, k: np.array([z[0] * z[1] - k, z[0] - z[1] - 1e-29]),
        "(z, k) -> [z[1] * z[2] - k, z[1] - z[2] - 1e-29]",
    )
    np.testing.assert_allclose(root(salt, [1.0, 1.0], args=(1e-52,)).value, [1.0005e-26, 0.9995e-26], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_solutions_far_below_1_are_found(kind):
    small = either(kind, lambda z: 0.3 * z + 7e-17, "z -> 0.3 .* z .+ 7e-17")
    np.testing.assert_allclose(fixed_point(small, [0.0]).value, 1e-16, rtol=1e-9)
    square = either(kind, lambda z: z**2 - 4e-26, "z -> z .^ 2 .- 4e-26")
    np.testing.assert_allclose(root(square, [1e-12]).value, 2e-13, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_solution_of_exactly_zero_converges(kind):
    halve = either(kind, lambda z: 0.5 * np.sin(z), "z -> 0.5 .* sin.(z)")
    for solver in FIXED_POINT_SOLVERS:
        sol = fixed_point(halve, [1.0], solver=solver)
        assert abs(sol.value[0]) < 1e-14, solver
    sine = either(kind, np.sin, "z -> sin.(z)")
    assert abs(root(sine, [0.5]).value[0]) < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_entries_of_very_different_sizes_are_found_each_with_its_scale(kind):
    f = either(
        kind, lambda z: np.array([0.9 * z[0] + 1e-13, 0.1 * z[1] + 9e5]), "z -> [0.9 * z[1] + 1e-13, 0.1 * z[2] + 9e5]"
    )
    sol = fixed_point(f, [0.0, 0.0], scale=[1e-12, 1e6], solver=Picard())
    np.testing.assert_allclose(sol.value, [1e-12, 1e6], rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("far", [1e7, 1e20, 1e300])
@pytest.mark.parametrize("shape", [(1,), (3,), (40, 1)])
def test_a_far_start_does_not_coarsen_a_fixed_point(kind, far, shape):
    f = either(kind, lambda z: np.cos(z), "z -> cos.(z)")
    for solver in [Auto(), Picard(), Anderson(), Newton()]:
        sol = fixed_point(f, np.full(shape, far), solver=solver, on_failure="ignore")
        found = np.broadcast_to(np.atleast_1d(sol.status == Status.CONVERGED), shape[0])
        np.testing.assert_allclose(sol.value[found], 0.7390851332151607, rtol=1e-8)
        assert found.all() or not isinstance(solver, Auto | Picard)


@pytest.mark.parametrize(("dtype", "decades"), [(np.float32, 30), (np.float64, 200)])
@pytest.mark.parametrize("samples", [1, 40])
def test_anderson_acceleration_is_the_same_in_any_unit(dtype, decades, samples, rng):
    M, a = rng.standard_normal((8, 8)).astype(dtype), rng.uniform(1, 2, (samples, 8)).astype(dtype)
    M *= dtype(0.9) / dtype(np.linalg.norm(M, 2))
    solver = Anderson(damping=0.9)

    def solve(unit):
        return fixed_point(
            lambda z, a: unit * np.cos(z / unit @ M + a), 0 * a, args=(a,), batched="a", vectorized=True, solver=solver
        )

    plain = solve(dtype(1))
    for unit in (dtype(2) ** -round(3.3 * decades), dtype(2) ** round(3.3 * decades)):
        sol = solve(unit)
        np.testing.assert_array_equal(sol.value / unit, plain.value)
        np.testing.assert_array_equal(sol.iterations, plain.iterations)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decades", [5, 12, 20])
@pytest.mark.parametrize("samples", [1, 40])
def test_units_of_single_conditions_and_unknowns_do_not_matter(kind, decades, samples, rng):
    f = either(
        kind,
        lambda z, a, M, units, rows: rows * (M @ (z / units) + (z / units) ** 3 / 4 - a),
        "(z, a, M, units, rows) -> rows .* (M * (z ./ units) .+ (z ./ units) .^ 3 ./ 4 .- a)",
    )
    M, one = rng.standard_normal((5, 5)) + 3 * np.eye(5), np.ones(5)
    units, rows = (10.0 ** rng.permutation(np.linspace(-decades, decades, 5)) for _ in range(2))
    a, start = rng.uniform(1, 2, (samples, 5)), np.exp(rng.uniform(-0.5, 0.5, (samples, 5)))
    plain, scaled = (root(f, start * u, args=(a, M, u, r), batched="a") for u, r in ((one, one), (units, rows)))
    np.testing.assert_allclose(scaled.value / units, plain.value, rtol=1e-9)
    np.testing.assert_allclose(
        scaled.jacobian("a") / units[:, None],
        plain.jacobian("a"),
        rtol=1e-7,
        atol=1e-9 * abs(plain.jacobian("a")).max(),
    )
    v = rng.standard_normal((samples, 5))
    np.testing.assert_allclose(scaled.vjp(v / units)["a"], plain.vjp(v)["a"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_carriers_of_a_semiconductor_have_their_derivatives(kind):
    f = either(
        kind,
        lambda z, doping, square: np.array([z[0] - z[1] - doping, z[0] * z[1] - square]),
        "(z, doping, square) -> [z[1] - z[2] - doping, z[1] * z[2] - square]",
    )
    for doping in (1e14, 1e16, 1e20):  # of 1e10 intrinsic carriers, all in 1/cm³
        sol = root(f, np.array([2 * doping, 3e20 / doping]), args=(doping, 1e20))
        electrons, holes = sol.value
        np.testing.assert_allclose(electrons * holes, 1e20, rtol=1e-9)
        total = electrons + holes
        expected = [[electrons / total, 1 / total], [-holes / total, 1 / total]]
        found = np.stack([sol.jacobian("doping"), sol.jacobian("square")], axis=-1)
        np.testing.assert_allclose(found.reshape(2, 2), expected, rtol=1e-8)


@pytest.mark.parametrize("unit", [1.0, 1e5, 1e15])
def test_units_of_two_fields_of_many_unknowns_do_not_matter(unit):
    def f(z, a):
        u, v = z[0::2] / unit, z[1::2] * unit
        laplacian = [np.concatenate([w[1:], [0]]) + np.concatenate([[0], w[:-1]]) - 2 * w for w in (u, v)]
        rows = np.empty_like(z * a[0])
        rows[0::2] = unit * (laplacian[0] - u - u**3 + v + a[0])
        rows[1::2] = (laplacian[1] - 2 * v - u + a[1]) / unit
        return rows

    a, step = np.array([0.3, 0.5]), 1e-6
    sol = root(f, np.zeros(3000), args=(a,))
    nearby = [root(f, sol.value, args=(a + sign * np.array([step, 0]),)).value for sign in (1, -1)]
    quotient = (nearby[0] - nearby[1]) / (2 * step)
    np.testing.assert_allclose(sol.jacobian("a")[:, 0], quotient, rtol=1e-7)


# --- samples that are not separate ---------------------------------------------------------------------------


@pytest.mark.parametrize("solve", [fixed_point, root])
@pytest.mark.parametrize(
    "f",
    [
        lambda z, a: np.cos(a * z) / 2 - z / 4 + 0.1 * z.mean(axis=0),
        lambda z, a: np.cos(a * z) / 2 - z / 4 + 0.1 * z[::-1],
        lambda z, a: np.cos(a * z) / 2 - z / 4 + 0.1 * np.cumsum(z, axis=0),
        lambda z, a: np.cos(a * z) / 2 - z / 4 + 0.1 * z / np.linalg.norm(z + 1),
        lambda z, a: np.cos(a * z) / 2 - z / 4 + 0.1 * a.max(),
    ],
)
def test_a_vectorized_function_that_mixes_samples_is_told(solve, f):
    a = np.linspace(0.2, 1, 5)[:, None]
    with pytest.raises(ValueError, match=r"f mixes samples.*vectorized=True"):
        solve(f, np.zeros((5, 1)), args=(a,), batched="a", vectorized=True)


def test_a_vectorized_function_that_keeps_what_belongs_to_samples_to_itself_is_told():
    a = np.linspace(1, 2, 5)[:, None]
    with pytest.raises(
        ValueError, match=r"f fails for \d of the 5 samples: (.|\n)*goes into args and is named in batched"
    ):
        root(lambda z: z**2 - a, np.ones((5, 1)), vectorized=True)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("unit", [1e-20, 1.0, 1e20])
def test_rounding_that_depends_on_the_number_of_samples_is_no_mixing(dtype, unit):
    rng = np.random.default_rng(0)
    R = 0.1 * rng.normal(size=(50, 50)).astype(dtype)
    u = rng.normal(size=(9, 50)).astype(dtype)

    def f(z, u):
        return dtype(unit) * np.tanh(z / dtype(unit) @ R + u)

    sol = fixed_point(f, np.zeros((9, 50), dtype), args=(u,), batched="u", vectorized=True)
    assert (sol.status == Status.CONVERGED).all()


# --- memory that f reuses ------------------------------------------------------------------------------------


def test_function_that_reuses_its_memory_gives_each_sample_its_own_answer():
    memory = np.empty(1)

    def f(z, a):
        return np.sin(a * z + 1, out=memory) if np.isrealobj(a * z) else np.sin(a * z + 1)

    a = np.array([0.1, 0.5, 0.9])
    sol = fixed_point(f, np.zeros((3, 1)), args=(a,), batched="a")
    expected = fixed_point(lambda z, a: np.sin(a * z + 1), np.zeros((3, 1)), args=(a,), batched="a")
    np.testing.assert_allclose(sol.value, expected.value)
    np.testing.assert_allclose(sol.jacobian("a"), expected.jacobian("a"), rtol=1e-6)


def test_vectorized_function_that_reuses_its_memory_has_its_derivative():
    memory: dict[Any, np.ndarray] = {}

    def f(z, a):
        argument = a[:, None] * z + 1
        out = memory.setdefault((argument.dtype, argument.shape), np.empty_like(argument))
        return np.sin(argument, out=out)

    a = np.array([0.1, 0.5])
    sol = fixed_point(f, np.zeros((2, 1)), args=(a,), batched="a", vectorized=True)
    expected = fixed_point(lambda z, a: np.sin(a * z + 1), np.zeros((2, 1)), args=(a,), batched="a")
    np.testing.assert_allclose(sol.jacobian("a"), expected.jacobian("a"), rtol=1e-6)


def test_function_that_writes_to_its_argument_harms_nothing():
    def f(z, a):
        z *= a
        return np.cos(z)

    np.testing.assert_allclose(fixed_point(f, [0.5], args=(0.8,)).value, [0.8014178535169356])


# --- derivatives of every row --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinked", "slope"),
    [
        (lambda z, a: np.where(a > 0, 0.5, 1) * np.abs(a) + 0 * z, lambda a: np.where(a > 0, 0.5, -1.0)),
        (lambda z, a: np.interp(np.real(a), [-9, 0, 9], [9, 0, 18]) + 0 * z, lambda a: np.where(a > 0, 2.0, -1.0)),
        (lambda z, a: np.real(a) ** 2 + 0 * z, lambda a: 2 * a),
        (lambda z, a: (a if np.real(a) > 5 else np.real(a)) * 3 + 0 * z, lambda a: np.full_like(a, 3)),
    ],
    ids=["abs", "table", "real part", "comparison"],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_rows_behind_the_first_have_the_right_derivative_too(kinked, slope, backwards):
    a = np.concatenate([np.linspace(6, 8, 12), np.linspace(-4, -0.5, 5)])
    a = a[::-1] if backwards else a
    sol = fixed_point(kinked, np.zeros((len(a), 1)), args=(a,), batched="a")
    np.testing.assert_allclose(sol.vjp(np.ones((len(a), 1)))["a"], slope(a), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-15, 1e-12, 1e-6, 1.0, 1e9])
def test_difference_steps_are_scaled_to_the_argument(size):
    def f(z, c):
        return np.array([float(np.real(c[0]) ** 2 / size)]) + 0 * z.real  # analytic to nobody

    sol = fixed_point(f, [0.0], args=([3 * size],))
    np.testing.assert_allclose(sol.jacobian("c"), [[6.0]], rtol=1e-6)


def test_derivative_at_an_argument_of_zero_is_right():
    sol = fixed_point(lambda z, c: np.sin(np.real(c)) + np.real(c) ** 2 + 0 * z.real, [0.3], args=([0.0],))
    np.testing.assert_allclose(sol.jacobian("c"), [[1.0]], rtol=1e-6)


def test_kink_gives_nan_and_a_warning_instead_of_a_number():
    with pytest.warns(
        DerivativeWarning, match="no trustworthy derivative with respect to a at the solution of 1 samples"
    ):
        J = fixed_point(lambda z, a: np.abs(a) + 0 * z.real, [0.3], args=([0.0],)).jacobian("a")
    assert np.isnan(J).all()


def test_smooth_functions_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sol = fixed_point(lambda z, a, b: np.tanh(a * z + b) * np.exp(-(z**2)), [0.3], args=(0.5, 0.1))
        sol.vjp([1.0])


# --- evaluations, statuses, forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("allowed", [1, 2, 3, 7, 20])
def test_no_more_evaluations_than_allowed(kind, allowed):
    slow = either(kind, lambda z: np.tanh(1.4 * z[::-1]) + 0.01, "z -> tanh.(1.4 .* reverse(z)) .+ 0.01")
    for solver in FIXED_POINT_SOLVERS:
        limited = type(solver)(max_iterations=allowed)
        sol = fixed_point(slow, np.linspace(0.1, 1, 16), solver=limited, on_failure="ignore")
        assert sol.iterations.max() <= allowed, limited
    hard = either(
        kind, lambda z: np.array([10 * (z[1] - z[0] ** 2), 1 - z[0]]), "z -> [10 * (z[2] - z[1]^2), 1 - z[1]]"
    )
    for solver in ROOT_SOLVERS:
        sol = root(hard, [-1.2, 1.0], solver=type(solver)(max_iterations=allowed), on_failure="ignore")
        assert sol.iterations.max() <= allowed, solver


@pytest.mark.parametrize("kind", KINDS)
def test_singular_jacobian_has_its_own_status_and_remedy(kind):
    f = either(kind, lambda z: np.array([z[0] + z[1] - 1, z[0] + z[1] - 2]), "z -> [z[1] + z[2] - 1, z[1] + z[2] - 2]")
    sol = root(f, [0.0, 0.0], on_failure="ignore")
    assert sol.status.tolist() == [Status.SINGULAR]
    with pytest.raises(irnn.ConvergenceError, match=r"1 singular.*the Jacobian has no inverse"):
        root(f, [0.0, 0.0])


@pytest.mark.parametrize("kind", KINDS)
def test_number_for_one_unknown(kind):
    sol = root(either(kind, lambda z, a: z**2 - a, "(z, a) -> z^2 - a"), 1.0, args=(2.0,))
    assert sol.value.shape == ()
    np.testing.assert_allclose(sol.value, np.sqrt(2))
    np.testing.assert_allclose(sol.vjp(1.0)["a"], 1 / (2 * np.sqrt(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_result_of_one_unknown_may_be_a_number(kind):
    sol = root(either(kind, lambda z, a: z[0] ** 2 - a, "(z, a) -> z[1]^2 - a"), [1.0], args=(2.0,))
    np.testing.assert_allclose(sol.value, [np.sqrt(2)])


@pytest.mark.parametrize("kind", KINDS)
def test_tuple_is_refused_in_our_own_words(kind):
    f = either(kind, lambda z: (z[0], z[1]), "z -> (z[1], z[2])")
    with pytest.raises((TypeError, ValueError), match="f returned a tuple of 2; expected"):
        fixed_point(f, [0.5, 0.5])


POLES = {
    "reciprocal": (lambda z: 1 / (z - 1), "z -> 1 ./ (z .- 1)", 1.0),
    "cube": (lambda z: 1 / (z - 2) ** 3, "z -> 1 ./ (z .- 2) .^ 3", 2.0),
    "cosecant": (lambda z: 1 / np.sin(z), "z -> 1 ./ sin.(z)", np.pi),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POLES)
@pytest.mark.parametrize("distance", [1e-9, 1e-11, -1e-11, 1e-13])
def test_pole_is_never_taken_for_a_root(kind, name, distance):
    function, code, pole = POLES[name]
    f = either(kind, function, code)
    for solver in [*ROOT_SOLVERS, *([NLsolve()] if kind == "julia" else [])]:
        assert not root(f, [pole + distance], solver=solver, on_failure="ignore").converged.any(), solver


@pytest.mark.parametrize("distance", [1e-9, 1e-11, 1e-13])
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("hook", ["jac", "vjp"])
def test_pole_is_never_taken_for_a_root_by_a_derivative_that_was_given(distance, vectorized, hook):
    def converges(pole, f):
        """A function whose derivative is -1 / (z - pole)²."""
        hooks = {"jac": lambda z: (-1 / (z - pole) ** 2)[..., None], "vjp": lambda v, z: (-v / (z - pole) ** 2,)}
        given = {hook: hooks[hook], "vectorized": vectorized}
        return root(f, [1 + distance], on_failure="ignore", **given).converged.all()

    assert not converges(1, lambda z: 1 / (z - 1))
    assert converges(0, lambda z: 1 / z - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_start_at_a_root_is_believed(kind):
    f = either(kind, lambda z: z**3 - 8, "z -> z .^ 3 .- 8")
    for start in (2.0, 2 + 1e-12, 2 - 1e-11):
        np.testing.assert_allclose(root(f, [start]).value, [2.0], rtol=1e-10)


# --- arguments that hardly count -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    "sine", [np.sin, lambda E: np.sin(E.real) + 1j * E.imag * np.cos(E.real)], ids=["plain", "own"]
)
def test_argument_whose_terms_are_near_the_rounding_of_f_has_its_derivative(dtype, sine, rng):
    M = rng.uniform(-np.pi, np.pi, (2000, 1)).astype(dtype)
    e = (10 ** rng.uniform(np.log10(np.finfo(dtype).eps) / 2.5, -0.1, (2000, 1))).astype(dtype)

    def kepler(E, M, e):
        return E - e * (np.sin(E) if np.isrealobj(E) else sine(E)) - M

    orbit = root(kepler, M, args=(M, e), batched=("M", "e"), vectorized=True)
    E = orbit.value.astype(np.float64)
    expected = np.sin(E) / (1 - e * np.cos(E))
    np.testing.assert_allclose(orbit.vjp(np.ones_like(M))["e"], expected, rtol=1e-3 if dtype == np.float32 else 1e-9)


@pytest.mark.parametrize("a", [-1.0, -1e-9, -1e9])
def test_plateau_has_the_derivative_zero(a):
    flat = root(lambda z, a: z**3 + z - 2 + np.maximum(a, 0 * a) * (a > 0), [1.5], args=(a,))
    assert flat.vjp([1.0])["a"] == 0


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_neurons_that_are_off_have_the_derivative_zero(dtype):
    R = (0.1 * np.eye(4)).astype(dtype)
    x = np.array([-3, -1, 1, 2], dtype)
    z = fixed_point(lambda z, R, x: np.maximum(np.real(R @ z + x), 0), np.zeros(4, dtype), args=(R, x))
    np.testing.assert_allclose(z.vjp(np.ones(4))["x"], np.array([0, 0, 1, 1]) / 0.9, rtol=1e-3)
    assert (z.vjp(np.ones(4))["R"][:2] == 0).all()


@pytest.mark.parametrize("a", [1e-4, 1e-6, 1e-8])
def test_small_argument_of_which_f_drops_the_imaginary_part_is_not_taken_for_a_constant(a):
    value = root(lambda z, a: z**3 + z - 2 + a.real, [1.5], args=(np.array([a]),))
    np.testing.assert_allclose(value.vjp([1.0])["a"], -1 / (3 * value.value**2 + 1), rtol=1e-5)


@pytest.mark.parametrize("a", [1e-12, 1e-16, 1e-100])
@pytest.mark.parametrize("vectorized", [False, True])
def test_argument_that_is_lost_in_rounding_has_its_derivative_without_complex_steps_too(a, vectorized):
    sizes = np.array([[1.0], [1e3], [1e6]])
    solution = root(
        lambda z, a, b: z - b * np.exp(np.real(a)), np.ones((3, 1)), args=(a, sizes), batched="b", vectorized=vectorized
    )
    np.testing.assert_allclose(solution.jacobian("a").ravel(), sizes.ravel(), rtol=1e-6)
    flat = root(lambda z, a: z - 1 - max(np.real(a), 0) - np.floor(np.real(a) + 0.5), [1.0], args=(-a,))
    assert flat.vjp([1.0])["a"] == 0


# --- hard systems --------------------------------------------------------------------------------------------


def brown(z):
    return np.append(z[:-1] + z.sum() - (len(z) + 1), np.prod(z) - 1)


def helical_valley(z):
    angle = np.arctan2(z[1].real, z[0].real) / (2 * np.pi)
    return np.array([10 * (z[2] - 10 * angle), 10 * (np.hypot(z[0].real, z[1].real) - 1), z[2]])


def powell_badly_scaled(z):
    return np.array([1e4 * z[0] * z[1] - 1, np.exp(-z[0]) + np.exp(-z[1]) - 1.0001])


def broyden_tridiagonal(z):
    return (3 - 2 * z) * z - np.append(0, z[:-1]) - 2 * np.append(z[1:], 0) + 1


def trigonometric(z):
    n = len(z)
    return n - np.cos(z).sum() + np.arange(1, n + 1) * (1 - np.cos(z)) - np.sin(z)


def rosenbrock(z):
    return np.array([10 * (z[1] - z[0] ** 2), 1 - z[0]])


SYSTEMS = {
    "Brown": (brown, np.full(10, 0.5)),
    "helical valley": (helical_valley, np.array([-1.0, 0.0, 0.0])),
    "Powell badly scaled": (powell_badly_scaled, np.array([0.0, 1.0])),
    "Broyden": (broyden_tridiagonal, np.full(10, -1.0)),
    "Rosenbrock": (rosenbrock, np.array([-1.2, 1.0])),
    "trigonometric": (trigonometric, np.full(10, 0.1)),
}


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("far", [1, 10, 100])
def test_what_minpack_solves_is_solved_and_nothing_wrong_is_called_converged(name, far):
    from scipy import optimize

    f, start = SYSTEMS[name]
    start = start * far
    sol = root(f, start, on_failure="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = optimize.root(f, start, method="hybr")
    if peer.success and np.linalg.norm(f(peer.x)) < 1e-8:
        assert sol.converged.all(), sol
    if sol.converged.all():
        assert np.linalg.norm(f(sol.value)) < 1e-6 * max(1, np.abs(sol.value).max())


@pytest.mark.parametrize("kind", KINDS)
def test_whole_newton_steps_lead_out_of_the_minima_in_which_the_other_methods_end(kind):
    f = either(kind, lambda z, A, B, c: A @ z**3 + B @ z + c, "(z, A, B, c) -> A * z .^ 3 .+ B * z .+ c")
    rng, found = np.random.default_rng(3), 0
    for _ in range(40):
        args = rng.standard_normal((5, 5)), rng.standard_normal((5, 5)), rng.standard_normal(5)
        found += root(f, 10 * rng.standard_normal(5), args=args, on_failure="ignore").converged.all()
    assert found >= 38


# --- what was seen on the way --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (2, 1)])
@pytest.mark.parametrize("start", [-2.0, -0.03, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_equation_without_solution_is_not_converged_because_iterates_exploded_once(kind, start, shape):
    f = either(kind, lambda z: np.exp(z**2 - z) + 0.52 * z, "z -> exp.(z .^ 2 .- z) .+ 0.52 .* z")
    for solver in (Auto(), Newton()):
        sol = fixed_point(f, np.full(shape, start), solver=solver, on_failure="ignore")
        assert not sol.converged.any(), (solver, sol.value)


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_point_is_sought_from_its_start_again_after_iteration_has_exploded(kind):
    f = either(kind, lambda z: 8 * np.log(z) ** 3 + z**2 - 3, "z -> 8 .* log.(z) .^ 3 .+ z .^ 2 .- 3")
    sol = fixed_point(f, [[9.0], [9.5]], solver=Auto(), on_failure="ignore")
    assert (sol.value > 1).all()  # of zero there is no logarithm
    assert (sol.status != Status.NON_FINITE).all()


@pytest.mark.parametrize("kind", KINDS)
def test_newton_step_to_where_f_has_no_value_is_shortened(kind):
    f = either(kind, lambda z: z - 0.9 * np.log(z), "z -> z .- 0.9 .* log.(z)")  # the first whole step leads to -2.9
    sol = fixed_point(f, [[4.0]], solver=Newton())
    np.testing.assert_allclose(sol.value, [[1.0]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", [Auto(), Newton(), Anderson(), Picard(damping=0.3)], ids=lambda s: s.name)
def test_fixed_point_that_iteration_would_leave_is_unstable_by_every_solver(kind, solver):
    f = either(kind, lambda z: np.tanh(0.5 - 3 * z), "z -> tanh.(0.5 .- 3 .* z)")
    sol = fixed_point(f, [[0.2], [0.3]], solver=solver, on_failure="ignore")
    assert (sol.status == Status.UNSTABLE).all()


def test_solution_that_has_shrunk_to_nearly_nothing_has_its_derivative():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sol = fixed_point(lambda z, a: np.tanh(a * z), np.array([[1.0], [2.0]]), args=(0.99,))
        np.testing.assert_allclose(sol.vjp(np.ones((2, 1)))["a"], 0, atol=1e-300)


@pytest.mark.parametrize("exponent", [-36, -31, -30, -29, -25, 0, 30])
def test_derivative_in_float32_does_not_depend_on_the_unit(exponent):
    unit = np.float32(10.0**exponent)
    sol = fixed_point(lambda z, a: unit * np.cos(a * z / unit), np.array([[1], [3]], np.float32) * unit, args=(0.8,))
    rtol = 1e-5 if np.__version__ >= "2" else 1e-4  # before, all of f is in float32
    np.testing.assert_allclose(sol.jacobian("a") / unit, -0.324205, rtol=rtol)


# --- steps that are short without a root ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "code", "starts"),
    [
        (lambda z: np.sqrt(z) + 1, "z -> sqrt.(z) .+ 1", [0.01, 1.0, 100.0]),
        (lambda z: np.sqrt(z) + 0.1 + z, "z -> sqrt.(z) .+ 0.1 .+ z", [0.01, 1.0, 100.0]),
        (lambda z: np.sqrt(z - 1) + 1, "z -> sqrt.(z .- 1) .+ 1", [1.01, 3.0, 100.0]),
        (lambda z: (z * z) ** 0.25 + 1, "z -> sqrt.(abs.(z)) .+ 1", [-1.0, 0.01, 100.0]),
    ],
    ids=["sqrt(z) + 1", "sqrt(z) + z + 0.1", "sqrt(z - 1) + 1", "sqrt(abs(z)) + 1"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_infinite_slope_is_no_root(kind, function, code, starts):
    f = either(kind, function, code)
    for solver in (Auto(max_iterations=300), Newton()):
        with np.errstate(all="ignore"):
            sol = root(f, np.array(starts)[:, None], solver=solver, on_failure="ignore")
        assert not sol.converged.any(), (solver, sol.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 5000])
@pytest.mark.parametrize("start", [-7.3, -1.5, 0.0, 3.0])
def test_leap_over_zero_is_no_root(kind, start, samples):
    f = either(kind, lambda z: np.floor(z.real) + z + 3, "z -> floor.(z) .+ z .+ 3")
    vectorized = {"vectorized": kind == "python"}
    solution = root(f, np.full((samples, 1), start), solver=Newton(), on_failure="ignore", **vectorized)
    z = solution.value[solution.converged]
    assert (np.abs(np.floor(z) + z + 3) < 1e-9).all()  # the number below -1 is one, where f is zero; -1 is not


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("function", "code", "start", "expected"),
    [
        (np.abs, "z -> abs.(z)", [3.0], [0.0]),
        (np.abs, "z -> abs.(z)", [-300.0], [0.0]),
        (lambda z: np.abs(z - 2), "z -> abs.(z .- 2)", [3.1], [2.0]),
        (
            lambda z: np.array([np.abs(z[0]), z[1] - 1 + z[0]]),
            "z -> [abs(z[1]), z[2] - 1 + z[1]]",
            [3.0, 7.0],
            [0.0, 1.0],
        ),
    ],
    ids=["near", "far", "away from zero", "one of two"],
)
def test_root_at_a_kink_where_the_slopes_cancel_is_found(kind, function, code, start, expected):
    for solver in (Auto(), Newton()):
        np.testing.assert_allclose(root(either(kind, function, code), start, solver=solver).value, expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("function", "code"),
    [(np.sign, "z -> sign.(z)"), (lambda z: np.floor(z.real) - 2 + 0 * z, "z -> floor.(z) .- 2 .+ 0 .* z")],
)
def test_steps_have_no_root_that_could_be_told_from_the_points_around(kind, function, code):
    assert not root(either(kind, function, code), [3.1], on_failure="ignore").converged.any()


@pytest.mark.parametrize("kind", KINDS)
def test_root_of_infinite_slope_is_found(kind):
    f = either(kind, lambda z: np.sqrt(z) - 1, "z -> sqrt.(z) .- 1")
    np.testing.assert_allclose(root(f, [[3.0], [0.2]]).value, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("tol", [1e-16, 1e-300])
def test_tolerance_that_no_number_can_reach_asks_for_the_nearest_root(kind, dtype, tol):
    f = either(kind, lambda z, a: z**2 - a, "(z, a) -> z .^ 2 .- a")
    a = np.arange(2, 40)[:, None].astype(dtype)
    for solver in (Newton(tol=tol), Auto(tol=tol)):
        sol = root(f, np.ones_like(a), args=(a,), batched="a", solver=solver)
        np.testing.assert_allclose(sol.value, np.sqrt(a), rtol=2 * np.finfo(dtype).eps)


@pytest.mark.parametrize("kind", KINDS)
def test_start_at_or_near_the_root_converges_at_once(kind):
    f = either(kind, lambda z, a: z**3 + z - a, "(z, a) -> z .^ 3 .+ z .- a")
    start = np.array([[1.0], [1 + 1e-15], [1 + 1e-12], [1 + 1e-9]])
    sol = root(f, start, args=(2.0,))
    np.testing.assert_allclose(sol.value, 1, rtol=1e-15)
    assert (sol.iterations <= 2).all()


FOLDS = {
    "parabola": (lambda z, a: z**2 - 2 * z + a, "(z, a) -> z .^ 2 .- 2 .* z .+ a", -1),
    "sine": (lambda z, a: np.sin(z) - a, "(z, a) -> sin.(z) .- a", -1),
    "exponential": (lambda z, a: np.exp(z) - z - a, "(z, a) -> exp.(z) .- z .- a", 1),
}
"""Functions with a double root at a = 1 in the sum of terms that are not small, and on which side of it there are roots."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("samples", [1, 5000])
@pytest.mark.filterwarnings("ignore:f has no trustworthy derivative:implicit_rnn.errors.DerivativeWarning")
def test_rounding_does_not_give_a_double_root_a_derivative(kind, fold, samples):
    f, code, side = FOLDS[fold]
    start = np.linspace(0.3, 2.5, samples)[:, None]

    def solve(distance):
        a = np.full((samples, 1), 1.0 + side * distance)
        return root(either(kind, f, code), start, args=(a,), batched="a", on_failure="ignore", **MANY[kind])

    with pytest.raises(irnn.ConvergenceError, match="singular at the solution"):
        solve(0).jacobian("a")
    slope = 2**-0.5 if fold != "parabola" else 0.5
    np.testing.assert_allclose(np.abs(solve(1e-8).jacobian("a")), slope * 1e4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 50, 5000])
def test_a_solution_at_a_guard_of_f_has_its_derivative(kind, samples):
    f = either(
        kind,
        lambda z, a: np.where(z == 0, 1.0, z / np.where(z == 0, 1.0, np.expm1(z))) - a,
        "(z, a) -> [z[1] == 0 ? 1.0 : z[1] / expm1(z[1])] .- a",
    )
    a = np.resize([[1.0], [0.75]], (samples, 1))
    solution = root(f, np.zeros((samples, 1)), args=(a,), batched="a", **MANY[kind])
    products = solution.vjp(np.ones((samples, 1)))["a"]
    np.testing.assert_allclose(products[::2], -2, rtol=1e-9)
    np.testing.assert_allclose(products, solution.jacobian("a")[:, 0], rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [3, 200])
def test_coupled_unknowns_at_a_guard_of_f_have_their_derivative(kind, n):
    f = either(
        kind,
        lambda z, a: (
            np.where(z == 0, 1.0, z / np.where(z == 0, 1.0, np.expm1(z))) + 0.1 * (np.roll(z, 1) + np.roll(z, -1)) - a
        ),
        "(z, a) -> [x == 0 ? one(x) : x / expm1(x) for x in z] .+ 0.1 .* (circshift(z, 1) .+ circshift(z, -1)) .- a",
    )
    np.testing.assert_allclose(root(f, np.zeros(n), args=(1.0,)).jacobian("a"), -1 / 0.3, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 50, 5000])
def test_rounding_of_constants_does_not_give_a_double_root_a_derivative(kind, samples):
    f = either(kind, lambda z, a: z**2 - 2 * z + 1 + a, "(z, a) -> z .^ 2 .- 2 .* z .+ 1 .+ a")
    many = MANY[kind]
    start = np.linspace(0.3, 2.5, samples)[:, None]
    with pytest.raises(irnn.ConvergenceError, match="singular at the solution"):
        root(f, start, args=(0.0,), on_failure="ignore", **many).jacobian("a")
    slope = root(f, start + 2, args=(-1e-12,), **many).jacobian("a")
    np.testing.assert_allclose(slope, -0.5e6, rtol=1e-2)


@pytest.mark.parametrize(
    ("kind", "samples"), [("python", 50), *(pytest.param("julia", n, marks=pytest.mark.julia) for n in (1, 5000))]
)
@pytest.mark.parametrize("start", [1e-9, 1e-6, 0.1, 1.0])
def test_double_root_at_zero_that_rounding_hides_has_no_derivative(kind, samples, start):
    f = either(kind, lambda z, a: np.exp(z) - z - 1 - a, "(z, a) -> exp.(z) .- z .- 1 .- a")
    Z = np.full((samples, 1), start)
    solution = root(f, Z, args=(0.0,), on_failure="ignore", **MANY[kind])
    if solution.converged.all():
        with pytest.raises(irnn.ConvergenceError, match="singular at the solution"):
            solution.jacobian("a")
    plain = root(f, Z, args=(1e-6,), on_failure="ignore", **MANY[kind])
    np.testing.assert_allclose(plain.jacobian("a")[:, 0, 0], 1 / np.expm1(plain.value[:, 0]), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 5000])
@pytest.mark.parametrize("start", [-0.5, 0.1, 3.0])
def test_root_at_zero_among_constants_has_its_derivative(kind, samples, start):
    for function, code in (
        (lambda z, a: np.exp(z) - 1 - a, "(z, a) -> exp.(z) .- 1 .- a"),
        (lambda z, a: np.log(1 + z) - a, "(z, a) -> log.(1 .+ z) .- a"),
    ):
        f = either(kind, function, code)
        solution = root(f, np.full((samples, 1), start), args=(0.0,), **MANY[kind])
        np.testing.assert_allclose(solution.jacobian("a"), 1, rtol=1e-6)


# --- memory, sizes and ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "arrange",
    [np.ascontiguousarray, np.asfortranarray, lambda A: np.repeat(A, 2, axis=1)[:, ::2], lambda A: A.T.copy().T],
)
def test_gradient_does_not_depend_on_the_order_of_an_argument_in_memory(kind, arrange):
    A = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    f = either(kind, lambda z, A: z - A @ np.array([1.0, 2.0]), "(z, A) -> z .- A * [1.0, 2.0]")
    gradient = root(f, np.zeros(3), args=(arrange(A),)).vjp([1.0, 0.0, 0.0])["A"]
    np.testing.assert_allclose(gradient, [[1, 2], [0, 0], [0, 0]])


def test_gradient_of_a_batched_argument_does_not_depend_on_its_order_in_memory():
    A = np.asfortranarray(np.arange(1.0, 13).reshape(2, 3, 2))
    solution = root(lambda z, A: z - A.sum(axis=1), np.zeros((2, 3)), args=(A,), batched="A")
    expected = np.zeros((2, 3, 2))
    expected[1, 2] = 1
    np.testing.assert_allclose(solution.vjp([[0.0, 0, 0], [0, 0, 1]])["A"], expected)


@pytest.mark.parametrize(("dtype", "a"), [(np.float64, 7.0), (np.float64, 10.0), (np.float32, 3.0)])
def test_complex_step_that_is_slightly_wrong_is_not_believed(dtype, a):
    def softplus(z, a):  # whose second term has no derivative by the complex step
        return np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z))) - a

    solution = root(softplus, np.array([a], dtype), args=(a,))
    rtol = 1e-4 if dtype == np.float32 else 1e-8
    np.testing.assert_allclose(solution.jacobian("a")[0], 1 + np.exp(-solution.value), rtol=rtol)


@pytest.mark.parametrize(
    ("activation", "slope", "dtype", "error"),
    [
        (lambda s: np.logaddexp(s, 0), lambda s: 1 / (1 + np.exp(-s)), np.float64, 5e-8),
        (np.abs, np.sign, np.float32, 3e-3),
    ],
)
def test_weights_of_all_sizes_have_derivatives_as_good_as_rounding_allows(activation, slope, dtype, error):
    rng = np.random.default_rng(1)
    R, x, v = (rng.standard_normal(shape).astype(dtype) for shape in ((20, 20), 20, 20))
    R *= dtype(0.4 / 20**0.5)
    solution = fixed_point(lambda z, R, x: activation(R @ z + x), np.zeros(20, dtype), args=(R, x))
    z = solution.value.astype(float)
    D = slope(R @ z + x)
    expected = np.outer(D * np.linalg.solve(np.eye(20) - R.T * D, v), z)
    assert np.abs(solution.vjp(v)["R"] - expected).max() < error * np.abs(expected).max()


def test_complex_step_that_is_wrong_for_one_small_condition_is_not_believed():
    def f(z, a):
        return np.array([1e5 * (z[0] - a[0]), abs(z[1]) * z[1] + z[1] - a[1]])

    np.testing.assert_allclose(root(f, [1.0, 1.0], args=([1.0, 6.0],)).jacobian("a"), np.diag([1, 0.2]), rtol=1e-6)


def test_complex_step_that_is_wrong_for_one_small_argument_is_not_believed():
    solution = root(lambda z, a: np.array([z[0] - a[0] - abs(a[1]) * a[1]]), [1.0], args=([1e4, 1.0],))
    np.testing.assert_allclose(solution.vjp([1.0])["a"], [1, 2], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("f", "start"),
    [
        (lambda z: np.exp(-z), 80.0),  # vanishes, with all its derivatives
        (lambda z: 1 / np.log(z + 2) - 1e-9, 1.0),  # beyond the largest number
        (lambda z: np.sqrt(z) + 1, 1.0),  # an infinite slope at zero
        (lambda z: z**0.25 + 1, 1.0),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_root_is_found_where_there_is_none(f, start, dtype):
    solution = root(f, dtype(start), on_failure="ignore")
    assert not solution.converged.any()
    assert np.isfinite(solution.value)


SATURATED = {
    "monod": (lambda z: z / (1 + z) - 1, "z -> z ./ (1 .+ z) .- 1"),
    "hill": (lambda z: z**2 / (1 + z**2) - 1, "z -> z .^ 2 ./ (1 .+ z .^ 2) .- 1"),
    "tanh": (lambda z: np.tanh(z) - 1, "z -> tanh.(z) .- 1"),
    "logistic": (lambda z: 1 / (1 + np.exp(-z)) - 1, "z -> 1 ./ (1 .+ exp.(-z)) .- 1"),
    "arctan": (lambda z: np.arctan(z) - np.pi / 2, "z -> atan.(z) .- pi / 2"),
    "two": (
        lambda z: np.stack([z[..., 0] / (1 + z[..., 0]) - 1, z[..., 1] - z[..., 0]], axis=-1),
        "z -> [z[1] / (1 + z[1]) - 1, z[2] - z[1]]",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SATURATED)
@pytest.mark.parametrize("samples", [1, 20])
def test_conditions_that_only_rounding_makes_zero_have_no_root(kind, name, samples):
    f, code = SATURATED[name]
    start = np.linspace(0.5, 2, samples)[:, None].repeat(2 if name == "two" else 1, axis=1)
    assert not root(either(kind, f, code), start, on_failure="ignore", **MANY[kind]).converged.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", FIXED_POINT_SOLVERS)
@pytest.mark.parametrize(
    ("f", "code"), [(lambda z: z + 1 / z, "z -> z .+ 1 ./ z"), (lambda z: z + np.exp(-z), "z -> z .+ exp.(-z)")]
)
@pytest.mark.parametrize(("start", "samples"), [(1.0, 1), (1e6, 1), (1.0, 5000)])
def test_residual_that_becomes_small_everywhere_makes_no_fixed_point(kind, solver, f, code, start, samples):
    z0 = np.full((samples, 1) if samples > 1 else 1, start)
    many = MANY[kind] if samples > 1 else {}
    sol = fixed_point(either(kind, f, code), z0, solver=solver, on_failure="ignore", **many)
    assert not sol.converged.any()


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_point_of_a_slope_of_nearly_one_is_found(kind):
    f = either(kind, lambda z: z + 1e-6 * (1 - z), "z -> z .+ 1e-6 .* (1 .- z)")
    for solver in (Auto(), Newton()):
        np.testing.assert_allclose(fixed_point(f, [5.0], solver=solver).value, 1, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("samples", [1, 20])
def test_root_that_one_long_step_leads_to_is_believed(kind, start, samples):
    kinked = either(kind, lambda z, a: np.maximum(z, z / 10) - a, "(z, a) -> max.(z, z ./ 10) .- a")
    a = np.linspace(-3, 3, samples)[:, None]
    sol = root(kinked, np.full((samples, 1), start), args=(a,), batched="a", **MANY[kind])
    np.testing.assert_allclose(sol.value, np.where(a > 0, a, 10 * a), rtol=1e-12)


def test_masked_value_of_f_is_none():
    assert root(lambda z: np.ma.log(z), [-1.0], on_failure="ignore").status == Status.NON_FINITE
    assert root(lambda z: np.ma.log(z) - 1, [2.0]).value == pytest.approx(np.e)


@pytest.mark.parametrize("n", [1, 2])
def test_f_that_returns_no_numbers_is_refused_by_name(n):
    with pytest.raises(TypeError, match="f returned an array of dtype bool; expected real numbers"):
        root(lambda z: z > 0, np.ones(n))
    with pytest.raises(TypeError, match="f returned what cannot be read as an array"):
        root(lambda z: [z[0], [1, 2]], np.ones(n))


@pytest.mark.parametrize("kind", KINDS)
def test_root_that_is_zero_to_rounding_has_its_derivative(kind):
    exponential = either(kind, lambda z, a: np.exp(z) - a, "(z, a) -> exp.(z) .- a")
    np.testing.assert_allclose(root(exponential, [1.0], args=(1.0,)).jacobian("a"), [[1]], rtol=1e-12)
    power = either(kind, lambda z, a: (1 + z) ** 10 - a, "(z, a) -> (1 .+ z) .^ 10 .- a")
    np.testing.assert_allclose(root(power, [1.0], args=(1.0,)).jacobian("a"), [[0.1]], rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("a", [1e-12, 1e-14, 1e-20])
def test_argument_that_is_small_beside_the_terms_has_its_derivative(kind, a):
    f = either(kind, lambda z, a: z - np.exp(a), "(z, a) -> z .- exp.(a)")
    np.testing.assert_allclose(root(f, [1.0], args=(a,)).jacobian("a"), [[1]], rtol=1e-9)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinite_argument_leaves_the_others_their_derivatives():
    solution = root(lambda z, a, b: np.minimum(z - a, b), [0.5], args=(1.0, np.inf))
    with pytest.warns(DerivativeWarning, match="with respect to b"):
        np.testing.assert_array_equal(solution.vjp([1.0])["a"], 1)


@pytest.mark.parametrize("small", [1e-3, 1e-30, 1e-200])
def test_arguments_of_any_two_sizes_have_their_derivatives(small):
    solution = root(lambda z, a: z - a * np.array([1, 1 / small]), [1.0, 1.0], args=([1 / small, small],))
    np.testing.assert_allclose(solution.vjp([1.0, 1.0])["a"], [1, 1 / small])


# --- Python functions that drop imaginary parts, or whose changes rounding hides -----------------------------------


def occupied_density(density: np.ndarray, coupling: np.ndarray) -> np.ndarray:
    """That of the three lowest states in the field of the density itself, less the density."""
    chain = np.diag(np.linspace(0, 3, 6)) - np.eye(6, k=1) - np.eye(6, k=-1)
    return (np.linalg.eigh(chain + coupling * np.diag(density))[1][:, :3] ** 2).sum(axis=1) - density


@pytest.mark.parametrize(
    ("f", "z0", "a"),
    [
        (lambda z, a: z - 0.5 * np.cos(a * np.abs(z)), [0.5], 1.0),
        (lambda z, a: 3 * z + 0.1 * np.tanh(a * np.linalg.norm(z)) - 2, [0.5], 1.0),
        (lambda z, a: z + 1e-3 * np.cos(a * z.real) - 0.3, [0.5], 2.0),
        (occupied_density, np.full(6, 0.5), 2.0),
    ],
)
def test_functions_that_drop_imaginary_parts_beside_others_have_right_derivatives(f, z0, a):
    solution = irnn.root(f, z0, args=(a,))
    assert solution.iterations[0] < 12
    ends = [irnn.root(f, solution.value, args=(a + step,)).value for step in (1e-5, -1e-5)]
    np.testing.assert_allclose(solution.jacobian(0)[:, 0], (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-9)


def test_hooks_of_functions_that_drop_imaginary_parts_are_judged_by_values():
    def f(z, a):
        return z - 0.5 * np.cos(a * np.abs(z))

    def right(z, a):
        return np.diag(1 + 0.5 * a * np.sin(a * np.abs(z)) * np.sign(z))

    product = irnn.root(f, [0.5], args=(1.0,), jac=right).vjp([1.0])["a"]
    assert product == pytest.approx(-0.0804428, rel=1e-5)
    with pytest.raises(ValueError, match="jac contradicts f"):
        irnn.root(f, [0.5], args=(1.0,), jac=lambda z, a: np.eye(1)).vjp([1.0])


@pytest.mark.parametrize("start", [0.2, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("f", [lambda z: math.exp(z) - 1, lambda z: math.erf(z - 1) + math.erf(1)])
def test_roots_at_zero_of_functions_of_real_numbers_are_found(f, start):
    assert irnn.root(f, start).value == pytest.approx(0, abs=1e-12)


def test_solutions_at_zero_of_functions_of_real_numbers_have_derivatives():
    solution = irnn.fixed_point(lambda z, a: 0.5 * math.sin(z + a) - 0.5 * math.sin(1), 0.5, args=(1.0,))
    slope = 0.5 * math.cos(1)
    assert solution.vjp(1.0)["a"] == pytest.approx(slope / (1 - slope), rel=1e-6)


@pytest.mark.parametrize("a", [9.0, 12.0, 13.5, 15.0, 17.0, 19.0, 25.0])
@pytest.mark.parametrize(
    ("f", "slope"),
    [(np.tanh, lambda a: np.cosh(a) ** -2), (lambda a: 1 / (1 + np.exp(-2 * a)), lambda a: 2 * np.exp(-2 * a))],
)
def test_derivatives_of_saturated_functions_are_not_lost(f, slope, a):
    assert irnn.root(lambda z, a: f(a) - z, [0.5], args=(a,)).vjp([1.0])["a"] == pytest.approx(slope(a), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [3, 5, 8, 9])
def test_averages_of_neighbours_go_where_iteration_goes_if_anywhere(kind, nodes):
    lateral = np.eye(nodes, k=1) + np.eye(nodes, k=-1)
    W, start = np.eye(nodes) - 0.3 * (np.diag(lateral.sum(axis=0)) - lateral), np.arange(nodes) ** 2.0
    solution = fixed_point(either(kind, lambda z, W: W @ z, "(z, W) -> W * z"), start, args=(W,), on_failure="ignore")
    assert solution.converged[0] or nodes > 5
    if solution.converged[0]:
        np.testing.assert_allclose(solution.value, start.mean(), rtol=1e-6)

"""Fixed points and roots of any function, and their derivatives."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import joblib
import numpy as np
import pytest
import scipy.sparse

import implicit_rnn as irnn
from implicit_rnn import (
    Anderson,
    Auto,
    ConvergenceError,
    EngineError,
    Newton,
    NLsolve,
    Picard,
    Status,
    fixed_point,
    root,
)


def _power(z: Any, a: Any, k: Any) -> Any:  # one that can be pickled
    return z**k - a


# Every problem once as Julia code and once as a Python function.
FUNCTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "cosine": ("(z, a) -> cos.(a .* z)", lambda z, a: np.cos(a * z)),
    "net": ("(z, R, x) -> tanh.(R * z .+ x)", lambda z, R, x: np.tanh(R @ z + x)),
    "power": ("(z, a, k) -> z .^ k .- a", _power),
    "linear": ("(z, a, b) -> a .* z .+ b", lambda z, a, b: a * z + b),
    "poised": ("z -> tanh.(1.5 .* z .+ 0.05)", lambda z: np.tanh(1.5 * z + 0.05)),
    "magnet": ("(z, b, h) -> tanh.(b .* (z .+ h))", lambda z, b, h: np.tanh(b * (z + h))),
    "poised root": ("z -> tanh.(1.5 .* z .+ 0.05) .- z", lambda z: np.tanh(1.5 * z + 0.05) - z),
    "no root": ("(z, a) -> z .^ 2 .+ a", lambda z, a: z**2 + a),
    "tensor": ("(z, A, T) -> (T[1, 3, 2] .* A) * z .+ T[2, 1, 2]", lambda z, A, T: (T[0, 2, 1] * A) @ z + T[1, 0, 1]),
    "log": ("(z, a) -> log.(z) .- a", lambda z, a: np.log(z) - a),
}


@pytest.fixture(params=["python", pytest.param("julia", marks=pytest.mark.julia)])
def given(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """The functions above as Python functions, and as Julia code."""

    def f(name: str) -> Any:
        text, function = FUNCTIONS[name]
        return irnn.julia(text) if request.param == "julia" else function

    return f


# --- solutions -----------------------------------------------------------------------------------------------


def test_the_example_of_the_docs(given):
    sol = fixed_point(given("cosine"), [0.5], args=(0.8,), solver=Anderson())
    z = sol.value[0]
    assert z == pytest.approx(np.cos(0.8 * z), abs=1e-10)
    slope = -z * np.sin(0.8 * z) / (1 + 0.8 * np.sin(0.8 * z))
    assert sol.vjp([1.0])["a"] == pytest.approx(slope, abs=1e-9)
    assert sol.jacobian("a") == pytest.approx(np.array([[slope]]), abs=1e-9)


@pytest.mark.parametrize("solver", [Auto(), Picard(), Picard(damping=0.5), Anderson(), Newton()], ids=str)
def test_every_solver_finds_the_same_fixed_point(given, solver, rng):
    R, x = 0.2 * rng.standard_normal((4, 4)), rng.standard_normal((7, 4))
    sol = fixed_point(given("net"), np.zeros((7, 4)), args=(R, x), batched="x", solver=solver)
    np.testing.assert_allclose(sol.value, np.tanh(sol.value @ R.T + x), atol=1e-9)
    assert sol.converged.all()
    assert (sol.residual <= 1e-10).all()
    assert (sol.iterations >= 1).all()


@pytest.mark.parametrize("solver", [Auto(), Newton()], ids=str)
def test_every_solver_finds_the_same_root(given, solver):
    sol = root(given("power"), np.ones((3, 1)), args=([2.0, 3.0, 4.0], 2), batched=["a"], solver=solver)
    np.testing.assert_allclose(sol.value[:, 0], np.sqrt([2, 3, 4]), rtol=1e-12)


@pytest.mark.julia
@pytest.mark.parametrize("method", ["trust_region", "newton", "anderson"])
def test_nlsolve_solves_julia_code(method):
    sol = fixed_point(irnn.julia(FUNCTIONS["cosine"][0]), [[0.5], [0.1]], args=(0.8,), solver=NLsolve(method))
    np.testing.assert_allclose(sol.value, np.cos(0.8 * sol.value), atol=1e-10)


def test_large_values_are_not_taken_for_divergence(given):
    sol = fixed_point(given("linear"), [0.0, 1.0], args=(0.5, 1e9))
    np.testing.assert_allclose(sol.value, 2e9)


def test_matrices_have_the_same_indices_in_both_languages(given, rng):
    A, T = 0.2 * rng.standard_normal((5, 2, 2)), rng.standard_normal((2, 3, 2))
    sol = fixed_point(given("tensor"), np.zeros((5, 2)), args=(A, T), batched=("A",))
    expected = [np.linalg.solve(np.eye(2) - T[0, 2, 1] * a, np.full(2, T[1, 0, 1])) for a in A]
    np.testing.assert_allclose(sol.value, expected, atol=1e-8)


def test_argument_that_is_not_finite_is_where_the_error_says_to_look():
    with pytest.raises(irnn.ConvergenceError, match=r"1 non_finite.*check that args and f.z0. are finite"):
        fixed_point(lambda z, a: np.cos(a * z), [0.5], args=(np.nan,))


@pytest.mark.parametrize("order", ["<", ">"])
def test_float32_stays_float32(given, order):
    sol = fixed_point(given("cosine"), np.array([0.5], f"{order}f4"), args=(0.8,))
    assert sol.value.dtype == sol.vjp([1.0])["a"].dtype == np.float32
    assert sol.vjp([1.0])["a"] == pytest.approx(-0.324205, rel=1e-3)


def test_a_single_problem_and_a_batch_of_one_agree(given):
    one, batch = (fixed_point(given("cosine"), z0, args=(0.8,)) for z0 in ([0.5, 0.2], [[0.5, 0.2]]))
    assert one.value.shape == (2,)
    np.testing.assert_array_equal(one.value, batch.value[0])
    np.testing.assert_array_equal(one.jacobian("a"), batch.jacobian("a")[0])


def test_vectorized_functions_see_many_samples_at_once(rng):
    shapes = []

    def f(z, a):
        shapes.append(z.shape)
        return np.cos(a[:, None] * z)

    a = rng.uniform(0.1, 0.9, 50)
    sol = fixed_point(f, np.zeros((50, 2)), args=(a,), batched="a", vectorized=True)
    assert max(shapes) == (50, 2)
    slow = fixed_point(FUNCTIONS["cosine"][1], np.zeros((50, 2)), args=(a,), batched="a")
    np.testing.assert_array_equal(sol.value, slow.value)
    v = rng.standard_normal((50, 2))
    np.testing.assert_allclose(sol.vjp(v)["a"], slow.vjp(v)["a"], rtol=1e-12)


def test_python_functions_need_no_julia(monkeypatch):
    monkeypatch.setattr("implicit_rnn.engines.julia.calls.call", None)
    for engine in ("numpy", "julia", "auto"):
        assert fixed_point(np.cos, [0.5], engine=engine).converged.all()


# --- reports -------------------------------------------------------------------------------------------------


def test_a_nan_sample_harms_nobody_else(given):
    a = np.array([0.1, 0.5, np.nan, 0.7])
    sol = fixed_point(given("cosine"), np.zeros((4, 1)), args=(a,), batched="a", on_failure="ignore")
    np.testing.assert_array_equal(sol.status, [0, 0, Status.NON_FINITE, 0])
    alone = fixed_point(given("cosine"), np.zeros((3, 1)), args=(a[[0, 1, 3]],), batched="a")
    np.testing.assert_array_equal(sol.value[[0, 1, 3]], alone.value)


def test_a_diverging_sample_harms_nobody_else(given):
    a = np.array([0.5, 3.0, -0.2])
    sol = fixed_point(
        given("linear"), np.zeros((3, 1)), args=(a, 1.0), batched="a", solver="picard", on_failure="ignore"
    )
    np.testing.assert_array_equal(sol.status, [0, Status.DIVERGED, 0])
    np.testing.assert_allclose(sol.value[[0, 2], 0], 1 / (1 - a[[0, 2]]))


def test_a_singular_sample_harms_nobody_else(given):
    start = np.array([[1.0], [0.0], [3.0]])  # at 0 the slope of z² - 2 is zero
    sol = root(given("power"), start, args=(2.0, 2), solver=Newton(), on_failure="ignore")
    assert sol.status[1] == Status.SINGULAR
    np.testing.assert_array_equal(sol.converged, [True, False, True])
    np.testing.assert_allclose(sol.value[[0, 2], 0], np.sqrt(2))


def test_overflow_is_not_convergence(given):
    sol = fixed_point(given("linear"), [1.0], args=(1e200, 0.0), solver="picard", on_failure="ignore")
    assert sol.status[0] in (Status.NON_FINITE, Status.DIVERGED)


@pytest.mark.parametrize("samples", [1, 2, 40, 300])
def test_a_result_does_not_depend_on_batch_mates(given, samples, rng):
    R, x = 0.2 * rng.standard_normal((3, 3)), rng.standard_normal((300, 3))
    all_of_them = fixed_point(given("net"), np.zeros((300, 3)), args=(R, x), batched="x")
    some = fixed_point(given("net"), np.zeros((samples, 3)), args=(R, x[:samples]), batched="x")
    np.testing.assert_array_equal(some.value, all_of_them.value[:samples])
    np.testing.assert_array_equal(some.iterations, all_of_them.iterations[:samples])


@pytest.mark.parametrize("field", [-0.139, -0.145, -0.16, -0.17])
def test_a_fixed_point_is_found_where_two_others_have_just_vanished(given, field):
    magnetisation = fixed_point(given("magnet"), [0.6], args=(1.5, field)).value
    np.testing.assert_allclose(np.tanh(1.5 * (magnetisation + field)), magnetisation, atol=1e-9)


def test_a_start_near_a_repelling_fixed_point_leads_away_from_it(given):
    fields = np.array([[1e-3], [-1e-4]])
    magnetisation = fixed_point(given("magnet"), np.zeros((2, 1)), args=(1.5, fields), batched=1).value
    assert (magnetisation * fields > 0).all()
    np.testing.assert_allclose(np.tanh(1.5 * (magnetisation + fields)), magnetisation, atol=1e-9)


def test_the_residual_of_a_fixed_point_at_zero_is_zero(given):
    assert fixed_point(given("linear"), [0.0], args=(0.5, 0.0)).residual == 0
    assert (fixed_point(given("linear"), np.zeros((3, 1)), args=(0.5, 0.0)).residual == 0).all()


def test_a_warning_names_the_line_of_the_user():
    at_a_kink = root(lambda z, a: np.maximum(z, a) + z - 2 * a, [1.0], args=(1.0,))
    with pytest.warns(irnn.errors.DerivativeWarning) as caught:
        at_a_kink.jacobian("a")
    assert {each.filename for each in caught} == {__file__}


def test_a_repelling_fixed_point_is_reported(given):
    with pytest.raises(ConvergenceError, match=r"1 unstable.*irnn\.root") as caught:
        fixed_point(given("poised"), [0.0], solver=Newton())
    assert caught.value.solution.status[0] == Status.UNSTABLE
    assert fixed_point(given("poised"), [0.0]).value[0] > 0.5
    assert -0.5 < root(given("poised root"), [0.0]).value[0] < 0


def test_what_does_not_converge_raises(given):
    with pytest.raises(
        ConvergenceError, match=r"1 of 2 samples did not converge \(1 (singular|max_iterations).*first sample 1"
    ) as caught:
        root(given("no root"), [[0.5], [0.5]], args=([-1.0, 1.0],), batched="a")
    np.testing.assert_allclose(caught.value.solution.value[0], 1)


def test_a_root_whose_step_is_the_rounding_of_large_terms_is_told_of_tol_and_scale():
    def worth(rate):  # an internal rate of return of 7e-7 on a million
        return -1e6 + 5e5 / (1 + rate) + 5e5 / (1 + rate) ** 2 + 1 / (1 + rate) ** 3

    with pytest.raises(ConvergenceError, match=r"1 singular.*a larger tol or scale= where z is small"):
        root(worth, [0.1])
    for found in (root(worth, [0.1], scale=1), root(worth, [0.1], solver=Auto(tol=1e-8))):
        assert found.value[0] == pytest.approx(1 / 1.5e6, rel=1e-5)


def test_many_samples_one_by_one_in_python_are_told_of_quicker_ways(monkeypatch):
    monkeypatch.setattr("implicit_rnn.equations.solving.LONG", 0.0)
    a = np.array([[1.0], [2.0]])
    with pytest.warns(UserWarning, match=r"2 samples took .* vectorized=True, .* irnn\.julia"):
        root(lambda z, a: z**2 - a, np.ones((2, 1)), args=(a,), batched="a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root(lambda z, a: z**2 - a, np.ones((2, 1)), args=(a,), batched="a", vectorized=True)
        root(lambda z, a: z**2 - a, [1.0], args=(2.0,))


def test_what_does_not_converge_warns_if_asked_to(given):
    with pytest.warns(irnn.ConvergenceWarning, match="did not converge"):
        fixed_point(given("cosine"), [0.5], args=(0.9,), solver=Picard(max_iterations=3), on_failure="warn")


def test_leaving_the_domain_of_f_is_no_end(given):
    assert root(given("log"), [9.0], args=(0.0,)).value[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("f", "start", "solution"),
    [
        (lambda z: math.log(z), 9.0, 1.0),
        (lambda z: [math.sqrt(z[0]) - 0.1], [4.0], [0.01]),
        (lambda z: math.exp(z) - 2, -8.0, math.log(2)),
        (lambda z: [math.acos(z[0]) - 0.1, z[1] - z[0]], [0.0, 0.0], [math.cos(0.1)] * 2),
        (lambda z: z - 1 / (0.0 if z == 2 else 1.0), 4.0, 1.0),
    ],
    ids=["log", "sqrt", "exp", "acos", "division"],
)
def test_leaving_the_domain_of_functions_of_math_is_no_end(f, start, solution):
    np.testing.assert_allclose(root(f, start, engine="numpy").value, solution, rtol=1e-8)


@pytest.mark.parametrize(
    ("f", "error"),
    [
        (lambda z: math.log(-1 - z * z), ValueError),  # nowhere
        (lambda z: float(z) / 0, ZeroDivisionError),
        (lambda z: z if z == 9 else int("three"), ValueError),
        (lambda z: 2 + z if z == 9 else [1.0, 2.0], ValueError),
    ],
)
def test_other_errors_of_f_are_raised(f, error):
    with pytest.raises(error):
        root(f, 9.0, engine="numpy")


# --- derivatives ---------------------------------------------------------------------------------------------

PROBLEMS = {
    "cosine": (fixed_point, (3,), lambda rng, B: (rng.uniform(0.2, 0.8, (B, 3)),), ("a",)),
    "net": (fixed_point, (4,), lambda rng, B: (0.3 * rng.standard_normal((4, 4)), rng.standard_normal((B, 4))), ("x",)),
    "power": (root, (2,), lambda rng, B: (rng.uniform(1, 3, B), 3), ("a",)),
    "linear": (fixed_point, (2,), lambda rng, B: (rng.uniform(-0.5, 0.5, B), rng.standard_normal(2)), (0,)),
    "tensor": (
        fixed_point,
        (2,),
        lambda rng, B: (0.2 * rng.standard_normal((B, 2, 2)), rng.standard_normal((2, 3, 2))),
        "A",
    ),
}


@pytest.mark.parametrize("samples", [2, 40], ids=["small", "large"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives_agree_with_finite_differences(given, name, samples, rng):
    solve, shape, make, batched = PROBLEMS[name]
    f, z0, args = given(name), np.ones((samples, *shape)), make(rng, samples)
    settings = {"batched": batched, "solver": (Picard if solve is fixed_point else Newton)(tol=1e-14)}
    sol = solve(f, z0, args=args, **settings)
    v = rng.standard_normal(z0.shape)
    gradients = sol.vjp(v)
    for index, argument in enumerate(args):
        if np.asarray(argument).dtype.kind != "f":
            continue
        key = sol.names[index]
        direction = rng.standard_normal(np.shape(argument))

        def loss(t, index=index, argument=argument, direction=direction):
            moved = [*args[:index], argument + t * direction, *args[index + 1 :]]
            return np.sum(v * solve(f, z0, args=moved, **settings).value)

        h = 1e-3
        slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
        assert gradients[key].shape == np.shape(argument)
        assert np.sum(gradients[key] * direction) == pytest.approx(slope, rel=1e-7, abs=1e-7)
        # The Jacobian holds the same numbers.
        J = sol.jacobian(key)
        assert J.shape == (samples, *shape, sol.equation.entries(index))
        products = np.einsum("bi,bik->bk", v, J)
        flat = gradients[key].reshape(samples, -1) if sol.equation.batched[index] else gradients[key].reshape(1, -1)
        np.testing.assert_allclose(
            products if len(flat) > 1 else products.sum(0, keepdims=True), flat, rtol=1e-8, atol=1e-10
        )


@pytest.mark.julia
@pytest.mark.parametrize("name", PROBLEMS)
def test_julia_and_python_agree(name, rng):
    solve, shape, make, batched = PROBLEMS[name]
    text, function = FUNCTIONS[name]
    args = make(rng, 30)
    settings = {"batched": batched, "solver": Newton(tol=1e-13), "args": args}
    a, b = (solve(f, np.ones((30, *shape)), **settings) for f in (irnn.julia(text), function))
    v = rng.standard_normal((30, *shape))
    np.testing.assert_allclose(a.value, b.value, rtol=1e-11, atol=1e-11)
    for key, gradient in a.vjp(v).items():
        np.testing.assert_allclose(gradient, b.vjp(v)[key], rtol=1e-8, atol=1e-9)


def test_complex_steps_are_used_where_they_are_right():
    sol = fixed_point(lambda z, a: np.cos(a * z), [0.5], args=(0.8,), solver=Newton(tol=1e-15))
    z = sol.value[0]
    exact = -z * np.sin(0.8 * z) / (1 + 0.8 * np.sin(0.8 * z))
    assert sol.vjp([1.0])["a"] == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize(
    "absolute",
    [
        lambda z, a: 1 - 0.5 * np.abs(a * z),  # real for complex input
        lambda z, a: 1 - 0.5 * np.array([abs(float(x)) for x in a * z]),  # raises for complex input
        lambda z, a: 1 - 0.5 * np.sqrt((a * z) * np.conj(a * z)),  # complex, but not analytic
    ],
)
def test_finite_differences_where_complex_steps_are_wrong(absolute):
    sol = fixed_point(absolute, [0.5], args=(0.8,))
    assert sol.value[0] == pytest.approx(1 / 1.4)
    assert sol.vjp([1.0])["a"] == pytest.approx(-0.5 / 1.4**2, rel=1e-8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
@pytest.mark.parametrize("start", [[1.0], [1.0, 2.0], [[1.0, 2.0]]], ids=str)
def test_f_and_jac_may_return_numbers_of_another_precision(dtype, start):
    f, jac = (lambda z: (z * z - 2).astype(dtype)), (lambda z: np.diag(2 * z).astype(dtype))
    for hooks in ({}, {"jac": jac}):
        sol = root(f, start, solver=Newton(tol=1e-3), **hooks)
        assert sol.value.dtype == np.float64
        np.testing.assert_allclose(sol.value, 2**0.5, rtol=1e-3)


def test_no_derivative_at_a_double_root(given):
    exact, near = root(given("power"), [0.0], args=(0.0, 2)), root(given("power"), [1.0], args=(0.0, 2))
    assert exact.value[0] == near.value[0] == 0
    for sol in (exact, near):
        with pytest.raises(ConvergenceError, match="singular at the solution"):
            sol.vjp([1.0])
        with pytest.raises(ConvergenceError, match="singular at the solution"):
            sol.jacobian("a")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("form", ["python", "vectorized", pytest.param("julia", marks=pytest.mark.julia)])
def test_an_argument_of_the_samples_that_was_not_named_in_batched_is_suggested(form, n):
    f = irnn.julia("(z, a, b) -> z.^2 .- a .* b") if form == "julia" else lambda z, a, b: z**2 - a * b
    of_samples, shared = np.arange(1.0, 4 * n + 1).reshape(4, n), np.ones(1)
    for b, named in ((shared, "a"), (of_samples, "a and b")):
        message = f"If the 4 rows of {named} belong to the samples, as those of z0 do, name {named} in batched$"
        with pytest.raises((ValueError, irnn.EngineError), match=message):
            root(f, np.ones((4, n)), args=(of_samples, b), vectorized=form == "vectorized")
    with pytest.raises((ValueError, irnn.EngineError), match=r"(?s)^((?!batched$).)*$"):
        root(f, np.ones(n), args=(of_samples, shared))  # one problem


@pytest.mark.parametrize("n", [1, 12])
def test_one_error_names_all_singular_samples_or_the_first_of_many(given, n):
    for samples, named in ((7, "samples 1, 4, or"), (66, "samples 1, 4, 7, .*, 58, …")):
        a = np.where(np.arange(samples) % 3 == 1, 0.0, 1.0)[:, None]
        sol = root(given("power"), np.repeat(a, n, axis=1), args=(a, 2), batched="a")  # from the solutions
        for differentiate in (lambda sol=sol: sol.vjp(np.ones_like(sol.value)), lambda sol=sol: sol.jacobian("a")):
            with pytest.raises(ConvergenceError, match=f"at the solution of {named}"):
                differentiate()


def test_one_error_names_the_singular_samples_of_many_unknowns():
    def slopes(z, a):
        return scipy.sparse.diags(2 * z)

    sol = root(
        lambda z, a: z**2 - a,
        np.tile([[1.0], [0.0], [0.0]], 600),
        args=([[1.0], [0.0], [0.0]],),
        batched="a",
        jac=slopes,
    )
    for differentiate in (lambda: sol.vjp(np.ones_like(sol.value)), lambda: sol.jacobian("a")):
        with pytest.raises(ConvergenceError, match="at the solution of samples 1, 2, or"):
            differentiate()


def test_the_singular_sample_is_named(given):
    sol = root(given("power"), np.ones((60, 1)), args=(np.r_[np.ones(59), 0.0], 2), batched="a")
    v = np.ones((60, 1))
    with pytest.raises(ConvergenceError, match="sample 59"):
        sol.vjp(v)
    v[59] = 0
    np.testing.assert_allclose(sol.vjp(v)["a"][:59], 0.5)


def test_unconverged_samples_have_no_derivative(given):
    sol = root(given("no root"), [[0.5], [0.5]], args=([-1.0, 1.0],), batched="a", on_failure="ignore")
    with pytest.raises(ConvergenceError, match=r"1 of 2 samples did not converge \(first sample 1.*v must be zero"):
        sol.vjp([[1.0], [1.0]])
    np.testing.assert_allclose(sol.vjp([[1.0], [0.0]])["a"], [-0.5, 0])
    np.testing.assert_allclose(sol.jacobian("a"), [[[-0.5]], [[np.nan]]])
    single = root(given("no root"), [0.5], args=(1.0,), on_failure="ignore")
    with pytest.raises(ConvergenceError, match="have no derivative"):
        single.jacobian("a")


def test_only_floats_have_derivatives(given):
    sol = root(given("power"), [1.0], args=(2.0, 2))
    assert list(sol.vjp([1.0])) == ["a"]
    with pytest.raises(TypeError, match=r"k is an argument of int64.*pass it as floats"):
        sol.jacobian("k")


def test_the_arguments_of_a_solution_are_its_own(given):
    a = np.array([0.8])
    sol = fixed_point(given("cosine"), [0.5], args=(a,))
    before = sol.vjp([1.0])["a"]
    a[0] = 0.1
    np.testing.assert_array_equal(sol.vjp([1.0])["a"], before)


@pytest.mark.parametrize("again", [lambda s: s, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_solution_cannot_be_written_to_as_its_derivatives_are_taken_at_it(given, again):
    solution = again(irnn.root(given("power"), [[1.0], [2.0]], args=(2.0, 2)))
    expected = solution.vjp([[1.0], [1.0]])["a"]
    for array in (solution.value, solution.state):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 5.0
    copied = solution.value.copy()
    copied *= 2
    np.testing.assert_array_equal(solution.vjp([[1.0], [1.0]])["a"], expected)


def test_a_solution_that_joblib_has_left_in_a_file_is_differentiated_as_before(given, tmp_path):
    solution = irnn.root(given("power"), np.ones((20, 1)), args=(np.linspace(1, 2, 20)[:, None], 2), batched="a")
    joblib.dump(solution, tmp_path / "solution")
    again = joblib.load(tmp_path / "solution", mmap_mode="r")
    v = np.ones((20, 1))
    np.testing.assert_array_equal(again.vjp(v)["a"], solution.vjp(v)["a"])
    np.testing.assert_array_equal(again.jacobian("a"), solution.jacobian("a"))


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "batched"])
def test_a_function_may_write_to_its_state_and_not_to_its_arguments(samples, own, vectorized):
    def to_state(z, a):
        z *= a
        return np.cos(z)

    def to_argument(z, a):
        a *= 0.5
        return np.cos(a * z)

    args = (np.full((samples, 1) if own else (1,), 0.8),)
    pose = {"z0": np.full((samples, 1), 0.5), "args": args, "vectorized": vectorized, "batched": "a" if own else ()}
    np.testing.assert_allclose(fixed_point(to_state, **pose).value, 0.801418, atol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        fixed_point(to_argument, **pose)


def test_threads_that_differentiate_one_solution_take_turns(given):
    a = np.linspace(0.2, 0.8, 10)[:, None]

    def differentiate(solution):
        return [*solution.vjp(np.ones((10, 1))).values(), solution.jacobian("a")]

    def solve():
        return fixed_point(given("cosine"), np.zeros((10, 1)), args=(a,), batched="a")

    expected, interval = differentiate(solve()), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(100):
                for found in pool.map(differentiate, [solve()] * 4):
                    np.testing.assert_array_equal(found[0], expected[0])
                    np.testing.assert_array_equal(found[1], expected[1])
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.julia
def test_julia_keeps_no_array():
    text, function = FUNCTIONS["cosine"]
    sols = [
        fixed_point(f, np.zeros((3, 1)), args=(np.full(3, 0.8),), batched="a") for f in (irnn.julia(text), function)
    ]
    counts = [[sys.getrefcount(x) for x in (*sol.vjp(np.ones((3, 1))).values(), sol.status, sol.state)] for sol in sols]
    assert counts[0] == counts[1]


@pytest.mark.julia
def test_keplers_equation_for_many_samples(rng):
    M = rng.uniform(0, 6, 100_000)
    kepler = irnn.julia("(E, M, e) -> M .+ e .* sin.(E)")
    sol = fixed_point(kepler, M[:, None], args=(M, 0.3), batched="M")
    E = sol.value[:, 0]
    np.testing.assert_allclose(E - 0.3 * np.sin(E), M, atol=1e-8)
    gradient = sol.vjp(np.ones((len(M), 1)))
    np.testing.assert_allclose(gradient["M"], 1 / (1 - 0.3 * np.cos(E)), rtol=1e-12)
    assert gradient["e"] == pytest.approx(np.sum(np.sin(E) / (1 - 0.3 * np.cos(E))), rel=1e-10)


# --- Julia code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("(z, a) -> a .* z", ("a",)),
        ("z -> z", ()),
        (" ( z ) -> z", ()),
        ("(z, A::AbstractMatrix, β) -> A * z .+ β", ("A", "β")),
        ("function (z, a, b)\n    w = a .* z\n    return w .+ b\nend", ("a", "b")),
    ],
)
def test_the_names_of_the_arguments_are_read_from_the_code(text, names):
    assert irnn.julia(text).arguments == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cos.(z)", "is not of the form"),
        ("", "is not of the form"),
        ("f(z) = cos.(z)", "is not of the form"),
        ("() -> 1", "has no parameters"),
        ("(z, a...) -> z", r"the parameter 'a\.\.\.'; expected plain names"),
        ("(z, a=1) -> z", "the parameter 'a=1'"),
        ("(z; a) -> z", "the parameter 'z; a'"),
        ("(z, z) -> z", "names a parameter twice"),
    ],
)
def test_code_of_another_form_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        irnn.julia(text)


def test_code_is_a_string():
    with pytest.raises(TypeError, match="expected Julia code as a string"):
        irnn.julia(np.cos)


def test_code_is_a_frozen_value():
    assert irnn.julia("z -> z") == irnn.julia("z -> z")
    with pytest.raises(dataclasses.FrozenInstanceError):
        irnn.julia("z -> z").text = "z -> 2z"


@pytest.mark.julia
def test_a_syntax_error_is_told_in_one_line():
    with pytest.raises(ValueError, match=r"cannot be parsed: Expected `\)`$"):
        fixed_point(irnn.julia("(z, a) -> cos.(a .* z"), [0.5], args=(0.8,))


@pytest.mark.julia
def test_an_error_of_the_code_is_told_by_its_first_line():
    with pytest.raises(EngineError, match="UndefVarError: `foo` not defined") as caught:
        fixed_point(irnn.julia("z -> foo(z)"), [0.5])
    assert "\n" not in str(caught.value)
    assert "Stacktrace" in caught.value.julia_traceback


@pytest.mark.julia
def test_linear_algebra_is_at_hand():
    assert fixed_point(irnn.julia("z -> z ./ (1 + norm(z)) .+ 1"), [0.5, 0.5]).converged.all()


def test_julia_code_needs_the_julia_engine(monkeypatch):
    f = irnn.julia("z -> z ./ 2")
    with pytest.raises(EngineError, match="Julia code runs on the Julia engine only"):
        fixed_point(f, [0.5], engine="numpy")
    monkeypatch.setenv("IMPLICIT_RNN_ENGINE", "numpy")
    with pytest.raises(EngineError, match="IMPLICIT_RNN_ENGINE"):
        root(f, [0.5])


# --- bad input -----------------------------------------------------------------------------------------------


def test_an_exception_of_a_python_function_is_passed_on():
    class MineError(Exception):
        pass

    def f(z):
        raise MineError("as it is")

    with pytest.raises(MineError, match=r"^as it is$"):
        fixed_point(f, [0.5])


@pytest.mark.parametrize("value", [[1.0, 2.0], [[1.0]]], ids=str)
def test_a_wrong_shape_from_python_is_refused(value):
    with pytest.raises(ValueError, match=r"f returned an array of shape \(.*\); expected \(1,\), the shape of z"):
        fixed_point(lambda z: np.array(value), [0.5])


@pytest.mark.parametrize("solver", ["auto", "picard", "anderson", "newton"])
def test_a_function_is_given_the_precision_of_the_start(solver):
    given = set()

    def f(z, a):
        given.add(z.dtype.name)
        return np.tanh(a * z + np.float32(0.1))

    solution = fixed_point(f, np.zeros((5, 3), np.float32), args=(0.9,), vectorized=True, solver=solver)
    assert given <= {"float32", "complex128"}  # the second for derivatives
    assert solution.value.dtype == np.float32


def test_a_function_without_a_return_is_told_so():
    for z0 in ([0.5, 0.5], [0.5], 0.5):
        with pytest.raises(TypeError, match="f returned None; expected one array of shape"):
            fixed_point(lambda z: None, z0)


def test_unknowns_that_are_a_matrix_are_told_from_a_batch():
    with pytest.raises(
        ValueError, match=r"each row of z0 \(2, 2\) is one sample; pass unknowns of two axes as z0\.ravel"
    ):
        root(lambda Z: Z @ Z - 4 * np.eye(2), np.eye(2))


def test_a_wrong_shape_from_a_vectorized_function_is_refused():
    with pytest.raises(ValueError, match=r"f returned an array of shape \(3,\); expected \(3, 1\)"):
        fixed_point(lambda z: z[:, 0], np.ones((3, 1)), vectorized=True)


@pytest.mark.julia
@pytest.mark.parametrize(
    ("text", "came"), [("z -> [1.0, 2.0]", r"shape \(2,\)"), ("z -> ones(1, 1)", r"shape \(1, 1\)")]
)
def test_a_wrong_shape_from_julia_is_refused(text, came):
    with pytest.raises(ValueError, match=f"f returned .*{came}; expected a vector of 1 entry, or a number, like z"):
        fixed_point(irnn.julia(text), [0.5])


@pytest.mark.parametrize("result", [1j * np.ones(1), np.array(["a"])], ids=["complex", "text"])
def test_a_wrong_dtype_from_python_is_refused(result):
    with pytest.raises(TypeError, match=r"f returned an array of dtype .*expected real numbers"):
        fixed_point(lambda z: result, [0.5])


BAD = {
    "scale of another shape": (
        {"scale": [1.0, 2.0]},
        ValueError,
        r"scale has shape \(2,\); expected a number or \(1,\)",
    ),
    "scale ragged": ({"scale": [[1.0], [1.0, 2.0]]}, ValueError, "^scale is not an array of numbers: setting"),
    "scale of zero": ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
    "z0 of three axes": ({"z0": np.ones((1, 1, 1))}, ValueError, r"z0 has shape \(1, 1, 1\)"),
    "no samples": ({"z0": np.ones((0, 2))}, ValueError, r"z0 has shape \(0, 2\).*, with at least one entry$"),
    "z0 not finite": (
        {"z0": [[1.0], [np.nan]]},
        ValueError,
        "z0 has NaN or infinity in 1 of 2 samples, first in sample 1",
    ),
    "z0 of text": ({"z0": ["a"]}, TypeError, "z0 has dtype <U1"),
    "z0 complex": ({"z0": [1j]}, TypeError, "z0 has dtype complex128"),
    "z0 ragged": ({"z0": [[1.0], [1.0, 2.0]]}, ValueError, "^z0 is not an array of numbers: setting"),
    "too few args": ({"args": ()}, ValueError, r"f takes z and 1 argument \(a\); args has 0"),
    "too many args": ({"args": (1.0, 2.0)}, ValueError, r"f takes z and 1 argument \(a\); args has 2"),
    "args not a tuple": ({"args": 0.8}, TypeError, "args is a float; expected a tuple"),
    "args an array": ({"args": np.ones(1)}, TypeError, "args is a ndarray; expected a tuple"),
    "arg of text": ({"args": ("b",)}, TypeError, "a has dtype <U1"),
    "arg an object": ({"args": ({},)}, TypeError, "a is a dict; expected numbers"),
    "arg empty": ({"args": ([],)}, ValueError, r"a has shape \(0,\) and no entries"),
    "arg too large": ({"args": (2**64 - 1,)}, ValueError, "a has integers beyond"),
    "batched unknown": (
        {"batched": "b"},
        ValueError,
        "batched has 'b', which is not an argument of f; the arguments are 'a'",
    ),
    "batched beyond": ({"batched": 1}, ValueError, "batched has 1, which is not the position of an argument"),
    "batched strange": ({"batched": [None]}, TypeError, "batched has None; expected the name or the position"),
    "batched single": ({"batched": "a"}, ValueError, "z0 of shape .1,. is one problem"),
    "batched for a number": ({"batched": "a", "z0": 1.0}, ValueError, "z0 of shape .. is one problem"),
    "batched length": (
        {"z0": np.ones((3, 1)), "args": (np.ones(2),), "batched": "a"},
        ValueError,
        r"a has shape \(2,\); expected \(3, ...\), as z0 has 3 samples",
    ),
    "batched number": ({"z0": np.ones((3, 1)), "batched": "a"}, ValueError, r"a has shape \(\); expected \(3, ...\)"),
    "solver unknown": ({"solver": "broyden"}, ValueError, "solver is 'broyden'; expected one of"),
    "solver class": ({"solver": Newton}, TypeError, r"pass an object: Newton\(\)"),
    "solver chord": ({"solver": irnn.Chord()}, ValueError, "Chord shares a matrix among the samples of a network"),
    "on_failure": ({"on_failure": "explode"}, ValueError, "on_failure is 'explode'"),
    "engine": ({"engine": "fortran"}, ValueError, "engine is 'fortran'"),
    "unknown option": ({"tolerance": 1e-3}, TypeError, "unexpected keyword argument 'tolerance'"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("code", [False, True], ids=["python", "julia code"])
def test_bad_input_is_refused(case, code):
    settings, error, message = BAD[case]
    text, function = FUNCTIONS["cosine"]
    arguments = {"z0": [0.5], "args": (0.8,)} | settings
    with pytest.raises(error, match=message):
        fixed_point(irnn.julia(text) if code else function, **arguments)


@pytest.mark.julia
@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("(z, a) -> z^2 - a", r"no method matching \^\(.*; a dot makes an operation one of each entry, as in z \.\^ 2"),
        ("(z, a) -> sin(z)", r"no method matching sin\(.*; a dot makes"),
        ("(z, a) -> z[0] - a", r"at index \[0\]; indices count from 1"),
        (
            "(z, a) -> z .- b",
            "`b` not defined .*; f knows its arguments, Julia and its LinearAlgebra; pass other values in args",
        ),
    ],
)
def test_julia_code_written_like_python_is_told_how_julia_says_it(code, remedy):
    with pytest.raises(irnn.EngineError, match=remedy) as caught:
        root(irnn.julia(code), [1.0], args=(2.0,))
    assert caught.value.julia_traceback


@pytest.mark.parametrize(("f", "message"), [("z -> z", r"irnn\.julia\(text\)"), (3, "expected irnn.julia")])
def test_what_is_no_function_is_refused(f, message):
    with pytest.raises(TypeError, match=message):
        root(f, [0.5])


@pytest.mark.parametrize("f", [lambda: 3.0, "abc".upper], ids=["function", "method"])
def test_function_without_an_argument_is_refused(f):
    with pytest.raises(ValueError, match="f takes no argument; expected a function of z"):
        root(f, 1.0)


@pytest.mark.parametrize("solver", [Picard(), Anderson()])
def test_fixed_point_solvers_do_not_find_roots(solver):
    with pytest.raises(ValueError, match=f"{solver.name} iterates z = f"):
        root(np.sin, [0.5], solver=solver)


def test_nlsolve_is_for_julia_code():
    with pytest.raises(EngineError, match=r"NLsolve solves Julia code only; give f as irnn\.julia"):
        fixed_point(np.cos, [0.5], solver=NLsolve())


@pytest.mark.parametrize("setting", [{"vectorized": True}, {"jac": lambda z: z}, {"vjp": lambda v, z: (v,)}], ids=list)
def test_what_julia_code_has_no_use_for_is_for_python_functions(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}.* is for Python functions"):
        fixed_point(irnn.julia("z -> z"), [[0.5]], **setting)


@pytest.mark.parametrize(
    ("v", "error", "message"),
    [
        ([1.0, 2.0], ValueError, r"v has shape \(2,\); expected \(1,\)"),
        ([[1.0]], ValueError, r"v has shape \(1, 1\); expected \(1,\)"),
        ([np.nan], ValueError, "v has NaN or infinity"),
        ([1j], TypeError, "v has dtype complex128"),
        (["a"], TypeError, "v has dtype <U1"),
    ],
)
def test_a_bad_v_is_refused(v, error, message):
    sol = fixed_point(FUNCTIONS["cosine"][1], [0.5], args=(0.8,))
    with pytest.raises(error, match=message):
        sol.vjp(v)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("b", ValueError, "the Jacobian was asked for 'b', which is not an argument of f; the arguments are 'a'"),
        (1, ValueError, "not the position of an argument"),
        (None, TypeError, "expected the name or the position"),
    ],
)
def test_an_unknown_argument_is_refused(key, error, message):
    sol = fixed_point(FUNCTIONS["cosine"][1], [0.5], args=(0.8,))
    with pytest.raises(error, match=message):
        sol.jacobian(key)


def test_arguments_without_names_go_by_their_position():
    sol = fixed_point(lambda z, *rest: np.cos(rest[0] * z) + rest[1], [0.5], args=(0.3, 0.1))
    assert list(sol.vjp([1.0])) == ["args[0]", "args[1]"]
    np.testing.assert_array_equal(sol.jacobian(1), sol.jacobian("args[1]"))


def test_repr_says_how_it_ended():
    sol = fixed_point(FUNCTIONS["cosine"][1], [0.5], args=(0.8,))
    assert "fixed point of shape (1,), 1 of 1 converged" in repr(sol)


def test_numbers_that_vanish_are_zero_where_the_caller_wants_errors_of_numpy():
    with np.errstate(all="raise"):
        solution = irnn.root(lambda z, a: z + 1e-200 * z**2 - a, np.ones(2), args=(np.array([0.0, 1e-300]),))
        gradient = solution.vjp(np.array([1e-300, 1.0]))["a"]
    np.testing.assert_allclose(solution.value, [0, 1e-300])
    np.testing.assert_allclose(gradient, [1e-300, 1])

"""Gradients against finite differences, and the guarantees of the theory as properties of random nets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import derivative_along, make_net
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import implicit_rnn as irnn
from implicit_rnn.model.activations import ACTIVATIONS

EXACT = irnn.Picard(tol=1e-14)


def test_gradient_is_exact_for_outputs_read_from_neurons(engine, X, Y):
    check_gradient(make_net(engine, outputs=[3, 0]), X, Y)


def away_from_kinks(net: irnn.Network, rng: np.random.Generator, samples: int) -> np.ndarray:
    """The samples whose neurons are farthest from s = 0, where relu and elu are not smooth."""
    X = rng.standard_normal((300, 3))
    z = net.equilibrium(X, solver="newton").state
    s = X @ net.input_weights.T + z @ net.recurrent_weights.T + net.weights["b"]
    return X[np.argsort(-np.abs(s).min(axis=1))[:samples]]


def check_gradient(net: irnn.Network, X: np.ndarray, T: np.ndarray, h: float = 2e-3, **settings: object) -> None:
    """The gradient is that of central differences of fourth order, to 1e-8."""
    settings["solver"] = EXACT
    _, gradient = net.loss_and_gradient(X, T, **settings)
    differences = [
        derivative_along(net, direction, lambda step: net.loss_and_gradient(X, T, **settings)[0], h)
        for direction in np.eye(len(gradient))
    ]
    assert np.linalg.norm(gradient - differences) <= 1e-8 * np.linalg.norm(differences)


# --- properties ----------------------------------------------------------------------------------------------

often = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

bounded = sorted(name for name in ACTIVATIONS if name != "identity")


@st.composite
def perron_nets(draw: st.DrawFn) -> tuple[irnn.Network, np.random.Generator]:
    """A Perron net with weights far larger than those at the start of training, and a source of samples."""
    kappa = draw(st.floats(0.05, 0.97))
    neurons = draw(st.integers(1, 8))
    activation = draw(st.sampled_from(bounded))
    net = irnn.Network(3, [irnn.Layer(neurons, activation)], outputs=1, constraint=irnn.Perron(kappa), engine="numpy")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([0.01, 1.0, 30.0]))
    net.parameters = rng.standard_normal(len(net.parameters))
    net.weights["R"][...] *= size
    return net, rng


def on(engine: str, drawn: tuple[irnn.Network, np.random.Generator]) -> tuple[irnn.Network, np.random.Generator]:
    net, rng = drawn
    twin = irnn.Network.from_topology(net.topology, "float64", engine)
    twin.parameters = net.parameters
    return twin, rng


@often
@given(perron_nets())
def test_perron_keeps_the_spectral_radius_of_slope_times_weights_below_kappa(drawn):
    net, _ = drawn
    slope = ACTIVATIONS[net.topology.layers[0].activation].slope_bound
    radius = np.abs(np.linalg.eigvals(slope * np.abs(net.recurrent_weights))).max()
    assert radius <= net.topology.constraint.kappa * (1 + 1e-9)


@often
@given(perron_nets())
def test_perron_leaves_rows_alone_that_keep_the_promise(drawn):
    net, _ = drawn
    slope = ACTIVATIONS[net.topology.layers[0].activation].slope_bound
    net.weights["a"][...] = 0
    net.weights["R"][...] *= 0.99 * net.topology.constraint.kappa / slope / np.abs(net.weights["R"]).sum(axis=1).max()
    np.testing.assert_allclose(net.recurrent_weights, net.weights["R"], rtol=1e-12)


@often
@given(drawn=perron_nets())
def test_certified_bound_really_bounds_the_error(engine, drawn):
    net, rng = on(engine, drawn)
    X = rng.standard_normal((5, 3))
    rough = net.equilibrium(X, solver=irnn.Picard(max_iterations=3), on_failure="ignore")
    fine = net.equilibrium(X, solver=irnn.Picard(tol=1e-14, max_iterations=3000), on_failure="ignore")
    error = np.abs(rough.state - fine.state).max(axis=1)
    assert (error <= rough.bound * (1 + 1e-9) + fine.bound + 1e-13).all()


@often
@given(drawn=perron_nets())
def test_result_of_a_sample_does_not_depend_on_its_batch_mates(engine, drawn):
    net, rng = on(engine, drawn)
    X = rng.standard_normal((7, 3)) * 3
    together = net.equilibrium(X)
    alone = np.concatenate([net.equilibrium(x[None]).state for x in X])
    np.testing.assert_allclose(together.state, alone, rtol=1e-12, atol=1e-12 * (1 + np.abs(alone).max()))


@often
@given(drawn=perron_nets())
def test_picard_reaches_the_same_equilibrium_from_any_start_under_perron(engine, drawn):
    net, rng = on(engine, drawn)
    x = np.tile(rng.standard_normal((1, 3)), (16, 1))
    starts = rng.uniform(-10, 10, (16, net.topology.neurons))
    solution = net.equilibrium(x, z0=starts, solver=irnn.Picard(tol=1e-12))
    assert solution.converged.all()
    assert (np.ptp(solution.state, axis=0) <= 2 * solution.bound.max() + 1e-13).all()


@often
@given(drawn=perron_nets())
def test_equilibrium_satisfies_its_equation(engine, drawn):
    net, rng = on(engine, drawn)
    X = rng.standard_normal((4, 3))
    z = net.equilibrium(X, solver=irnn.Picard(tol=1e-12)).state
    f = ACTIVATIONS[net.topology.layers[0].activation].value
    expected = f(X @ net.input_weights.T + z @ net.recurrent_weights.T + net.weights["b"])
    np.testing.assert_allclose(z, expected, rtol=0, atol=1e-10 * (1 + np.abs(z).max()))


def test_perron_promises_no_equilibrium_bound_for_free_nets(engine, X):
    net = make_net(engine, constraint=irnn.Free())
    assert np.isnan(net.equilibrium(X).bound).all()


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_slope_bound_of_an_activation_is_its_largest_slope(name):
    activation = ACTIVATIONS[name]
    s = np.linspace(-10, 10, 200_001)
    slopes = np.abs(activation.slope(s, activation.value(s)))
    assert slopes.max() <= activation.slope_bound * (1 + 1e-9)
    assert slopes.max() >= activation.slope_bound * (1 - 1e-3)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_derivatives_of_an_activation_are_numbers_however_large_its_argument(name, dtype):
    activation = ACTIVATIONS[name]
    s = np.array([-1, 1], dtype) * (np.finfo(dtype).max / 4)
    z = activation.value(s)
    slopes, curvatures = activation.slope(s, z), activation.curvature(s, z)
    assert np.isfinite(z).all()
    assert set(slopes) <= {0, 1}
    assert not curvatures.any()
    assert z.dtype == slopes.dtype == curvatures.dtype == dtype


def test_report_tells_the_residuals_of_each_sample(engine, X, Y):
    net = make_net(engine, constraint=irnn.Perron(0.9))
    report = irnn.GradientReport.empty(len(X))
    exact = {"solver": EXACT, "adjoint": irnn.Implicit("lu")}
    tight = net.loss_and_gradient(X, Y, **exact, report=report)[1]
    assert (report.status == irnn.Status.CONVERGED).all()
    assert (report.residual <= 1e-14).all()
    assert (report.adjoint_residual < 1e-12).all()
    np.testing.assert_array_equal(tight, net.loss_and_gradient(X, Y, **exact)[1])
    net.loss_and_gradient(X, Y, solver=irnn.Picard(max_iterations=2), on_failure="ignore", report=report)
    assert (report.status == irnn.Status.MAX_ITERATIONS).all()
    assert (report.residual > 1e-6).all()


def test_report_of_another_size_is_refused(engine, X, Y):
    with pytest.raises(ValueError, match=f"X has {len(X)}"):
        make_net(engine).loss_and_gradient(X, Y, report=irnn.GradientReport.empty(len(X) + 1))


@pytest.mark.parametrize(
    ("array", "wrong", "error", "message"),
    [
        ("adjoint_residual", np.empty(1), ValueError, r"has shape \(1,\), X has 12 samples"),
        ("residual", np.empty((12, 1)), ValueError, r"has shape \(12, 1\), X has 12 samples"),
        ("status", [0] * 12, TypeError, "is a list; expected an array of whole numbers"),
        ("status", np.empty(12), TypeError, "has dtype float64; expected an array of whole numbers"),
        ("residual", np.empty(12, np.int64), TypeError, "has dtype int64; expected an array of floats"),
    ],
)
def test_report_of_other_arrays_is_refused(engine, array, wrong, error, message, X, Y):
    report = dataclasses.replace(irnn.GradientReport.empty(12), **{array: wrong})
    with pytest.raises(error, match=rf"report\.{array} {message}.*use GradientReport\.empty\(12\)$"):
        make_net(engine).loss_and_gradient(X, Y, report=report)


@pytest.mark.parametrize(("samples", "error"), [(-1, ValueError), (0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_report_of_no_number_of_samples_is_refused(samples, error):
    with pytest.raises(error, match=f"samples must be a whole number from 1, got {samples}"):
        irnn.GradientReport.empty(samples)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kappa", [0.3, 0.95, 0.9999])
def test_adjoint_that_is_chosen_for_speed_is_that_of_lu(engine, dtype, kappa, rng):
    """Fast, slow and hardly converging series of the adjoint, the last of which are left to LU."""
    layers = [irnn.Layer(20, "identity")]
    net = irnn.Network(3, layers, outputs=2, constraint=irnn.InfNorm(kappa), dtype=dtype, engine=engine, seed=0)
    net.weights["R"][...] = kappa / 20 + 0.001 * rng.standard_normal((20, 20))
    X, Y = rng.standard_normal((64, 3)), rng.standard_normal((64, 2))
    exact = net.loss_and_gradient(X, Y, solver=irnn.Newton(), adjoint=irnn.Implicit("lu"))[1]
    report = irnn.GradientReport.empty(64)
    gradient = net.loss_and_gradient(X, Y, solver=irnn.Newton(), report=report)[1]
    rounding = 1e-8 if dtype == "float64" else 2e-2
    assert np.linalg.norm(gradient - exact) <= rounding * np.linalg.norm(exact)
    assert (report.adjoint_residual <= (1e-10 if dtype == "float64" else 1e-5)).all()


def test_tolerance_of_the_adjoint_is_kept(rng):
    net = irnn.Network(3, [irnn.Layer(20)], outputs=2, engine="numpy", seed=0)
    X, Y = rng.standard_normal((64, 3)), rng.standard_normal((64, 2))
    report = irnn.GradientReport.empty(64)
    net.loss_and_gradient(X, Y, adjoint=irnn.Implicit(tol=1e-3), report=report)
    assert 1e-7 < report.adjoint_residual.max() <= 1e-3


def test_adjoint_of_a_sample_that_is_not_finite_harms_no_other(rng):
    net = irnn.Network(3, [irnn.Layer(20, "identity")], outputs=2, constraint=irnn.Free(), engine="numpy", seed=0)
    X, Y = rng.standard_normal((64, 3)), rng.standard_normal((64, 2))
    X[5] = 1e308
    report = irnn.GradientReport.empty(64)
    with np.errstate(all="raise"):  # the report tells of numbers that overflow
        net.loss_and_gradient(X, Y, on_failure="ignore", report=report)
        assert not net.equilibrium(X, on_failure="ignore").converged[5]
    assert (np.delete(report.adjoint_residual, 5) <= 1e-10).all()

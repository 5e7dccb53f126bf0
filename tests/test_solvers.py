"""Solvers: how often they may evaluate f, and what they say of an equation whose Jacobian is singular."""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import implicit_rnn as irnn
from implicit_rnn.model.activations import ACTIVATIONS

NETWORKS = {
    "layer": ([irnn.Layer(8)], {}),
    "single neuron": ([irnn.Layer(1)], {}),
    "large": ([irnn.Layer(70)], {}),
    "stages": ([irnn.Layer(9), irnn.Layer(4, lateral=False), irnn.Layer(20)], {}),
    "feedback": ([irnn.Layer(12), irnn.Layer(5)], {"feedback": True}),
}
SOLVERS = (irnn.Auto, irnn.Picard, irnn.Anderson, irnn.Newton, irnn.Chord, irnn.NLsolve)


def make(engine, name, spread, seed=0):
    """A free net whose recurrent weights are that many times as large as at the start of a training."""
    layers, connections = NETWORKS[name]
    net = irnn.Network(3, layers, outputs=1, constraint="free", seed=seed, engine=engine, **connections)
    for name, weight in net.weights.items():
        if name.startswith("R"):
            weight *= spread
    return net


@contextlib.contextmanager
def counted():
    """Count the evaluations of tanh on the NumPy engine, a row of the array each."""
    rows = []

    def value(s):
        rows.append(s.size // s.shape[-1])
        return np.tanh(s)

    with mock.patch.dict(ACTIVATIONS, tanh=dataclasses.replace(ACTIVATIONS["tanh"], value=value)):
        yield rows


# --- max_iterations ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(list(NETWORKS)),
    solver=st.sampled_from(SOLVERS),
    limit=st.integers(1, 30),
    spread=st.sampled_from([1.0, 5.0, 20.0]),
    seed=st.integers(0, 100),
)
def test_solver_never_evaluates_f_more_often_than_allowed(engine, name, solver, limit, spread, seed):
    if engine == "numpy" and solver in (irnn.Chord, irnn.NLsolve):
        return
    net = make(engine, name, spread, seed)
    X = np.random.default_rng(seed).standard_normal((6, 3))
    solution = net.equilibrium(X, solver=solver(max_iterations=limit), on_failure="ignore")
    assert (solution.iterations <= limit).all()
    spent = solution.status == irnn.Status.MAX_ITERATIONS
    assert (solution.iterations[spent] == limit).all()


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["layer", "single neuron", "large"]),
    solver=st.sampled_from(SOLVERS[:4]),
    limit=st.integers(1, 30),
    spread=st.sampled_from([1.0, 5.0, 20.0]),
    seed=st.integers(0, 100),
)
def test_iterations_are_the_evaluations_of_f(name, solver, limit, spread, seed):
    net = make("numpy", name, spread, seed)
    X = np.random.default_rng(seed).standard_normal((6, 3))
    with counted() as rows:
        solution = net.equilibrium(X, solver=solver(max_iterations=limit), on_failure="ignore")
    assert sum(rows) == solution.iterations.sum()


def test_state_of_an_unconverged_sample_is_the_one_its_residual_belongs_to(engine):
    net = make(engine, "layer", 20.0)
    X = np.ones((1, 3))
    for solver in (irnn.Auto, irnn.Picard, irnn.Anderson, irnn.Newton):
        solution = net.equilibrium(X, solver=solver(max_iterations=7), on_failure="ignore")
        z = solution.state[0]
        f = np.tanh(net.input_weights @ X[0] + net.recurrent_weights @ z + net.weights["b"])
        residual = np.linalg.norm(f - z) / max(np.linalg.norm(f), 1e-3 * np.sqrt(8))
        assert solution.residual[0] == pytest.approx(residual, rel=1e-6)


# --- singular Jacobians --------------------------------------------------------------------------------------


def make_drifting(engine, neurons):
    """z = x + z: no equilibrium unless x = 0, and a singular Jacobian everywhere."""
    net = irnn.Network(1, [irnn.Layer(neurons, "identity")], outputs=[0], constraint="free", engine=engine)
    net.weights["W"][...], net.weights["R"][...] = 1.0, np.eye(neurons)
    return net


@pytest.mark.parametrize("neurons", [1, 5, 20])
@pytest.mark.parametrize("solver", [irnn.Newton(), irnn.Auto()])
def test_singular_jacobian_has_a_status_of_its_own(engine, neurons, solver):
    solution = make_drifting(engine, neurons).equilibrium([[0.1], [-3.0]], solver=solver, on_failure="ignore")
    np.testing.assert_array_equal(solution.status, irnn.Status.SINGULAR)


def test_singular_jacobian_on_the_way_does_no_harm(engine):
    """z = max(0, z - 1) has the slope 1 down to z = 1, where Newton's method finds no step."""
    net = irnn.Network(1, [irnn.Layer(1, "relu")], outputs=[0], constraint="free", engine=engine)
    net.weights["R"][...], net.weights["b"][...] = 1.0, -1.0
    assert net.equilibrium([[0.0]], z0=[[5.0]], solver="newton").state == 0


def test_error_says_what_to_do_about_a_singular_jacobian(engine):
    with pytest.raises(irnn.ConvergenceError, match=r"1 singular.*Remedies: .*another start z0.*constraint=Perron"):
        make_drifting(engine, 5).equilibrium([[0.1]], solver="newton")


# --- large numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 1e20), ("float32", 1e30), ("float64", 1e155), ("float64", 1e200)]
)
@pytest.mark.parametrize("activation", ["relu", "softplus", "elu", "gelu", "silu", "identity"])
@pytest.mark.parametrize("neurons", [2, 30, 150])
def test_residuals_are_told_where_squares_overflow(engine, neurons, activation, dtype, size):
    net = irnn.Network(2, [irnn.Layer(neurons, activation)], outputs=1, seed=0, dtype=dtype, engine=engine)
    X = (size * np.random.default_rng(0).standard_normal((40, 2))).astype(dtype)
    solution = net.equilibrium(X)
    R, z = net.recurrent_weights.astype(np.longdouble), solution.state.astype(np.longdouble)
    s = X.astype(np.longdouble) @ net.weights["W"].T + z @ R.T
    f = s if activation == "identity" else np.maximum(s, 0)  # as all of them are from afar, but for -1 of elu
    assert (np.linalg.norm(f - z, axis=1) <= 2e-6 * np.linalg.norm(f, axis=1) + 10).all()
    assert np.isfinite(net.vjp(X, np.ones((40, 1), dtype), z0=solution.state)[1]).all()


# --- rates about 1 ---------------------------------------------------------------------------------------------


def test_a_residual_just_above_the_tolerance_that_does_not_shrink_is_left_to_another_method(engine):
    a = np.random.default_rng(0).uniform(1, 1.2, (20000, 1)).astype(np.float32)
    start = np.random.default_rng(1).uniform(0.2, 0.9, a.shape).astype(np.float32)
    solution = irnn.fixed_point(
        lambda z, a: a * np.exp(-(z**2)),
        start,
        args=(a,),
        batched="a",
        vectorized=True,
        on_failure="ignore",
        engine=engine,
    )
    assert (solution.status != irnn.Status.MAX_ITERATIONS).all()


@pytest.mark.parametrize("neurons", [1, 100])
def test_auto_passes_the_place_where_two_equilibria_have_just_vanished(engine, neurons):
    net = irnn.Network(1, [irnn.Layer(neurons)], outputs=[0], constraint=irnn.Free(), engine=engine)
    net.parameters[:] = 0
    net.weights["R"][...], net.weights["W"][...] = 1.5 / neurons, 1.5  # a magnet below its critical temperature
    fields, on_the_lost_branch = np.array([[-0.139], [-0.145], [-0.16], [-0.17]]), np.full((4, neurons), 0.6)
    z = net.equilibrium(fields, z0=on_the_lost_branch).state
    np.testing.assert_allclose(np.tanh(1.5 * (z + fields)), z, atol=1e-9)


def test_auto_tells_what_newtons_method_found_where_nothing_attracts(engine):
    net = irnn.Network(1, [irnn.Layer(1)], outputs=[0], constraint=irnn.Free(), engine=engine)
    net.parameters[:] = 0
    net.weights["R"][...], net.weights["b"][...] = -2, 0.5
    solution = net.equilibrium([[0.0]], on_failure="ignore")
    assert irnn.Status(solution.status[0]) == irnn.Status.UNSTABLE
    np.testing.assert_allclose(np.tanh(0.5 - 2 * solution.state), solution.state, atol=1e-9)
    assert solution.iterations[0] <= irnn.Auto().max_iterations

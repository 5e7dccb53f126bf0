"""Products with the derivatives of a network, from either side: against differences, against each other, and their truth."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import derivative_along, make_bistable, make_net, make_oscillating
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gradients import away_from_kinks
from test_layered import ADJOINTS, CONSTRAINTS

import implicit_rnn as irnn
from implicit_rnn.model.activations import ACTIVATIONS

EXACT = irnn.Newton(tol=1e-13)
TOPOLOGIES = ["no recurrence", "lateral", "feedback", "skips", "input skips", "neurons read"]


def build(engine: str, activation: str, constraint: irnn.Free, topology: str, seed: int = 7) -> irnn.Network:
    """A net whose recurrent weights are so large that a constraint acts."""
    lateral = topology != "no recurrence"
    settings = {
        "feedback": topology == "feedback",
        "skips": [(0, 2)] if topology == "skips" else (),
        "input_skips": [2] if topology == "input skips" else (),
        "outputs": [6, 0, 6] if topology == "neurons read" else 2,
    }
    layers = [
        irnn.Layer(3, activation, lateral),
        irnn.Layer(2, "tanh", lateral=False),
        irnn.Layer(2, activation, lateral),
    ]
    net = irnn.Network(3, layers, constraint=constraint, engine=engine, **settings)  # type: ignore[arg-type]
    net.parameters = 0.4 * np.random.default_rng(seed).standard_normal(net.parameters.shape)
    for name, weight in net.weights.items():
        weight *= (5 if constraint.unique else 0.4) if name.startswith("R") else 1
    return net


def possible(activation: str, constraint: irnn.Free) -> bool:
    return ACTIVATIONS[activation].increasing or not constraint.needs_increasing


CASES = [
    pytest.param(activation, constraint, topology, id=f"{activation}-{constraint.name}-{topology}")
    for activation in ACTIVATIONS
    for constraint in CONSTRAINTS
    for topology in TOPOLOGIES
    if possible(activation, constraint)
]


def derivative_of(net: irnn.Network, X: np.ndarray, dX: np.ndarray, dp: np.ndarray) -> np.ndarray:
    """The derivative of ``predict`` along a direction, by differences."""
    return derivative_along(net, dp, lambda step: net.predict(X + step * dX, solver=EXACT), 1e-3)


# --- against differences -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "constraint", "topology"), CASES)
def test_products_are_those_of_fourth_order_central_differences_to_1e_8(engine, activation, constraint, topology, rng):
    net = build(engine, activation, constraint, topology)
    X = away_from_kinks(net, rng, 6)
    V = rng.standard_normal((len(X), net.topology.output_size))
    gradient, dX = net.vjp(X, V, solver=EXACT)
    dp, dx = rng.standard_normal(gradient.shape), rng.standard_normal(X.shape)
    dp, dx = dp / np.linalg.norm(dp), dx / np.linalg.norm(dx)
    by_parameters, by_samples = derivative_of(net, X, 0 * dx, dp), derivative_of(net, X, dx, 0 * dp)
    size = np.linalg.norm(V) * np.linalg.norm(by_parameters)
    assert gradient @ dp == pytest.approx((V * by_parameters).sum(), abs=1e-8 * size)
    size = np.linalg.norm(V) * np.linalg.norm(by_samples)
    np.testing.assert_allclose((dX * dx).sum(axis=1), (V * by_samples).sum(axis=1), rtol=0, atol=1e-8 * size)
    expected = by_parameters + by_samples
    tangent = net.jvp(X, dx, dp, solver=EXACT)
    np.testing.assert_allclose(tangent, expected, rtol=0, atol=1e-8 * np.linalg.norm(expected))


def test_steps_that_are_unrolled_are_differentiated_exactly(engine, rng, X):
    net = build(engine, "tanh", irnn.Perron(0.9), "feedback")
    steps = irnn.Unrolled(5).reader(irnn.Auto())
    dp, dx = rng.standard_normal(net.parameters.shape), rng.standard_normal(X.shape)

    def outputs(step: float) -> np.ndarray:
        return net.predict(X + step * dx, solver=steps, on_failure="ignore")

    expected = derivative_along(net, dp, outputs, 1e-4)
    tangent = net.jvp(X, dx, dp, adjoint=irnn.Unrolled(5))
    np.testing.assert_allclose(tangent, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


def test_vjp_with_the_derivative_of_a_loss_is_the_gradient_of_the_loss(engine, X, Y):
    net = build(engine, "silu", irnn.Perron(0.9), "skips")
    _, expected = net.loss_and_gradient(X, Y, solver=EXACT)
    gradient, _ = net.vjp(X, 2 * (net.predict(X, solver=EXACT) - Y) / Y.size, solver=EXACT)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


# --- against each other --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_jvp_is_the_transpose_of_vjp(engine, data):
    activation, constraint = data.draw(st.sampled_from(sorted(ACTIVATIONS))), data.draw(st.sampled_from(CONSTRAINTS))
    if not possible(activation, constraint):
        constraint = irnn.Perron(0.9)
    topology, seed = data.draw(st.sampled_from(TOPOLOGIES)), data.draw(st.integers(0, 2**32 - 1))
    of, adjoint = data.draw(st.sampled_from(["outputs", "state"])), data.draw(st.sampled_from(ADJOINTS))
    net, rng = build(engine, activation, constraint, topology, seed), np.random.default_rng(seed)
    X, dX = rng.standard_normal((2, data.draw(st.integers(1, 9)), 3))
    dp = rng.standard_normal(net.parameters.shape)
    options = {"of": of, "adjoint": adjoint, "solver": EXACT, "on_failure": "ignore"}
    report = irnn.GradientReport.empty(len(X))
    tangent = net.jvp(X, dX, dp, **options, report=report)
    V = rng.standard_normal(tangent.shape)
    V[report.status != irnn.Status.CONVERGED] = 0  # a net without constraint may have no equilibrium
    gradient, dx = net.vjp(X, V, **options)
    size = np.linalg.norm(V) * np.linalg.norm(tangent) + np.linalg.norm(gradient) * np.linalg.norm(dp)
    assert (V * tangent).sum() == pytest.approx(gradient @ dp + (dx * dX).sum(), abs=1e-9 * size + 1e-12)


@pytest.mark.parametrize("adjoint", [irnn.Implicit("lu"), *ADJOINTS[1:]], ids=lambda a: a.name)  # exact ones
def test_direction_that_is_not_given_is_zero(engine, adjoint, rng, X):
    net = build(engine, "tanh", irnn.Perron(0.9), "feedback")
    dX, dp = rng.standard_normal(X.shape), rng.standard_normal(net.parameters.shape)
    both = net.jvp(X, dX, dp, adjoint=adjoint)
    parts = net.jvp(X, dX, adjoint=adjoint) + net.jvp(X, dparameters=dp, adjoint=adjoint)
    np.testing.assert_allclose(both, parts, rtol=0, atol=1e-12)


def test_derivative_of_the_outputs_is_that_of_the_state_read_out(engine, rng, X):
    net = make_net(engine, outputs=[3, 0])
    dX, V = rng.standard_normal(X.shape), rng.standard_normal((12, 2))
    np.testing.assert_array_equal(net.jvp(X, dX), net.jvp(X, dX, of="state")[:, [3, 0]])
    of_state = np.zeros((12, 5))
    of_state[:, [3, 0]] = V
    for ours, theirs in zip(net.vjp(X, V), net.vjp(X, of_state, of="state"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.julia
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: a.name)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_engines_agree(topology, adjoint, rng, X):
    dX = rng.standard_normal(X.shape)
    results = []
    for engine in ("numpy", "julia"):
        net = build(engine, "sigmoid", irnn.Perron(0.9), topology)
        V = np.random.default_rng(1).standard_normal((12, 7))
        dp = np.random.default_rng(2).standard_normal(len(net.parameters))
        options = {"of": "state", "adjoint": adjoint, "solver": EXACT}
        results.append([*net.vjp(X, V, **options), net.jvp(X, dX, dp, **options)])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-10)


def test_float32_follows_float64(engine, rng, X, Y):
    dX = rng.standard_normal(X.shape)
    results = []
    for dtype in ("float32", "float64"):
        net = make_net(engine, dtype=dtype)
        results.append([*net.vjp(X, Y), net.jvp(X, dX)])
        assert all(array.dtype == dtype for array in results[-1])
    for narrow, wide in zip(*results, strict=True):
        np.testing.assert_allclose(narrow, wide, rtol=0, atol=1e-4 * np.abs(wide).max())


# --- equilibria that are known -------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_known_equilibria_are_confirmed_by_one_evaluation(engine, topology, rng, X):
    net = build(engine, "tanh", irnn.Perron(0.9), topology)
    state = net.equilibrium(X).state
    V = rng.standard_normal((12, net.topology.output_size))
    once = irnn.Picard(max_iterations=1)
    for ours, cold in zip(net.vjp(X, V, z0=state, solver=once), net.vjp(X, V, solver=EXACT), strict=True):
        np.testing.assert_allclose(ours, cold, rtol=0, atol=1e-7 * np.abs(cold).max())
    np.testing.assert_allclose(net.jvp(X, X, z0=state, solver=once), net.jvp(X, X, solver=EXACT), rtol=0, atol=1e-7)


def test_state_that_is_no_equilibrium_is_only_a_start(engine, rng, X, Y):
    net = make_net(engine)
    wrong = net.equilibrium(X).state + 0.1
    for ours, cold in zip(net.vjp(X, Y, z0=wrong), net.vjp(X, Y), strict=True):
        np.testing.assert_allclose(ours, cold, rtol=0, atol=1e-8 * np.abs(cold).max())
    with pytest.raises(irnn.ConvergenceError, match="12 of 12 samples did not reach an equilibrium"):
        net.vjp(X, Y, z0=wrong, solver=irnn.Picard(max_iterations=1))
    with pytest.raises(irnn.ConvergenceError, match="12 of 12 samples did not reach an equilibrium"):
        net.jvp(X, X, z0=wrong, solver=irnn.Picard(max_iterations=1))


def test_start_chooses_among_equilibria(engine):
    net = make_bistable(engine)
    x, V = np.full((1, 1), 0.1), np.ones((1, 1))
    for sign in (1.0, -1.0):
        state = net.equilibrium(x, z0=np.full((1, 1), sign)).state
        slope = 1 - state**2
        expected = slope / (1 - 2 * slope)  # of z = tanh(x + 2 z)
        np.testing.assert_allclose(net.vjp(x, V, z0=state)[1], expected, rtol=1e-8)
        np.testing.assert_allclose(net.jvp(x, V, z0=state), expected, rtol=1e-8)


def test_unrolled_steps_take_no_start(engine, X, Y):
    net = make_net(engine)
    state = net.equilibrium(X).state
    with pytest.raises(
        ValueError, match=r"z0 is the start of a solver, which adjoint=Unrolled\(steps=8\) does not use"
    ):
        net.vjp(X, Y, z0=state, adjoint="unrolled")
    with pytest.raises(ValueError, match="z0 is the start"):
        net.jvp(X, X, z0=state, adjoint="unrolled")


# --- truth ---------------------------------------------------------------------------------------------------


def test_samples_without_equilibrium_are_told_as_the_caller_chooses(engine):
    net = make_oscillating(engine)
    X, V, solver = np.array([[5.0], [0.1], [5.0]]), np.ones((3, 1)), irnn.Picard(max_iterations=50)
    report = irnn.GradientReport.empty(3)
    options = {"solver": solver, "adjoint": irnn.Implicit("lu")}
    for call in (lambda **o: net.vjp(X, V, **options, **o), lambda **o: net.jvp(X, V, **options, **o)):
        with pytest.raises(irnn.ConvergenceError, match=r"1 of 3 samples .* not the derivative at an equilibrium"):
            call()
        with pytest.warns(irnn.ConvergenceWarning, match="1 of 3 samples"):
            call(on_failure="warn")
        call(on_failure="ignore", report=report)
        converged = irnn.Status.CONVERGED
        assert report.status.tolist() == [converged, irnn.Status.MAX_ITERATIONS, converged]
        assert report.residual[1] > 0.1
        assert (report.adjoint_residual < 1e-12).all()


def test_derivative_at_a_fold_is_told_and_not_returned_silently(engine):
    net = make_bistable(engine)
    net.weights["R"][...] = 1.0  # z = tanh(x + z): at x = 0 the derivative of z - tanh(z) vanishes
    x, V = np.zeros((1, 1)), np.ones((1, 1))
    for call in (net.vjp, net.jvp):
        with pytest.raises(irnn.ConvergenceError, match="1 of 1 samples"):
            call(x, V)


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net, X: net.vjp(X, np.ones((12, 3))), ValueError, r"V has shape \(12, 3\); .* 2 outputs"),
        (lambda net, X: net.vjp(X, np.ones((11, 2))), ValueError, "V has 11 samples, X has 12"),
        (lambda net, X: net.vjp(X, np.ones((12, 2)), of="state"), ValueError, r"V has shape \(12, 2\); .* 5 neurons"),
        (lambda net, X: net.vjp(X, np.full((12, 2), np.nan)), ValueError, "V has NaN"),
        (lambda net, X: net.vjp(X, X[:, :2], of="states"), ValueError, r"of is 'states'; .* did you mean state\?"),
        (lambda net, X: net.vjp(X, X[:, :2], z0=X), ValueError, r"z0 has shape \(12, 3\); .* 5 neurons"),
        (lambda net, X: net.vjp(X, X[:, :2], report=irnn.GradientReport.empty(3)), ValueError, "X has 12"),
        (lambda net, X: net.vjp(X, X[:, :2], on_failure="no"), ValueError, "on_failure"),
        (lambda net, X: net.jvp(X), TypeError, "needs a direction"),
        (lambda net, X: net.jvp(X, X[:, :2]), ValueError, r"dX has shape \(12, 2\)"),
        (lambda net, X: net.jvp(X, X[:2]), ValueError, "dX has 2 samples, X has 12"),
        (lambda net, X: net.jvp(X, dparameters=np.ones(3)), ValueError, r"dparameters has shape \(3,\)"),
        (lambda net, X: net.jvp(X, X, of="output"), ValueError, "of is 'output'"),
    ],
)
def test_bad_argument_is_refused_by_name(engine, call, error, message, X):
    with pytest.raises(error, match=message):
        call(make_net(engine), X)


@pytest.mark.parametrize("neurons", [12, 40])
@pytest.mark.parametrize(("dtype", "sizes"), [("float32", [2.0**-50, 2.0**-83, 2.0**-110]), ("float64", [2.0**-600])])
def test_products_are_as_exact_for_tiny_cotangents(engine, neurons, dtype, sizes):
    net = irnn.Network(3, [irnn.Layer(neurons)], outputs=2, dtype=dtype, engine=engine, seed=0)
    net.weights["R"][...] *= 3
    rng = np.random.default_rng(0)
    X, V = rng.standard_normal((70, 3)).astype(dtype), rng.standard_normal((70, 2)).astype(dtype)
    _, dX = net.vjp(X, V)
    for size in sizes:
        scale = np.full((70, 1), size, dtype)
        for chosen in (slice(None), slice(5, 9)):
            mixed = np.ones((70, 1), dtype)
            mixed[chosen] = scale[chosen]
            np.testing.assert_allclose(
                net.vjp(X, V * mixed)[1] / mixed, dX, rtol=1e-3 if dtype == "float32" else 1e-8, atol=1e-6
            )

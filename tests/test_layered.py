"""Layered networks, every constraint, solver and adjoint: the two engines agree, and the guarantees hold."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import derivative_along
from hypothesis import given, settings
from hypothesis import strategies as st

import implicit_rnn as irnn

CONSTRAINTS = [irnn.Free(), irnn.Perron(0.9), irnn.InfNorm(0.9), irnn.Spectral(0.9), irnn.Monotone(0.1)]
SOLVERS = [irnn.Auto(tol=1e-12), irnn.Picard(tol=1e-12), irnn.Anderson(tol=1e-12), irnn.Newton(tol=1e-12)]
ADJOINTS = [irnn.Implicit(), irnn.JacobianFree(), irnn.Unrolled(7)]
LAYERS = [irnn.Layer(4), irnn.Layer(3, "sigmoid", lateral=False), irnn.Layer(5, "softplus")]
SHAPES = {
    "one layer": {"layers": [irnn.Layer(5)]},
    "no feedback": {"layers": LAYERS},
    "feedback": {"layers": LAYERS, "feedback": True},
    "chosen pairs and skips": {"layers": LAYERS, "feedback": [(1, 0)], "skips": [(0, 2)], "input_skips": [2]},
}


def build(shape: str, constraint: irnn.model.constraints.Constraint, engine: str) -> irnn.Network:
    net = irnn.Network(3, outputs=2, constraint=constraint, engine=engine, **SHAPES[shape])
    net.parameters[:] = 0.3 * np.random.default_rng(7).standard_normal(net.parameters.shape)
    return net


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((9, 3)), rng.standard_normal((9, 2))


@pytest.mark.julia
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: c.name)
class TestEnginesAgree:
    @pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
    def test_on_states_and_bounds(self, shape, constraint, solver, data):
        julia, numpy = (build(shape, constraint, e).equilibrium(data[0], solver=solver) for e in ("julia", "numpy"))
        assert np.abs(julia.state - numpy.state).max() < 1e-10
        np.testing.assert_array_equal(julia.status, numpy.status)

    @pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: a.name)
    def test_on_gradients(self, shape, constraint, adjoint, data):
        losses, gradients = zip(
            *(
                build(shape, constraint, e).loss_and_gradient(*data, solver=irnn.Newton(tol=1e-13), adjoint=adjoint)
                for e in ("julia", "numpy")
            ),
            strict=True,
        )
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        assert np.abs(gradients[0] - gradients[1]).max() < 1e-11

    def test_on_training_with_the_jacobian_penalty(self, shape, constraint, data):
        nets = [build(shape, constraint, e) for e in ("julia", "numpy")]
        runs = [net.fit(*data, epochs=20, batch_size=4, jacobian_penalty=1.0) for net in nets]
        assert np.abs(runs[0].loss - runs[1].loss).max() < 1e-8
        assert np.abs(nets[0].spectral_radius(data[0]) - nets[1].spectral_radius(data[0])).max() < 1e-7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: c.name)
@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_gradient_is_that_of_finite_differences(engine, shape, constraint, penalty, data):
    net = build(shape, constraint, engine)
    settings = {"solver": irnn.Newton(tol=1e-13), "jacobian_penalty": penalty, "probe": 3}
    gradient = net.loss_and_gradient(*data, **settings)[1]
    direction = np.random.default_rng(1).standard_normal(gradient.shape)
    slope = derivative_along(net, direction, lambda step: net.loss_and_gradient(*data, **settings)[0], 1e-4)
    assert gradient @ direction == pytest.approx(slope, rel=1e-7)


LIMITS = {
    irnn.Perron(0.9): lambda R: np.abs(np.linalg.eigvals(np.abs(R))).max() <= 0.9 + 1e-9,
    irnn.InfNorm(0.9): lambda R: np.abs(R).sum(axis=1).max() <= 0.9 + 1e-9,
    irnn.Spectral(0.9): lambda R: np.linalg.norm(R, 2) <= 0.9 + 1e-9,
    irnn.Monotone(0.1): lambda R: np.linalg.eigvalsh((R + R.T) / 2).max() <= 0.9 + 1e-9,
}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(0.01, 30), constraint=st.sampled_from(list(LIMITS)))
def test_guarantee_holds_for_any_raw_weights(seed, size, constraint):
    net = irnn.Network(2, [4, 3], feedback=True, outputs=1, constraint=constraint, engine="numpy")
    net.parameters[:] = size * np.random.default_rng(seed).standard_normal(net.parameters.shape)
    assert LIMITS[constraint](net.recurrent_weights)


@pytest.mark.parametrize("constraint", CONSTRAINTS[1:], ids=lambda c: c.name)
def test_certified_bound_holds_through_the_stages(engine, constraint, data):
    net = build("no feedback", constraint, engine)
    exact = net.equilibrium(data[0], solver=irnn.Newton(tol=1e-13)).state
    loose = net.equilibrium(data[0], solver=irnn.Picard(tol=1e-3), on_failure="ignore")
    assert (np.abs(loose.state - exact).max(axis=1) <= loose.bound + 1e-12).all()


@pytest.mark.parametrize("shift", [-740.0, -96.0, 96.0, 740.0])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_only_differences_of_the_scales_of_perron_count(dtype, shift):
    rng, residual = np.random.default_rng(0), np.ones((1, 1, 4))
    K, scales, bounds = rng.standard_normal((1, 4, 4)).astype(dtype), rng.standard_normal((1, 4)), np.ones(4)
    near, far = (np.round(scales * 256) / 256 + offset for offset in (0, shift))
    (R, certified), (shifted, others) = (
        (irnn.Perron().apply(K, a, bounds), irnn.Perron().certify(K, a, bounds, residual))
        for a in (near.astype(dtype), far.astype(dtype))
    )
    np.testing.assert_allclose(shifted, R, rtol=1e-6 if dtype == "float32" else 1e-14)
    np.testing.assert_allclose(others, certified, rtol=1e-6 if dtype == "float32" else 1e-14)


@pytest.mark.parametrize("shift", [-96.0, 96.0, 740.0])
def test_states_and_bounds_depend_on_no_common_part_of_the_scales_of_perron(engine, shift):
    net = irnn.Network(3, [irnn.Layer(4)], outputs=1, seed=0, dtype="float32", engine=engine)
    X = np.random.default_rng(0).standard_normal((20, 3))
    scales = net.weights["a"]
    scales[...] = [0, 0.5, -0.25, 0.125]
    before = net.equilibrium(X)
    scales += np.float32(shift)
    after = net.equilibrium(X)
    np.testing.assert_allclose(after.state, before.state, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(after.bound, before.bound, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("constraint", CONSTRAINTS[1:], ids=lambda c: c.name)
def test_bound_of_a_state_whose_residual_has_a_square_that_vanishes_is_none_of_zero(engine, constraint):
    net = irnn.Network(2, [irnn.Layer(3)], outputs=1, seed=0, constraint=constraint, engine=engine)
    net.weights["b"][...] = 0
    x = np.array([[1e-165, -3e-165]])
    solution = net.equilibrium(x)
    exact = np.linalg.solve(np.eye(3) - net.recurrent_weights, net.weights["W"] @ x[0])  # as tanh has the slope 1 there
    assert np.abs(exact - solution.state[0]).max() <= solution.bound[0] * (1 + 1e-9)


@pytest.mark.parametrize("size", [1e-300, 1e-165, 1e200])
@pytest.mark.parametrize("constraint", CONSTRAINTS[1:], ids=lambda c: c.name)
def test_certified_bound_grows_with_residuals_whose_squares_vanish_or_overflow(constraint, size):
    R, scales, bounds, residual = np.zeros((1, 2, 2)), np.zeros((1, 2)), np.ones(2), np.array([[[0.3, 0.4]]])
    expected = constraint.certify(R, scales, bounds, residual)
    np.testing.assert_allclose(constraint.certify(R, scales, bounds, size * residual) / size, expected, rtol=1e-12)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_weights_far_within_their_bound_are_differentiated_as_they_are(engine, dtype):
    X, Y = np.ones((1, 2)), np.full((1, 1), 1e3)
    results = []
    for constraint in (irnn.Monotone(0.1), irnn.Free()):
        net = irnn.Network(2, [irnn.Layer(4)], outputs=1, constraint=constraint, seed=0, dtype=dtype, engine=engine)
        net.weights["R"][...] = np.kron(np.eye(2), [[0, 0.5], [-0.5, 0]])  # the size that Monotone bounds is zero
        tangent = net.jvp(X, dparameters=np.full(net.parameters.shape, 100))
        results.append(np.append(net.loss_and_gradient(X, Y)[1], tangent))
    np.testing.assert_allclose(*results, rtol=1e-8 if dtype == "float64" else 1e-4)


def test_monotone_is_refused_where_slopes_are_negative():
    with pytest.raises(ValueError, match="slope is never negative"):
        irnn.Network(2, [irnn.Layer(3, "gelu")], outputs=1, constraint=irnn.Monotone())


@pytest.mark.parametrize("option", [irnn.Chord(), irnn.NLsolve()], ids=lambda o: o.name)
def test_solver_of_the_other_engine_is_refused_by_name(option, data):
    with pytest.raises(
        irnn.EngineError, match=rf'{option.name} is not available on the NumPy engine; use engine="julia"'
    ):
        build("one layer", irnn.Perron(), "numpy").equilibrium(data[0], solver=option)


def test_a_solver_of_ones_own_is_not_sent_to_the_other_engine(data):
    class Mine(irnn.Picard):
        pass

    with pytest.raises(
        irnn.EngineError, match="the solver Mine is not available on the NumPy engine; use one of the package"
    ):
        build("one layer", irnn.Perron(), "numpy").equilibrium(data[0], solver=Mine())

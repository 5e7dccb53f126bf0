"""The NumPy engine is the reference: the Julia engine gives the same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import make_net

import implicit_rnn as irnn
from implicit_rnn.engines.base import Replicas, Samples, TrainerOptions

pytestmark = pytest.mark.julia

ACTIVATIONS = ["tanh", "sigmoid", "gelu"]
CONSTRAINTS = [irnn.Free(), irnn.Perron(0.9)]
OPTIMIZERS = [
    irnn.SGD(0.1),
    irnn.Momentum(0.02, weight_decay=1e-3),
    irnn.Nesterov(0.02),
    irnn.Adam(0.005),
    irnn.AdamW(0.005),
    irnn.RMSProp(0.001, weight_decay=1e-3),
]


def both(activation: str = "tanh", **settings: Any) -> tuple[irnn.Network, irnn.Network]:
    return make_net("numpy", activation, **settings), make_net("julia", activation, **settings)


def names(option: object) -> str:
    return type(option).__name__


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=names)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "of_states", "of_gradients"), [("float64", 1e-12, 1e-9), ("float32", 1e-5, 1e-4)])
def test_equilibria_and_gradients_agree(activation, constraint, dtype, of_states, of_gradients, X, Y):
    nets = both(activation, constraint=constraint, dtype=dtype)
    solver = irnn.Picard(tol=1e-14) if dtype == "float64" else irnn.Auto()
    ours, theirs = (n.equilibrium(X, solver=solver).state for n in nets)
    assert ours.dtype == theirs.dtype == dtype
    assert np.abs(ours - theirs).max() <= of_states
    ours, theirs = (n.loss_and_gradient(X, Y)[1] for n in nets)
    assert np.abs(ours - theirs).max() <= of_gradients * np.abs(ours).max()


@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_states_statuses_and_bounds_agree_after_the_same_number_of_iterations(damping, X):
    solver = irnn.Picard(damping=damping, max_iterations=8)
    ours, theirs = (n.equilibrium(X, solver=solver, on_failure="ignore") for n in both())
    np.testing.assert_allclose(ours.state, theirs.state, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(ours.iterations, theirs.iterations)
    np.testing.assert_array_equal(ours.status, theirs.status)
    np.testing.assert_allclose(ours.residual, theirs.residual, rtol=1e-6)
    np.testing.assert_allclose(ours.bound, theirs.bound, rtol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"outputs": [1, 4]}, {"outputs": [2, 2]}, {"neurons": 1}, {"neurons": 40}], ids=str
)
def test_gradients_agree_for_other_shapes(settings, X, rng):
    ours, theirs = both(**settings)
    Y = rng.standard_normal((len(X), ours.topology.output_size))
    np.testing.assert_allclose(theirs.loss_and_gradient(X, Y)[1], ours.loss_and_gradient(X, Y)[1], rtol=0, atol=1e-9)


def test_julia_solves_the_large_batch_that_spans_several_tiles(rng):
    ours, theirs = both()
    X = rng.standard_normal((5000, 3))
    solver = irnn.Picard(tol=1e-13)
    assert np.abs(ours.predict(X, solver=solver) - theirs.predict(X, solver=solver)).max() <= 1e-11


@pytest.mark.parametrize("linear_solver", ["auto", "lu", "neumann", "anderson", "gmres"])
def test_derivatives_of_zero_are_zero_by_every_linear_solver_of_julia(linear_solver, X):
    net = make_net("julia")
    adjoint = irnn.Implicit(linear_solver)
    gradient, dX = net.vjp(X, np.zeros((len(X), 2)), adjoint=adjoint)
    assert not gradient.any()
    assert not dX.any()
    assert not net.jvp(X, np.zeros_like(X), adjoint=adjoint).any()
    V = np.zeros((len(X), 2))
    V[3] = 1.0  # some samples have a derivative, others have none
    np.testing.assert_allclose(net.vjp(X, V, adjoint=adjoint)[1], net.vjp(X, V)[1], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("linear_solver", ["auto", "lu", "neumann"])
def test_every_linear_solver_of_julia_gives_the_gradient_of_the_reference(linear_solver, X, Y):
    ours, theirs = both()
    reference = ours.loss_and_gradient(X, Y)[1]
    gradient = theirs.loss_and_gradient(X, Y, adjoint=irnn.Implicit(linear_solver))[1]
    assert np.abs(gradient - reference).max() <= 1e-8 * np.abs(reference).max()


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=names)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=names)
class TestTraining:
    @pytest.fixture
    def Y(self, X):  # noqa: N802
        """Targets that free nets learn without coming near a fold, where any difference would grow without bound."""
        return np.sin(X[:, :2])

    @pytest.mark.parametrize("settings", [{"epochs": 100}, {"epochs": 20, "batch_size": 5, "seed": 3}], ids=str)
    def test_training_follows_the_same_trajectory(self, optimizer, constraint, settings, X, Y):
        nets = both(constraint=constraint)
        runs = [n.fit(X, Y, optimizer=optimizer, **settings) for n in nets]
        assert np.abs(nets[0].parameters - nets[1].parameters).max() <= 1e-6
        assert np.abs(runs[0].loss - runs[1].loss).max() <= 1e-6

    def test_optimiser_states_are_equal_and_portable(self, optimizer, constraint, X, Y):
        nets = both(constraint=constraint)
        trainers = [n.program().trainer(TrainerOptions(optimizer, 1, len(X), np.inf, irnn.Guard())) for n in nets]
        for net, trainer in zip(nets, trainers, strict=True):
            train(trainer, net, X, Y, optimizer, 10)
        np.testing.assert_allclose(trainers[1].state(), trainers[0].state(), rtol=0, atol=1e-9)

        resumed = [n.program().trainer(TrainerOptions(optimizer, 1, len(X), np.inf, irnn.Guard())) for n in nets]
        for new, other in zip(resumed, reversed(trainers), strict=True):
            new.restore(other.state())
        for net, trainer in zip(nets, resumed, strict=True):
            train(trainer, net, X, Y, optimizer, 10)
        uninterrupted = make_net("numpy", constraint=constraint)
        uninterrupted.fit(X, Y, optimizer=optimizer, epochs=20)
        for net in nets:
            assert np.abs(net.parameters - uninterrupted.parameters).max() <= 1e-9


def train(trainer, net, X, Y, optimizer, epochs) -> None:
    order = np.tile(np.arange(len(X)), (epochs, 1))
    rates = np.full(epochs, optimizer.learning_rate)
    losses, unconverged = np.empty((1, epochs)), np.empty((1, epochs), np.int64)
    nets = Replicas.start(net.parameters[None])
    trainer.train(nets, Samples(X, Y), order, len(X), rates, losses, unconverged)


@pytest.mark.parametrize(
    ("dtype", "settings", "tolerance"),
    [
        ("float64", {"optimizer": irnn.SGD(0.5), "clip": 0.1}, 1e-6),
        ("float32", {"optimizer": irnn.Adam(0.01)}, 1e-3),
    ],
    ids=str,
)
def test_training_that_is_clipped_or_in_float32_agrees(dtype, settings, tolerance, X, Y):
    nets = both(dtype=dtype)
    for net in nets:
        net.fit(X, Y, epochs=50, **settings)
    assert np.abs(nets[0].parameters - nets[1].parameters).max() <= tolerance


def test_many_nets_trained_side_by_side_agree(X, Y):
    nets = {e: [make_net(e, seed=s) for s in range(3)] for e in ("numpy", "julia")}
    for group in nets.values():
        irnn.fit_many(group, X, Y, optimizer=irnn.Adam(0.02), epochs=50)
    for ours, theirs in zip(*nets.values(), strict=True):
        assert np.abs(ours.parameters - theirs.parameters).max() <= 1e-6


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=names)
def test_a_state_of_the_wrong_length_is_refused(optimizer, X):
    trainer = make_net("julia").program().trainer(TrainerOptions(optimizer, 1, len(X), np.inf, irnn.Guard()))
    with pytest.raises((irnn.EngineError, ValueError), match="numbers"):
        trainer.restore(np.zeros((1, trainer.state().shape[1] + 1)))

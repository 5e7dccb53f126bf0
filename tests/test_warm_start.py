"""Warm starts of training: what they save, what they leave as it is, and where they are refused."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_net, make_neuron
from test_losses import squared

import implicit_rnn as irnn
from implicit_rnn.engines.base import Replicas, Samples, TrainerOptions

STILL = irnn.SGD(1e-300)
"""An optimiser that leaves the parameters as they are."""


OWN_LOSS = irnn.CustomLoss(squared)


def fit(net: irnn.Network, X: np.ndarray, Y: np.ndarray, **settings: object) -> irnn.Run:
    return net.fit(X, Y, **({"epochs": 15, "batch_size": 5, "optimizer": irnn.Adam(0.02)} | settings))


# --- what they save ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", OWN_LOSS], ids=["mse", "own loss"])
@pytest.mark.parametrize("batch_size", [2, 5], ids=["minibatches", "all at once"])
def test_samples_that_change_little_need_fewer_iterations(engine, loss, batch_size):
    """40 iterations do from zero for r = 0.7, not for 0.75, and there from the equilibrium for 0.749."""
    X = np.array([[-30.0], [-1.0], [0.1], [2.0], [50.0]])

    def unconverged(warm_start: bool) -> np.ndarray:
        net = make_neuron(engine, 0.7, "identity")

        def raise_r(progress: irnn.Progress) -> None:
            net.weights["R"][...] += 0.001

        return net.fit(
            X,
            np.zeros((5, 1)),
            loss=loss,
            batch_size=batch_size,
            solver=irnn.Picard(tol=1e-6, max_iterations=40),
            optimizer=STILL,
            epochs=51,
            callbacks=raise_r,
            warm_start=warm_start,
            on_failure="ignore",
        ).unconverged

    assert not unconverged(warm_start=True).any()
    assert unconverged(warm_start=False)[[0, -1]].tolist() == [0, 5]


@pytest.mark.parametrize("loss", [irnn.MSE(), OWN_LOSS], ids=["mse", "own loss"])
def test_nets_trained_together_have_equilibria_of_their_own(engine, loss):
    X, order = np.array([[1.0], [-20.0], [3.0]]), np.array([[2, 0, 1]])
    net = make_neuron(engine, 0.7, "identity")
    program = net.program(irnn.Picard(tol=1e-6, max_iterations=40), loss=loss)
    nets = Replicas.start(np.stack([net.parameters * scale for scale in ([1, 1, 1], [-30, 1, 1])]))
    trainer = program.trainer(TrainerOptions(STILL, 2, 2, np.inf, irnn.Guard(), warm_start=True))
    unconverged = np.zeros((2, 1), np.int64)
    for _ in range(51):
        trainer.train(nets, Samples(X, np.zeros((3, 1))), order, 2, np.full(2, 1e-300), np.zeros((2, 1)), unconverged)
        assert not unconverged.any()
        net.topology.block("R").view(nets.parameters)[...] += 0.001


def test_samples_that_do_not_converge_start_from_zero_at_their_next_visit(engine):
    """z = x + 3 z runs away, and from there 30 iterations would not lead back to the equilibrium of z = x + 0.5 z."""
    X, Y = np.array([[1.0], [2.0], [-1.0]]), np.zeros((3, 1))
    net = make_neuron(engine, 3.0, "identity")

    def lower_r(progress: irnn.Progress) -> None:
        net.weights["R"][...] = 0.5

    solver = irnn.Picard(tol=1e-6, max_iterations=30)
    run = net.fit(
        X, Y, solver=solver, optimizer=STILL, epochs=3, callbacks=lower_r, warm_start=True, on_failure="ignore"
    )
    assert run.unconverged.tolist() == [3, 0, 0]
    assert run.loss[1] == make_neuron(engine, 0.5, "identity").loss_and_gradient(X, Y, solver=solver)[0]


# --- what they leave as it is --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": None},
        {"loss": OWN_LOSS},
        {"sample_weights": np.linspace(0, 2, 12)},
        {"solver": "newton"},
        {"solver": "anderson"},
        {"adjoint": "jacobian_free"},
        {"jacobian_penalty": 0.1},
        {"optimizer": irnn.Momentum(0.02), "schedule": "cosine", "clip": 0.5},
    ],
    ids=str,
)
def test_training_is_the_same_to_the_tolerance(engine, settings, X, Y):
    warm, cold = make_net(engine), make_net(engine)
    run, expected = fit(warm, X, Y, warm_start=True, **settings), fit(cold, X, Y, **settings)
    np.testing.assert_allclose(run.loss, expected.loss, rtol=1e-7)
    np.testing.assert_allclose(warm.parameters, cold.parameters, rtol=0, atol=1e-6)
    assert not run.unconverged.any()


@pytest.mark.parametrize("neurons", [24, 80])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_larger_and_layered_nets_are_the_same_to_the_tolerance(engine, neurons, dtype, rng):
    X, Y = rng.standard_normal((60, 4)), rng.standard_normal((60, 2))

    def trained(warm_start: bool) -> np.ndarray:
        layers = [irnn.Layer(neurons), irnn.Layer(6, "sigmoid"), irnn.Layer(3, lateral=False)]
        net = irnn.Network(4, layers, outputs=2, feedback=[(1, 0)], dtype=dtype, seed=1, engine=engine)
        return fit(net, X, Y, batch_size=40, epochs=4, warm_start=warm_start).loss

    np.testing.assert_allclose(trained(True), trained(False), rtol=1e-8 if dtype == "float64" else 1e-4)


@pytest.mark.parametrize("loss", ["mse", OWN_LOSS], ids=["mse", "own loss"])
def test_many_nets_end_as_if_trained_alone(engine, loss, X, Y):
    together, alone = ([make_net(engine, seed=seed) for seed in range(4)] for _ in range(2))
    settings = {"epochs": 10, "batch_size": 5, "loss": loss, "warm_start": True}
    runs = irnn.fit_many(together, X, Y, **settings)
    for net, other, run in zip(together, alone, runs, strict=True):
        expected = other.fit(X, Y, **settings)
        np.testing.assert_allclose(net.parameters, other.parameters, rtol=0, atol=1e-9)
        np.testing.assert_allclose(run.loss, expected.loss, rtol=1e-8)
        if engine == "julia":
            np.testing.assert_array_equal(net.parameters, other.parameters)


def test_early_stopping_ends_at_the_same_epoch(engine, X, Y):
    settings = {
        "validation": (X, -Y),
        "early_stopping": irnn.EarlyStopping(3),
        "optimizer": irnn.Adam(0.05),
        "epochs": 50,
    }
    warm, cold = make_net(engine), make_net(engine)
    run, expected = fit(warm, X, Y, warm_start=True, **settings), fit(cold, X, Y, **settings)
    assert run.best_epoch == expected.best_epoch
    assert len(run.loss) == len(expected.loss) < 50
    np.testing.assert_allclose(warm.parameters, cold.parameters, rtol=0, atol=1e-6)


# --- resuming ------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_whole_one_to_the_tolerance(engine, X, Y, tmp_path):
    whole, resumed = make_net(engine), make_net(engine)
    expected = fit(whole, X, Y, warm_start=True)
    fit(resumed, X, Y, warm_start=True, epochs=7, checkpoint=tmp_path / "run.ckpt")
    run = fit(resumed, X, Y, warm_start=True, resume=tmp_path / "run.ckpt")
    np.testing.assert_array_equal(run.loss[:7], expected.loss[:7])
    np.testing.assert_allclose(run.loss, expected.loss, rtol=1e-7)
    np.testing.assert_allclose(resumed.parameters, whole.parameters, rtol=0, atol=1e-6)


# --- what is refused -----------------------------------------------------------------------------------------


def test_unrolled_steps_which_begin_at_zero_are_refused(net, X, Y):
    with pytest.raises(ValueError, match=r"which adjoint=Unrolled\(steps=8\) does not use"):
        net.fit(X, Y, adjoint="unrolled", warm_start=True)


def test_lbfgs_whose_line_search_needs_one_function_is_refused(net, X, Y):
    with pytest.raises(ValueError, match="warm_start would make the loss that LBFGS searches"):
        net.fit(X, Y, optimizer="lbfgs", warm_start=True)

"""Training: what a run records, minibatches, validation, clipping, many nets, Ctrl-C, and runs that fail."""

from __future__ import annotations

import dataclasses
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ENVIRONMENT, make_net, make_oscillating

import implicit_rnn as irnn
from implicit_rnn.engines.base import TrainerOptions
from implicit_rnn.errors import ScaleWarning
from implicit_rnn.training import loop

# --- the record ----------------------------------------------------------------------------------------------


def test_run_records_every_epoch(net, engine, X, Y):
    run = net.fit(X, Y, epochs=7)
    assert run.loss.shape == run.unconverged.shape == (7,)
    assert not run.unconverged.any()
    assert run.engine == engine
    assert run.seconds > 0


def test_validation_of_unrolled_steps_takes_all_of_them(net, X, Y):
    before, _ = net.loss_and_gradient(X, Y, adjoint=irnn.Unrolled(3))
    run = net.fit(X, Y, adjoint=irnn.Unrolled(3), optimizer=irnn.SGD(1e-300), epochs=1, validation=(X, Y))
    assert run.validation_loss[0] == pytest.approx(before, rel=1e-12)


def test_training_reduces_the_loss(net, X, Y):
    run = net.fit(X, Y, optimizer=irnn.Adam(0.02), epochs=200)
    assert run.loss[-1] < 0.5 * run.loss[0]


def test_loss_of_an_epoch_is_that_before_its_update(net, X, Y):
    before, _ = net.loss_and_gradient(X, Y)
    assert net.fit(X, Y, epochs=1).loss[0] == pytest.approx(before, rel=1e-12)


def test_training_updates_the_parameters_in_place(net, X, Y):
    memory, before = net.parameters, net.parameters.copy()
    net.fit(X, Y, epochs=2)
    assert net.parameters is memory
    assert np.abs(memory - before).max() > 0


def test_same_call_gives_the_same_result(engine, X, Y):
    nets = [make_net(engine) for _ in range(2)]
    runs = [net.fit(X, Y, epochs=30, batch_size=5, seed=4) for net in nets]
    np.testing.assert_array_equal(nets[0].parameters, nets[1].parameters)
    np.testing.assert_array_equal(runs[0].loss, runs[1].loss)


@pytest.mark.parametrize("seconds", [0.0, 1e-4, 10.0])
def test_result_does_not_depend_on_the_length_of_the_chunks(engine, seconds, monkeypatch, X, Y):
    expected = make_net(engine)
    expected.fit(X, Y, epochs=40, batch_size=5)
    monkeypatch.setattr(loop, "CHUNK_SECONDS", seconds)
    net = make_net(engine)
    net.fit(X, Y, epochs=40, batch_size=5)
    np.testing.assert_array_equal(net.parameters, expected.parameters)


def test_ten_thousand_epochs_of_a_tiny_net_are_a_handful_of_calls(engine, monkeypatch, X, Y):
    net, calls = make_net(engine, neurons=2), []
    trainer = type(net.program().trainer(TrainerOptions(irnn.Adam(), 1, 12, 1.0, irnn.Guard())))

    def train(self, nets, samples, order, *rest, real=trainer.train):
        calls.append(len(order))
        real(self, nets, samples, order, *rest)

    monkeypatch.setattr(trainer, "train", train)
    monkeypatch.setattr(loop, "CHUNK_SECONDS", 60.0)  # as on an infinitely fast machine
    epochs = 10_000 if engine == "julia" else 1000
    net.fit(X, Y, epochs=epochs, schedule="cosine", clip=1.0, loss="huber", sample_weights=np.ones(12))
    assert sum(calls) == epochs
    assert len(calls) <= 6


def test_optimiser_starts_afresh_at_each_fit(engine, X, Y):
    net, other = make_net(engine), make_net(engine)
    net.fit(X, Y, epochs=5)
    other.parameters = net.parameters
    net.fit(X, Y, epochs=5)
    other.fit(X, Y, epochs=5)
    np.testing.assert_array_equal(net.parameters, other.parameters)


# --- minibatches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 11])
def test_batch_size_that_leaves_a_smaller_last_batch_visits_every_sample(net, batch_size, X, Y):
    net.fit(X, Y, optimizer=irnn.SGD(1e-300), epochs=1)  # full batch: the loss that every epoch must show
    expected = net.loss_and_gradient(X, Y)[0]
    run = net.fit(X, Y, optimizer=irnn.SGD(1e-300), epochs=3, batch_size=batch_size)
    np.testing.assert_allclose(run.loss, expected, rtol=1e-12)


def test_step_on_the_smaller_last_batch_uses_its_own_mean(engine, X, Y):
    net, twin = make_net(engine), make_net(engine)
    net.fit(X, Y, optimizer=irnn.SGD(0.1), epochs=1, batch_size=7, seed=2)
    order = np.random.default_rng(2).permutation(12)
    for part in (order[:7], order[7:]):
        _, gradient = twin.loss_and_gradient(X[part], Y[part])
        twin.parameters -= 0.1 * gradient
    np.testing.assert_allclose(net.parameters, twin.parameters, rtol=0, atol=1e-13)


@pytest.mark.parametrize("batch_size", [12, 13, 1000])
def test_batch_size_from_the_number_of_samples_is_full_batch(engine, batch_size, X, Y):
    nets = [make_net(engine) for _ in range(2)]
    nets[0].fit(X, Y, epochs=5)
    nets[1].fit(X, Y, epochs=5, batch_size=batch_size)
    np.testing.assert_array_equal(nets[0].parameters, nets[1].parameters)


@pytest.mark.parametrize(
    "more",
    [
        lambda X, Y: {"validation": (X, Y), "validation_every": 2},
        lambda X, Y: {"callbacks": lambda progress: None, "callback_every": 2},
        lambda X, Y: {"clip": 1e6},
    ],
    ids=["validation", "callbacks", "clip of longer gradients"],
)
def test_what_only_watches_or_does_not_bind_leaves_the_training_as_it_is(engine, more, X, Y):
    nets = [make_net(engine) for _ in range(2)]
    nets[0].fit(X, Y, epochs=9, batch_size=5)
    nets[1].fit(X, Y, epochs=9, batch_size=5, **more(X, Y))
    np.testing.assert_array_equal(nets[0].parameters, nets[1].parameters)


def test_seed_decides_the_order_of_the_minibatches(engine, X, Y):
    nets = [make_net(engine) for _ in range(2)]
    for seed, net in enumerate(nets):
        net.fit(X, Y, epochs=5, batch_size=5, seed=seed)
    assert np.abs(nets[0].parameters - nets[1].parameters).max() > 1e-9


def test_without_a_seed_no_other_run_has_the_order_of_the_minibatches(X, Y):
    nets = [make_net("numpy") for _ in range(2)]
    for net in nets:
        net.fit(X, Y, epochs=5, batch_size=5, seed=None)
    assert (nets[0].parameters != nets[1].parameters).any()


# --- validation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "epochs", "expected"), [(1, 4, [1, 2, 3, 4]), (3, 10, [3, 6, 9]), (5, 4, [])])
def test_validation_loss_is_taken_after_so_many_epochs(net, every, epochs, expected, X, Y):
    run = net.fit(X, Y, epochs=epochs, validation=(X[:4], Y[:4]), validation_every=every)
    assert run.validation_epochs.tolist() == expected
    assert run.validation_loss.shape == (len(expected),)


def test_validation_loss_is_that_of_the_parameters_of_its_epoch(net, X, Y):
    run = net.fit(X, Y, epochs=6, validation=(X[:4], Y[:4]), validation_every=3)
    assert run.validation_loss[-1] == pytest.approx(net.loss_and_gradient(X[:4], Y[:4])[0], rel=1e-10)


def test_run_without_validation_has_no_validation_losses(net, X, Y):
    run = net.fit(X, Y, epochs=2)
    assert run.validation_epochs.size == run.validation_loss.size == 0
    assert run.best_epoch is None


# --- clipping ------------------------------------------------------------------------------------------------


def test_clip_scales_a_longer_gradient_down_to_it(net, X, Y):
    before = net.parameters.copy()
    _, gradient = net.loss_and_gradient(X, Y)
    clip = 0.1 * np.linalg.norm(gradient)
    net.fit(X, Y, optimizer=irnn.SGD(1.0), epochs=1, clip=clip)
    np.testing.assert_allclose(before - net.parameters, 0.1 * gradient, rtol=1e-10, atol=1e-14)


# --- many nets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"batch_size": 5}, {"clip": 0.1}, {"optimizer": irnn.Nesterov(0.02)}], ids=str
)
def test_nets_trained_together_end_as_if_trained_alone(engine, settings, X, Y):
    together = [make_net(engine, seed=seed) for seed in range(3)]
    alone = [make_net(engine, seed=seed) for seed in range(3)]
    runs = irnn.fit_many(together, X, Y, epochs=20, **settings)
    for net, other, run in zip(together, alone, runs, strict=True):
        expected = other.fit(X, Y, epochs=20, **settings)
        np.testing.assert_allclose(net.parameters, other.parameters, rtol=0, atol=1e-9)
        np.testing.assert_allclose(run.loss, expected.loss, rtol=1e-8)


def test_nets_trained_together_have_validation_losses_of_their_own(engine, X, Y):
    nets = [make_net(engine, seed=seed) for seed in range(2)]
    runs = irnn.fit_many(nets, X, Y, epochs=3, validation=(X, Y))
    for net, run in zip(nets, runs, strict=True):
        assert run.validation_loss[-1] == pytest.approx(net.loss_and_gradient(X, Y)[0], rel=1e-10)


def test_net_that_fails_leaves_the_others_alone(engine, X, Y):
    nets, other = [make_net(engine, seed=seed) for seed in range(2)], make_net(engine, seed=1)
    nets[0].weights["C"][...] = 1e200  # its loss overflows
    with np.errstate(all="ignore"):
        runs = irnn.fit_many(nets, X, Y, epochs=5, on_failure="ignore")
    other.fit(X, Y, epochs=5)
    assert np.isnan(runs[0].loss).all()
    np.testing.assert_allclose(nets[1].parameters, other.parameters, rtol=0, atol=1e-9)


# --- runs that fail ------------------------------------------------------------------------------------------


def explode(net: irnn.Network, X: np.ndarray, Y: np.ndarray, **settings: object) -> irnn.Run:
    with np.errstate(all="ignore"):
        return net.fit(X, Y, optimizer=irnn.SGD(1e60), epochs=30, guard=irnn.Guard(parameter_norm=None), **settings)


def test_exploding_training_has_losses_that_are_not_numbers_and_finite_parameters(net, X, Y):
    run = explode(net, X, Y, on_failure="ignore")
    assert np.isfinite(run.loss[0])
    assert np.isnan(run.loss[-1])
    assert np.isfinite(net.parameters).all()


def feed_forward(engine: str) -> irnn.Network:
    """A net that always has its equilibrium, so that only its loss can fail."""
    return irnn.Network(3, [irnn.Layer(5, "tanh", lateral=False)], outputs=2, seed=0, engine=engine)


def test_exploding_training_is_told_even_if_every_sample_has_its_equilibrium(engine, X, Y):
    with pytest.warns(irnn.ConvergenceWarning):
        explode(feed_forward(engine), X, Y)
    with pytest.raises(irnn.ConvergenceError):
        explode(feed_forward(engine), X, Y, on_failure="raise")


def test_run_that_failed_keeps_its_parameters_whatever_the_chunks(engine):
    """One sample of three makes the loss overflow; no later epoch may begin to learn from the other two again."""
    X, Y = np.array([[1.0], [2.0], [1e200]]), np.zeros((3, 1))

    def trained(epochs: int) -> tuple[np.ndarray, np.ndarray]:
        net = irnn.Network(1, [irnn.Layer(1, "identity", lateral=False)], outputs=[0], seed=0, engine=engine)
        with np.errstate(all="ignore"), pytest.warns(ScaleWarning):
            run = net.fit(X, Y, epochs=epochs, batch_size=1, on_failure="ignore")
        return net.parameters, run.loss

    after_failure, _ = trained(1)
    parameters, loss = trained(20)
    np.testing.assert_array_equal(parameters, after_failure)
    assert np.isnan(loss).all()


@pytest.mark.filterwarnings("ignore::implicit_rnn.errors.ScaleWarning")
def test_training_whose_loss_overflows_is_not_said_to_lack_equilibria_alone(net, X):
    cause = (
        r"gradient is not finite in epoch 1, .* or the derivative of the loss overflows .* scaled inputs and targets"
    )
    net.weights["C"][...] = 1e20
    with pytest.warns(irnn.ConvergenceWarning, match=cause):
        net.fit(X, np.full((len(X), 2), 1e300), epochs=3)


def test_training_without_equilibrium_warns_once_and_counts_the_samples(engine):
    net = make_oscillating(engine)
    X = np.array([[5.0], [0.5], [0.7]])
    with pytest.warns(
        irnn.ConvergenceWarning, match="2 of 3 samples did not reach an equilibrium in epoch 1"
    ) as caught:
        run = net.fit(X, np.zeros((3, 1)), optimizer=irnn.SGD(1e-9), epochs=4, solver=irnn.Picard())
    assert len(caught) == 1
    assert run.unconverged[0] == 2


def test_training_without_equilibrium_raises_if_asked_to(engine):
    with pytest.raises(irnn.ConvergenceError, match="1 of 1 samples"):
        make_oscillating(engine).fit([[0.5]], [[0.0]], epochs=1, solver=irnn.Picard(), on_failure="raise")


def test_training_without_equilibrium_is_silent_if_failures_are_ignored(engine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = make_oscillating(engine).fit([[0.5]], [[0.0]], epochs=1, solver=irnn.Picard(), on_failure="ignore")
    assert run.unconverged.tolist() == [1]


# --- progress and Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [None, False])
def test_progress_bar_is_silent_where_there_is_no_terminal_or_none_is_wanted(net, X, Y, capfd, progress):
    net.fit(X, Y, epochs=3, progress=progress)
    assert capfd.readouterr() == ("", "")


def test_progress_bar_can_be_asked_for(net, X, Y, capfd):
    net.fit(X, Y, epochs=3, progress=True)
    assert "3/3" in capfd.readouterr().err


INTERRUPTED = """
    import os, signal, threading, time, warnings
    import numpy as np
    import implicit_rnn as irnn

    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((200, 3)), rng.standard_normal((200, 2))
    nets = [irnn.Network(3, [irnn.Layer(8)], outputs=2, seed=s, engine={engine!r}) for s in range({nets})]
    irnn.fit_many(nets, X, Y, epochs=1)
    start = [net.parameters.copy() for net in nets]
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    begin = time.perf_counter()
    try:
        irnn.fit_many(nets, X, Y, epochs=10**7, batch_size=50)
        print("finished")
    except KeyboardInterrupt:
        print("interrupted", time.perf_counter() - begin < 4)
    print("finite", all(np.isfinite(net.parameters).all() for net in nets))
    print("trained", all((net.parameters != p).any() for net, p in zip(nets, start)))
    print("usable", np.isfinite(nets[0].predict(X)).all())
"""


@pytest.mark.parametrize("nets", [1, 3])
def test_ctrl_c_ends_training_soon_and_leaves_finite_trained_parameters(engine, nets, run_python):
    done = run_python(INTERRUPTED.format(engine=engine, nets=nets), ENVIRONMENT)
    assert done.stdout.split("\n")[:4] == ["interrupted True", "finite True", "trained True", "usable True"], str(done)
    assert done.returncode == 0, str(done)


# --- what a person sees --------------------------------------------------------------------------------------


def test_repr_of_a_run_is_one_line_with_its_losses_and_its_end(X, Y):
    run = make_net("numpy").fit(X, Y, epochs=4, validation=(X, Y))
    text = repr(run)
    assert text.startswith(
        f"Run(4 epochs, loss {run.loss[-1]:.4g}, validation loss {run.validation_loss[-1]:.4g}, lowest "
    )
    assert text.endswith("engine numpy)")
    assert "\n" not in text


def test_repr_of_a_run_that_ended_early_says_why(X, Y):
    run = make_net("numpy").fit(X, Y, epochs=4, callbacks=lambda progress: True)
    assert repr(run).endswith("stopped a callback ended the training after epoch 1)")


def test_notebook_shows_a_run_as_a_table_in_which_texts_are_escaped(X, Y):
    run = dataclasses.replace(make_net("numpy").fit(X, Y, epochs=2), stopped="a < b & c")
    table = ElementTree.fromstring(run._repr_html_())
    assert [row[1].text for row in table.iter("tr")][-1] == "a < b & c"


@pytest.mark.filterwarnings("ignore::implicit_rnn.errors.ScaleWarning")
def test_squares_beyond_single_precision_do_not_halt_a_training_in_single_precision(engine, X):
    net = make_net(engine, dtype="float32")
    run = net.fit(X, np.full((len(X), 2), 1e22), optimizer=irnn.Adam(0.01), clip=1.0, epochs=3, progress=False)
    assert run.stopped is None
    assert np.isfinite(run.loss).all()


def test_squares_beyond_double_precision_do_not_halt_a_training_whose_gradient_is_clipped(engine, X):
    net = make_net(engine)
    net.weights["C"][...] = 1e200
    settings = {"guard": irnn.Guard(parameter_norm=None), "epochs": 3, "progress": False}
    run = net.fit(X, np.zeros((len(X), 2)), loss="mae", optimizer=irnn.SGD(0.1), clip=1.0, **settings)
    assert run.stopped is None
    assert np.isfinite(run.loss).all()

"""What ends a run early, and which parameters a net then has: best weights, early stopping, callbacks, guards."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
from conftest import make_net, make_oscillating

import implicit_rnn as irnn
from implicit_rnn.errors import ScaleWarning


@pytest.fixture
def overfitting(rng, engine):
    """Arguments of a fit whose validation loss falls at first and rises then."""
    net = make_net(engine, neurons=8)
    X, Xv = rng.standard_normal((12, 3)), rng.standard_normal((40, 3))
    Y, Yv = (np.sin(x[:, :2]) + 0.7 * rng.standard_normal((len(x), 2)) for x in (X, Xv))
    return net, X, Y, {"validation": (Xv, Yv), "optimizer": irnn.Adam(0.03), "epochs": 150}


# --- best weights --------------------------------------------------------------------------------------------


def test_best_epoch_is_that_of_the_lowest_validation_loss(overfitting):
    net, X, Y, settings = overfitting
    run = net.fit(X, Y, **settings)
    assert run.best_epoch == run.validation_epochs[run.validation_loss.argmin()]
    assert run.best_epoch < 100


@pytest.mark.parametrize(
    ("more", "best"),
    [
        ({}, False),
        ({"restore_best": True}, True),
        ({"early_stopping": irnn.EarlyStopping(10)}, True),
        ({"early_stopping": irnn.EarlyStopping(10, restore_best=False)}, False),
    ],
    ids=str,
)
def test_net_ends_with_its_last_weights_or_if_asked_for_with_the_best(overfitting, more, best):
    net, X, Y, settings = overfitting
    run = net.fit(X, Y, **settings, **more)
    loss, _ = net.loss_and_gradient(*settings["validation"])
    lowest, last = run.validation_loss.min(), run.validation_loss[-1]
    assert loss == pytest.approx(lowest if best else last, rel=1e-9)
    assert last > 1.001 * lowest
    assert (len(run.loss) < 150) == ("early_stopping" in more)


def test_best_weights_of_nets_trained_together_are_those_of_each(engine, X, Y):
    nets = [make_net(engine, seed=seed) for seed in range(3)]
    runs = irnn.fit_many(nets, X, Y, epochs=60, optimizer=irnn.Adam(0.1), validation=(X, -Y), restore_best=True)
    for net, run in zip(nets, runs, strict=True):
        assert net.loss_and_gradient(X, -Y)[0] == pytest.approx(run.validation_loss.min(), rel=1e-8)


@pytest.mark.parametrize("settings", [{"restore_best": True}, {"early_stopping": irnn.EarlyStopping(3)}], ids=str)
def test_best_weights_need_validation_data(net, settings, X, Y):
    with pytest.raises(ValueError, match="needs validation="):
        net.fit(X, Y, **settings)


@pytest.mark.parametrize("settings", [{"restore_best": True}, {"early_stopping": irnn.EarlyStopping(3)}], ids=str)
def test_fit_too_short_for_a_validation_loss_warns_that_the_last_weights_are_left(net, settings, X, Y):
    with pytest.warns(
        UserWarning, match="no validation loss .* the first is that of epoch 5, but training ended at epoch 4"
    ):
        net.fit(X, Y, validation=(X, Y), validation_every=5, epochs=4, **settings)


def test_validation_losses_that_are_never_finite_warn_that_the_last_weights_are_left(net, X, Y):
    with pytest.warns(UserWarning, match=r"no validation loss was finite, .* the last parameters are kept"):
        run = net.fit(X, Y, validation=(X, Y + 1e200), epochs=3, restore_best=True)
    assert run.best_epoch is None
    assert np.isinf(run.validation_loss).all()


# --- early stopping ------------------------------------------------------------------------------------------


def test_training_stops_once_the_loss_has_not_improved_for_patience_epochs(overfitting):
    net, X, Y, settings = overfitting
    run = net.fit(X, Y, early_stopping=irnn.EarlyStopping(patience=10), **settings)
    assert len(run.loss) == run.best_epoch + 10 < 150
    assert run.stopped == f"the validation loss has not improved in the 10 epochs up to epoch {len(run.loss)}"


def test_patience_counts_epochs_however_rare_validation_is(overfitting):
    net, X, Y, settings = overfitting
    run = net.fit(X, Y, early_stopping=irnn.EarlyStopping(10), validation_every=4, **settings)
    assert len(run.loss) == run.best_epoch + 12


def test_improvements_up_to_min_delta_do_not_count(net, X, Y):
    stopping = irnn.EarlyStopping(5, min_delta=10.0)
    run = net.fit(X, Y, epochs=50, validation=(X, Y), early_stopping=stopping)
    assert len(run.loss) == 6  # the first loss improves on none
    assert run.best_epoch == 6


def test_net_that_stops_early_leaves_the_others_to_train_on(engine, X, Y):
    settings = {"epochs": 30, "optimizer": irnn.Adam(0.2), "validation": (X[:4], -Y[:4])}
    settings["early_stopping"] = irnn.EarlyStopping(4, min_delta=1e-3)
    together = [make_net(engine, seed=seed) for seed in range(3)]
    runs = irnn.fit_many(together, X, Y, **settings)
    assert len({len(run.loss) for run in runs}) > 1
    for seed, (net, run) in enumerate(zip(together, runs, strict=True)):
        alone = make_net(engine, seed=seed)
        expected = alone.fit(X, Y, **settings)
        assert len(run.loss) == len(expected.loss)
        np.testing.assert_allclose(net.parameters, alone.parameters, rtol=0, atol=1e-8)
        np.testing.assert_array_equal(run.validation_epochs, expected.validation_epochs)
        assert np.isfinite(run.loss).all()


# --- callbacks -----------------------------------------------------------------------------------------------


def test_callback_is_told_what_the_run_records(net, X, Y):
    seen: list[irnn.Progress] = []
    watch = {"validation": (X, Y), "validation_every": 2, "callbacks": [seen.append], "callback_every": 2}
    run = net.fit(X, Y, epochs=6, schedule="cosine", **watch)
    assert [progress.epoch for progress in seen] == [2, 4, 6]
    assert [progress.loss for progress in seen] == run.loss[1::2].tolist()
    assert [progress.validation_loss for progress in seen] == run.validation_loss.tolist()
    assert [progress.learning_rate for progress in seen] == run.learning_rate[1::2].tolist()
    assert seen[-1].net is net
    assert (seen[0].index, seen[0].epochs, seen[0].unconverged) == (0, 6, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen[0].epoch = 3


def test_callback_sees_the_parameters_of_its_epoch(engine, X, Y):
    nets = [make_net(engine, seed=seed) for seed in range(2)]
    seen = {}

    def note(progress: irnn.Progress) -> None:
        if progress.epoch == 3:
            seen[progress.index] = progress.net.parameters.copy()

    irnn.fit_many(nets, X, Y, epochs=5, callbacks=[note])
    alone = [make_net(engine, seed=seed) for seed in range(2)]
    irnn.fit_many(alone, X, Y, epochs=3)
    for k in range(2):
        np.testing.assert_array_equal(seen[k], alone[k].parameters)


def test_callback_that_returns_true_stops_its_net(engine, X, Y):
    nets = [make_net(engine, seed=seed) for seed in range(3)]
    runs = irnn.fit_many(nets, X, Y, epochs=8, callbacks=[lambda progress: progress.index == 1 and progress.epoch == 3])
    assert [len(run.loss) for run in runs] == [8, 3, 8]
    assert [run.stopped for run in runs] == [None, "a callback ended the training after epoch 3", None]


def test_callback_that_raises_stop_training_stops_all_nets_in_good_order(engine, X, Y):
    def stop(progress: irnn.Progress) -> None:
        if progress.epoch == 3:
            raise irnn.StopTraining

    nets = [make_net(engine, seed=seed) for seed in range(2)]
    runs = irnn.fit_many(nets, X, Y, epochs=8, callbacks=[stop])
    assert [len(run.loss) for run in runs] == [3, 3]


@pytest.mark.parametrize("answer", [np.zeros(2), np.array([True]), 1, 0.0, "no", [], {"stop": True}])
def test_answer_of_a_callback_that_is_neither_yes_nor_no_is_an_error_that_names_it(net, answer, X, Y):
    def undecided(progress: irnn.Progress) -> object:
        return answer

    with pytest.raises(
        TypeError, match=r"the callback .*undecided returned .*; expected True to end .*, False or None"
    ):
        net.fit(X, Y, epochs=3, callbacks=[lambda progress: None, undecided])


@pytest.mark.parametrize(("answer", "epochs"), [(np.True_, 1), (np.False_, 3), (False, 3), (None, 3)])
def test_callback_may_answer_in_booleans_of_numpy(net, answer, epochs, X, Y):
    assert len(net.fit(X, Y, epochs=3, callbacks=lambda progress: answer).loss) == epochs


def test_error_in_a_callback_reaches_the_caller(net, X, Y):
    def fail(progress: irnn.Progress) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        net.fit(X, Y, epochs=3, callbacks=[fail])


def test_net_in_training_is_trained_by_no_other_call(net, X, Y):
    def train_again(progress: irnn.Progress) -> None:
        net.fit(X, Y, epochs=1)

    with pytest.raises(RuntimeError, match="is being trained by another call of fit") as refused:
        net.fit(X, Y, epochs=3, callbacks=train_again)
    assert len(net.fit(X, Y, epochs=2).loss) == 2, refused  # though the traceback keeps the first call's frames


def test_net_in_training_in_another_thread_keeps_its_parameters_from_what_is_resumed(net, X, Y):
    begun, refused = threading.Event(), threading.Event()
    first = net.fit(X, Y, epochs=1)

    def wait(progress: irnn.Progress) -> None:
        begun.set()
        assert refused.wait(60)

    thread = threading.Thread(target=net.fit, args=(X, Y), kwargs={"epochs": 2, "callbacks": wait})
    thread.start()
    assert begun.wait(60)
    before = net.parameters.copy()
    with pytest.raises(RuntimeError, match="is being trained by another call of fit"):
        net.fit(X, Y, epochs=2, resume=first)
    np.testing.assert_array_equal(net.parameters, before)
    refused.set()
    thread.join()
    net.fit(X, Y, epochs=1)


# --- guards --------------------------------------------------------------------------------------------------


def test_exploding_parameters_halt_the_training_and_the_last_good_ones_are_kept(net, X, Y):
    before = net.parameters.copy()
    with pytest.warns(irnn.ConvergenceWarning, match="norm of the parameters exceeds 50 after epoch 1.*learning_rate"):
        run = net.fit(X, Y, optimizer=irnn.SGD(1e3), epochs=9, guard=irnn.Guard(parameter_norm=50))
    assert len(run.loss) == 1
    assert np.isfinite(run.loss).all()
    assert "norm of the parameters" in run.stopped
    np.testing.assert_array_equal(net.parameters, before)


def test_exploding_parameters_are_the_reason_even_if_samples_missed_their_equilibrium(net, X, Y):
    few = irnn.Picard(max_iterations=1)
    with pytest.warns(irnn.ConvergenceWarning, match="norm of the parameters exceeds 50 after epoch 1"):
        run = net.fit(X, Y, optimizer=irnn.SGD(1e3), epochs=9, solver=few, guard=irnn.Guard(parameter_norm=50))
    assert run.unconverged.all()
    assert np.isfinite(run.loss).all()


def test_parameters_of_the_last_good_epoch_are_those_it_began_with(engine, X, Y):
    net, other = make_net(engine), make_net(engine)
    limit = 1.2 * np.linalg.norm(net.parameters)
    settings = {"optimizer": irnn.SGD(0.005), "batch_size": 5, "on_failure": "ignore"}
    run = net.fit(X, -9 * Y, epochs=500, guard=irnn.Guard(parameter_norm=limit), **settings)
    assert 1 < len(run.loss) < 500
    other.fit(X, -9 * Y, epochs=len(run.loss) - 1, **settings)
    np.testing.assert_array_equal(net.parameters, other.parameters)
    assert np.linalg.norm(net.parameters) <= limit


def test_too_many_unconverged_samples_halt_the_training(engine):
    net = make_oscillating(engine)
    X, before = np.array([[5.0], [0.5], [0.7]]), net.parameters.copy()
    settings = {"optimizer": irnn.SGD(1e-9), "epochs": 4, "solver": irnn.Picard()}
    message = (
        r"2 of 3 samples did not reach an equilibrium in epoch 1, more than the share of 0.5 that guard allows.*Perron"
    )
    with pytest.warns(irnn.ConvergenceWarning, match=message) as caught:
        run = net.fit(X, np.zeros((3, 1)), guard=irnn.Guard(unconverged=0.5), **settings)
    assert len(caught) == 1
    assert run.unconverged.tolist() == [2]
    np.testing.assert_array_equal(net.parameters, before)
    assert (
        len(net.fit(X, np.zeros((3, 1)), guard=irnn.Guard(unconverged=0.7), on_failure="ignore", **settings).loss) == 4
    )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("batch_size", [5, None])
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": irnn.SGD(1e300)},
        {"optimizer": irnn.Adam(1e300), "guard": irnn.Guard(parameter_norm=None)},
        {"optimizer": irnn.AdamW(1e300, weight_decay=1e10), "validation": True},
        {"optimizer": irnn.RMSProp(1e300), "loss": "huber", "jacobian_penalty": 0.1},
    ],
    ids=str,
)
def test_absurd_learning_rate_is_told_by_the_guard_alone(engine, settings, batch_size, dtype, X, Y):
    net = make_net(engine, dtype=dtype)
    if "validation" in settings:
        settings = settings | {"validation": (X, Y)}
    with pytest.warns(irnn.ConvergenceWarning, match="training halted") as told:
        run = net.fit(X, Y, epochs=5, batch_size=batch_size, **settings)
    assert [warning.category for warning in told] == [irnn.ConvergenceWarning]
    assert len(run.loss) <= 2
    assert np.isfinite(net.parameters).all()


def test_warnings_of_a_loss_of_ones_own_are_not_hidden(X, Y):
    def logarithm(y, t):
        with np.errstate(divide="ignore"):
            return np.log(y - 9)[:, 0], 1 / (y - 9)

    net = irnn.Network(X.shape[1], [irnn.Layer(2)], outputs=1, seed=0, engine="numpy")
    with pytest.warns(RuntimeWarning, match="invalid value encountered in log"):
        net.fit(X, Y[:, :1], epochs=1, loss=irnn.CustomLoss(logarithm), on_failure="ignore")


def test_guard_raises_if_asked_to(net, X, Y):
    with pytest.raises(irnn.ConvergenceError, match="norm of the parameters"):
        net.fit(X, Y, optimizer=irnn.SGD(1e3), guard=irnn.Guard(parameter_norm=50), on_failure="raise")


def test_guarded_lbfgs_halts_too(net, X, Y):
    with pytest.warns(ScaleWarning):
        run = net.fit(X, 1e3 * Y, optimizer="lbfgs", guard=irnn.Guard(parameter_norm=20), on_failure="ignore")
    assert "norm of the parameters" in run.stopped
    assert np.linalg.norm(net.parameters) <= 20


# --- the picture ---------------------------------------------------------------------------------------------


@pytest.fixture
def pyplot():
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


@pytest.mark.usefixtures("pyplot")
def test_run_draws_its_losses(overfitting):
    net, X, Y, settings = overfitting
    run = net.fit(X, Y, **settings)
    ax = run.plot()
    assert ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "training",
        "validation",
        f"best, epoch {run.best_epoch}",
    ]
    assert run.plot(ax) is ax


@pytest.mark.usefixtures("pyplot")
@pytest.mark.parametrize("epochs", [1, 3, 20])
def test_epochs_are_numbered_by_whole_numbers(epochs, X, Y):
    ticks = make_net("numpy").fit(X, Y, epochs=epochs).plot().get_xticks()
    assert all(tick == int(tick) for tick in ticks)


@pytest.mark.usefixtures("pyplot")
@pytest.mark.parametrize(("factor", "shift", "scale"), [(1, 0, "log"), (1, -9, "linear"), (0, 0, "linear")])
def test_losses_below_and_at_zero_are_drawn_too(factor, shift, scale, X, Y):
    loss = irnn.CustomLoss(lambda y, t: (factor * ((y - t) ** 2).sum(axis=1) + shift, factor * 2 * (y - t)))
    ax = make_net("numpy").fit(X, Y, epochs=1, loss=loss).plot()
    assert ax.get_yscale() == scale
    assert ax.lines[0].get_marker() == "o"  # of one epoch there is no line

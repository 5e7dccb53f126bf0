"""Checkpoints: a resumed run is the run that was never stopped, bit by bit, whatever happened to the process."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ENVIRONMENT, make_net, run_process
from safetensors.numpy import save_file

import implicit_rnn as irnn
from implicit_rnn import files
from implicit_rnn.training import loop

Failure = irnn.CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.safetensors"


class Killed(Exception):  # noqa: N818
    """Ends a run in the middle, without any good order."""


def three_nets(engine: str = "numpy") -> list[irnn.Network]:
    return [make_net(engine, seed=seed) for seed in range(3)]


def stop_after(epoch: int):
    def stop(progress: irnn.Progress) -> None:
        if progress.epoch >= epoch:
            raise Killed

    return stop


def assert_equal_runs(run: irnn.Run, other: irnn.Run) -> None:
    curves = ("loss", "unconverged", "learning_rate", "validation_epochs", "validation_loss", "validation_unconverged")
    for name in curves:
        np.testing.assert_array_equal(getattr(run, name), getattr(other, name), name)
    assert (run.best_epoch, run.stopped) == (other.best_epoch, other.stopped)


def assert_equal_trainings(nets, runs, other_nets, other_runs) -> None:
    for net, run, other, other_run in zip(nets, runs, other_nets, other_runs, strict=True):
        np.testing.assert_array_equal(net.parameters, other.parameters)
        assert_equal_runs(run, other_run)


def interrupted(net: irnn.Network, X, Y, path: Path, epoch: int, **settings) -> None:
    """Train to ``epoch``, with a checkpoint one epoch before."""
    checkpoint = irnn.Checkpoint(path, every_epochs=1)
    with pytest.raises(Killed):
        net.fit(X, Y, checkpoint=checkpoint, callbacks=[stop_after(epoch)], **settings)


# --- bit by bit ----------------------------------------------------------------------------------------------

RUNS = {
    "sgd": {"optimizer": irnn.SGD(0.1)},
    "momentum": {"optimizer": irnn.Momentum(0.05, weight_decay=1e-3), "schedule": irnn.Step(4, 0.5)},
    "nesterov": {"optimizer": irnn.Nesterov(0.05), "schedule": "one_cycle", "clip": 0.1},
    "adam": {"optimizer": irnn.Adam(0.03), "schedule": irnn.WarmUp(3, irnn.Cosine()), "jacobian_penalty": 0.1},
    "adamw": {"optimizer": irnn.AdamW(0.03), "loss": "huber", "sample_weights": np.arange(1, 13)},
    "rmsprop": {"optimizer": irnn.RMSProp(0.01), "restore_best": True},
    "lbfgs": {"optimizer": irnn.LBFGS(memory=3), "batch_size": None, "jacobian_penalty": 0.1},
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", list(RUNS))
def test_resumed_run_is_the_run_that_never_stopped(engine, name, dtype, path, X, Y):
    settings = {"epochs": 20, "batch_size": 5, "validation": (X[:4], Y[:4]), "validation_every": 2, "seed": 3}
    settings |= RUNS[name]
    whole, resumed = make_net(engine, dtype=dtype), make_net(engine, dtype=dtype, seed=99)
    expected = whole.fit(X, Y, **settings)
    interrupted(make_net(engine, dtype=dtype), X, Y, path, 12, **settings)
    run = resumed.fit(X, Y, resume=path, **settings)
    np.testing.assert_array_equal(resumed.parameters, whole.parameters)
    assert_equal_runs(run, expected)


@pytest.mark.parametrize("seconds", [0.0, 10.0])
def test_neither_the_length_of_chunks_nor_checkpoints_matter(engine, seconds, monkeypatch, path, X, Y):
    settings = {"epochs": 30, "batch_size": 5, "optimizer": irnn.Adam(0.03), "schedule": "cosine"}
    whole, resumed = make_net(engine), make_net(engine)
    whole.fit(X, Y, **settings)
    monkeypatch.setattr(loop, "CHUNK_SECONDS", seconds)
    watch = {"checkpoint": irnn.Checkpoint(path, every_epochs=7), "callbacks": stop_after(25), "callback_every": 5}
    with pytest.raises(Killed):
        resumed.fit(X, Y, **watch, **settings)
    resumed.fit(X, Y, resume=path, checkpoint=irnn.Checkpoint(path, every_epochs=4), **settings)
    np.testing.assert_array_equal(resumed.parameters, whole.parameters)


def test_many_nets_of_which_some_have_ended_are_resumed(engine, path, X, Y):
    settings = {"epochs": 30, "optimizer": irnn.Adam(0.2), "validation": (X[:4], -Y[:4]), "batch_size": 5}
    settings["early_stopping"] = irnn.EarlyStopping(4, min_delta=1e-3)
    whole, resumed = three_nets(engine), three_nets(engine)
    expected = irnn.fit_many(whole, X, Y, **settings)
    ends = sorted(len(run.loss) for run in expected)
    assert ends[0] < ends[-1]
    watched = {"checkpoint": irnn.Checkpoint(path, every_epochs=1), "callbacks": [stop_after(ends[0] + 2)]}
    with pytest.raises(Killed):
        irnn.fit_many(three_nets(engine), X, Y, **watched, **settings)
    runs = irnn.fit_many(resumed, X, Y, resume=path, **settings)
    assert_equal_trainings(resumed, runs, whole, expected)


def test_finished_run_is_returned_as_it_was(engine, path, X, Y):
    net, other = make_net(engine), make_net(engine)
    run = net.fit(X, Y, epochs=5, checkpoint=path, validation=(X, Y), restore_best=True)
    again = other.fit(X, Y, epochs=5, resume=path, validation=(X, Y), restore_best=True)
    np.testing.assert_array_equal(net.parameters, other.parameters)
    assert_equal_runs(run, again)
    assert again.seconds == run.seconds


@pytest.mark.parametrize("schedule", [irnn.Constant(), irnn.Step(3), irnn.WarmUp(2)], ids=str)
def test_run_may_be_prolonged_where_the_schedule_does_not_depend_on_its_end(net, engine, schedule, path, X, Y):
    longer = make_net(engine)
    net.fit(X, Y, epochs=5, schedule=schedule, checkpoint=path, batch_size=5)
    net.fit(X, Y, epochs=9, schedule=schedule, resume=path, batch_size=5)
    longer.fit(X, Y, epochs=9, schedule=schedule, batch_size=5)
    np.testing.assert_array_equal(net.parameters, longer.parameters)


def test_run_that_a_callback_ended_goes_on(engine, path, X, Y):
    def pause(progress: irnn.Progress) -> None:
        if progress.epoch == 4:
            raise irnn.StopTraining

    whole, paused = make_net(engine), make_net(engine)
    whole.fit(X, Y, epochs=9, batch_size=5)
    assert len(paused.fit(X, Y, epochs=9, batch_size=5, checkpoint=path, callbacks=[pause]).loss) == 4
    run = paused.fit(X, Y, epochs=9, batch_size=5, resume=path)
    assert (len(run.loss), run.stopped) == (9, None)
    np.testing.assert_array_equal(paused.parameters, whole.parameters)


def end_one(progress: irnn.Progress) -> bool:
    return progress.index == 1 and progress.epoch == 4


@pytest.mark.parametrize("killed", [5, 7])  # with the checkpoint of the epoch of the callback, and of a later one
def test_net_that_a_callback_ended_before_the_others_stays_ended(engine, killed, path, X, Y):
    settings = {"epochs": 9, "batch_size": 5}
    whole, resumed = three_nets(engine), three_nets(engine)
    expected = irnn.fit_many(whole, X, Y, callbacks=end_one, **settings)
    watched = {"checkpoint": irnn.Checkpoint(path, every_epochs=1), "callbacks": [end_one, stop_after(killed)]}
    with pytest.raises(Killed):
        irnn.fit_many(three_nets(engine), X, Y, **watched, **settings)
    runs = irnn.fit_many(resumed, X, Y, resume=path, **settings)
    assert [len(run.loss) for run in runs] == [9, 4, 9]
    assert_equal_trainings(resumed, runs, whole, expected)


@pytest.mark.parametrize("begun", [4, 6])  # up to the epoch of the callback, and to a later one
def test_more_epochs_leave_a_net_ended_that_a_callback_ended_before_the_others(engine, begun, X, Y):
    nets = three_nets(engine)
    runs = irnn.fit_many(nets, X, Y, epochs=begun, batch_size=5, callbacks=end_one)
    runs = irnn.fit_many(nets, X, Y, epochs=9, batch_size=5, resume=runs)
    assert [len(run.loss) for run in runs] == [9, 4, 9]
    assert runs[1].stopped == "a callback ended the training after epoch 4"


def test_run_that_callbacks_ended_goes_on_with_the_nets_that_were_in_it_to_the_end(X, Y):
    nets = three_nets()
    ends = [6, 4, 6]
    runs = irnn.fit_many(nets, X, Y, epochs=9, callbacks=lambda progress: progress.epoch == ends[progress.index])
    assert [len(run.loss) for run in runs] == ends
    runs = irnn.fit_many(nets, X, Y, epochs=9, resume=runs)
    assert [len(run.loss) for run in runs] == [9, 4, 9]


THREADS = """
    import sys
    import numpy as np
    import implicit_rnn as irnn

    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((3000, 4)), rng.standard_normal((3000, 2))
    def stop(progress):
        if progress.epoch == 2:
            raise irnn.StopTraining
    net = irnn.Network(4, [irnn.Layer(12)], outputs=2, seed=0, engine="julia")
    settings = dict(epochs=4, batch_size=2500, optimizer=irnn.Adam(0.02), progress=False)
    if sys.argv[1:] == ["resumed"]:
        net.fit(X, Y, checkpoint="run", callbacks=[stop], **settings)
        net.fit(X, Y, resume="run", **settings)
    else:
        net.fit(X, Y, **settings)
    print(net.parameters.tobytes().hex())
"""


@pytest.mark.julia
def test_number_of_threads_does_not_change_a_run_resumed_or_not(tmp_path):
    def outcome(threads: int, *arguments: str) -> str:
        env = ENVIRONMENT | {"PYTHON_JULIACALL_THREADS": str(threads), "PYTHON_JULIACALL_HANDLE_SIGNALS": "yes"}
        command = [sys.executable, "-c", textwrap.dedent(THREADS), *arguments]
        done = run_process(command, env, 120, tmp_path)
        assert done.returncode == 0, str(done)
        return done.stdout

    assert outcome(1) == outcome(2, "resumed")


# --- runs in memory ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:there is no validation loss")
@pytest.mark.parametrize("name", list(RUNS))
def test_fits_of_one_epoch_each_are_one_fit(engine, name, X, Y):
    epochs = 150 if name == "adamw" else 12
    settings = {"batch_size": 5, "validation": (X[:4], Y[:4]), "validation_every": 2, "seed": 3} | RUNS[name]
    if name in ("nesterov", "adam"):
        settings["schedule"] = irnn.WarmUp(3)  # those of RUNS depend on the last epoch
    whole, net, run = make_net(engine), make_net(engine), None
    expected = whole.fit(X, Y, epochs=epochs, **settings)
    for epoch in range(1, epochs + 1):
        run = net.fit(X, Y, epochs=epoch, resume=run, **settings)
    np.testing.assert_array_equal(net.parameters, whole.parameters)
    assert_equal_runs(run, expected)


def test_run_that_was_pickled_is_gone_on_from_with_any_net_of_its_kind(engine, X, Y):
    settings = {"batch_size": 5, "optimizer": irnn.Nesterov(0.05), "restore_best": True, "validation": (X[:4], -Y[:4])}
    whole, part, other = make_net(engine), make_net(engine), make_net(engine, seed=99)
    expected = whole.fit(X, Y, epochs=20, **settings)
    run = pickle.loads(pickle.dumps(part.fit(X, Y, epochs=8, **settings)))
    assert_equal_runs(other.fit(X, Y, epochs=20, resume=run, **settings), expected)
    np.testing.assert_array_equal(other.parameters, whole.parameters)


def test_run_is_not_changed_by_what_goes_on_from_it(net, X, Y):
    run = net.fit(X, Y, epochs=3, batch_size=5)
    before = pickle.dumps(run)
    once = net.fit(X, Y, epochs=9, batch_size=5, resume=run)
    again = net.fit(X, Y, epochs=9, batch_size=5, resume=run)
    assert pickle.dumps(run) == before
    assert_equal_runs(once, again)


def test_many_nets_go_on_from_their_runs(engine, X, Y):
    settings = {"optimizer": irnn.Adam(0.2), "validation": (X[:4], -Y[:4]), "batch_size": 5}
    settings["early_stopping"] = irnn.EarlyStopping(4, min_delta=1e-3)
    whole, parts = three_nets(engine), three_nets(engine)
    expected = irnn.fit_many(whole, X, Y, epochs=30, **settings)
    ends = sorted(len(run.loss) for run in expected)
    assert ends[0] < ends[-1]
    begun = irnn.fit_many(parts, X, Y, epochs=ends[0] + 1, **settings)
    begun = [pickle.loads(pickle.dumps(run)) for run in begun]
    runs = irnn.fit_many(parts, X, Y, epochs=30, resume=begun, **settings)
    assert_equal_trainings(parts, runs, whole, expected)


def test_run_with_all_its_epochs_is_refused_rather_than_returned(X, Y):
    net = make_net("numpy")
    run = net.fit(X, Y, epochs=5)
    before = net.parameters.copy()
    with pytest.raises(Failure, match="resume is at epoch 5 already, and epochs=5 counts from the start of its run"):
        net.fit(X, Y, epochs=5, resume=run)
    np.testing.assert_array_equal(net.parameters, before)


def test_runs_other_than_all_of_one_call_are_refused(X, Y):
    nets = [make_net("numpy", seed=seed) for seed in range(2)]
    runs, others = (irnn.fit_many(nets, X, Y, epochs=epochs) for epochs in (2, 3))
    with pytest.raises(Failure, match="resume has runs of several calls"):
        irnn.fit_many(nets, X, Y, epochs=4, resume=[runs[0], others[1]])
    with pytest.raises(Failure, match="resume has 1 runs of a call that has returned 2; expected all"):
        nets[0].fit(X, Y, epochs=4, resume=runs[0])
    with pytest.raises(Failure, match="nets is 2 there and 3 here"):
        irnn.fit_many([*nets, make_net("numpy")], X, Y, epochs=4, resume=runs)


REORDERED = {
    "runs": lambda nets, runs: (nets, runs[::-1]),
    "nets": lambda nets, runs: (nets[::-1], runs),
    "fresh nets": lambda nets, runs: (three_nets()[::-1], runs),
    "fresh nets, one other": lambda nets, runs: ([make_net("numpy", seed=9), *three_nets()[:2]], runs),
}


@pytest.mark.parametrize("restore_best", [False, True])
@pytest.mark.parametrize("reordered", REORDERED.values(), ids=REORDERED)
def test_nets_in_another_order_than_their_runs_are_refused(reordered, restore_best, X, Y):
    settings = {"batch_size": 5, "validation": (X[:4], -Y[:4]), "restore_best": restore_best}
    nets = three_nets()
    runs = irnn.fit_many(nets, X, Y, epochs=3, **settings)
    given, resume = reordered(nets, runs)
    before = [net.parameters.copy() for net in given]
    with pytest.raises(Failure, match=r"nets\[\d\] has the parameters of net \d of resume, .* in the same order"):
        irnn.fit_many(given, X, Y, epochs=6, resume=resume, **settings)
    np.testing.assert_array_equal([net.parameters for net in given], before)


def test_nets_in_another_order_than_those_of_a_checkpoint_are_refused(path, X, Y):
    irnn.fit_many(three_nets(), X, Y, epochs=3, checkpoint=path)
    with pytest.raises(Failure, match=r"nets\[0\] has the parameters of net 2 of .*run\.safetensors"):
        irnn.fit_many(three_nets()[::-1], X, Y, epochs=6, resume=path)


def test_nets_and_their_runs_may_both_be_in_another_order(engine, X, Y):
    whole, parts = three_nets(engine), three_nets(engine)
    irnn.fit_many(whole, X, Y, epochs=8, batch_size=5)
    runs = irnn.fit_many(parts, X, Y, epochs=3, batch_size=5)
    irnn.fit_many(parts[::-1], X, Y, epochs=8, batch_size=5, resume=runs[::-1])
    for net, other in zip(parts, whole, strict=True):
        np.testing.assert_allclose(net.parameters, other.parameters, rtol=0, atol=1e-10)


def test_nets_of_other_parameters_take_those_of_the_runs_in_order(X, Y):
    whole, alike = three_nets(), [make_net("numpy", seed=0) for _ in range(3)]
    irnn.fit_many(whole, X, Y, epochs=6)
    runs = irnn.fit_many(three_nets(), X, Y, epochs=3)
    irnn.fit_many(alike, X, Y, epochs=6, resume=runs)
    np.testing.assert_array_equal([net.parameters for net in alike], [net.parameters for net in whole])


@pytest.mark.parametrize("resume", [5, [], ["run"], {"epoch": 3}], ids=str)
def test_what_is_neither_a_path_nor_a_run_is_refused(resume, X, Y):
    with pytest.raises(TypeError, match="resume must be the path of a checkpoint, a Run"):
        make_net("numpy").fit(X, Y, resume=resume)


# --- Ctrl-C --------------------------------------------------------------------------------------------------


def test_ctrl_c_in_a_callback_writes_the_last_epoch_before_it_raises(engine, path, X, Y):
    def interrupt(progress: irnn.Progress) -> None:
        if progress.epoch == 7:
            signal.raise_signal(signal.SIGINT)

    settings = {"epochs": 20, "batch_size": 5, "optimizer": irnn.Adam(0.03), "schedule": "cosine"}
    whole, resumed = make_net(engine), make_net(engine)
    expected = whole.fit(X, Y, **settings)
    with pytest.raises(KeyboardInterrupt):
        resumed.fit(X, Y, checkpoint=path, callbacks=interrupt, **settings)
    assert epoch_of(path) == 6
    assert_equal_runs(resumed.fit(X, Y, resume=path, **settings), expected)
    np.testing.assert_array_equal(resumed.parameters, whole.parameters)


@pytest.mark.parametrize("error", [Killed, SystemExit, MemoryError, ConnectionError])
def test_error_in_a_callback_writes_the_last_epoch_before_it_is_raised(error, path, X, Y):
    def fail(progress: irnn.Progress) -> None:
        if progress.epoch == 5:
            raise error

    with pytest.raises(error):
        make_net("numpy").fit(X, Y, epochs=9, checkpoint=path, callbacks=fail)
    assert epoch_of(path) == 4


def test_ctrl_c_at_any_moment_leaves_a_checkpoint_that_goes_on_bit_by_bit(engine, path, X, Y):
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))

    def start(progress: irnn.Progress) -> None:
        if progress.epoch == 3:
            timer.start()

    settings = {"batch_size": 5, "optimizer": irnn.Adam(0.03), "validation": (X[:4], Y[:4])}
    with pytest.raises(KeyboardInterrupt):
        make_net(engine).fit(X, Y, epochs=10**6, checkpoint=path, callbacks=start, callback_every=3, **settings)
    epochs = epoch_of(path) + 5
    assert epochs > 7
    whole, resumed = make_net(engine), make_net(engine)
    expected = whole.fit(X, Y, epochs=epochs, **settings)
    assert_equal_runs(resumed.fit(X, Y, epochs=epochs, resume=path, **settings), expected)
    np.testing.assert_array_equal(resumed.parameters, whole.parameters)


class Named:
    """A path, though none of pathlib."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Named, lambda path: irnn.Checkpoint(Named(path))])
def test_path_of_a_checkpoint_may_be_of_any_kind(kind, net, path, X, Y):
    net.fit(X, Y, epochs=2, checkpoint=kind(path))
    resume = path if kind not in (str, Named) else kind(path)
    assert len(net.fit(X, Y, epochs=3, resume=resume).loss) == 3


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.fixture
def settings(X, Y) -> dict[str, Any]:
    return {"epochs": 4, "batch_size": 5, "validation": (X, Y), "schedule": "cosine"}


@pytest.fixture(params=["checkpoint", "run"])
def resuming(request, settings, path, X, Y) -> dict[str, Any]:
    """The settings of a finished run, and its checkpoint or itself to go on from."""
    run = make_net("numpy").fit(X, Y, checkpoint=path, **settings)
    return settings | {"resume": path if request.param == "checkpoint" else run}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": irnn.Adam(0.02)}, r"of another run: optimizer\.learning_rate is 0\.01 there and 0\.02 here$"),
        ({"optimizer": irnn.Adam(beta2=0.99)}, r"of another run: optimizer\.beta2 is 0\.999 there and 0\.99 here$"),
        ({"batch_size": 4}, "of another run: batch_size is 5 there and 4 here$"),
        ({"sample_weights": np.arange(1, 13)}, "of another run: sample_weights is given here only$"),
        ({"loss": "mae"}, "loss is MSE there and MAE here"),
        ({"schedule": irnn.Cosine(0.1)}, r"schedule\.final is 0\.0 there and 0\.1 here"),
        ({"clip": 1.0}, "clip is None there and 1.0 here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"solver": "newton"}, "solver is Auto there and Newton here"),
        ({"restore_best": True}, "restore_best is False there and True here"),
        ({"early_stopping": irnn.EarlyStopping(3)}, "early_stopping is None there and EarlyStopping here"),
        ({"validation": None}, r"validation\[0\] is given there only; validation\[1\] is given there only$"),
        ({"epochs": 8}, "epochs is 4 there and 8 here, and the learning rates of Cosine"),
        (
            {"optimizer": "sgd", "batch_size": 3},
            "optimizer is Adam there and SGD here; batch_size is 5 there and 3 here",
        ),
    ],
    ids=str,
)
def test_resuming_with_other_settings_is_refused_and_says_which(resuming, change, message, X, Y):
    net = make_net("numpy")
    before = net.parameters.copy()
    with pytest.raises(Failure, match=message):
        net.fit(X, Y, **(resuming | change))
    np.testing.assert_array_equal(net.parameters, before)


@pytest.mark.parametrize("later", [{"novel": 3}, {"optimizer": {"name": "Adam", **irnn.Adam().options(), "novel": 3}}])
def test_run_with_settings_that_this_version_does_not_know_is_refused(net, later, X, Y):
    run = net.fit(X, Y, optimizer=irnn.Adam(), epochs=2)
    other = replace(run, snapshot=replace(run.snapshot, run=run.snapshot.run | later))
    with pytest.raises(Failure, match=r"of another run: .*novel is 3 there and None here$"):
        net.fit(X, Y, optimizer=irnn.Adam(), epochs=4, resume=other)


class Quantile:
    def __init__(self, q):
        self.q = q

    def __call__(self, Y, T):
        return quantile(Y, T, self.q)

    def loss(self, Y, T):
        return quantile(Y, T, self.q)


def quantile(Y, T, q):
    d = T - Y
    return np.maximum(q * d, (q - 1) * d).sum(axis=1), np.where(d > 0, -q, 1 - q)


def closure(q):
    return lambda Y, T: quantile(Y, T, q)


def around_a_list(q):
    held = [q]
    return lambda Y, T: quantile(Y, T, *held)


def around_a_dict(q):
    held = {"q": q}
    return lambda Y, T: quantile(Y, T, **held)


def around_a_function(q):
    inner = closure(q)
    return lambda Y, T: inner(Y, T)


@pytest.mark.parametrize(
    "make",
    [
        lambda q: partial(quantile, q=q),
        Quantile,
        lambda q: Quantile(q).loss,
        closure,
        around_a_list,
        around_a_dict,
        around_a_function,
    ],
)
def test_loss_of_ones_own_is_known_again_by_its_name_and_what_it_holds(make, path, X, Y):
    def train(q, epochs, resume=None):
        net = make_net("numpy")
        loss = irnn.CustomLoss(make(q))
        return net.fit(X, Y, loss=loss, epochs=epochs, checkpoint=path, resume=resume, progress=False)

    train(0.9, 2)
    assert len(train(np.float64(0.9), 4, path).loss) == 4
    with pytest.raises(Failure, match=r"loss\.function.* is .*0\.9.* there and .*0\.1.* here"):
        train(0.1, 6, path)


def test_another_lambda_of_that_name_is_another_loss(path, X, Y):
    losses = [irnn.CustomLoss(lambda Y, T: quantile(Y, T, 0.9)), irnn.CustomLoss(lambda Y, T: quantile(Y, T, 0.1))]
    make_net("numpy").fit(X, Y, loss=losses[0], epochs=2, checkpoint=path)
    with pytest.raises(Failure, match=r"loss\.function\.code is .* there and .* here$"):
        make_net("numpy").fit(X, Y, loss=losses[1], epochs=4, resume=path)


def test_numbers_of_numpy_are_as_good_as_those_of_python(path, X, Y):
    net = irnn.Network(
        X.shape[1], [irnn.Layer(np.int64(3), lateral=np.bool_(True))], outputs=Y.shape[1], seed=0, engine="numpy"
    )
    adam = irnn.Adam(np.float32(0.125))
    net.fit(X, Y, optimizer=adam, seed=np.int64(1), epochs=2, checkpoint=path, progress=False)
    run = net.fit(X, Y, optimizer=irnn.Adam(0.125), seed=1, epochs=3, resume=path, progress=False)
    assert len(run.loss) == 3
    net.save(path.with_suffix(".safetensors"))


def test_resuming_with_other_data_is_refused(resuming, X, Y):
    with pytest.raises(
        Failure,
        match=r"X has the shape \(12, 3\) there and \(11, 3\) here; Y has the shape \(12, 2\) there and \(11, 2\) here$",
    ):
        make_net("numpy").fit(X[:11], Y[:11], **resuming)
    with pytest.raises(Failure, match=r"of another run: X has other values$"):
        make_net("numpy").fit(X + 1e-15, Y, **resuming)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neurons": 4}, r"of another run: layers\[0\]\.neurons is 5 there and 4 here$"),
        ({"activation": "relu"}, r"of another run: layers\[0\]\.activation is 'tanh' there and 'relu' here$"),
        ({"constraint": irnn.Free()}, "of another run: constraint is Perron there and Free here$"),
        ({"constraint": irnn.Perron(0.9)}, r"of another run: constraint\.kappa is 0\.95 there and 0\.9 here$"),
        ({"dtype": "float32"}, "dtype is 'float64' there and 'float32' here"),
    ],
    ids=str,
)
def test_resuming_another_net_is_refused(resuming, change, message, X, Y):
    with pytest.raises(Failure, match=message):
        make_net("numpy", **change).fit(X, Y, **resuming)


def test_resuming_other_numbers_of_nets_is_refused(resuming, X, Y):
    with pytest.raises(Failure, match="nets is 1 there and 2 here"):
        irnn.fit_many([make_net("numpy") for _ in range(2)], X, Y, **resuming)


def test_resuming_one_run_as_two_is_refused(X, Y):
    nets = [make_net("numpy"), make_net("numpy")]
    runs = irnn.fit_many(nets, X, Y, epochs=2, progress=False)
    with pytest.raises(Failure, match="resume has the same Run twice"):
        irnn.fit_many(nets, X, Y, epochs=4, resume=[runs[0], runs[0]], progress=False)
    assert runs[0] != runs[1]
    assert len({*runs}) == 2


@pytest.mark.julia
def test_resuming_on_another_engine_is_refused(resuming, X, Y):
    with pytest.raises(Failure, match="engine is 'numpy' there and 'julia' here"):
        make_net("julia").fit(X, Y, **resuming)


def test_resuming_beyond_the_epochs_asked_for_is_refused(path, X, Y):
    make_net("numpy").fit(X, Y, epochs=6, checkpoint=path)
    with pytest.raises(Failure, match="is at epoch 6 already, and epochs=5 counts from the start of its run"):
        make_net("numpy").fit(X, Y, epochs=5, resume=path)


def test_missing_checkpoint_is_reported_as_such(path, X, Y):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*run\.safetensors"):
        make_net("numpy").fit(X, Y, resume=path)


def test_files_that_are_no_checkpoints_are_refused(path, X, Y):
    make_net("numpy").save(path)
    with pytest.raises(Failure, match=r"not a checkpoint: it is a model that Network\.save wrote"):
        make_net("numpy").fit(X, Y, resume=path)
    save_file({"parameters": np.zeros(3)}, path, {"format": "implicit-rnn checkpoint", "format_version": "7"})
    with pytest.raises(Failure, match="format version 7"):
        make_net("numpy").fit(X, Y, resume=path)


# --- disks and processes that fail ---------------------------------------------------------------------------


def test_checkpoint_is_refused_before_training_where_it_cannot_be_written(tmp_path, X, Y):
    net = make_net("numpy")
    before = net.parameters.copy()
    with pytest.raises(OSError, match=r"could not be written .*No such file"):
        net.fit(X, Y, epochs=3, checkpoint=tmp_path / "missing" / "run.safetensors")
    np.testing.assert_array_equal(net.parameters, before)


def test_full_disk_is_an_error_that_keeps_the_last_checkpoint_and_the_parameters(net, engine, monkeypatch, path, X, Y):
    other = make_net(engine)
    other.fit(X, Y, epochs=5)
    count = itertools.count()

    def fsync(descriptor: int, real=os.fsync) -> None:
        if next(count) >= 10:  # two per checkpoint: the file and its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(
        OSError, match=r"checkpoint of epoch 5 could not be written .*No space left on device"
    ) as caught:
        net.fit(X, Y, epochs=20, checkpoint=irnn.Checkpoint(path, every_epochs=1))
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    np.testing.assert_array_equal(net.parameters, other.parameters)
    assert list(path.parent.iterdir()) == [path]
    whole = make_net(engine)
    whole.fit(X, Y, epochs=20)
    net.fit(X, Y, epochs=20, resume=path)
    np.testing.assert_array_equal(net.parameters, whole.parameters)


def test_file_size_limit_of_the_system_keeps_the_last_checkpoint(tmp_path, run_python):
    """A real failure of the operating system in the middle of a file."""
    done = run_python(f"""
        import resource
        import numpy as np
        import implicit_rnn as irnn

        rng = np.random.default_rng(0)
        X, Y = rng.standard_normal((20, 3)), rng.standard_normal((20, 2))
        net = irnn.Network(3, [irnn.Layer(5)], outputs=2, seed=0, engine="numpy")
        path = {str(tmp_path / "limited")!r}
        def limit(progress):
            if progress.epoch == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            net.fit(X, Y, epochs=9, callbacks=[limit], checkpoint=irnn.Checkpoint(path, every_epochs=1))
        except OSError as error:
            print(error)
        run = net.fit(X, Y, epochs=2, resume=path)
        print(len(run.loss))
    """)
    assert "checkpoint of epoch 3 could not be written" in done.stdout, str(done)
    assert "File too large" in done.stdout, str(done)
    assert done.stdout.endswith("\n2\n"), str(done)
    assert [entry.name for entry in tmp_path.iterdir()].count("limited") == 1
    assert not list(tmp_path.glob(".limited.*"))


def test_leftovers_of_a_killed_process_are_removed(path, X, Y):
    leftover = path.parent / f".{path.name}.abc123.tmp"
    leftover.write_bytes(b"half a check")
    os.utime(leftover, (0, 0))
    make_net("numpy").fit(X, Y, epochs=2, checkpoint=path)
    assert list(path.parent.iterdir()) == [path]


def test_checkpoint_that_another_process_writes_is_not_taken_for_a_leftover(monkeypatch, path, X, Y):
    synchronise = os.fsync

    def start_another_run(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", synchronise)
        make_net("numpy").fit(X, Y, epochs=1, checkpoint=path)
        synchronise(descriptor)

    monkeypatch.setattr(os, "fsync", start_another_run)
    make_net("numpy").fit(X, Y, epochs=2, checkpoint=path)
    assert irnn.training.checkpoints.read(path).epoch == 2


WORKER = """
    import sys
    import numpy as np
    import implicit_rnn as irnn

    # One process forked per run spares the start of Python: its parent has imported all it needs.
    import os
    from pathlib import Path

    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((40, 3)), rng.standard_normal((40, 2))
    settings = dict(
        optimizer=irnn.Adam(0.02), schedule="cosine", epochs=120, batch_size=8, validation=(X[:10], Y[:10]),
        early_stopping=irnn.EarlyStopping(100), progress=False,
    )

    def train(path):
        net = irnn.Network(3, [irnn.Layer(4)], outputs=2, seed=1, engine="numpy")
        resume = path if Path(path).exists() else None
        run = net.fit(X, Y, checkpoint=irnn.Checkpoint(path, every_epochs=1), resume=resume, **settings)
        net.save(path + ".net")
        np.save(path + ".npy", run.loss)

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            train(line.strip())
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
"""


def test_run_killed_twenty_times_at_random_moments_ends_as_if_it_never_was(tmp_path):
    """kill -9 of real processes; a checkpoint is written after every epoch, so that many kills hit a write."""
    command = [sys.executable, "-c", textwrap.dedent(WORKER)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as worker:

        def start(path: Path) -> int:
            worker.stdin.write(f"{path}\n")
            worker.stdin.flush()
            return int(worker.stdout.readline())

        def finished() -> int:
            return int(worker.stdout.readline())

        whole, killed = tmp_path / "whole", tmp_path / "killed"
        start(whole)
        begin = time.perf_counter()
        assert finished() == 0
        duration = time.perf_counter() - begin
        rng, epochs = np.random.default_rng(5), []
        for kills in itertools.count():
            child = start(killed)
            if kills >= 20 and killed.exists():
                assert finished() == 0
                break
            time.sleep(rng.uniform(0, duration / 4))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            if finished() == 0:  # it was faster than the clock: once more from the beginning
                assert_equal_files(killed, whole)
                killed.unlink()
            epochs.append(epoch_of(killed) if killed.exists() else 0)
        worker.stdin.close()
    assert len(set(epochs)) > 3
    assert_equal_files(killed, whole)


def assert_equal_files(path: Path, other: Path) -> None:
    """What two runs have left behind: parameters and losses."""
    assert irnn.load(f"{path}.net").parameters.tobytes() == irnn.load(f"{other}.net").parameters.tobytes()
    np.testing.assert_array_equal(np.load(f"{path}.npy"), np.load(f"{other}.npy"))


def epoch_of(path: Path) -> int:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return int(json.loads(data[8 : 8 + length])["__metadata__"]["epoch"])


# --- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": 3}, TypeError, "path is 3; expected a file name"),
        ({"path": "x", "every_epochs": 0}, ValueError, "every_epochs"),
        ({"path": "x", "every_minutes": -1}, ValueError, "every_minutes"),
        ({"path": "x", "every": 1}, TypeError, "no option every"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        irnn.Checkpoint(**options)


@pytest.mark.parametrize(
    ("rule", "epochs", "expected"),
    [({"every_epochs": 3}, 8, [0, 0, 0, 3, 3, 3, 6, 6]), ({"every_minutes": 1e-9}, 3, [0, 1, 2])],
    ids=str,
)
def test_checkpoints_are_written_when_they_are_due_and_at_the_end(rule, epochs, expected, path, X, Y):
    seen = []
    watch = {"checkpoint": irnn.Checkpoint(path, **rule), "callbacks": lambda _: seen.append(epoch_of(path))}
    make_net("numpy").fit(X, Y, epochs=epochs, **watch)
    assert seen == expected
    assert epoch_of(path) == epochs

"""The loop over chunks of epochs, each chunk one call of the engine, and the work between them."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from implicit_rnn.console import progress_bar
from implicit_rnn.engines.base import Halt, Replicas, Samples, Trainer, TrainerOptions
from implicit_rnn.errors import report_failure, warn
from implicit_rnn.model.losses import CustomLoss
from implicit_rnn.model.optimizers import LBFGS, Optimizer
from implicit_rnn.solution import Solution, remedy
from implicit_rnn.training.checkpoints import Checkpoint, Writer
from implicit_rnn.training.history import Run
from implicit_rnn.training.lbfgs import LBFGSTrainer
from implicit_rnn.training.settings import Settings
from implicit_rnn.training.snapshot import Snapshot, describe, digest
from implicit_rnn.training.stopping import Callback, Progress, StopTraining, ends_training, reason
from implicit_rnn.validation import as_generator

if TYPE_CHECKING:
    from tqdm import tqdm

    from implicit_rnn.network import Network

Array = np.ndarray

CHUNK_SECONDS = 0.25
"""Target length of a chunk: the delay of Ctrl-C and of the progress bar."""

_taking = threading.Lock()


@dataclass(frozen=True)
class Watch:
    """Settings that accompany a run without changing its result, unless a callback ends it."""

    callbacks: tuple[Callback, ...]
    callback_every: int
    checkpoint: Checkpoint | None
    progress: bool | None
    on_failure: str


@dataclass
class State:
    """The whole state of a run of S nets at the end of an epoch, except that of its optimiser."""

    nets: Replicas
    rng: np.random.Generator
    losses: Array
    """(S, epochs), filled in for the finished epochs, as is the next"""
    unconverged: Array
    origin: Array
    """(S, 16) the digests of the parameters at the start"""
    ended: Array
    """(S,) the last epoch of nets that were halted; 0 for those in training"""
    best: Array
    """(S, parameters) the parameters with the lowest validation loss"""
    best_loss: Array
    """(S,)"""
    best_epoch: Array
    """(S,) 0 if there is none"""
    improved_loss: Array
    """(S,) the validation loss at the last improvement in the sense of early stopping; likewise the next"""
    improved_epoch: Array
    validation_epochs: list[int] = field(default_factory=list)
    validation_losses: list[Array] = field(default_factory=list)
    """(S,) at each of these epochs, NaN for nets that no longer run"""
    validation_unconverged: list[Array] = field(default_factory=list)
    """(S,) likewise, -1 for nets that no longer run"""
    epoch: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, parameters: Array, epochs: int, seed: int | None) -> State:
        """The state of nets with these parameters (S, parameters) before the first epoch."""
        S = len(parameters)
        return cls(
            nets=Replicas.start(parameters),
            rng=as_generator(seed),
            losses=np.empty((S, epochs)),
            unconverged=np.empty((S, epochs), np.int64),
            origin=np.stack([digest(p) for p in parameters]),
            ended=np.zeros(S, np.int64),
            best=parameters.copy(),
            best_loss=np.full(S, np.inf),
            best_epoch=np.zeros(S, np.int64),
            improved_loss=np.full(S, np.inf),
            improved_epoch=np.zeros(S, np.int64),
        )

    @property
    def running(self) -> Array:
        """(S,) whether each net is still in training."""
        return np.asarray(self.nets.halted == Halt.RUNNING)


class Training:
    """The nets of one call in training."""

    runs = False

    def __init__(self, nets: Sequence[Network], samples: Samples, held_out: Samples | None, settings: Settings) -> None:
        self.nets, self.samples, self.held_out, self.settings = nets, samples, held_out, settings
        first = nets[0]
        parameters = first.parameters[None] if len(nets) == 1 else np.stack([net.parameters for net in nets])
        self.state = State.start(parameters, settings.epochs, settings.seed)
        program = first.program(settings.solver, settings.adjoint, settings.loss, settings.jacobian_penalty)
        if isinstance(settings.optimizer, LBFGS):
            self.trainer: Trainer = LBFGSTrainer(
                program, settings.optimizer, len(nets), parameters.shape[1], settings.guard
            )
        else:
            clip = np.inf if settings.clip is None else settings.clip
            _check_rounded(clip, settings.optimizer, first.dtype)
            options = TrainerOptions(
                settings.optimizer, len(nets), settings.batch_size, clip, settings.guard, settings.warm_start
            )
            self.trainer = program.trainer(options)

    @cached_property
    def description(self) -> dict[str, Any]:
        """A description that must be equal for another run to continue from this one."""
        return describe(self)

    def run(self, watch: Watch) -> list[Run]:
        """Train to the end, and give the nets their parameters."""
        self._take_nets()
        try:
            return self._run(watch)
        finally:
            self.runs = False

    def _take_nets(self) -> None:
        with _taking:
            refuse_nets_in_training(self.nets)
            self.runs = True
            # Weak: an interrupt before the call can mark its end must not leave a net locked.
            for net in self.nets:
                net._training = weakref.ref(self)

    def _run(self, watch: Watch) -> list[Run]:
        writer = None if watch.checkpoint is None else Writer(self, watch.checkpoint)
        try:
            self._train_to_the_end(watch, writer)
        except BaseException:  # Ctrl-C, a callback's error, a signal's handler that exits
            if writer is not None and not writer.failed:
                writer.save()
            raise
        state, settings = self.state, self.settings
        ends = Snapshot.of_each(self)
        if settings.restore_best or (settings.early_stopping and settings.early_stopping.restore_best):
            for net, best, epoch in zip(self.nets, state.best, state.best_epoch, strict=True):
                if epoch:
                    net.parameters = best
            if not state.validation_epochs:
                warn(
                    f"there is no validation loss for stopping or for choosing parameters: with validation_every="
                    f"{settings.validation_every} the first is that of epoch {settings.validation_every}, but training ended "
                    f"at epoch {state.epoch}; the net has the last parameters",
                    UserWarning,
                )
            elif not state.best_epoch.all():
                without = np.flatnonzero(state.best_epoch == 0)
                which = "" if len(self.nets) == 1 else f" of {len(without)} of {len(self.nets)} nets"
                warn(
                    f"no validation loss{which} was finite, so the last parameters are kept instead of the best; look at "
                    "the validation data and at Run.validation_loss",
                    UserWarning,
                )
        rates = settings.rates(np.arange(state.epoch) * settings.steps_per_epoch)
        return [self._record(k, rates, end) for k, end in enumerate(ends)]

    def _train_to_the_end(self, watch: Watch, writer: Writer | None) -> None:
        state, settings = self.state, self.settings
        report = _Report(self, watch.on_failure)
        chunk = 1
        with progress_bar(watch.progress, total=settings.epochs, initial=state.epoch, unit="epoch") as bar:
            while state.epoch < settings.epochs and state.running.any():
                begin = time.perf_counter()
                before, running = state.epoch, state.running
                count = self._until_next_stop(chunk, watch)
                with self._quiet():
                    self._train(count)
                    self._validate()
                elapsed = time.perf_counter() - begin
                state.seconds += elapsed
                if bar is not None:
                    self._show(bar, count)
                report(before, running)
                self._call_back(watch)
                if writer is not None:
                    writer()
                chunk = int(min(max(count * CHUNK_SECONDS / max(elapsed, 1e-9), 1), 10 * count))

    def _quiet(self) -> AbstractContextManager[object]:
        """Suppress NumPy's overflow warnings, since the guard reports overflow; those of a custom loss are shown."""
        if isinstance(self.settings.loss, CustomLoss):
            return np.errstate(under="ignore")
        return np.errstate(all="ignore")

    def _until_next_stop(self, chunk: int, watch: Watch) -> int:
        intervals = [self.settings.epochs]
        if self.held_out is not None:
            intervals.append(self.settings.validation_every)
        if watch.callbacks:
            intervals.append(watch.callback_every)
        if watch.checkpoint is not None and watch.checkpoint.every_epochs is not None:
            intervals.append(watch.checkpoint.every_epochs)
        return min(chunk, *(every - self.state.epoch % every for every in intervals))

    def _train(self, count: int) -> None:
        """Train for ``count`` epochs and record their losses."""
        state, settings = self.state, self.settings
        span = slice(state.epoch, state.epoch + count)
        order = _orders(state.rng, count, len(self.samples), settings.batch_size)
        rates = settings.rates(np.arange(span.start * settings.steps_per_epoch, span.stop * settings.steps_per_epoch))
        losses, unconverged = np.empty((len(self.nets), count)), np.empty((len(self.nets), count), np.int64)
        self.trainer.train(state.nets, self.samples, order, settings.batch_size, rates, losses, unconverged)
        state.losses[:, span], state.unconverged[:, span] = losses, unconverged
        for k in np.flatnonzero((state.nets.halted != Halt.RUNNING) & (state.ended == 0)):
            finite = int(np.isfinite(losses[k]).sum())
            state.ended[k] = span.start + finite + (state.nets.halted[k] == Halt.NOT_FINITE)
        state.epoch += count
        self.publish()

    def publish(self) -> None:
        """Copy the parameters to the nets; a single net shares them anyway."""
        if len(self.nets) > 1:
            for net, p in zip(self.nets, self.state.nets.parameters, strict=True):
                net.parameters[...] = p

    def _validate(self) -> None:
        """Evaluate the validation loss if it is due, and halt nets that no longer improve."""
        state, stopping = self.state, self.settings.early_stopping
        if self.held_out is None or state.epoch % self.settings.validation_every:
            return
        losses, failures = np.full(len(self.nets), np.nan), np.full(len(self.nets), -1)
        for k in np.flatnonzero(state.running):
            losses[k], failures[k] = self._loss_of(state.nets.parameters[k], self.held_out)
        state.validation_epochs.append(state.epoch)
        state.validation_losses.append(losses)
        state.validation_unconverged.append(failures)
        better = losses < state.best_loss
        state.best[better], state.best_loss[better] = state.nets.parameters[better], losses[better]
        state.best_epoch[better] = state.epoch
        if stopping is not None:
            improved = losses < state.improved_loss - stopping.min_delta
            state.improved_loss[improved], state.improved_epoch[improved] = losses[improved], state.epoch
            self._halt(state.epoch - state.improved_epoch >= stopping.patience, Halt.NO_IMPROVEMENT)

    def _loss_of(self, p: Array, samples: Samples) -> tuple[float, int]:
        """The loss of a net with the parameters p on samples, and how many of them did not reach their equilibrium."""
        first = self.nets[0]
        solution = Solution.empty(len(samples), first.topology.neurons, first.dtype)
        first.program(self.settings.reader).solve(p, samples.X, None, solution)
        outputs = first.topology.read_out(p, solution.state)
        loss, _ = self.settings.loss.value_and_gradient(outputs, samples.Y, samples.weights)
        failed = int((~solution.converged).sum()) if self.settings.adjoint.needs_equilibrium else 0
        return float(loss), failed

    def _halt(self, chosen: Array, halt: int) -> None:
        chosen = chosen & self.state.running
        self.state.nets.halted[chosen] = halt
        self.state.ended[chosen] = self.state.epoch

    def _call_back(self, watch: Watch) -> None:
        """Call the callbacks if they are due."""
        state = self.state
        if not watch.callbacks or state.epoch % watch.callback_every:
            return
        try:
            for k in np.flatnonzero(state.running):
                progress = self._progress(int(k))
                answers = [ends_training(callback, progress) for callback in watch.callbacks]
                if any(answers):
                    self._halt(np.arange(len(self.nets)) == k, Halt.BY_CALLBACK)
        except StopTraining:
            self._halt(state.running, Halt.BY_CALLBACK)

    def _progress(self, k: int) -> Progress:
        state, last = self.state, self.state.epoch - 1
        return Progress(
            net=self.nets[k],
            index=k,
            epoch=state.epoch,
            epochs=self.settings.epochs,
            loss=float(state.losses[k, last]),
            unconverged=int(state.unconverged[k, last]),
            validation_loss=float(state.validation_losses[-1][k]) if state.validation_losses else None,
            best_epoch=int(state.best_epoch[k]) or None,
            learning_rate=float(self.settings.rates(np.array([last * self.settings.steps_per_epoch]))[0]),
        )

    def _show(self, bar: tqdm[Any], count: int) -> None:
        state, last = self.state, self.state.epoch - 1
        shown = {"loss": f"{_median(state.losses[:, last]):.3g}"}
        if state.validation_losses:
            shown["validation"] = f"{_median(state.validation_losses[-1]):.3g}"
        if state.unconverged[:, last].any():
            shown["unconverged"] = f"{state.unconverged[:, last].mean() / len(self.samples):.1%}"
        bar.set_postfix(shown, refresh=False)
        bar.update(count)

    def _record(self, k: int, rates: Array, end: Snapshot) -> Run:
        state = self.state
        epochs = int(state.ended[k]) or state.epoch
        taken = [n for n, counts in enumerate(state.validation_unconverged) if counts[k] >= 0]
        return Run(
            loss=state.losses[k, :epochs].copy(),
            unconverged=state.unconverged[k, :epochs].copy(),
            learning_rate=rates[:epochs].copy(),
            validation_epochs=np.array([state.validation_epochs[n] for n in taken], np.int64),
            validation_loss=np.array([state.validation_losses[n][k] for n in taken]),
            validation_unconverged=np.array([state.validation_unconverged[n][k] for n in taken], np.int64),
            best_epoch=int(state.best_epoch[k]) or None,
            stopped=self.why_halted(k),
            seconds=state.seconds,
            engine=self.nets[0].engine.name,
            snapshot=end,
        )

    def why_halted(self, k: int) -> str | None:
        """A sentence on why a net was halted; None if it was not."""
        state = self.state
        epoch = int(state.ended[k])
        if epoch == 0:
            return None
        return reason(
            int(state.nets.halted[k]), epoch, int(state.unconverged[k, epoch - 1]), self.settings, self.remedy
        )

    @property
    def remedy(self) -> str:
        """What to do about samples without equilibrium."""
        return remedy(self.nets[0].topology.constraint.unique)


def refuse_nets_in_training(nets: Sequence[Network]) -> None:
    """``RuntimeError`` for nets that a call trains at this moment, whose parameters would be a mixture in the end."""
    if any((training := net._training()) is not None and training.runs for net in nets):
        raise RuntimeError(
            "the network is being trained by another call of fit, in another thread or around this callback; "
            "train a copy, copy.deepcopy(net)"
        )


class _Report:
    """Tells of samples without equilibrium and of nets that their guard halted, once for each."""

    def __init__(self, training: Training, on_failure: str) -> None:
        self.training = training
        self.on_failure = on_failure
        self.warned: set[str] = {"unconverged", "halted"} if on_failure == "ignore" else set()

    def __call__(self, before: int, running: Array) -> None:
        """Tell of the epochs since ``before``, at whose end the nets ``running`` ran."""
        state, settings = self.training.state, self.training.settings
        unconverged = state.unconverged[:, before : state.epoch]
        halted = running & (state.nets.halted != Halt.RUNNING) & (state.nets.halted <= Halt.TOO_LARGE)
        if halted.any() and "halted" not in self.warned:
            first = int(np.flatnonzero(halted)[np.argmin(state.ended[halted])])
            self._announce("halted", str(self.training.why_halted(first)))
        elif unconverged.any() and "unconverged" not in self.warned:
            failing = np.argwhere(unconverged > 0)
            net, epoch = failing[np.argmin(failing[:, 1])]
            self._announce(
                "unconverged",
                f"{unconverged[net, epoch]} of {settings.samples} samples did not reach an equilibrium in epoch "
                f"{before + epoch + 1}; their gradient is not that of the loss. Remedies: {self.training.remedy}",
            )

    def _announce(self, what: str, message: str) -> None:
        self.warned.add(what)
        report_failure(message, self.on_failure)


def _check_rounded(clip: float, optimizer: Optimizer, dtype: np.dtype) -> None:
    """Raise ``ValueError`` for settings that the precision of the nets rounds to what they must not be."""
    if dtype.type(clip) == 0:
        raise ValueError(f"clip must be positive, got {clip}, which is 0 as a {dtype}")
    options = optimizer.options()
    if dtype.type(options.get("epsilon", 1)) == 0:
        raise ValueError(
            f"{optimizer} has the epsilon {options['epsilon']!r}, which is 0 as a {dtype}: a gradient of zero would make NaN"
        )
    for rate in (options[name] for name in ("beta1", "beta2", "decay") if name in options):
        if dtype.type(rate) == 1:
            raise ValueError(
                f"{optimizer} has the decay rate {rate!r}, which is 1 as a {dtype}: its average would never move; expected less "
                "than 1 there, too"
            )


def _orders(rng: np.random.Generator, epochs: int, samples: int, batch_size: int) -> Array:
    order = np.tile(np.arange(samples), (epochs, 1))
    return order if batch_size >= samples else rng.permuted(order, axis=1)  # each row as by rng.permutation


def _median(losses: Array) -> float:
    finite = losses[np.isfinite(losses)]
    return float(np.median(finite)) if len(finite) else np.nan

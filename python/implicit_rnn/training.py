"""Training: the loop over chunks of epochs, each chunk one call of the engine, and the record of a run."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from implicit_rnn import options
from implicit_rnn.errors import ConvergenceError, ConvergenceWarning, warn
from implicit_rnn.options import Adam, Adjoint, Auto, Implicit, Optimizer, Picard, Solver, Unrolled
from implicit_rnn.validation import as_samples, as_targets

if TYPE_CHECKING:
    from implicit_rnn.network import Network

Array = np.ndarray

CHUNK_SECONDS = 0.25
"""Aimed-at length of a chunk: the delay of Ctrl-C and of the progress bar."""


@dataclass(frozen=True)
class Run:
    """The record of a training run, E epochs long."""

    loss: Array
    """(E,) mean training loss of each epoch, each step's before its update."""
    unconverged: Array
    """(E,) samples that did not reach their equilibrium."""
    validation_epochs: Array
    """The epochs (from 1) after which the validation loss was taken."""
    validation_loss: Array
    """The validation loss at those epochs; empty without validation data."""
    validation_unconverged: Array
    """Validation samples that did not reach their equilibrium at those epochs."""
    seconds: float
    engine: str


def fit_many(
    nets: Sequence[Network],
    X: ArrayLike,
    Y: ArrayLike,
    *,
    optimizer: Optimizer | str = Adam(),
    epochs: int = 100,
    batch_size: int | None = None,
    loss: str = "mse",
    solver: Solver | str = Auto(),
    adjoint: Adjoint | str = Implicit(),
    clip: float | None = None,
    jacobian_penalty: float = 0.0,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
    validation_every: int = 1,
    seed: int = 0,
    progress: bool | None = None,
    on_failure: str = "warn",
) -> list[Run]:
    """Train nets of one topology, each from its own parameters, on the same samples.

    Many small nets in one call cost little more than the arithmetic.

    Parameters
    ----------
    nets
        Networks of equal topology, dtype and engine; their parameters are updated in place.
    X, Y
        Samples (B, inputs) and targets (B, outputs).
    optimizer
        ``SGD``, ``Momentum``, ``Nesterov`` or ``Adam`` with their options.
    epochs, batch_size
        Passes over the data, and samples per step; ``None`` takes all samples at once.
    clip
        Largest Euclidean norm of a gradient; longer ones are scaled down to it.
    jacobian_penalty
        Adds that much of mean_b ‖J_b‖_F² / N to the loss, see ``Network.loss_and_gradient``.
    validation, validation_every
        Samples and targets on which the loss is taken every so many epochs.
    seed
        Of the order of the minibatches, the same on every engine.
    progress
        A progress bar on stderr; ``None`` shows it on a terminal only.
    on_failure
        What happens when samples do not reach their equilibrium: "raise", "warn" (once) or "ignore".

    Returns
    -------
    One ``Run`` per net. A run whose loss is no longer finite keeps its last parameters and has NaN losses.

    Raises
    ------
    ValueError, TypeError
        For bad data or options.
    ConvergenceError
        With ``on_failure="raise"``. Ctrl-C raises ``KeyboardInterrupt`` and leaves the parameters of the last chunk.
    """
    if not nets:
        raise ValueError("nets is empty")
    first = nets[0]
    if any((net.topology, net.dtype, net.engine) != (first.topology, first.dtype, first.engine) for net in nets):
        raise ValueError("all nets of one call must have the same topology, dtype and engine")
    topology, dtype = first.topology, first.dtype
    x = as_samples("X", X, topology.inputs, dtype, "features", topology.neurons)
    y = as_targets("Y", Y, len(x), topology.output_size, dtype)
    epochs = options.check_count("epochs", epochs)
    validation_every = options.check_count("validation_every", validation_every)
    batch_size = len(x) if batch_size is None else options.check_count("batch_size", batch_size)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    options.check_on_failure(on_failure)
    rule = options.choose(Optimizer, optimizer, "optimizer")
    size = min(batch_size, len(x))
    steps = -(-len(x) // size)
    held_out = None
    if validation is not None:
        xv = as_samples("validation[0]", validation[0], topology.inputs, dtype, "features", topology.neurons)
        held_out = xv, as_targets("validation[1]", validation[1], len(xv), topology.output_size, dtype)

    trainer = first.program(solver, adjoint, loss, jacobian_penalty).trainer(rule, len(nets), clip or np.inf, size)
    P = first.parameters[None] if len(nets) == 1 else np.stack([net.parameters for net in nets])
    rng = np.random.default_rng(seed)
    losses, unconverged = np.empty((len(nets), epochs)), np.empty((len(nets), epochs), np.int64)
    validation_epochs: list[int] = []
    validation_losses: list[list[float]] = []
    validation_failures: list[list[int]] = []
    # What an unrolled net computes is the result of its steps.
    steps_only = isinstance(adjoint, Unrolled)
    reader = Picard(max_iterations=adjoint.steps) if isinstance(adjoint, Unrolled) else solver
    warned = on_failure == "ignore"
    begin = time.perf_counter()
    with tqdm(total=epochs, disable=None if progress is None else not progress, unit="epoch") as bar:
        done, chunk = 0, 1
        while done < epochs:
            started = time.perf_counter()
            count = min(chunk, epochs - done)
            if held_out is not None:
                count = min(count, validation_every - done % validation_every)
            order = _orders(rng, count, len(x), size)
            rates = np.full(count * steps, rule.learning_rate)
            part_losses, part_unconverged = np.empty((len(nets), count)), np.empty((len(nets), count), np.int64)
            trainer.train(P, x, y, order, size, rates, part_losses, part_unconverged)
            span = slice(done, done + count)
            losses[:, span], unconverged[:, span] = part_losses, part_unconverged
            done += count
            if len(nets) > 1:
                for net, p in zip(nets, P, strict=True):
                    net.parameters = p
            if held_out is not None and done % validation_every == 0:
                validation_epochs.append(done)
                measured = [_validate(net, *held_out, reader) for net in nets]
                validation_losses.append([value for value, _ in measured])
                validation_failures.append([0 if steps_only else failed for _, failed in measured])
            if not warned and (part_unconverged.any() or not np.isfinite(part_losses).all()):
                warned = True
                _report_failure(
                    on_failure, part_losses, part_unconverged, done - count, len(x), topology.constraint.unique
                )
            _show(bar, count, part_losses, part_unconverged, len(x), validation_losses)
            elapsed = time.perf_counter() - started
            chunk = int(min(max(count * CHUNK_SECONDS / max(elapsed, 1e-9), 1), 10 * count))
    seconds = time.perf_counter() - begin
    return [
        Run(
            losses[k],
            unconverged[k],
            np.array(validation_epochs, np.int64),
            np.array([values[k] for values in validation_losses]),
            np.array([counts[k] for counts in validation_failures], np.int64),
            seconds,
            first.engine.name,
        )
        for k in range(len(nets))
    ]


def _orders(rng: np.random.Generator, epochs: int, samples: int, batch_size: int) -> Array:
    if batch_size >= samples:
        return np.tile(np.arange(samples), (epochs, 1))
    return np.stack([rng.permutation(samples) for _ in range(epochs)])


def _validate(net: Network, X: Array, Y: Array, solver: Solver | str) -> tuple[float, int]:
    """The loss on samples, and how many of them did not reach their equilibrium."""
    solution = net.equilibrium(X, solver=solver, on_failure="ignore")
    outputs = net.read_out(solution.state)
    return float(np.mean((outputs.astype(np.float64) - Y) ** 2)), int((~solution.converged).sum())


def _report_failure(
    on_failure: str, losses: Array, unconverged: Array, before: int, samples: int, unique: bool
) -> None:
    failing = np.argwhere((unconverged > 0) | ~np.isfinite(losses))
    net, epoch = failing[np.argmin(failing[:, 1])]
    if unconverged[net, epoch]:
        remedy = "raise max_iterations, loosen tol or damp the solver"
        message = (
            f"{unconverged[net, epoch]} of {samples} samples did not reach an equilibrium in epoch {before + epoch + 1}; "
            f"their gradient is not that of the loss. Remedies: {remedy}{'' if unique else ', or use constraint=Perron()'}"
        )
    else:
        message = (
            f"the loss is no longer finite in epoch {before + epoch + 1}; the parameters are those of the step before. "
            "Remedies: a smaller learning_rate, clip, or scaled inputs and targets"
        )
    if on_failure == "raise":
        raise ConvergenceError(message)
    warn(message, ConvergenceWarning)


def _show(
    bar: tqdm[Any], count: int, losses: Array, unconverged: Array, samples: int, validation: list[list[float]]
) -> None:
    shown = {"loss": f"{np.median(losses[:, -1]):.3g}"}
    if validation:
        shown["validation"] = f"{np.median(validation[-1]):.3g}"
    if unconverged[:, -1].any():
        shown["unconverged"] = f"{unconverged[:, -1].mean() / samples:.1%}"
    bar.set_postfix(shown, refresh=False)
    bar.update(count)


SETTINGS = tuple(name for name in inspect.signature(fit_many).parameters if name not in ("nets", "X", "Y"))
"""The settings of a fit."""

"""Ending the training of a net before its last epoch: early stopping, callbacks, and a guard."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from implicit_rnn.engines.base import Halt
from implicit_rnn.options import Option, check_count, check_flag, check_not_negative

if TYPE_CHECKING:
    from implicit_rnn.network import Network
    from implicit_rnn.training.settings import Settings


@dataclass(frozen=True)
class EarlyStopping(Option):
    """Training ends once the validation loss no longer improves.

    Parameters
    ----------
    patience
        Number of epochs without an improvement before training ends.
    min_delta
        How much lower than at the last improvement a loss must be to count as one.
    restore_best
        Whether the net ends with the parameters of its lowest validation loss rather than the last.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> stop = irnn.EarlyStopping(patience=5)
    >>> data = {"validation": (X + 0.05, X**2), "early_stopping": stop}
    >>> run = net.fit(X, X**2, optimizer=irnn.Adam(0.1), epochs=500, progress=False, **data)
    >>> len(run.loss) - run.best_epoch
    5
    >>> print(run.stopped[:64])
    the validation loss has not improved in the 5 epochs up to epoch
    """

    patience: int = 20
    min_delta: float = 0.0
    restore_best: bool = True

    def __post_init__(self) -> None:
        check_count("patience", self.patience)
        check_not_negative("min_delta", self.min_delta)
        check_flag("restore_best", self.restore_best)


@dataclass(frozen=True)
class Progress:
    """The information about a net in training that a callback gets.

    Attributes
    ----------
    net
        The net, with the parameters of this epoch; do not change it.
    index
        Its position among the nets of the call.
    epoch
        Number of finished epochs.
    epochs
        Number of requested epochs.
    loss
        Mean training loss of this epoch.
    unconverged
        Number of samples of this epoch that did not reach their equilibrium.
    validation_loss
        The latest validation loss.
    best_epoch
        The epoch of the lowest validation loss so far.
    learning_rate
        The learning rate of the first step of this epoch.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> def show(progress):
    ...     print(progress.epoch, progress.epochs, progress.unconverged)
    >>> run = net.fit(X, X**2, epochs=20, callbacks=show, callback_every=10, progress=False)
    10 20 0
    20 20 0
    """

    net: Network
    index: int
    epoch: int
    epochs: int
    loss: float
    unconverged: int
    validation_loss: float | None
    best_epoch: int | None
    learning_rate: float


Callback = Callable[[Progress], bool | None]


class StopTraining(Exception):  # noqa: N818
    """Raised by a callback to end the training of all nets of the call without an error.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> def enough(progress):
    ...     if progress.loss < 0.02:
    ...         raise irnn.StopTraining
    >>> run = net.fit(X, X**2, optimizer=irnn.Adam(0.05), epochs=500, callbacks=enough, progress=False)
    >>> run.stopped.startswith("a callback ended the training after epoch")
    True
    """


def ends_training(callback: Callback, progress: Progress) -> bool:
    """Call it; return whether it ends the training of the net. ``TypeError`` for results other than True, False and None."""
    answer = callback(progress)
    if answer is not None and not isinstance(answer, bool | np.bool_):
        name = getattr(callback, "__qualname__", repr(callback))
        raise TypeError(
            f"the callback {name} returned {reprlib.repr(answer)}; expected True to end the training of the net, False or None "
            "to go on"
        )
    return bool(answer)


def reason(halt: int, epoch: int, unconverged: int, settings: Settings, remedy: str) -> str:
    """Why a net was halted in ``epoch``, with ``unconverged`` samples without equilibrium, for which ``remedy`` is given."""
    if halt == Halt.NO_IMPROVEMENT:
        assert settings.early_stopping is not None
        patience = settings.early_stopping.patience
        return f"the validation loss has not improved in the {patience} epochs up to epoch {epoch}"
    if halt == Halt.BY_CALLBACK:
        return f"a callback ended the training after epoch {epoch}"
    kept = "the net has the parameters from which its last good epoch began"
    if halt == Halt.TOO_MANY_UNCONVERGED:
        return (
            f"training halted: {unconverged} of {settings.samples} samples did not reach an equilibrium in epoch {epoch}, more "
            f"than the share of {settings.guard.unconverged:g} that guard allows; {kept}. Remedies: {remedy}, a smaller "
            "learning_rate"
        )
    slower = "a smaller learning_rate, clip, weight_decay, or scaled inputs and targets"
    if halt == Halt.TOO_LARGE:
        if settings.guard.parameter_norm is None:
            return (
                f"training halted: the parameters are no longer finite after epoch {epoch}; {kept}. Remedies: {slower}"
            )
        return (
            f"training halted: the norm of the parameters exceeds {settings.guard.parameter_norm} after epoch {epoch}; {kept}. "
            f"Remedies: {slower}; guard=Guard(parameter_norm=None) allows any"
        )
    cause = (
        f", where {unconverged} of {settings.samples} samples did not reach an equilibrium, or the derivative of the loss "
        "overflows for them"
    )
    return (
        f"training halted: the loss or its gradient is not finite in epoch {epoch}{cause if unconverged else ''}; {kept}. "
        f"Remedies: {f'{remedy}, ' if unconverged else ''}{slower}"
    )

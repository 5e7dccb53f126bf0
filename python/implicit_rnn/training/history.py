"""The record of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray


@dataclass(frozen=True)
class Run:
    """The record of the training of one net, E epochs long."""

    loss: Array
    """(E,) mean training loss of each epoch, each step's before its update."""
    unconverged: Array
    """(E,) samples that did not reach their equilibrium."""
    learning_rate: Array
    """(E,) of the first step of each epoch."""
    validation_epochs: Array
    """The epochs (from 1) after which the validation loss was taken."""
    validation_loss: Array
    """The validation loss at those epochs; empty without validation data."""
    validation_unconverged: Array
    """Validation samples that did not reach their equilibrium at those epochs."""
    best_epoch: int | None
    """The epoch after which the validation loss was lowest; None if there is none."""
    stopped: str | None
    """Why training ended before the last epoch that was asked for; None if it did not."""
    seconds: float
    engine: str

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the losses against the epoch, by default into a new figure."""
        from matplotlib import pyplot

        from implicit_rnn import plotting

        if ax is None:
            _, ax = pyplot.subplots(layout="constrained")
        plotting.loss_curve(self, ax)
        return ax

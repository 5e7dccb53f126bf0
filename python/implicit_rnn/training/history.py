"""The record of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from implicit_rnn.console import html_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from implicit_rnn.training.snapshot import Snapshot

Array = np.ndarray


@dataclass(frozen=True, repr=False, eq=False)
class Run:
    """The record of the training of one net, E epochs long.

    Attributes
    ----------
    loss
        (E,) mean training loss of each epoch, each step's loss taken before its update.
    unconverged
        (E,) number of samples that did not reach their equilibrium.
    learning_rate
        (E,) learning rate of the first step of each epoch.
    validation_epochs
        (V,) the epochs (from 1) after which the validation loss was evaluated.
    validation_loss
        (V,) the validation loss at those epochs; empty without validation data.
    validation_unconverged
        (V,) number of validation samples that did not reach their equilibrium at those epochs.
    best_epoch
        The epoch after which the validation loss was lowest; None if there is none.
    stopped
        Why training ended before the last requested epoch; None if it did not.
    seconds
        How long the training took.
    engine
        The name of the engine.
    snapshot
        The state at the end, optimiser and order of the minibatches included, from which ``fit(resume=run)`` continues.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> run = net.fit(X, X**2, epochs=30, validation=(X, X**2), validation_every=10, progress=False)
    >>> run.loss.shape, run.validation_epochs, run.stopped
    ((30,), array([10, 20, 30]), None)
    >>> run = net.fit(X, X**2, epochs=40, validation=(X, X**2), validation_every=10, resume=run, progress=False)  # 10 more
    >>> run.loss.shape
    (40,)
    """

    loss: Array
    unconverged: Array
    learning_rate: Array
    validation_epochs: Array
    validation_loss: Array
    validation_unconverged: Array
    best_epoch: int | None
    stopped: str | None
    seconds: float
    engine: str
    snapshot: Snapshot | None = None

    def __repr__(self) -> str:
        facts = self._facts()
        epochs = facts.pop("epochs")
        return f"Run({epochs} epochs, {', '.join(f'{name} {text}' for name, text in facts.items())})"

    def _repr_html_(self) -> str:
        return html_table("Run", self._facts())

    def _facts(self) -> dict[str, str]:
        facts = {"epochs": str(len(self.loss))}
        if len(self.loss):
            facts["loss"] = f"{self.loss[-1]:.4g}"
        if len(self.validation_loss):
            facts["validation loss"] = f"{self.validation_loss[-1]:.4g}"
        if self.best_epoch is not None:
            lowest = self.validation_loss[self.validation_epochs == self.best_epoch]
            facts["lowest"] = f"{float(lowest[0]):.4g} after epoch {self.best_epoch}"
        if self.unconverged.any():
            facts["unconverged"] = f"{self.unconverged.sum()} in all epochs, {self.unconverged[-1]} in the last"
        facts |= {"seconds": f"{self.seconds:.3g}", "engine": self.engine}
        if self.stopped is not None:
            facts["stopped"] = self.stopped.partition(";")[0]
        return facts

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the losses against the epoch.

        Parameters
        ----------
        ax
            Matplotlib's axes; ``None`` for those of a new figure.

        Returns
        -------
        The axes.

        Examples
        --------
        >>> net = irnn.Network(1, [irnn.Layer(2)], outputs=1, seed=0)
        >>> run = net.fit([[0.1], [0.2]], [[0.3], [0.5]], epochs=3, progress=False)
        >>> run.plot().get_xlabel()
        'epoch'
        """
        from matplotlib import pyplot

        from implicit_rnn import plotting

        if ax is None:
            _, ax = pyplot.subplots(layout="constrained")
        plotting.loss_curve(self, ax)
        return ax

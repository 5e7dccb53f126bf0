"""What ends the training of a net before its last epoch: early stopping, callbacks, and a guard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from implicit_rnn.engines import Halt
from implicit_rnn.options import Option, check_count, check_not_negative

if TYPE_CHECKING:
    from implicit_rnn.network import Network
    from implicit_rnn.training.settings import Settings


@dataclass(frozen=True)
class EarlyStopping(Option):
    """Training ends once the validation loss has not improved for ``patience`` epochs.

    An improvement is a loss lower by more than ``min_delta`` than at the last improvement. With ``restore_best`` the
    net then has the parameters of its lowest validation loss.
    """

    patience: int = 20
    """Epochs without an improvement that are waited for."""
    min_delta: float = 0.0
    """The least that counts as an improvement."""
    restore_best: bool = True
    """Whether the net ends with its best parameters rather than the last."""

    def __post_init__(self) -> None:
        check_count("patience", self.patience)
        check_not_negative("min_delta", self.min_delta)


@dataclass(frozen=True)
class Progress:
    """What a callback is told about a net in training."""

    net: Network
    """The net, with the parameters of this epoch; not to be changed."""
    index: int
    """Its place among the nets of the call."""
    epoch: int
    """Epochs done."""
    epochs: int
    """Epochs asked for."""
    loss: float
    """Mean training loss of this epoch."""
    unconverged: int
    """Samples of this epoch that did not reach their equilibrium."""
    validation_loss: float | None
    """The last one taken."""
    best_epoch: int | None
    """The epoch of the lowest validation loss so far."""
    learning_rate: float
    """Of the first step of this epoch."""


Callback = Callable[[Progress], bool | None]


class StopTraining(Exception):  # noqa: N818
    """Raised by a callback: the training of all nets of the call ends in good order."""


def reason(halt: int, epoch: int, unconverged: int, settings: Settings, remedy: str) -> str:
    """A sentence on what halted a net in ``epoch``, when so many samples had no equilibrium; ``remedy`` is for these."""
    if halt == Halt.NO_IMPROVEMENT:
        assert settings.early_stopping is not None
        patience = settings.early_stopping.patience
        return f"the validation loss has not improved in the {patience} epochs up to epoch {epoch}"
    if halt == Halt.BY_CALLBACK:
        return f"a callback ended the training after epoch {epoch}"
    kept = "the net has the parameters from which its last good epoch began"
    if halt == Halt.TOO_MANY_UNCONVERGED or unconverged:
        limit = f", more than the share of {settings.guard.unconverged:g} that guard allows"
        return (
            f"training halted: {unconverged} of {settings.samples} samples did not reach an equilibrium in epoch "
            f"{epoch}{limit if halt == Halt.TOO_MANY_UNCONVERGED else ', and the loss is not finite'}; {kept}. Remedies: "
            f"{remedy}, a smaller learning_rate"
        )
    slower = "a smaller learning_rate, clip, weight_decay, or scaled inputs and targets"
    if halt == Halt.TOO_LARGE:
        return (
            f"training halted: the norm of the parameters exceeds {settings.guard.parameter_norm} after epoch {epoch}; {kept}. "
            f"Remedies: {slower}; guard=Guard(parameter_norm=None) allows any"
        )
    return f"training halted: the loss is not finite in epoch {epoch}; {kept}. Remedies: {slower}"

"""The guard that halts training."""

from __future__ import annotations

from dataclasses import dataclass

from implicit_rnn.options import Option, check_positive, check_share


@dataclass(frozen=True)
class Guard(Option):
    """Conditions that halt the training of a net, besides a loss or gradient that is not finite.

    A halted net gets the parameters at the start of its last good epoch: one with finite losses and no more
    unconverged samples than allowed.

    Parameters
    ----------
    unconverged
        Largest share of an epoch's samples that may fail to reach an equilibrium, from 0 to 1; 1 allows all.
    parameter_norm
        Largest Euclidean norm of the parameters after an epoch; None for any.

    Examples
    --------
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> net = irnn.Network(1, [irnn.Layer(4)], outputs=1, seed=0)
    >>> guard = irnn.Guard(parameter_norm=100)
    >>> run = net.fit(X, X**2, optimizer=irnn.SGD(1e4), epochs=9, guard=guard, on_failure="ignore", progress=False)
    >>> print(run.stopped[:73])
    training halted: the norm of the parameters exceeds 100 after epoch 1; th
    """

    unconverged: float = 1.0
    parameter_norm: float | None = 1e6

    def __post_init__(self) -> None:
        check_share("unconverged", self.unconverged)
        if self.parameter_norm is not None:
            check_positive("parameter_norm", self.parameter_norm)

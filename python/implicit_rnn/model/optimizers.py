"""The optimisers, and the guard that halts a training."""

from __future__ import annotations

from dataclasses import dataclass, field

from implicit_rnn.options import Option, check_count, check_decay, check_not_negative, check_positive, check_share


@dataclass(frozen=True)
class Optimizer(Option):
    """How a gradient g changes the parameters p."""


@dataclass(frozen=True)
class GradientDescent(Optimizer):
    """One step along each gradient; the formulas are those of Optimisers.jl.

    ``weight_decay`` λ adds λ p to the gradient of all parameters p, as if λ ‖p‖² / 2 were added to the loss.
    """

    learning_rate: float = 1e-3
    weight_decay: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        check_not_negative("weight_decay", self.weight_decay)


@dataclass(frozen=True)
class SGD(GradientDescent):
    """p ← p - η g."""

    learning_rate: float = 1e-1


@dataclass(frozen=True)
class Momentum(GradientDescent):
    """v ← ρ v + η g; p ← p - v."""

    learning_rate: float = 1e-2
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("momentum", self.momentum)


@dataclass(frozen=True)
class Nesterov(GradientDescent):
    """Nesterov's accelerated gradient in its momentum form."""

    learning_rate: float = 1e-2
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("momentum", self.momentum)


@dataclass(frozen=True)
class Adam(GradientDescent):
    """Adam (Kingma and Ba, arXiv 1412.6980)."""

    learning_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moments(self.beta1, self.beta2, self.epsilon)


@dataclass(frozen=True)
class AdamW(GradientDescent):
    """Adam whose ``weight_decay`` λ shrinks the parameters by η λ p beside its step (Loshchilov and Hutter, 1711.05101)."""

    learning_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = field(default=1e-2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moments(self.beta1, self.beta2, self.epsilon)


@dataclass(frozen=True)
class RMSProp(GradientDescent):
    """v ← ρ v + (1 - ρ) g²; p ← p - η g / (√v + ε), with ρ = ``decay`` (Tieleman and Hinton 2012)."""

    learning_rate: float = 1e-3
    decay: float = 0.9
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("decay", self.decay)
        check_positive("epsilon", self.epsilon)


@dataclass(frozen=True)
class LBFGS(Optimizer):
    """The quasi-Newton method of limited memory (Liu and Nocedal 1989), for all samples at once.

    An epoch is one iteration: a search along the direction that the last ``memory`` steps suggest for one that meets the
    strong Wolfe conditions, with at most ``search_steps`` lengthenings; most often one or two gradients are enough.
    Where no step lowers the loss any more, the parameters stay as they are.
    """

    memory: int = 10
    search_steps: int = 20

    def __post_init__(self) -> None:
        check_count("memory", self.memory)
        check_count("search_steps", self.search_steps)


def _check_moments(beta1: float, beta2: float, epsilon: float) -> None:
    check_decay("beta1", beta1)
    check_decay("beta2", beta2)
    check_positive("epsilon", epsilon)


@dataclass(frozen=True)
class Guard(Option):
    """When the training of a net is halted, besides a loss or gradient that is not finite.

    When more than the share ``unconverged`` of an epoch's samples does not reach its equilibrium (1 lets all pass), or
    when the Euclidean norm of the parameters is more than ``parameter_norm`` after an epoch (None: any will do). A net
    that is halted has the parameters from which its last good epoch began: one with finite losses and no more
    unconverged samples than allowed.
    """

    unconverged: float = 1.0
    parameter_norm: float | None = 1e6

    def __post_init__(self) -> None:
        check_share("unconverged", self.unconverged)
        if self.parameter_norm is not None:
            check_positive("parameter_norm", self.parameter_norm)

"""The constraints on the recurrent weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from implicit_rnn.options import Option, check_fraction


@dataclass(frozen=True)
class Constraint(Option):
    """What is promised of the recurrent weights R, where L is the bound on the slope of the activation."""

    unique: ClassVar[bool] = True
    """Whether every input has exactly one equilibrium."""


@dataclass(frozen=True)
class Free(Constraint):
    """No constraint, as in Sanokowski (arXiv 2010.10564): equilibria may be many, unstable or out of reach."""

    unique: ClassVar[bool] = False


@dataclass(frozen=True)
class Perron(Constraint):
    """R = e^{-A} K e^{A} with a learnt diagonal A and rows of L|K| summing to at most ``kappa``.

    One equilibrium, global convergence of Picard iteration and a certified error bound, at little cost in
    expressiveness (El Ghaoui et al. 2021, well-posedness by the Perron-Frobenius eigenvalue of L|R|).
    """

    kappa: float = 0.95

    def __post_init__(self) -> None:
        check_fraction("kappa", self.kappa)


@dataclass(frozen=True)
class InfNorm(Constraint):
    """Every row of L|R| sums to at most ``kappa``: a contraction in the maximum norm."""

    kappa: float = 0.95

    def __post_init__(self) -> None:
        check_fraction("kappa", self.kappa)


@dataclass(frozen=True)
class Spectral(Constraint):
    """The largest singular value of L R is at most ``rho``: a contraction in the Euclidean norm."""

    rho: float = 0.95

    def __post_init__(self) -> None:
        check_fraction("rho", self.rho)


@dataclass(frozen=True)
class Monotone(Constraint):
    """I - (L R + RᵀL)/2 ⪰ ``margin`` I: one equilibrium (Winston and Kolter 2020), which Picard may not reach.

    Holds for activations whose slope is never negative, hence not for gelu and silu.
    """

    margin: float = 0.05

    def __post_init__(self) -> None:
        check_fraction("margin", self.margin)

"""The compared networks, with about the same number of parameters, and their tuned learning rates."""

from __future__ import annotations

from dataclasses import dataclass

from implicit_rnn.experiments.pendulum.simulation import TIMES
from implicit_rnn.model.constraints import Constraint, Free, Monotone, Perron
from implicit_rnn.model.topology import Layer
from implicit_rnn.network import Network
from implicit_rnn.solvers import Adjoint, Auto, Implicit, Solver, Unrolled

SOLVER = Auto(tol=1e-8, max_iterations=200)
INITIAL_SEED = 10_000
"""Added to a seed for its initial weights, so that they are not drawn from the same numbers as its data."""


@dataclass(frozen=True)
class Model:
    """A kind of network, and how it is trained; the neurons of its last layer are its outputs."""

    title: str
    layers: tuple[Layer, ...]
    feedback: bool = False
    constraint: Constraint = Free()
    adjoint: Adjoint = Implicit()
    learning_rate: float = 1e-2

    @property
    def guaranteed(self) -> bool:
        """Whether it is recurrent and every input is guaranteed one equilibrium."""
        return self.recurrent and self.constraint.unique

    @property
    def recurrent(self) -> bool:
        return self.feedback or any(layer.lateral for layer in self.layers)

    @property
    def solver(self) -> Solver:
        """The solver for the outputs: a net trained with K unrolled steps is evaluated by K steps, not at a fixed point."""
        return self.adjoint.reader(SOLVER)

    def network(self, seed: int | None = None, engine: str | None = None) -> Network:
        """The untrained net of a seed: W ~ N(0, 1/32), feed-forward N(0, 1/n), recurrent N(0, 0.09/n), biases 0."""
        hidden = sum(layer.neurons for layer in self.layers[:-1])
        return Network(
            len(TIMES),
            self.layers,
            feedback=self.feedback,
            outputs=[hidden, hidden + 1],
            constraint=self.constraint,
            seed=None if seed is None else INITIAL_SEED + seed,
            engine=engine,
        )


def _feed_forward(*neurons: int) -> tuple[Layer, ...]:
    return (*(Layer(n, lateral=False) for n in neurons), Layer(2, "identity", lateral=False))


RECURRENT = (Layer(24), Layer(2, "identity"))

MODELS = {
    "ff2": Model("feed-forward, 42", _feed_forward(42)),
    "ff3": Model("feed-forward, 24-24", _feed_forward(24, 24)),
    "lateral": Model("lateral", RECURRENT),
    "lateral-perron": Model("lateral, Perron", RECURRENT, constraint=Perron(0.95)),
    "lateral-monotone": Model("lateral, Monotone", RECURRENT, constraint=Monotone(0.05)),
    "feedback": Model("lateral + feedback", RECURRENT, feedback=True),
    "feedback-perron": Model("lateral + feedback, Perron", RECURRENT, feedback=True, constraint=Perron(0.95)),
    "feedback-monotone": Model("lateral + feedback, Monotone", RECURRENT, feedback=True, constraint=Monotone(0.05)),
    "bptt": Model("lateral + feedback, 8 steps (BPTT)", RECURRENT, feedback=True, adjoint=Unrolled(8)),
}
"""The models by the names that the command and the files use. The last layer is linear and is the output."""

SHIPPED = "lateral-monotone"
"""The model that is trained to analyse the user's own pendulum."""

"""XOR with one layer: lateral connections solve it, a feed-forward layer cannot (claim i of arXiv 2010.10564).

The paper's own settings are not published in full; the protocol here is ours. Inputs {-1, 1}², targets ±0.9, one tanh
layer of n neurons whose first neuron is the output; W ~ N(0, 0.49), R ~ N(0, 0.25/n), b = 0; Adam 0.03 for 2000
full-batch steps in float64, gradients clipped to norm 10.

A net has solved XOR if all four signs are right, all four samples converged and the mean squared error is below 0.01.
It is multistable if any sample reaches a second equilibrium from 64 random starts in [-1, 1]ⁿ: its output then
depends on where the iteration starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from implicit_rnn.engines import get_engine
from implicit_rnn.experiments.provenance import versions
from implicit_rnn.experiments.statistics import wilson_interval
from implicit_rnn.files import write_figure, write_json
from implicit_rnn.model.constraints import Constraint, Free, Perron
from implicit_rnn.model.optimizers import Adam
from implicit_rnn.model.topology import Layer
from implicit_rnn.network import Network
from implicit_rnn.solvers import Auto
from implicit_rnn.training import Run, fit_many

X = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
Y = np.array([-0.9, 0.9, 0.9, -0.9])

RECURRENCES: dict[str, tuple[bool, Constraint]] = {
    "none": (False, Free()),
    "free": (True, Free()),
    "perron": (True, Perron(0.95)),
}
"""The recurrences by name: whether there are lateral connections, and their constraint."""

OPTIMIZER = Adam(0.03)
STEPS = 2000
CLIP = 10.0
STARTS = 64
SOLVED_BELOW = 0.01
SOLVER = Auto(tol=1e-8, max_iterations=500)
LEGEND = f"""\
recurrence   lateral connections: none, free weights, or under Perron(0.95), which guarantees one equilibrium
solved       nets whose four outputs have the right sign and converged, with a mean squared error below {SOLVED_BELOW}
interval     of the share of all such nets that would solve XOR (Wilson's, at 95 %)
multistable  among the solved: nets with a second equilibrium, whose answer depends on where the iteration starts"""
FILES = ("xor.json", "xor.png")
DEFAULT_SEEDS = {"julia": 200, "numpy": 10}


@dataclass(frozen=True)
class Cell:
    """One entry of the table: several nets of one kind."""

    recurrence: str
    neurons: int
    seeds: int
    solved: int
    solved_interval: tuple[float, float]
    multistable: int
    """Among the solved."""
    seconds: float


@dataclass(frozen=True)
class Result:
    """The whole table, one trained net to look at, and what is needed to repeat it."""

    cells: list[Cell]
    net: Network | None
    run: Run | None
    engine: str
    seeds: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "experiment": "xor",
            "protocol": {
                "optimizer": {"name": OPTIMIZER.name, **OPTIMIZER.options()},
                "solver": {"name": SOLVER.name, **SOLVER.options()},
                "steps": STEPS,
                "clip": CLIP,
                "starts": STARTS,
                "seeds": list(range(self.seeds)),
            },
            "versions": versions(),
            "engine": self.engine,
            "cells": [asdict(cell) for cell in self.cells],
        }


def initial_net(recurrence: str, neurons: int, seed: int, engine: str | None = None) -> Network:
    """The untrained net of a seed."""
    lateral, constraint = RECURRENCES[recurrence]
    net = Network(2, [Layer(neurons, "tanh", lateral)], outputs=[0], constraint=constraint, engine=engine)
    rng = np.random.default_rng(seed)
    net.parameters[:] = 0
    net.weights["W"][...] = 0.7 * rng.standard_normal((neurons, 2))
    if lateral:
        net.weights["R"][...] = 0.5 / np.sqrt(neurons) * rng.standard_normal((neurons, neurons))
    return net


def train(recurrence: str, neurons: int, seeds: int, engine: str | None = None) -> tuple[list[Network], list[Run]]:
    """Nets with the seeds 0 to ``seeds`` - 1, trained side by side."""
    nets = [initial_net(recurrence, neurons, seed, engine) for seed in range(seeds)]
    runs = fit_many(
        nets,
        X,
        Y[:, None],
        optimizer=OPTIMIZER,
        epochs=STEPS,
        clip=CLIP,
        solver=SOLVER,
        on_failure="ignore",
        progress=False,
    )
    return nets, runs


def solves(net: Network) -> bool:
    """Whether a net has learnt XOR: signs, convergence and error."""
    solution = net.equilibrium(X, solver=SOLVER, on_failure="ignore")
    outputs = net.read_out(solution.state)[:, 0]
    right = np.sign(outputs) == np.sign(Y)
    return bool(solution.converged.all() and right.all() and np.mean((outputs - Y) ** 2) < SOLVED_BELOW)


def is_multistable(net: Network, seed: int) -> bool:
    """Whether some sample has another equilibrium that Picard iteration reaches from one of the random starts."""
    from_zero = net.equilibrium(X, solver=SOLVER, on_failure="ignore").state
    starts = np.random.default_rng(seed).uniform(-1, 1, (STARTS * len(X), net.topology.neurons))
    solution = net.equilibrium(np.tile(X, (STARTS, 1)), solver=SOLVER, z0=starts, on_failure="ignore")
    distance = np.abs(solution.state - np.tile(from_zero, (STARTS, 1))).max(axis=1)
    return bool((solution.converged & (distance > 1e-3)).any())


def run(
    neurons: Sequence[int] = (1, 2, 3, 4),
    recurrences: Sequence[str] = ("none", "free", "perron"),
    seeds: int | None = None,
    engine: str | None = None,
    report: Callable[[Cell], None] = lambda cell: None,
) -> Result:
    """Train and evaluate all nets; ``report`` is called with each cell of the table when it is done.

    ``seeds`` defaults to 200 on the Julia engine and 10 on the NumPy engine. Raises ``ValueError`` for unknown names
    and numbers below 1.
    """
    unknown = set(recurrences) - set(RECURRENCES)
    if unknown or not recurrences or not neurons or min(neurons) < 1 or (seeds is not None and seeds < 1):
        raise ValueError(
            f"neurons {list(neurons)}, recurrences {list(recurrences)}, seeds {seeds}: expected numbers from 1 and "
            f"recurrences among {', '.join(RECURRENCES)}"
        )
    used = get_engine(engine).name
    count = DEFAULT_SEEDS[used] if seeds is None else seeds
    cells: list[Cell] = []
    examples: dict[str, tuple[Network, Run]] = {}
    for n in neurons:
        for recurrence in recurrences:
            begin = time.perf_counter()
            nets, runs = train(recurrence, n, count, engine)
            solved = [k for k, net in enumerate(nets) if solves(net)]
            multistable = sum(is_multistable(nets[k], k) for k in solved)
            interval = wilson_interval(len(solved), count)
            cells.append(Cell(recurrence, n, count, len(solved), interval, multistable, time.perf_counter() - begin))
            report(cells[-1])
            if solved:
                examples.setdefault(recurrence, (nets[solved[0]], runs[solved[0]]))
    net, history = examples.get("perron") or next(iter(examples.values()), (None, None))
    return Result(cells, net, history, used, count)


def table(result: Result) -> str:
    """The table as text."""
    lines = [
        f"{'recurrence':<11} {'neurons':>7} {'solved':>11} {'95 % interval':>16} {'multistable':>12} {'seconds':>8}"
    ]
    for cell in result.cells:
        low, high = cell.solved_interval
        solved, interval = f"{cell.solved} of {cell.seeds}", f"{low:.1%} to {high:.1%}"
        multistable = f"{cell.multistable} of {cell.solved}" if cell.solved else "-"
        lines.append(
            f"{cell.recurrence:<11} {cell.neurons:>7} {solved:>11} {interval:>16} {multistable:>12} {cell.seconds:>8.1f}"
        )
    return "\n".join([*lines, "", LEGEND])


def save(result: Result, folder: Path) -> list[Path]:
    """Write xor.json and, if a net was found that solves XOR, xor.png, else remove an older one; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / FILES[0]]
    write_json(written[0], result.as_dict())
    figure = folder / FILES[1]
    if result.net is not None and result.run is not None:
        written.append(figure)
        _figure(result.net, result.run, figure)
    else:
        figure.unlink(missing_ok=True)
    return written


def _figure(net: Network, run: Run, path: Path) -> None:
    from matplotlib.figure import Figure

    from implicit_rnn import plotting

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    surface, graph, curve = figure.subplots(1, 3)
    plotting.decision_surface(net, surface, X, Y)
    surface.set_title(f"Output of neuron 1 ({net.topology.neurons} neurons, {net.topology.constraint.name})")
    plotting.topology(net, graph)
    graph.set_title("Weights: $x \\to z$ and lateral $z \\leftrightarrow z$")
    plotting.loss_curve(run, curve)
    curve.set_title("Mean squared error")
    write_figure(path, figure)

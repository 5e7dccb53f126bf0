"""Training in one call: gradient steps of nets per second, against jitted JAX.

A step is the equilibrium of a minibatch, its implicit gradient, and the update of one net by Adam; the default constraint. JAX
scans over all steps inside one compiled function, maps over the nets, and solves two neurons by Newton's method with the inverse
written out, more by fixed-point iteration. Both begin with the same parameters and take the same minibatches; the verified
deviation is that of the losses of the first epochs, which agree only if all gradients before did. Rounds are interleaved as
those of the training gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from workers import OURS, Worker, compete, load, median_ratio, time_rounds

JAX = "jax"
SCRIPTS = {OURS: "fit_ours.py", JAX: "fit_with_jax.py"}
EPOCHS_COMPARED = 5

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """Nets of one layer on the samples of XOR, or on noisy images of ten digits."""

    dtype: str
    nets: int
    neurons: int
    samples: int
    batch: int
    epochs: int
    goal: float
    """The ratio of JAX's time to ours that is aimed at."""

    @property
    def name(self) -> str:
        return f"{self.nets} x {self.neurons} neurons, {self.samples} samples by {self.batch}, {self.dtype}"

    @property
    def steps(self) -> int:
        """Of all nets."""
        return self.nets * self.epochs * -(-self.samples // self.batch)

    def draw(self) -> dict[str, Array]:
        """Data, parameters (nets, ...), and the samples of each step (steps, batch)."""
        rng = np.random.default_rng(0)
        xor = self.neurons < 10
        if xor:
            X = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
            X, Y = (np.tile(A, (self.samples // 4, 1)) for A in (X, 0.9 * -X[:, :1] * X[:, 1:]))
        else:
            classes = rng.integers(0, 10, self.samples)
            X, Y = rng.normal(size=(10, 64))[classes] + rng.normal(size=(self.samples, 64)), np.eye(10)[classes]
        n, d, S = self.neurons, X.shape[1], self.nets
        shapes = {"W": (n, d), "R": (n, n), "b": (n,), "a": (n,)} | ({} if xor else {"C": (10, n), "d": (10,)})
        scale = {"W": d**-0.5, "R": 0.5 * n**-0.5, "b": 0.1, "a": 0, "C": n**-0.5, "d": 0}
        weights = {name: scale[name] * rng.normal(size=(S, *shape)) for name, shape in shapes.items()}
        arrays = {key: value.astype(self.dtype) for key, value in ({"X": X, "Y": Y} | weights).items()}
        rng = np.random.default_rng(0)  # as `fit` draws
        whole = self.batch >= self.samples
        orders = [np.arange(self.samples) if whole else rng.permutation(self.samples) for _ in range(self.epochs)]
        return arrays | {"order": np.concatenate(orders).reshape(-1, self.batch)}


CASES = (
    Case("float64", 1, 2, 4, 4, 20_000, 2),
    Case("float32", 1, 2, 4, 4, 20_000, 2),
    Case("float64", 200, 2, 4, 4, 2_000, 3),
    Case("float32", 200, 2, 4, 4, 2_000, 3),
    Case("float64", 1, 2, 64, 4, 1_000, 2),
    Case("float32", 1, 32, 1200, 100, 40, 2.5),
)


def run(peers_python: str, rounds: int) -> dict[str, Any]:
    """Time all cases; plain data for JSON."""
    print(header(), flush=True)
    return compete(SCRIPTS, peers_python, CASES, partial(measure, rounds=rounds), line, {"rounds": rounds})


def measure(case: Case, workers: dict[str, Worker], rounds: int) -> Iterator[dict[str, Any]]:
    """A row of the table."""
    load(workers, case.draw(), f"{case.batch}", 1e-10 if case.dtype == "float64" else 1e-6)
    seconds = time_rounds(workers, dict.fromkeys(workers, 1), rounds)
    losses = {name: worker.answer()[0]["losses"][:, :EPOCHS_COMPARED] for name, worker in workers.items()}
    compared = JAX in workers
    yield {
        "name": case.name,
        "steps per second": {name: case.steps / float(np.median(times)) for name, times in seconds.items()},
        "rounds": seconds,
        "deviation": float(np.abs(losses[OURS] / losses[JAX] - 1).max()) if compared else None,
        "ratio": median_ratio(seconds[JAX], seconds[OURS]) if compared else None,
        "goal": case.goal,
    }


def header() -> str:
    return f"{'steps of nets per second':<52} {OURS:>14} {JAX:>14} {'deviation':>10} {'jax/ours':>9} {'goal':>6}"


def line(row: dict[str, Any]) -> str:
    rates = "".join(
        f" {row['steps per second'][name]:>14,.0f}" if name in row["steps per second"] else f" {'absent':>14}"
        for name in SCRIPTS
    )
    if row["ratio"] is None:
        return f"{row['name']:<52}{rates}"
    missed = "" if row["ratio"] >= row["goal"] else "  MISSED"
    return f"{row['name']:<52}{rates} {row['deviation']:>10.0e} {row['ratio']:>9.2f} {row['goal']:>6g}{missed}"

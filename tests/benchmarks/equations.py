"""Equations of many samples against jitted JAX: a root, and its vjp.

Both solve by Newton's method from the same start; the verified error stands beside each time: the size of the Newton step from
the solution that was found, and the deviation of the gradient from that by the implicit function theorem, relative. Rounds are
interleaved as those of the training gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from workers import OURS, Worker, compete, load, median_ratio, time_rounds

JAX = "jax"
SCRIPTS = {OURS: "equations_ours.py", JAX: "equations_with_jax.py"}
TOL = 1e-10
BLOCK_SECONDS, FEWEST, MOST = 0.5, 3, 100

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """An equation c(z, *args) = 0 of (B, n) unknowns, with its derivatives."""

    name: str
    goals: Mapping[str, float]
    """The ratios of JAX's time to ours that are aimed at."""
    draw: Callable[[np.random.Generator], dict[str, Array]]
    """The start ``z0`` and the arguments, all (B, ...)."""
    c: Callable[..., Array]
    by_z: Callable[..., Array]
    """(B, n, n)"""
    by_args: Callable[..., dict[str, Array]]
    """(B, n, ...) for each argument."""

    def errors(self, z: Array, gradient: dict[str, Array], args: dict[str, Array]) -> dict[str, float]:
        """The relative errors of a solution, and of its vjp with ones."""
        A = self.by_z(z, **args)
        step = np.linalg.solve(A, self.c(z, **args)[..., None])[..., 0]
        multiplier = np.linalg.solve(A.transpose(0, 2, 1), -np.ones_like(z)[..., None])[..., 0]
        exact = {name: np.einsum("bi,bi...->b...", multiplier, B) for name, B in self.by_args(z, **args).items()}
        return {
            "root": float((np.linalg.norm(step, axis=1) / np.linalg.norm(z, axis=1)).max()),
            "vjp": max(_deviation(gradient[name].reshape(g.shape), g) for name, g in exact.items()),
        }


def _deviation(a: Array, b: Array) -> float:
    return float((np.abs(a - b) / np.abs(b).max()).max())


def _kepler(rng: np.random.Generator) -> dict[str, Array]:
    M, e = rng.uniform(-np.pi, np.pi, 1_000_000), rng.uniform(0, 0.9, 1_000_000)
    return {"z0": (M + 0.8 * np.sin(M))[:, None], "M": M, "e": e}


def _exponential(rng: np.random.Generator) -> dict[str, Array]:
    a = rng.uniform(0.1, 10, 700_000)
    return {"z0": np.log1p(a)[:, None], "a": a}


def _acid(rng: np.random.Generator) -> dict[str, Array]:
    c = np.stack(
        [rng.uniform(0.05, 0.2, 100_000), rng.uniform(0.01, 0.04, 100_000), 10 ** rng.uniform(-6, -4, 100_000)], 1
    )
    return {"z0": np.log(np.stack([c[:, 0] - c[:, 1], c[:, 1], c[:, 2], 1e-14 / c[:, 2]], 1)), "c": c}


def _acid_conditions(z: Array, c: Array) -> Array:
    HA, A, H, OH = np.exp(z.T)
    return np.stack(
        [
            HA + A - c[:, 0],
            H + c[:, 1] - OH - A,
            z[:, 2] + z[:, 1] - z[:, 0] - np.log(c[:, 2]),
            z[:, 2] + z[:, 3] + np.log(1e14),
        ],
        1,
    )


def _acid_by_z(z: Array, c: Array) -> Array:
    HA, A, H, OH = np.exp(z.T)
    J = np.zeros((len(z), 4, 4))
    J[:, 0, 0], J[:, 0, 1] = HA, A
    J[:, 1, 1], J[:, 1, 2], J[:, 1, 3] = -A, H, -OH
    J[:, 2] = [-1, 1, 1, 0]
    J[:, 3] = [0, 0, 1, 1]
    return J


def _acid_by_c(z: Array, c: Array) -> dict[str, Array]:
    J = np.zeros((len(z), 4, 3))
    J[:, 0, 0], J[:, 1, 1], J[:, 2, 2] = -1, 1, -1 / c[:, 2]
    return {"c": J}


CASES = (
    Case(
        "Kepler's equation, 1e6 samples",
        {"root": 3, "vjp": 2},
        _kepler,
        lambda z, M, e: z - e[:, None] * np.sin(z) - M[:, None],
        lambda z, M, e: (1 - e[:, None] * np.cos(z))[..., None],
        lambda z, M, e: {"M": np.full_like(z, -1), "e": -np.sin(z)},
    ),
    Case(
        "z exp(z) = a, 7e5 samples",
        {"root": 3, "vjp": 1.2},
        _exponential,
        lambda z, a: z * np.exp(z) - a[:, None],
        lambda z, a: ((1 + z) * np.exp(z))[..., None],
        lambda z, a: {"a": np.full_like(z, -1)},
    ),
    Case(
        "a weak acid, 4 unknowns, 1e5 samples", {"root": 4, "vjp": 2}, _acid, _acid_conditions, _acid_by_z, _acid_by_c
    ),
)


def run(peers_python: str, rounds: int) -> dict[str, Any]:
    """Time all cases; plain data for JSON."""
    columns = "".join(f"{name + ' ms':>17} {'error':>8}" for name in SCRIPTS)
    print(f"{'':<44}{columns} {'jax/ours':>9} {'goal':>6}", flush=True)
    protocol = {"tolerance": TOL, "rounds": rounds}
    return compete(SCRIPTS, peers_python, CASES, partial(measure, rounds=rounds), line, protocol)


def measure(case: Case, workers: dict[str, Worker], rounds: int) -> Iterator[dict[str, Any]]:
    """Two rows of the table."""
    arrays = case.draw(np.random.default_rng(0))
    args = {name: array for name, array in arrays.items() if name != "z0"}
    for what in ("root", "vjp"):
        fastest = load(workers, arrays, f"{case.name}: {what}", TOL)
        counts = {name: int(np.clip(BLOCK_SECONDS / least, FEWEST, MOST)) for name, least in fastest.items()}
        seconds = time_rounds(workers, counts, rounds)
        results = {}
        for name, worker in workers.items():
            answer, report = worker.answer()
            z = answer.pop("z").reshape(arrays["z0"].shape)
            results[name] = {
                "seconds": float(np.median(seconds[name])),
                "rounds": seconds[name],
                "error": case.errors(z, answer, args)[what],
                **report,
            }
        yield {
            "name": f"{case.name}: {what}",
            "results": results,
            "ratio": median_ratio(seconds[JAX], seconds[OURS]) if JAX in seconds else None,
            "goal": case.goals[what],
        }


def line(row: dict[str, Any]) -> str:
    text = f"{row['name']:<44}"
    for name in SCRIPTS:
        result = row["results"].get(name)
        text += f"{result['seconds'] * 1e3:>17.2f} {result['error']:>8.0e}" if result else f"{'absent':>17} {'':>8}"
    ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
    return f"{text} {ratio:>9} {row['goal']:>6g}{'' if (row['ratio'] or 0) >= row['goal'] else '  MISSED'}"

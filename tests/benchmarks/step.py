"""One training gradient against the peers: jitted JAX, PyTorch by hand, torchdeq.

Everyone solves to the same relative residual, forward and adjoint; the verified error of the gradient stands beside each
time. Rounds are interleaved (ours, a peer, a peer, ...): a ratio is the median of the ratios of the rounds, so that what
slows the machine down for a while slows all of a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from cases import INPUTS, NORM, OUTPUTS, TOL, Case, flops
from workers import OURS, Worker, compete, load, median_ratio, time_rounds

PEERS = {"jax": "with_jax.py", "torch": "with_torch.py", "torchdeq": "with_torchdeq.py"}
BLOCK_SECONDS, FEWEST, MOST = 0.15, 3, 2000
"""Aimed-at length of a timed block, and the fewest and most steps in one."""


def run(cases: Sequence[Case], peers_python: str, rounds: int) -> dict[str, Any]:
    """Time all cases; plain data for JSON."""
    protocol = {
        "tolerance": TOL, "inputs": INPUTS, "outputs": OUTPUTS, "norm of R": NORM, "rounds": rounds,
        "error": "largest relative error of a parameter block, Euclidean norm, against float64 solved to 1e-12",
        "floor": "matrix products of fixed-point iteration at the rate of one large product in the same process",
    }  # fmt: skip
    scripts = {OURS: "ours.py", **PEERS}
    return compete(scripts, peers_python, cases, partial(measure, rounds=rounds), line, protocol)


def measure(case: Case, workers: dict[str, Worker], rounds: int) -> Iterator[dict[str, Any]]:
    """One row of the table."""
    fastest = load(workers, case.arrays, case.activation, TOL)
    counts = {name: int(np.clip(BLOCK_SECONDS / least, FEWEST, MOST)) for name, least in fastest.items()}
    seconds = time_rounds(workers, counts, rounds)
    results: dict[str, dict[str, Any]] = {}
    for name, worker in workers.items():
        gradient, report = worker.answer()
        results[name] = {
            "seconds": float(np.median(seconds[name])),
            "rounds": seconds[name],
            "steps per round": counts[name],
            "gradient error": case.reference.error(gradient),
            **report,
            "ratio": median_ratio(seconds[name], seconds[OURS]),
        }
    ours = results[OURS]
    peers = [name for name in results if name != OURS]
    best = min(peers, key=lambda name: results[name]["ratio"], default=None)
    floor = flops(case) / ours["gemm_flops"]
    yield {
        "case": asdict(case),
        "name": case.name,
        "results": results,
        "best peer": best,
        "ratio": results[best]["ratio"] if best else None,
        "goal": case.goal,
        "floor": floor,
        "over floor": ours["seconds"] / floor,
        "needed iterations": {"forward": case.reference.forward, "adjoint": case.reference.adjoint},
    }


# --- the table -----------------------------------------------------------------------------------------------


def header() -> str:
    """The heading of the table."""
    columns = "".join(f"{name + ' ms':>13} {'error':>8}" for name in (OURS, *PEERS))
    return f"{'neurons x batch':<24}{columns} {'best/ours':>10} {'goal':>6} {'it.':>5} {'ours/floor':>10}"


def line(row: dict[str, Any]) -> str:
    """A row of the table as text."""
    text = f"{row['name']:<24}"
    for name in (OURS, *PEERS):
        result = row["results"].get(name)
        text += (
            f"{result['seconds'] * 1e3:>13.3f} {result['gradient error']:>8.0e}"
            if result
            else f"{'absent':>13} {'':>8}"
        )
    ours = row["results"][OURS]
    ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
    goal = "" if row["goal"] is None else f"{row['goal']:g}"
    missed = "" if row["goal"] is None or (row["ratio"] or 0) >= row["goal"] else "  MISSED"
    return f"{text} {ratio:>10} {goal:>6} {ours['iterations']:>5.1f} {row['over floor']:>10.2f}{missed}"

"""The cost of one call of the Julia engine on three small arrays.

What is timed is one `program.gradient(p, X, Y, g, probe)` of a net of three neurons on four samples, so that the arithmetic is
next to nothing; the same on the NumPy engine stands beside it, and the difference of the two gradients.
"""

from __future__ import annotations

import timeit
from typing import Any

import numpy as np

import implicit_rnn as irnn
from implicit_rnn.engines.base import Samples

GOAL = 25.0
"""Microseconds."""

REPEATS, CALLS = 200, 100


def run() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((4, 2)), rng.standard_normal((4, 1))
    solver = irnn.Picard(tol=1e-2)
    gradients, quartiles = {}, {}
    print(f"{'engine':<8} {'median us':>10} {'quartiles':>20} {'goal':>8}")
    for engine in ("julia", "numpy"):
        net = irnn.Network(2, [irnn.Layer(3)], outputs=1, seed=0, engine=engine)
        gradients[engine] = net.loss_and_gradient(X, Y)[1]
        program, g = net.program(solver), np.empty_like(net.parameters)
        times = microseconds(lambda program=program, p=net.parameters, g=g: program.gradient(p, Samples(X, Y), g, 0))
        low, median, high = quartiles[engine] = np.percentile(times, [25, 50, 75]).tolist()
        goal = f"< {GOAL:.0f}{'' if median < GOAL else ' MISSED'}" if engine == "julia" else ""
        print(f"{engine:<8} {median:>10.2f} {f'{low:.2f} to {high:.2f}':>20} {goal:>8}")
    error = float(np.abs(gradients["julia"] - gradients["numpy"]).max())
    print(f"the gradients differ by at most {error:.1e}")
    return {"goal": GOAL, "quartiles in microseconds": quartiles, "largest difference of the gradients": error}


def microseconds(call) -> list[float]:
    call()
    return [1e6 * seconds / CALLS for seconds in timeit.repeat(call, number=CALLS, repeat=REPEATS)]

"""Gradient steps per second of the training of tiny nets, inside one call of ``fit_many``.

XOR with two tanh neurons, Adam, the default solver and constraint; a step is an equilibrium, its gradient and the update of one
net. Time is that of the whole call.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import implicit_rnn as irnn

GOAL = 200_000
"""Steps per second with two neurons and a batch of four."""

SECONDS = 3.0
"""Aimed-at length of a call."""

X = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
Y = np.array([[-0.9], [0.9], [0.9], [-0.9]])


def run() -> dict[str, Any]:
    rows = []
    print(f"{'dtype':<9} {'nets':>5} {'samples':>8} {'batch':>6} {'steps':>10} {'steps/s':>10} {'goal':>10}")
    for dtype, nets, copies in (("float64", 1, 1), ("float32", 1, 1), ("float64", 200, 1), ("float64", 1, 16)):
        row = measure(dtype, nets, copies)
        rows.append(row)
        goal = f"{GOAL}{'' if row['steps per second'] >= GOAL else ' MISSED'}" if nets == copies == 1 else ""
        print(
            f"{dtype:<9} {nets:>5} {4 * copies:>8} {4:>6} {row['steps']:>10} {row['steps per second']:>10.0f} {goal:>10}",
            flush=True,
        )
    return {"goal": GOAL, "rows": rows}


def measure(dtype: str, count: int, copies: int) -> dict[str, Any]:
    """One row: ``count`` nets side by side on ``copies`` copies of the four samples, in batches of four."""
    steps_per_epoch = count * copies
    train(dtype, count, copies, 2)  # compiles
    trial = train(dtype, count, copies, max(20_000 // steps_per_epoch, 1))
    rate = steps_per_epoch * len(trial.loss) / trial.seconds
    epochs = max(int(SECONDS * rate / steps_per_epoch), 1)
    run = train(dtype, count, copies, epochs)
    steps = steps_per_epoch * epochs
    return {
        "dtype": dtype,
        "nets": count,
        "samples": 4 * copies,
        "steps": steps,
        "seconds": run.seconds,
        "steps per second": steps / run.seconds,
        "unconverged": int(run.unconverged.sum()),
    }


def train(dtype: str, count: int, copies: int, epochs: int) -> irnn.Run:
    nets = [
        irnn.Network(2, [irnn.Layer(2)], outputs=[0], dtype=dtype, seed=seed, engine="julia") for seed in range(count)
    ]
    x, y = np.tile(X, (copies, 1)), np.tile(Y, (copies, 1))
    return irnn.fit_many(
        nets, x, y, optimizer=irnn.Adam(1e-3), epochs=epochs, batch_size=4, progress=False, on_failure="ignore"
    )[0]

"""One training gradient and whole fits on a GPU, ours and the peers' on the same card."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import step
from cases import Case
from contestants.protocol import DEVICE

import implicit_rnn as irnn
from implicit_rnn.runtime import gpu

CASES = (
    Case(16, 4096, 20),
    Case(64, 4096, 15),
    Case(64, 65536, 6),
    Case(256, 4096, 3),
    Case(256, 65536, 2.5),
    Case(1024, 4096, 2.5),
)
FITS = {"xor": (2, 2, 4, 4), "digits": (64, 64, 1500, 128), "pendulum": (100, 64, 20000, 256)}
"""Inputs, neurons, samples and batch size of the fits."""
EPOCHS, NETS = 20, 8


def run(peers_python: str, rounds: int) -> dict[str, Any]:
    """Plain data for JSON; where there is no card, why not."""
    card = gpu.describe("cuda")
    if card.startswith("not available"):
        print(f"skipped: {card}")
        return {"skipped": card}
    print(f"{card}\n{step.header()}")
    os.environ[DEVICE] = "cuda"
    try:
        result = step.run(CASES, peers_python, rounds)
    finally:
        del os.environ[DEVICE]
    return {"card": card} | result | {"fits": {name: fits(*sizes) for name, sizes in FITS.items()}}


def fits(inputs: int, neurons: int, samples: int, batch_size: int) -> dict[str, float]:
    """Gradient steps per second of one net and of several, on the CPU and on the card."""
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((samples, inputs)), rng.standard_normal((samples, 2))
    rates = {}
    for device in ("cpu", "cuda"):
        for count in (1, NETS):
            nets = [
                irnn.Network(inputs, [irnn.Layer(neurons)], outputs=2, dtype="float32", device=device, seed=seed)
                for seed in range(count)
            ]
            options = {"batch_size": batch_size, "progress": False}
            irnn.fit_many(nets, X, Y, epochs=1, **options)  # which compiles
            begin = time.perf_counter()
            irnn.fit_many(nets, X, Y, epochs=EPOCHS, **options)
            rates[f"{device}, {count} nets"] = (
                count * EPOCHS * -(-samples // batch_size) / (time.perf_counter() - begin)
            )
    return rates

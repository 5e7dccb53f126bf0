"""Time and memory of one training gradient against the batch, the neurons and the depth.

Each point is a process of its own: the median time of some gradients, and how far the first of them makes the process grow, all
buffers included, inputs not. float32, default constraint and solver, 50 inputs, 2 outputs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import implicit_rnn as irnn
from implicit_rnn.experiments.cost import PeakMemory

INPUTS, OUTPUTS = 50, 2
SECONDS, FEWEST = 0.5, 3


@dataclass(frozen=True)
class Point:
    """A network of equal layers with all connections, and a batch."""

    neurons: int
    """In all layers together."""
    layers: int
    batch: int


SERIES = {
    "batch": [Point(64, 1, batch) for batch in (100, 300, 1000, 3000, 10_000, 30_000, 100_000)],
    "neurons": [Point(n, 1, 256) for n in (2, 8, 16, 24, 25, 32, 64, 128, 256, 512, 1024, 2048)],
    "layers": [Point(32 * layers, layers, 1000) for layers in (1, 2, 3, 4, 6, 8)],
}


def run() -> dict[str, Any]:
    series = {}
    for name, points in SERIES.items():
        print(
            f"{'neurons':>8} {'layers':>7} {'batch':>7} {'ms':>10} {'us/sample':>10} {'peak MB':>9} {'inputs MB':>10}"
        )
        series[name] = []
        for point in points:
            row = asdict(point) | measure_in_new_process(point)
            series[name].append(row)
            print(
                f"{point.neurons:>8} {point.layers:>7} {point.batch:>7} {row['seconds'] * 1e3:>10.2f} "
                f"{row['seconds'] / point.batch * 1e6:>10.2f} {row['peak bytes'] / 1e6:>9.1f} {row['input bytes'] / 1e6:>10.1f}",
                flush=True,
            )
    return {"series": series}


def measure_in_new_process(point: Point) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(asdict(point))], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(point: Point) -> dict[str, Any]:
    """One point, in this process."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((point.batch, INPUTS)).astype("float32")
    Y = rng.standard_normal((point.batch, OUTPUTS)).astype("float32")
    make_net(point).loss_and_gradient(X[:2], Y[:2])
    net = make_net(point)
    with PeakMemory() as memory:
        net.loss_and_gradient(X, Y)
    seconds: list[float] = []
    while len(seconds) < FEWEST or sum(seconds) < SECONDS:
        begin = time.perf_counter()
        net.loss_and_gradient(X, Y)
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": float(np.median(seconds)),
        "peak bytes": memory.bytes,
        "input bytes": X.nbytes + Y.nbytes,
        "iterations": float(net.equilibrium(X).iterations.mean()),
    }


def make_net(point: Point) -> irnn.Network:
    layers = [irnn.Layer(point.neurons // point.layers)] * point.layers
    return irnn.Network(INPUTS, layers, feedback=True, outputs=OUTPUTS, dtype="float32", seed=0, engine="julia")


if __name__ == "__main__":
    print(json.dumps(measure(Point(**json.loads(sys.argv[1])))))

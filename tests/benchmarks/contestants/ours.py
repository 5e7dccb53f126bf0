"""implicit-rnn through its public API: ``Network.loss_and_gradient``."""

from __future__ import annotations

import os
import time
from importlib import metadata

import numpy as np
from protocol import DEVICE, Arrays, serve

import implicit_rnn as irnn
from implicit_rnn.runtime import start


class Ours:
    def __init__(self, arrays: Arrays, activation: str, tol: float) -> None:
        self.x, self.t = arrays["x"], arrays["t"]
        neurons, part = len(arrays["R"]), len(arrays["W"])
        self.net = irnn.Network(
            arrays["x"].shape[1],
            [irnn.Layer(part, activation)] * (neurons // part),
            feedback=neurons > part,
            outputs=len(arrays["C"]),
            constraint=irnn.Free(),
            dtype=arrays["R"].dtype.name,
            engine="julia",
            device=os.environ.get(DEVICE, "cpu"),
        )
        for block in self.net.topology.blocks:
            self.net.weights[block.name][...] = self._part(arrays, block.name)
        self.solver, self.adjoint = irnn.Auto(tol=tol), irnn.Implicit(tol=tol)

    def _part(self, arrays: Arrays, name: str) -> np.ndarray:
        """The part of R, W, b, C or d that a block R[to,source] or W[layer] of a layered net stands for."""
        array = arrays[name[0]]
        if not name.startswith("R["):
            return array
        to, source = (self.net.topology.rows[int(layer)] for layer in name[2:-1].split(","))
        return array[to, source]

    def step(self) -> None:
        self.loss, self.flat = self.net.loss_and_gradient(self.x, self.t, solver=self.solver, adjoint=self.adjoint)

    def gradient(self) -> dict[str, np.ndarray]:
        rows, neurons = self.net.topology.rows, self.net.topology.neurons
        stacked = {"R": np.zeros((neurons, neurons), self.flat.dtype)}
        for name, block in self.net.named(self.flat).items():
            if name.startswith("R["):
                to, source = (rows[int(layer)] for layer in name[2:-1].split(","))
                stacked["R"][to, source] = block
            else:
                stacked[name[0]] = block
        return stacked

    def iterations(self) -> float:
        return float(self.net.equilibrium(self.x, solver=self.solver).iterations.mean())

    def report(self) -> dict[str, object]:
        R, B = self.net.recurrent_weights, max(1024, len(self.x))
        return {"gemm_flops": gemm_rate(R, B), "threads": int(start.evaluate("Threads.nthreads()"))}


def gemm_rate(R: np.ndarray, columns: int) -> float:
    """Floating-point operations per second of R times so many columns, with all cores, at best."""
    z = np.ones((columns, len(R)), R.dtype)
    out, best, begin = np.empty_like(z), np.inf, time.perf_counter()
    while time.perf_counter() - begin < 0.3:
        started = time.perf_counter()
        np.matmul(z, R.T, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * len(R) ** 2 * columns / best


if __name__ == "__main__":
    irnn.get_engine("julia")
    julia = str(start.evaluate("string(VERSION)"))
    serve(Ours, {"implicit-rnn": metadata.version("implicit-rnn"), "julia": julia, "numpy": np.__version__})

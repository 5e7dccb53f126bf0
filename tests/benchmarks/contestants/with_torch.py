"""PyTorch by hand: fixed-point iteration both ways with the formulas written out, no autograd in the loop or outside it."""

from __future__ import annotations

import os

import numpy as np
import torch
from protocol import DEVICE, Arrays, serve

VALUE = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": torch.nn.functional.softplus}
SLOPE = {
    "tanh": lambda s, z: 1 - z * z,
    "sigmoid": lambda s, z: z * (1 - z),
    "softplus": lambda s, z: torch.sigmoid(s),
}
MAX_ITERATIONS = 2000


class WithTorch:
    def __init__(self, arrays: Arrays, activation: str, tol: float) -> None:
        self.arrays = {
            name: torch.from_numpy(array).to(os.environ.get(DEVICE, "cpu")) for name, array in arrays.items()
        }
        self.value, self.slope, self.tol = VALUE[activation], SLOPE[activation], tol

    def picard(self, g, z):
        count, residual = 0, torch.inf
        while residual > self.tol and count < MAX_ITERATIONS:
            new = g(z)
            residual = ((new - z).norm(dim=1) / (new.norm(dim=1) + 1e-12)).max()
            z, count = new, count + 1
        return z, count

    @torch.no_grad()
    def step(self) -> None:
        R, W, b, C, d, x, t = self.arrays.values()
        part, last = len(W), slice(len(R) - C.shape[1], None)
        if part == len(R):
            u = torch.addmm(b, x, W.T)
        else:
            u = b.repeat(len(x), 1)
            u[:, :part] += x @ W.T
        z, self.count = self.picard(lambda z: self.value(torch.addmm(u, z, R.T)), torch.zeros_like(u))
        error = torch.addmm(d, z[:, last], C.T) - t
        self.loss = (error * error).mean()
        g_y = error * (2 / t.numel())
        g = g_y @ C
        if part != len(R):
            g = torch.nn.functional.pad(g, (len(R) - C.shape[1], 0))
        slopes = self.slope(torch.addmm(u, z, R.T), z)
        multiplier, _ = self.picard(lambda v: torch.addmm(g, v * slopes, R), g)
        e = multiplier * slopes
        self.blocks = {"R": e.T @ z, "W": e[:, :part].T @ x, "b": e.sum(0), "C": g_y.T @ z[:, last], "d": g_y.sum(0)}
        if x.is_cuda:
            torch.cuda.synchronize()

    def gradient(self) -> dict[str, np.ndarray]:
        return {name: block.cpu().numpy() for name, block in self.blocks.items()}

    def iterations(self) -> float:
        return float(self.count)


if __name__ == "__main__":
    serve(WithTorch, {"torch": torch.__version__})

"""torchdeq with its exact implicit gradient, by fixed-point iteration, the fastest of its solvers on most sizes."""

from __future__ import annotations

from importlib import metadata

import numpy as np
import torch
from protocol import Arrays, serve
from torchdeq import get_deq
from with_torch import VALUE


class WithTorchdeq:
    def __init__(self, arrays: Arrays, activation: str, tol: float) -> None:
        self.weights = {name: torch.tensor(arrays[name], requires_grad=True) for name in ("R", "W", "b", "C", "d")}
        self.x, self.t = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["t"])
        self.value = VALUE[activation]
        self.deq = get_deq(
            core="indexing", ift=True, grad=1, no_stat=True,
            f_solver="fixed_point_iter", f_tol=tol, f_max_iter=2000, f_stop_mode="rel",
            b_solver="fixed_point_iter", b_tol=tol, b_max_iter=2000, b_stop_mode="rel",
        )  # fmt: skip

    def step(self) -> None:
        for weight in self.weights.values():
            weight.grad = None
        R, W, b, C, d = self.weights.values()
        u = torch.nn.functional.pad(self.x @ W.T, (0, len(R) - len(W))) + b
        states, self.info = self.deq(
            lambda z: self.value(torch.addmm(u, z, R.T)), torch.zeros(len(u), len(R), dtype=u.dtype)
        )
        y = states[-1][:, len(R) - C.shape[1] :] @ C.T + d
        self.loss = ((y - self.t) ** 2).mean()
        self.loss.backward()

    def gradient(self) -> dict[str, np.ndarray]:
        return {name: weight.grad.numpy() for name, weight in self.weights.items()}

    def iterations(self) -> float:
        return float(self.info["nstep"].max())


if __name__ == "__main__":
    serve(WithTorchdeq, {"torchdeq": metadata.version("torchdeq"), "torch": torch.__version__})

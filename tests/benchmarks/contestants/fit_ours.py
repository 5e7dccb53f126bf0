"""implicit-rnn through its public API: ``fit_many``."""

from __future__ import annotations

from importlib import metadata

import numpy as np
from protocol import Arrays, serve

import implicit_rnn as irnn


class Ours:
    def __init__(self, arrays: Arrays, batch: str, tol: float) -> None:
        self.X, self.Y, self.weights = arrays["X"], arrays["Y"], {k: arrays[k] for k in "WRbaCd" if k in arrays}
        nets, n, d = self.weights["W"].shape
        linear = "C" in self.weights
        outputs = self.Y.shape[1] if linear else [0]
        dtype = str(self.X.dtype)
        self.nets = [
            irnn.Network(d, [irnn.Layer(n)], outputs=outputs, dtype=dtype, engine="julia", seed=0) for _ in range(nets)
        ]
        epochs = len(arrays["order"]) * int(batch) // len(self.X)
        self.settings = {
            "optimizer": irnn.Adam(1e-2),
            "epochs": epochs,
            "batch_size": int(batch),
            "loss": "cross_entropy" if linear else "mse",
            "solver": irnn.Auto(tol=tol),
            "adjoint": irnn.Implicit(tol=tol),
            "seed": 0,
        }

    def step(self) -> None:
        for s, net in enumerate(self.nets):
            for name, values in self.weights.items():
                net.weights[name][...] = values[s]
        self.runs = irnn.fit_many(self.nets, self.X, self.Y, progress=False, **self.settings)

    def gradient(self) -> dict[str, np.ndarray]:
        return {"losses": np.array([run.loss for run in self.runs])}

    def iterations(self) -> float:
        return float("nan")


if __name__ == "__main__":
    serve(Ours, {"implicit-rnn": metadata.version("implicit-rnn"), "numpy": np.__version__})

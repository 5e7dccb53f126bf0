"""implicit-rnn through its public API: ``root`` and ``vjp`` of Julia code."""

from __future__ import annotations

from importlib import metadata

import numpy as np
from protocol import Arrays, serve

import implicit_rnn as irnn

CODE = {
    "Kepler": "(E, M, e) -> E .- e .* sin.(E) .- M",
    "z exp(z)": "(z, a) -> z .* exp.(z) .- a",
    "a weak acid": """function (z, c)
        HA, A, H, OH = exp.(z)
        return [HA + A - c[1], H + c[2] - OH - A, z[3] + z[2] - z[1] - log(c[3]), z[3] + z[4] + log(1e14)]
    end""",
}


class Ours:
    def __init__(self, arrays: Arrays, name: str, tol: float) -> None:
        self.f = irnn.julia(next(code for key, code in CODE.items() if name.startswith(key)))
        self.z0, self.args = arrays["z0"], tuple(array for key, array in arrays.items() if key != "z0")
        self.solver, self.v = irnn.Auto(tol=tol), np.ones_like(self.z0)
        self.only_vjp = name.endswith("vjp")
        self.solve()

    def solve(self) -> None:
        batched = range(len(self.args))
        self.solution = irnn.root(self.f, self.z0, args=self.args, batched=batched, solver=self.solver, engine="julia")

    def before_step(self) -> None:
        if self.only_vjp:
            self.solve()  # what a first vjp finds out would be known to the next

    def step(self) -> None:
        if self.only_vjp:
            self.products = self.solution.vjp(self.v)
        else:
            self.solve()

    def gradient(self) -> dict[str, np.ndarray]:
        return {"z": self.solution.value, **self.solution.vjp(self.v)}

    def iterations(self) -> float:
        return float(self.solution.iterations.mean())


if __name__ == "__main__":
    serve(Ours, {"implicit-rnn": metadata.version("implicit-rnn"), "numpy": np.__version__})

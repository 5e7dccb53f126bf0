"""The problems of the step benchmark: data, weights, and their exact gradient in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TOL = 1e-5
"""Relative residual to which everyone solves, forward and adjoint."""

INPUTS, OUTPUTS, NORM = 50, 2, 0.9
"""Inputs, linear outputs, and the spectral norm of R."""

EXACT = 1e-12
"""Relative residual of the float64 reference."""

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """One network and one batch: z = f(W x + R z + b), y = C z_last + d, L = mean (y - t)²."""

    neurons: int
    batch: int
    goal: float | None = None
    """The ratio of the best peer's time to ours that is aimed at."""
    activation: str = "tanh"
    dtype: str = "float32"
    layers: int = 1
    """Layers of equal size, all connected with all, the input to the first only."""

    @property
    def name(self) -> str:
        extra = [self.activation] * (self.activation != "tanh") + [self.dtype] * (self.dtype != "float32")
        extra += [f"{self.layers} layers"] * (self.layers > 1)
        return " ".join([f"{self.neurons} x {self.batch}", *extra])

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """R (N, N), W (first layer, inputs), b (N,), C (outputs, last layer), d (outputs,), x (B, inputs), t (B, outputs)."""
        rng = np.random.default_rng(0)
        n, part = self.neurons, self.neurons // self.layers
        R = rng.standard_normal((n, n))
        arrays = {
            "R": R * (NORM / np.linalg.norm(R, 2)),
            "W": rng.standard_normal((part, INPUTS)) / np.sqrt(INPUTS),
            "b": 0.1 * rng.standard_normal(n),
            "C": rng.standard_normal((OUTPUTS, part)) / np.sqrt(part),
            "d": 0.1 * rng.standard_normal(OUTPUTS),
            "x": rng.standard_normal((self.batch, INPUTS)),
            "t": rng.standard_normal((self.batch, OUTPUTS)),
        }
        return {name: np.ascontiguousarray(array, self.dtype) for name, array in arrays.items()}

    @cached_property
    def reference(self) -> Reference:
        """The exact gradient."""
        return solve(self)


@dataclass(frozen=True)
class Reference:
    """The gradient by float64 fixed-point iteration both ways, and what it takes to reach the tolerance of the benchmark."""

    gradient: dict[str, Array]
    forward: float
    """Picard iterations until the relative residual is below ``TOL``, the mean over the samples."""
    adjoint: float

    def error(self, gradient: dict[str, Array]) -> float:
        """The largest relative error of a parameter block in the Euclidean norm."""
        return max(
            float(np.linalg.norm(gradient[name] - exact) / np.linalg.norm(exact))
            for name, exact in self.gradient.items()
        )


ACTIVATIONS = {
    "tanh": (np.tanh, lambda s, z: 1 - z * z),
    "sigmoid": (lambda s: 1 / (1 + np.exp(-s)), lambda s, z: z * (1 - z)),
    "softplus": (lambda s: np.logaddexp(0, s), lambda s, z: 1 / (1 + np.exp(-s))),
}
"""Value and slope."""


def solve(case: Case) -> Reference:
    """The reference of a case."""
    R, W, b, C, d, x, t = (array.astype(np.float64) for array in case.arrays.values())
    value, slope = ACTIVATIONS[case.activation]
    u = np.tile(b, (len(x), 1))
    u[:, : len(W)] += x @ W.T
    z, forward = fixed_point(lambda z: value(u + z @ R.T), np.zeros_like(u))
    s = u + z @ R.T
    last = slice(case.neurons - C.shape[1], None)
    g_y = 2 * (z[:, last] @ C.T + d - t) / t.size
    g = np.zeros_like(z)
    g[:, last] = g_y @ C
    slopes = slope(s, z)
    multiplier, adjoint = fixed_point(lambda v: g + (v * slopes) @ R, g)
    e = multiplier * slopes
    gradient = {"R": e.T @ z, "W": e[:, : len(W)].T @ x, "b": e.sum(0), "C": g_y.T @ z[:, last], "d": g_y.sum(0)}
    return Reference(gradient, forward, adjoint)


def fixed_point(f, z: Array) -> tuple[Array, float]:
    """The fixed point to ``EXACT``, and the mean number of evaluations of f after which samples are within ``TOL``."""
    needed = np.zeros(len(z), int)
    for k in range(1, 100_000):
        new = f(z)
        residual = np.linalg.norm(new - z, axis=1) / np.linalg.norm(new, axis=1)
        needed[(needed == 0) & (residual <= TOL)] = k
        z = new
        if residual.max() <= EXACT:
            return z, float(needed.mean())
    raise RuntimeError("the reference does not converge")


def flops(case: Case) -> float:
    """Floating-point operations of the matrix products in one gradient by fixed-point iteration of each sample."""
    n, B, part = case.neurons, case.batch, case.neurons // case.layers
    # From z = 0 the first evaluation needs no product; the adjoint's does. One more product is the gradient of R.
    recurrent = case.reference.forward - 1 + case.reference.adjoint + 1
    return B * (2 * n * n * recurrent + 2 * 2 * part * INPUTS + 3 * 2 * part * OUTPUTS)


TABLE = (
    Case(2, 256, 10.0),
    Case(16, 256, 4.0),
    Case(64, 256, 3.0),
    Case(64, 4096, 3.0),
    Case(256, 256, 1.6),
    Case(256, 4096, 1.6),
    Case(1024, 256, 1.3),
)

VARIANTS = (
    Case(17, 256),
    Case(65, 257),
    Case(257, 255),
    Case(64, 256, activation="sigmoid"),
    Case(64, 256, activation="softplus"),
    Case(64, 256, layers=2),
    Case(64, 256, dtype="float64"),
    Case(256, 256, dtype="float64"),
)

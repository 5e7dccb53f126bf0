"""Jitted JAX: fixed-point iteration in ``lax.while_loop`` both ways, the gradient by ``custom_vjp``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from protocol import Arrays, serve

ACTIVATIONS = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}
MAX_ITERATIONS = 2000


def make_gradient(f, tol: float):
    """The jitted loss and gradient for the weights {R, W, b, C, d}."""

    def picard(g, start):
        def unfinished(carry):
            _, residual, k = carry
            return (residual > tol) & (k < MAX_ITERATIONS)

        def body(carry):
            z, _, k = carry
            new = g(z)
            change = jnp.linalg.norm(new - z, axis=1)
            return new, jnp.max(change / (jnp.linalg.norm(new, axis=1) + 1e-12)), k + 1

        z, _, k = jax.lax.while_loop(unfinished, body, (start, jnp.array(jnp.inf, start.dtype), 0))
        return z, k

    @jax.custom_vjp
    def equilibrium(R, u):
        return picard(lambda z: f(u + z @ R.T), jnp.zeros_like(u))

    def forward(R, u):
        z, k = equilibrium(R, u)
        return (z, k), (R, u, z)

    def backward(saved, cotangents):
        R, u, z = saved
        g, _ = cotangents
        _, slope = jax.vjp(f, u + z @ R.T)
        multiplier, _ = picard(lambda v: g + slope(v)[0] @ R, g)
        (e,) = slope(multiplier)
        return e.T @ z, e

    equilibrium.defvjp(forward, backward)

    def loss(weights, x, t):
        u = x @ weights["W"].T
        u = jnp.pad(u, ((0, 0), (0, len(weights["b"]) - u.shape[1]))) + weights["b"]
        z, k = equilibrium(weights["R"], u)
        y = z[:, -weights["C"].shape[1] :] @ weights["C"].T + weights["d"]
        return jnp.mean((y - t) ** 2), k

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


class WithJax:
    def __init__(self, arrays: Arrays, activation: str, tol: float) -> None:
        jax.config.update("jax_enable_x64", arrays["R"].dtype == np.float64)
        self.weights = {name: jnp.asarray(arrays[name]) for name in ("R", "W", "b", "C", "d")}
        self.x, self.t = jnp.asarray(arrays["x"]), jnp.asarray(arrays["t"])
        self.run = make_gradient(ACTIVATIONS[activation], tol)

    def step(self) -> None:
        self.result = jax.block_until_ready(self.run(self.weights, self.x, self.t))

    def gradient(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(block) for name, block in self.result[1].items()}

    def iterations(self) -> float:
        return float(self.result[0][1])


if __name__ == "__main__":
    serve(WithJax, {"jax": jax.__version__})

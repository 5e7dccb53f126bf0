"""Jitted JAX: a scan over all steps, mapped over the nets; the gradient of the equilibrium by the implicit function theorem."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from protocol import Arrays, serve

jax.config.update("jax_enable_x64", True)

KAPPA, RATE, BETA, EPSILON = 0.95, 1e-2, (0.9, 0.999), 1e-8


def perron(p):
    size = jnp.abs(p["R"]).sum(axis=1)
    factor = jnp.minimum(1, KAPPA / jnp.where(size > 0, size, 1))
    return factor[:, None] * p["R"] * jnp.exp(p["a"][None, :] - p["a"][:, None])


def inverse_times(A, r):
    """A⁻¹ r for matrices (B, 2, 2)."""
    determinant = A[:, 0, 0] * A[:, 1, 1] - A[:, 0, 1] * A[:, 1, 0]
    return (
        jnp.stack([A[:, 1, 1] * r[:, 0] - A[:, 0, 1] * r[:, 1], A[:, 0, 0] * r[:, 1] - A[:, 1, 0] * r[:, 0]], 1)
        / determinant[:, None]
    )


def size_of(z):
    return jnp.linalg.norm(z, axis=1)


def iterate(step, z, tol):
    """Until the relative residual of all samples is below tol."""
    floor = 1e-3 * z.shape[1] ** 0.5

    def body(carry):
        z, _, k = carry
        new, residual, scale = step(z)
        return new, jnp.max(residual / jnp.maximum(scale, floor)), k + 1

    return jax.lax.while_loop(lambda carry: (carry[1] > tol) & (carry[2] < 200), body, (z, jnp.ones((), z.dtype), 0))[0]


def equilibrium_function(n, tol):
    @jax.custom_vjp
    def equilibrium(drive, R):
        def step(z):
            f = jnp.tanh(drive + z @ R.T)
            if n > 2:
                return f, size_of(f - z), size_of(f)
            A = jnp.eye(n, dtype=z.dtype) - (1 - f**2)[:, :, None] * R
            return z + inverse_times(A, f - z), size_of(f - z), size_of(f)

        return iterate(step, jnp.tanh(drive), tol)

    def forward(drive, R):
        z = equilibrium(drive, R)
        return z, (z, R)

    def backward(saved, g):
        z, R = saved
        D = 1 - z**2
        if n > 2:

            def step(e):
                new = D * (g + e @ R)
                return new, size_of(new - e), size_of(new)

            e = iterate(step, D * g, tol)
        else:
            A = jnp.eye(n, dtype=z.dtype) - (D[:, :, None] * R).transpose(0, 2, 1)
            e = D * inverse_times(A, g)
        return e, e.T @ z

    equilibrium.defvjp(forward, backward)
    return equilibrium


class WithJax:
    def __init__(self, arrays: Arrays, batch: str, tol: float) -> None:
        X, Y = jnp.asarray(arrays["X"]), jnp.asarray(arrays["Y"])
        self.parameters = {k: jnp.asarray(arrays[k]) for k in "WRbaCd" if k in arrays}
        self.epochs = len(arrays["order"]) * int(batch) // len(X)
        whole = int(batch) >= len(X)
        inputs = None if whole else jnp.asarray(arrays["order"])
        equilibrium = equilibrium_function(self.parameters["W"].shape[1], tol)

        def loss(p, rows):
            x, y = (X, Y) if rows is None else (X[rows], Y[rows])
            z = equilibrium(x @ p["W"].T + p["b"], perron(p))
            if "C" not in p:
                return jnp.mean((z[:, :1] - y) ** 2)
            return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(z @ p["C"].T + p["d"]), axis=1))

        def step(carry, rows):
            p, m, v, t = carry
            value, g = jax.value_and_grad(loss)(p, rows)
            t = t + 1
            m = jax.tree.map(lambda m, g: BETA[0] * m + (1 - BETA[0]) * g, m, g)
            v = jax.tree.map(lambda v, g: BETA[1] * v + (1 - BETA[1]) * g**2, v, g)
            c, d = 1 - BETA[0] ** t, 1 - BETA[1] ** t
            p = jax.tree.map(lambda p, m, v: p - RATE * (m / c) / (jnp.sqrt(v / d) + EPSILON), p, m, v)
            return (p, m, v, t), value

        def train(p):
            zeros = jax.tree.map(jnp.zeros_like, p)
            start = (p, zeros, zeros, jnp.zeros((), X.dtype))
            return jax.lax.scan(step, start, inputs, length=self.epochs if whole else None)[1]

        one = len(self.parameters["W"]) == 1
        self.train = jax.jit(train if one else jax.vmap(train))
        if one:
            self.parameters = {k: v[0] for k, v in self.parameters.items()}

    def step(self) -> None:
        self.losses = jax.block_until_ready(self.train(self.parameters))

    def gradient(self) -> dict[str, np.ndarray]:
        losses = np.atleast_2d(np.asarray(self.losses))
        return {"losses": losses.reshape(len(losses), self.epochs, -1).mean(axis=2)}

    def iterations(self) -> float:
        return float("nan")


if __name__ == "__main__":
    serve(WithJax, {"jax": jax.__version__})

"""Jitted JAX: Newton's method for all samples in ``lax.while_loop``, the vjp by the implicit function theorem."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from protocol import Arrays, serve

jax.config.update("jax_enable_x64", True)


def kepler(z, M, e):
    return z - e * jnp.sin(z) - M


def exponential(z, a):
    return z * jnp.exp(z) - a


def acid(z, c):
    HA, A, H, OH = jnp.exp(z)
    return jnp.array(
        [HA + A - c[0], H + c[1] - OH - A, z[2] + z[1] - z[0] - jnp.log(c[2]), z[2] + z[3] + jnp.log(1e14)]
    )


EQUATIONS = {"Kepler": kepler, "z exp(z)": exponential, "a weak acid": acid}


def newton(step, z, tol):
    def body(carry):
        z, _, k = carry
        s = step(z)
        return z - s, jnp.max(jnp.abs(s) / jnp.maximum(jnp.abs(z), 1e-300)), k + 1

    z, _, k = jax.lax.while_loop(lambda carry: (carry[1] > tol) & (carry[2] < 60), body, (z, jnp.inf, 0))
    return z, k


class WithJax:
    def __init__(self, arrays: Arrays, name: str, tol: float) -> None:
        f = next(f for key, f in EQUATIONS.items() if name.startswith(key))
        scalar = f is not acid
        self.names = [key for key in arrays if key != "z0"]
        self.z0 = jnp.asarray(arrays["z0"][:, 0] if scalar else arrays["z0"])
        self.args = tuple(jnp.asarray(arrays[key]) for key in self.names)
        by_z = jax.vmap(jax.grad(f) if scalar else jax.jacfwd(f))
        values = jax.vmap(f)

        def step(z, *args):
            c, A = values(z, *args), by_z(z, *args)
            return c / A if scalar else jnp.linalg.solve(A, c[..., None])[..., 0]

        def vjp(z, v, *args):
            A = by_z(z, *args)
            multiplier = -v / A if scalar else jnp.linalg.solve(A.transpose(0, 2, 1), -v[..., None])[..., 0]
            pull = jax.vmap(lambda z, m, *args: jax.vjp(lambda *args: f(z, *args), *args)[1](m))
            return pull(z, multiplier, *args)

        self.solve = jax.jit(lambda z, *args: newton(lambda z: step(z, *args), z, tol))
        self.vjp = jax.jit(vjp)
        self.v, self.only_vjp = jnp.ones_like(self.z0), name.endswith("vjp")
        self.z, self.count = self.solve(self.z0, *self.args)

    def step(self) -> None:
        if self.only_vjp:
            jax.block_until_ready(self.vjp(self.z, self.v, *self.args))
        else:
            self.z, self.count = jax.block_until_ready(self.solve(self.z0, *self.args))

    def gradient(self) -> dict[str, np.ndarray]:
        products = self.vjp(self.z, self.v, *self.args)
        return {"z": np.asarray(self.z)} | {k: np.asarray(g) for k, g in zip(self.names, products, strict=True)}

    def iterations(self) -> float:
        return float(self.count)


if __name__ == "__main__":
    serve(WithJax, {"jax": jax.__version__})

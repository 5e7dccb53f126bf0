"""The activations by name: value, derivatives, and the slope bounds that the constraints need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Activation:
    """An elementwise activation f."""

    value: Callable[[Array], Array]
    """f(s)"""
    slope: Callable[[Array, Array], Array]
    """f′(s), given s and z = f(s)"""
    curvature: Callable[[Array, Array], Array]
    """f″(s), given s and z = f(s)"""
    slope_bound: float
    """sup |f′|"""
    increasing: bool = True
    """Whether f′ is never negative."""


def _logistic(s: Array) -> Array:
    e = np.exp(-np.abs(s))
    return np.where(s < 0, e, 1) / (1 + e)


def _softplus(s: Array) -> Array:
    return np.maximum(s, 0) + np.log1p(np.exp(-np.abs(s)))


def _silu_slope(s: Array, z: Array) -> Array:
    p = _logistic(s)
    return p + z * (1 - p)


_GELU_C, _GELU_Q, _GELU_END = 0.7978845608028654, 0.044715, 20.0


def _gelu_parts(s: Array) -> tuple[Array, Array, Array, Array]:
    """tanh u, u′, u″ and s, with s clipped to where tanh u has reached ±1, since s³ overflows early."""
    s = np.clip(s, -_GELU_END, _GELU_END)
    t = np.tanh(_GELU_C * s * (1 + _GELU_Q * s * s))
    return t, _GELU_C * (1 + 3 * _GELU_Q * s * s), 6 * _GELU_C * _GELU_Q * s, s


def _gelu(s: Array) -> Array:
    return s / 2 * (1 + _gelu_parts(s)[0])


def _gelu_slope(s: Array, z: Array) -> Array:
    t, du, _, s = _gelu_parts(s)
    return (1 + t) / 2 + s / 2 * (1 - t * t) * du


def _gelu_curvature(s: Array, z: Array) -> Array:
    t, du, d2u, s = _gelu_parts(s)
    return (1 - t * t) * (du + s / 2 * (d2u - 2 * t * du * du))


def _silu_curvature(s: Array, z: Array) -> Array:
    p = _logistic(s)
    return p * (1 - p) * (2 + s * (1 - 2 * p))


def _softplus_curvature(s: Array, z: Array) -> Array:
    p = _logistic(s)
    return p * (1 - p)


ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(np.tanh, lambda s, z: 1 - z * z, lambda s, z: -2 * z * (1 - z * z), 1.0),
    "sigmoid": Activation(_logistic, lambda s, z: z * (1 - z), lambda s, z: z * (1 - z) * (1 - 2 * z), 0.25),
    "softplus": Activation(_softplus, lambda s, z: _logistic(s), _softplus_curvature, 1.0),
    "relu": Activation(
        lambda s: np.maximum(s, 0), lambda s, z: (s > 0).astype(s.dtype), lambda s, z: np.zeros_like(s), 1.0
    ),
    "elu": Activation(
        lambda s: np.where(s > 0, s, np.expm1(np.minimum(s, 0))),
        lambda s, z: np.where(s > 0, 1, z + 1),
        lambda s, z: np.where(s > 0, 0, z + 1),
        1.0,
    ),
    "gelu": Activation(_gelu, _gelu_slope, _gelu_curvature, 1.1289930687, increasing=False),
    "silu": Activation(lambda s: s * _logistic(s), _silu_slope, _silu_curvature, 1.0998393202, increasing=False),
    "identity": Activation(lambda s: s, lambda s, z: np.ones_like(s), lambda s, z: np.zeros_like(s), 1.0),
}
"""The activation of each name; gelu is in its tanh form, silu is also called swish."""

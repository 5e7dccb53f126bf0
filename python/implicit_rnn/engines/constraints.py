"""The constraints of the NumPy engine: R from the raw weights K (S, n, n), the exact derivative, the certificate."""

from __future__ import annotations

import numpy as np

from implicit_rnn.options import Constraint, Free, Perron

Array = np.ndarray


def apply(constraint: Constraint, K: Array, scales: Array, slopes: Array) -> Array:
    """The recurrent weights in force."""
    if isinstance(constraint, Perron):
        factor, _ = _row_factor(constraint.kappa, K, slopes)
        return factor * K * _stretch(scales)
    return K


def pullback(
    constraint: Constraint, K: Array, scales: Array, slopes: Array, R: Array, GR: Array
) -> tuple[Array, Array]:
    """∂L/∂K and ∂L/∂a from GR = ∂L/∂R.

    For Perron, with H_ij = GR_ij e^{a_j - a_i} and c_i = min(1, κ / (L_i Σ_j |K_ij|)):
    ∂L/∂K_ij = c_i (H_ij - [c_i < 1] sign(K_ij) Σ_k H_ik K_ik / Σ_k |K_ik|) and
    ∂L/∂a_k = Σ_i GR_ik R_ik - Σ_j GR_kj R_kj.
    """
    if isinstance(constraint, Perron):
        factor, total = _row_factor(constraint.kappa, K, slopes)
        H = GR * _stretch(scales)
        inner = np.where(factor < 1, (H * K).sum(axis=-1, keepdims=True) / np.where(total > 0, total, 1), 0)
        flow = GR * R
        return factor * (H - np.sign(K) * inner), flow.sum(axis=-2) - flow.sum(axis=-1)
    return GR, scales


def certify(constraint: Constraint, R: Array, scales: Array, slopes: Array, residual: Array) -> Array:
    """Elementwise bound on |z - z*| from elementwise bounds on |f(u + Rz) - z| (S, B, n)."""
    if isinstance(constraint, Perron):
        stretch = np.exp(scales)[:, None, :]
        size = (stretch * residual).max(axis=-1, keepdims=True) / (1 - constraint.kappa)
        return np.asarray(size / stretch)
    assert isinstance(constraint, Free)
    return np.full_like(residual, np.nan)


def _row_factor(kappa: float, K: Array, slopes: Array) -> tuple[Array, Array]:
    total = np.abs(K).sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        factor = np.minimum(1, (kappa / slopes)[:, None].astype(K.dtype) / total)
    return factor, total


def _stretch(scales: Array) -> Array:
    e = np.exp(scales)
    return np.asarray(e[:, None, :] / e[:, :, None])

"""The constraints: R from the raw weights K (S, n, n), the exact derivative, and the certificate.

``slopes`` (n,) bounds the slope of each neuron's activation; L = diag(slopes).
"""

from __future__ import annotations

import numpy as np

from implicit_rnn.model.constraints import Constraint, InfNorm, Monotone, Perron, Spectral

Array = np.ndarray


def apply(constraint: Constraint, K: Array, scales: Array, slopes: Array) -> Array:
    """The recurrent weights in force."""
    if isinstance(constraint, Perron | InfNorm):
        factor, _ = _row_factor(constraint.kappa, K, slopes)
        return factor * K * _stretch(constraint, scales)
    if isinstance(constraint, Spectral | Monotone):
        size, _ = _matrix_size(constraint, K, slopes)
        return np.minimum(1, _limit(constraint) / size) * K
    return K


def pullback(
    constraint: Constraint, K: Array, scales: Array, slopes: Array, R: Array, GR: Array
) -> tuple[Array, Array]:
    """∂L/∂K and ∂L/∂a from GR = ∂L/∂R.

    Rows, with H_ij = GR_ij e^{a_j - a_i} and c_i = min(1, κ / (L_i Σ_j |K_ij|)):
    ∂L/∂K_ij = c_i (H_ij - [c_i < 1] sign(K_ij) Σ_k H_ik K_ik / Σ_k |K_ik|) and
    ∂L/∂a_k = Σ_i GR_ik R_ik - Σ_j GR_kj R_kj. Whole matrices, with R = c K and c = limit / size(K) where that is below 1:
    ∂L/∂K = c (GR - ⟨GR, K⟩ / size ∂size/∂K).
    """
    if isinstance(constraint, Perron | InfNorm):
        factor, total = _row_factor(constraint.kappa, K, slopes)
        H = GR * _stretch(constraint, scales)
        inner = np.where(factor < 1, (H * K).sum(axis=-1, keepdims=True) / np.where(total > 0, total, 1), 0)
        flow = GR * R
        ga = flow.sum(axis=-2) - flow.sum(axis=-1) if isinstance(constraint, Perron) else scales
        return factor * (H - np.sign(K) * inner), ga
    if isinstance(constraint, Spectral | Monotone):
        size, gradient = _matrix_size(constraint, K, slopes)
        factor = np.minimum(1, _limit(constraint) / size)
        inner = (GR * K).sum(axis=(-2, -1), keepdims=True) / size
        return factor * (GR - np.where(factor < 1, inner, 0) * gradient), scales
    return GR, scales


def certify(constraint: Constraint, R: Array, scales: Array, slopes: Array, residual: Array) -> Array:
    """Elementwise bound on |z - z*| from elementwise bounds on |f(u + Rz) - z| (S, B, n); NaN if there is none.

    With D = f′ and M = L R: a contraction has ‖(I - D R)⁻¹‖ <= 1/(1 - κ); for a monotone M it is at most 1 + ‖M‖₂/m.
    """
    if isinstance(constraint, Perron | InfNorm):
        stretch = np.exp(scales)[:, None, :] if isinstance(constraint, Perron) else np.ones(residual.shape[-1])
        size = (stretch * residual).max(axis=-1, keepdims=True) / (1 - constraint.kappa)
        return np.asarray(size / stretch)
    size = np.linalg.norm(residual, axis=-1, keepdims=True)
    if isinstance(constraint, Spectral):
        return np.asarray(np.broadcast_to(size / (1 - constraint.rho), residual.shape))
    if isinstance(constraint, Monotone):
        norms = np.linalg.norm(slopes[:, None] * R, 2, axis=(-2, -1))[:, None, None]
        return np.asarray(np.broadcast_to((1 + norms / constraint.margin) * size, residual.shape))
    return np.full_like(residual, np.nan)


def _row_factor(kappa: float, K: Array, slopes: Array) -> tuple[Array, Array]:
    total = np.abs(K).sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        factor = np.minimum(1, (kappa / slopes)[:, None].astype(K.dtype) / total)
    return factor, total


def _stretch(constraint: Constraint, scales: Array) -> Array | float:
    if not isinstance(constraint, Perron):
        return 1.0
    e = np.exp(scales)
    return np.asarray(e[:, None, :] / e[:, :, None])


def _limit(constraint: Spectral | Monotone) -> float:
    return constraint.rho if isinstance(constraint, Spectral) else 1 - constraint.margin


def _matrix_size(constraint: Spectral | Monotone, K: Array, slopes: Array) -> tuple[Array, Array]:
    """The size of K which is limited (S, 1, 1), at least tiny, and its gradient ∂size/∂K (S, n, n)."""
    M = slopes[:, None] * K
    if isinstance(constraint, Spectral):
        left, values, right = np.linalg.svd(M)
        size, u, v = values[:, 0], left[:, :, 0], right[:, 0, :]
    else:
        eigenvalues, vectors = np.linalg.eigh((M + np.swapaxes(M, -1, -2)) / 2)
        size, u, v = eigenvalues[:, -1], vectors[:, :, -1], vectors[:, :, -1]
    gradient = (slopes * u)[:, :, None] * v[:, None, :]
    return np.maximum(size, np.finfo(K.dtype).tiny)[:, None, None], gradient

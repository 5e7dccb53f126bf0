"""The losses of outputs Y against targets T (B, outputs), with any leading axes of Y, and their derivatives.

The formulas are in ``implicit_rnn.model.losses``; ``weights`` (B,) are those of the samples, with mean 1, or None.
"""

from __future__ import annotations

import numpy as np

from implicit_rnn.model.losses import MAE, MSE, BinaryCrossEntropy, CrossEntropy, Huber, Loss

Array = np.ndarray


def loss_and_gradient(loss: Loss, Y: Array, T: Array, weights: Array | None) -> tuple[Array, Array]:
    """The loss (leading axes of Y) in float64, and its gradient of the shape of Y."""
    share = np.full((len(T), 1), 1 / len(T)) if weights is None else (weights / len(T))[:, None]
    if not isinstance(loss, CrossEntropy):
        share = share / T.shape[1]
    terms, slopes = _terms(loss, Y, T)
    return (terms * share).sum(axis=(-2, -1)), slopes * share.astype(Y.dtype)


def _terms(loss: Loss, Y: Array, T: Array) -> tuple[Array, Array]:
    """The terms of the sum in float64, and their derivatives with respect to the outputs."""
    d = Y - T
    wide = d.astype(np.float64)
    if isinstance(loss, MSE):
        return wide**2, 2 * d
    if isinstance(loss, MAE):
        return np.abs(wide), np.sign(d)
    if isinstance(loss, Huber):
        size, δ = np.abs(wide), loss.delta
        return np.where(size <= δ, size**2 / 2, δ * (size - δ / 2)), np.clip(d, -δ, δ)
    y, t = Y.astype(np.float64), T.astype(np.float64)
    if isinstance(loss, BinaryCrossEntropy):
        e = np.exp(-np.abs(y))
        probabilities = np.where(y < 0, e, 1) / (1 + e)
        return np.maximum(y, 0) - t * y + np.log1p(e), (probabilities - t).astype(Y.dtype)
    assert isinstance(loss, CrossEntropy)
    y = y - y.max(axis=-1, keepdims=True)
    partition = np.exp(y).sum(axis=-1, keepdims=True)
    gradient = t.sum(axis=-1, keepdims=True) * np.exp(y) / partition - t
    return t * (np.log(partition) - y), gradient.astype(Y.dtype)

"""Euclidean norms of numbers whose squares may overflow or underflow."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def norm(A: Array) -> Array:
    """Euclidean norm over the last axis, in the precision of A, also where squares overflow."""
    size = np.asarray(np.sqrt(np.einsum("...i,...i->...", A, A)))
    if (far := np.isinf(size)).any():
        size[far] = np.hypot.reduce(A[far], axis=-1)
    return size


def scaled_norm(A: Array) -> Array:
    """Euclidean norm over the last axis, in double precision, also where squares overflow or underflow."""
    B = np.abs(A.astype(np.float64))
    unit = B.max(axis=-1, initial=0)
    unit = np.where((unit > 0) & np.isfinite(unit), unit, 1)
    return np.asarray(unit * norm(B / unit[..., None]))

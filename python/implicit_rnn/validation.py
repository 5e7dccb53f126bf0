"""Checks of the arrays a user passes in: everything is refused or converted here, before an engine sees it."""

from __future__ import annotations

import functools
import math
import os

import numpy as np
from numpy.typing import ArrayLike

_CONVERTIBLE = "biuf"


def as_real(name: str, value: ArrayLike, dtype: np.dtype) -> np.ndarray:
    """``value`` as an array of that dtype.

    Booleans, integers and floats up to 64 bits, of either byte order, are converted; ``TypeError`` for anything
    else.
    """
    array = _as_array(name, value)
    if array.dtype.kind not in _CONVERTIBLE:
        raise TypeError(f"{name} has dtype {array.dtype}; expected real numbers (float, integer or boolean)")
    if array.dtype.itemsize > 8:
        raise TypeError(
            f"{name} has dtype {array.dtype}, which {dtype} cannot hold; pass {name}.astype({dtype.name!r})"
        )
    if array.dtype == dtype and array.dtype.isnative:
        return array
    return array.astype(dtype)


def as_samples(name: str, value: ArrayLike, columns: int, dtype: np.dtype, what: str, neurons: int = 0) -> np.ndarray:
    """``value`` as a C-contiguous (samples, columns) array of finite numbers; it is copied only where it must be.

    ``neurons`` is the size of the state each sample will need, for the check of memory. Raises ``TypeError`` for
    dtypes that are no real numbers, ``ValueError`` for wrong shapes, no samples, NaN and infinity, and
    ``MemoryError`` for more than the machine has.
    """
    array = _as_array(name, value)
    if array.ndim != 2:
        hint = f"; one sample is {name}[None, :]" if array.ndim == 1 and array.shape[0] == columns else ""
        raise ValueError(f"{name} has shape {array.shape}; expected (samples, {columns} {what}){hint}")
    if array.shape[1] != columns:
        raise ValueError(
            f"{name} has shape {array.shape}; expected (samples, {columns}): the network has {columns} {what}"
        )
    if array.shape[0] == 0:
        raise ValueError(f"{name} has no samples: shape {array.shape}")
    check_memory(name, array.shape[0], columns + neurons, dtype)
    array = as_real(name, array, dtype)
    if not (array.flags.c_contiguous and array.flags.aligned):
        array = np.require(array, requirements=("C", "A"))
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        raise ValueError(f"{name} has NaN or infinity in {len(bad)} of {len(array)} samples, first in sample {bad[0]}")
    return array


def as_targets(name: str, value: ArrayLike, samples: int, outputs: int, dtype: np.dtype) -> np.ndarray:
    """Targets as a (samples, outputs) array; a vector is accepted for a single output."""
    array = _as_array(name, value)
    if array.ndim == 1 and outputs == 1:
        array = array[:, None]
    array = as_samples(name, array, outputs, dtype, "outputs")
    if array.shape[0] != samples:
        raise ValueError(f"{name} has {array.shape[0]} samples, X has {samples}")
    return array


def check_memory(name: str, samples: int, numbers: int, dtype: np.dtype) -> None:
    """``MemoryError`` if ``samples`` rows of ``numbers`` numbers cannot fit in the machine's memory."""
    needed = samples * numbers * dtype.itemsize
    available = _memory()
    if needed > available:
        raise MemoryError(
            f"{name} has {samples} samples, for which {needed / 2**30:.3g} GiB are needed and {available / 2**30:.3g} GiB "
            f"are there; pass it in parts"
        )


@functools.cache
def _memory() -> float:
    """Bytes of memory of the machine, infinity where that is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every platform
        return math.inf


def _as_array(name: str, value: ArrayLike) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is no array of numbers: {error}") from error

"""Checks of the arrays a user passes in: everything is refused or converted here, before an engine sees it."""

from __future__ import annotations

import functools
import math
import os
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from implicit_rnn.errors import ScaleWarning, warn, without_underflow
from implicit_rnn.options import check_whole

_CONVERTIBLE = "biuf"
_FEW = 4096

LARGEST_SCALE, LARGEST_RATIO = 100.0, 1000.0
"""Limits on the mean and standard deviation of a column, and on the ratio of two standard deviations, for nets to learn."""


def as_real(name: str, value: ArrayLike, dtype: np.dtype) -> np.ndarray:
    """``value`` as an array of that dtype.

    Booleans, integers and floats up to 64 bits, of either byte order, are converted; ``TypeError`` for anything
    else, ``ValueError`` for numbers beyond the range of that dtype.
    """
    array = as_array(name, value)
    if array.dtype is dtype:
        return array
    if array.dtype.kind == "O":
        array = _numbers(name, array)
    if array.dtype.kind not in _CONVERTIBLE:
        raise TypeError(f"{name} has dtype {array.dtype}; expected real numbers (float, integer or boolean)")
    if array.dtype.itemsize > 8:
        raise TypeError(
            f"{name} has dtype {array.dtype}, which {dtype} cannot hold; pass {name}.astype({dtype.name!r})"
        )
    if array.dtype == dtype and array.dtype.isnative:
        return array
    with np.errstate(over="ignore", under="ignore"):
        converted = array.astype(dtype)
    narrowed = array.dtype.itemsize > dtype.itemsize and np.isinf(converted).any()
    if narrowed and (np.isinf(converted) & (finite := np.isfinite(array))).any():
        largest = np.abs(array[finite]).max()
        raise ValueError(
            f"{name} has entries up to {largest:.3g}, which {dtype} cannot hold; scale it, or use dtype='float64'"
        )
    return converted


def as_samples(name: str, value: ArrayLike, columns: int, dtype: np.dtype, what: str, neurons: int = 0) -> np.ndarray:
    """``value`` as a C-contiguous (samples, columns) array of finite numbers; it is copied only where it must be.

    ``neurons`` is the size of the state each sample will need, for the check of memory. Raises ``TypeError`` for
    dtypes that are not real, ``ValueError`` for wrong shapes, no samples, NaN and infinity, and
    ``MemoryError`` for more than fits in the machine's memory.
    """
    array = as_array(name, value)
    check_shape_of_samples(name, array.shape, columns, what)
    check_memory(name, array.shape[0], columns + neurons, dtype)
    array = as_real(name, array, dtype)
    if not (array.flags.c_contiguous and array.flags.aligned):
        array = np.require(array, requirements=("C", "A"))
    check_finite(name, array)
    return array


def check_finite(name: str, array: np.ndarray) -> None:
    """``ValueError`` for NaN and infinity in an array (samples, columns)."""
    if not all_finite(array):
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        refuse_nonfinite(name, len(bad), len(array), int(bad[0]))


def all_finite(array: np.ndarray) -> bool:
    """Whether the array has neither NaN nor infinity."""
    # For few numbers the sum of squares is faster than a check of each; should it overflow, each is checked.
    return (array.size < _FEW and math.isfinite(np.vdot(array, array))) or bool(np.isfinite(array).all())


def check_shape_of_samples(name: str, shape: tuple[int, ...], columns: int, what: str) -> None:
    """``ValueError`` unless the shape is (samples, columns), with at least one sample."""
    if len(shape) != 2:
        what_fits, shaped = ("one sample is", (1, -1)) if columns > 1 else ("samples of one number are", (-1, 1))
        fits = len(shape) == 1 and columns in (1, shape[0])
        hint = f"; {what_fits} np.reshape({name}, {shaped})" if fits else ""
        raise ValueError(f"{name} has shape {shape}; expected (samples, {columns} {what}){hint}")
    if shape[1] != columns:
        raise ValueError(f"{name} has shape {shape}; expected (samples, {columns}): the network has {columns} {what}")
    if shape[0] == 0:
        raise ValueError(f"{name} has no samples: shape {shape}")


def refuse_nonfinite(name: str, bad: int, samples: int, first: int) -> None:
    """``ValueError`` if ``bad`` samples have entries that are not finite; ``first`` is the index of the first."""
    if bad:
        raise ValueError(f"{name} has NaN or infinity in {bad} of {samples} samples, first in sample {first}")


def as_targets(name: str, value: ArrayLike, samples: int, outputs: int, dtype: np.dtype) -> np.ndarray:
    """Targets as a (samples, outputs) array.

    A vector is refused: with predictions (samples, 1) it would silently broadcast to (samples, samples).
    """
    array = as_array(name, value)
    if array.ndim == 1 and outputs == 1 and len(array) == samples:
        raise ValueError(
            f"{name} has shape {array.shape}, but predictions have shape ({samples}, 1), and the difference of the two would "
            f"broadcast to ({samples}, {samples}): pass np.reshape({name}, (-1, 1))"
        )
    array = as_samples(name, array, outputs, dtype, "outputs")
    check_samples(name, array, samples)
    return array


def check_samples(name: str, array: np.ndarray, samples: int) -> None:
    """``ValueError`` unless the first axis has that many samples, those of X or of the validation."""
    if array.ndim == 0 or array.shape[0] != samples:
        found = f"{array.shape[0]} samples" if array.ndim else "no axis"
        raise ValueError(f"{name} has {found}, {samples_of(name)} has {samples}")


def samples_of(name: str) -> str:
    """The argument with the samples to which another belongs."""
    return "validation[0]" if name.startswith("validation[") else "X"


def check_memory(name: str, samples: int, numbers: int, dtype: np.dtype) -> None:
    """``MemoryError`` if ``samples`` rows of ``numbers`` numbers cannot fit in the machine's memory."""
    if (needed := samples * numbers * dtype.itemsize) > _memory():
        raise _too_large(f"{name} has {samples} samples", needed, "pass it in parts")


def check_memory_of_parameters(parameters: int, dtype: np.dtype) -> None:
    """``MemoryError`` if that many parameters cannot fit in the machine's memory."""
    if (needed := parameters * dtype.itemsize) > _memory():
        raise _too_large(
            f"the network has {parameters} parameters", needed, "expected fewer inputs, neurons or outputs"
        )


def _too_large(what: str, needed: int, remedy: str) -> MemoryError:
    available = _memory()
    return MemoryError(
        f"{what}, which need {needed / 2**30:.3g} GiB of memory, but the machine has {available / 2**30:.3g} GiB; {remedy}"
    )


@functools.cache
def _memory() -> float:
    """The machine's memory in bytes, infinity where it is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every platform
        return math.inf


@without_underflow()
def warn_of_scale(name: str, array: np.ndarray) -> None:
    """Warn, at most once, about columns of (samples, columns) so far from unit scale that training will fail."""
    if len(array) < 2 or not isinstance(array, np.ndarray):  # those on a device stay there
        return
    columns = array.astype(np.float64)
    unit = np.maximum(np.abs(columns).max(axis=0), np.finfo(np.float64).tiny)
    columns /= unit  # whose squares neither overflow nor vanish
    mean, spread = unit * columns.mean(axis=0), unit * columns.std(axis=0)
    varied = spread > 1e-12 * np.maximum(np.abs(mean), 1e-300)
    far = np.flatnonzero(~((np.abs(mean) <= LARGEST_SCALE) & (spread <= LARGEST_SCALE)))
    if len(far):
        k = int(far[0])
        what = f"column {k} of {name} has mean {mean[k]:.3g} and standard deviation {spread[k]:.3g}"
    elif varied.any() and spread[varied].max() > LARGEST_RATIO * spread[varied].min():
        big, small = (int(np.flatnonzero(varied)[f(spread[varied])]) for f in (np.argmax, np.argmin))
        what = f"columns {big} and {small} of {name} have standard deviations {spread[big]:.3g} and {spread[small]:.3g}"
    else:
        return
    warn(
        f"{what}; networks learn from numbers around 1: standardise it, ({name} - {name}.mean(0)) / {name}.std(0), and undo that "
        "in what is predicted",
        ScaleWarning,
    )


def _numbers(name: str, array: np.ndarray) -> np.ndarray:
    """An array of Python objects as numbers, if they all are."""
    kinds = {type(entry).__name__ for entry in array.reshape(-1) if not isinstance(entry, Real | np.bool_)}
    if kinds:
        raise TypeError(
            f"{name} has dtype object with entries of type {', '.join(sorted(kinds))}; expected real numbers in all of them"
        )
    try:
        return array.astype(np.float64)
    except OverflowError:
        raise ValueError(f"{name} has whole numbers beyond the range of float64; scale it") from None


def refuse_masked_or_sparse(name: str, value: object) -> None:
    """``TypeError`` for masked arrays, whose hidden values NumPy would use, and sparse ones, which it takes as one object."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise TypeError(
            f"{name} is a masked array with {int(np.ma.getmaskarray(value).sum())} masked entries, which have no value here: "
            f"fill them, {name}.filled(number), or leave their samples out"
        )
    if hasattr(value, "toarray") and hasattr(value, "nnz"):
        raise TypeError(f"{name} is a sparse {type(value).__name__}; expected a dense array: pass {name}.toarray()")


def as_array(name: str, value: ArrayLike) -> np.ndarray:
    """``value`` as an array of any dtype; ``TypeError`` or ``ValueError`` for kinds that NumPy would misread."""
    if type(value) is np.ndarray:
        return value
    refuse_masked_or_sparse(name, value)
    if isinstance(value, np.ma.MaskedArray):
        return np.ma.getdata(value)
    if hasattr(value, "iloc"):
        return _from_pandas(name, value)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # those of tensors of PyTorch
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{name} is not an array of numbers: {error}") from error
    if array.ndim == 0 and array.dtype == object and not isinstance(value, Real):
        what = (
            " in the memory of a GPU, which is not accepted here; copy it to a NumPy array first"
            if hasattr(value, "__cuda_array_interface__")
            else "; expected numbers, as an array or in lists"
        )
        raise TypeError(f"{name} is a {type(value).__name__}{what}")
    return array


def _from_pandas(name: str, table: Any) -> np.ndarray:
    """A data frame or series, also with nullable or mixed dtypes, as one array."""
    missing = table.isna()
    if bool(np.asarray(missing).any()):
        raise ValueError(
            f"{name} has {int(np.asarray(missing).sum())} missing values; fill them, or leave their samples out"
        )
    for column, dtype in table.dtypes.items() if hasattr(table, "columns") else [(table.name, table.dtype)]:
        if str(dtype) == "category" or getattr(dtype, "kind", "?") not in _CONVERTIBLE + "O":
            raise TypeError(
                f"{name} has a column {column!r} of dtype {dtype}; expected numbers: encode it, for example with "
                "pandas.get_dummies"
            )
    array = np.asarray(table)
    return _numbers(name, array) if array.dtype.kind == "O" else array


def as_generator(seed: int | None) -> np.random.Generator:
    """The generator of a seed, at random for None; ``TypeError`` or ``ValueError`` unless it is a whole number from 0."""
    return np.random.default_rng(None if seed is None else check_whole("seed", seed, 0))

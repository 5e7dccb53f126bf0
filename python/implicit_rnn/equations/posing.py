"""Posing an equation: the start, the arguments and the scale, checked and converted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from implicit_rnn import device_arrays
from implicit_rnn.device_arrays import DeviceArray, as_device_array, check_dtype
from implicit_rnn.engines.base import Equation
from implicit_rnn.equations.functions import Function, argument_names
from implicit_rnn.options import is_whole
from implicit_rnn.validation import as_array, as_real, check_finite

Array = np.ndarray

_KEPT = {"b": np.dtype(np.bool_), "i": np.dtype(np.int64), "u": np.dtype(np.int64)}
"""The dtypes to which arguments other than floats are converted, by their kind."""

_SINGLE, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)


def pose(
    f: Function,
    z0: ArrayLike,
    args: Sequence[ArrayLike],
    batched: Any,
    vectorized: bool,
    jac: Callable[..., Any] | None,
    vjp: Callable[..., Any] | None,
    scale: ArrayLike | None,
    root: bool,
    device: str,
) -> Equation:
    """The equation for these arguments of ``fixed_point`` or ``root``, checked."""
    start, shape = _start(z0, device)
    names = argument_names(f, len(check_arguments(args)))
    per_sample = positions(batched, names)
    arrays = tuple([_argument(name, value, start.dtype, device) for name, value in zip(names, args, strict=True)])
    for index in sorted(per_sample):
        own = arrays[index].shape
        if len(shape) < 2:
            raise ValueError(f"batched has {names[index]!r}, but z0 of shape {shape} is one problem; a batch is (B, n)")
        if not own or own[0] != len(start):
            raise ValueError(
                f"{names[index]} has shape {own}; expected ({len(start)}, ...), as z0 has {len(start)} samples"
            )
    return Equation(
        f=f,
        root=root,
        start=start,
        args=arrays,
        batched=tuple([index in per_sample for index in range(len(arrays))]),
        names=names,
        shape=shape,
        scale=_sizes(scale, start),
        vectorized=vectorized,
        jac=jac,
        vjp=vjp,
        device=device,
    )


def check_arguments(args: Sequence[Any]) -> Sequence[Any]:
    """``args``; ``TypeError`` unless it is a tuple or list."""
    if type(args) is not tuple and (isinstance(args, (str, bytes)) or not isinstance(args, Sequence)):
        raise TypeError(f"args is a {type(args).__name__}; expected a tuple of arguments, such as args=(a,)")
    return args


def position_of(key: object, names: tuple[str, ...], subject: str) -> int:
    """The position of the argument with that name or position; otherwise an error that begins with the subject."""
    known = f"the arguments are {', '.join(map(repr, names))}" if names else "f has no arguments besides z"
    if isinstance(key, str):
        if key in names:
            return names.index(key)
        raise ValueError(f"{subject} {key!r}, which is not an argument of f; {known}")
    if is_whole(key):
        if 0 <= key < len(names):
            return int(key)
        raise ValueError(f"{subject} {key}, which is not the position of an argument (they count from 0); {known}")
    raise TypeError(f"{subject} {key!r}; expected the name or the position of an argument; {known}")


def device_or_host_array(name: str, value: ArrayLike, device: str) -> Array | DeviceArray:
    """An array on the device as it is, any other value as a NumPy array."""
    there = as_device_array(name, value, device)
    return as_array(name, value) if there is None else there


def _sizes(scale: ArrayLike | None, start: Array) -> Array | None:
    if scale is None:
        return None
    sizes = as_real("scale", scale, start.dtype)
    n = start.shape[1]
    if sizes.shape not in ((), (n,)):
        raise ValueError(f"scale has shape {sizes.shape}; expected a number or ({n},), a size for each entry of z")
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError(f"scale must be positive and finite, got {scale!r}")
    return np.array(np.broadcast_to(sizes, n))


def _start(z0: ArrayLike, device: str) -> tuple[Array, tuple[int, ...]]:
    array = device_or_host_array("z0", z0, device)
    if array.ndim > 2 or array.size == 0:
        raise ValueError(
            f"z0 has shape {array.shape}; expected a number or (n,) for one problem, or (B, n) for a batch, with at least one "
            "entry"
        )
    if isinstance(array, DeviceArray):
        if array.dtype not in (np.float32, np.float64):
            raise TypeError(f"z0 has dtype {array.dtype}; expected float32 or float64")
        there = array if array.ndim == 2 else array.reshape(1, -1)
        device_arrays.check_finite("z0", there)
        return cast("Array", there), array.shape
    dtype = _SINGLE if array.dtype.kind == "f" and array.dtype.itemsize == 4 else _DOUBLE
    start = np.ascontiguousarray(as_real("z0", array, dtype))
    start = start if start.ndim == 2 else start.reshape(1, -1)
    check_finite("z0", start)
    return start, array.shape


def _argument(name: str, value: ArrayLike, dtype: np.dtype, device: str) -> Array:
    array = device_or_host_array(name, value, device)
    if array.size == 0:
        raise ValueError(f"{name} has shape {array.shape} and no entries")
    if isinstance(array, DeviceArray):
        check_dtype(name, array, dtype, "z0")
        return cast("Array", array)
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} has integers beyond 2**63 - 1")
    array = np.array(as_real(name, array, _KEPT.get(array.dtype.kind, dtype)), order="C")
    array.flags.writeable = False  # it belongs to the solution, and a Python f could write to it
    return array


def positions(batched: Any, names: tuple[str, ...]) -> set[int]:
    """The positions of the arguments in ``batched``, given all names; ``ValueError`` for others."""
    if type(batched) is tuple and not batched:  # the usual case of one problem, without the checks of any iterable
        return set()
    listed = (batched,) if isinstance(batched, (str, int, np.integer)) else batched
    if not isinstance(listed, Iterable) or getattr(listed, "shape", (0,)) == ():
        raise TypeError(f"batched is {batched!r}; expected names or positions of arguments, such as 'a' or (0,)")
    return {position_of(key, names, "batched has") for key in listed}

"""Reading and making DLPack capsules, through the C structures of DLPack.

The layout is that of DLPack before 1.0 (dmlc.github.io/dlpack), which later versions accept.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

_NAME = b"dltensor"
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_FLOAT = 2


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("number", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_api = ctypes.pythonapi
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer_of_dying = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)(("PyCapsule_New", _api))


class Memory(NamedTuple):
    """The address, shape, strides and dtype of an array."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    """in entries; None for C order"""
    dtype: str
    """such as float32; with the number of lanes where there are several"""


def memory_of(capsule: object) -> Memory:
    """The array of a capsule; it is not marked as used, so that its producer gets the memory back with it."""
    tensor = _Managed.from_address(_get_pointer(capsule, _NAME)).tensor
    kind = _KINDS.get(tensor.dtype.code, f"of code {tensor.dtype.code}")
    lanes = "" if tensor.dtype.lanes == 1 else f"x{tensor.dtype.lanes}"
    shape = tuple(tensor.shape[k] for k in range(tensor.ndim))
    strides = tuple(tensor.strides[k] for k in range(tensor.ndim)) if tensor.strides else None
    return Memory((tensor.data or 0) + tensor.byte_offset, shape, strides, f"{kind}{tensor.dtype.bits}{lanes}")


_exported: dict[int, tuple[object, ...]] = {}
"""The objects that exported capsules need, by the address of their tensors, until the consumers release them."""


def c_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in entries, of an array of that shape in C order."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def capsule_of(address: int, shape: tuple[int, ...], bits: int, device: tuple[int, int], owner: object) -> object:
    """A capsule for a floating-point array in C order, whose ``owner`` is kept until nobody uses it."""
    sizes = ctypes.c_int64 * len(shape)
    lengths = sizes(*shape)
    strides = sizes(*c_order(shape))
    pointer = ctypes.POINTER(ctypes.c_int64)
    tensor = _Tensor(
        address,
        _Device(*device),
        len(shape),
        _Type(_FLOAT, bits, 1),
        ctypes.cast(lengths, pointer),
        ctypes.cast(strides, pointer),
        0,
    )
    managed = _Managed(tensor, None, _DELETER)
    place = ctypes.addressof(managed)
    _exported[place] = (managed, lengths, strides, owner)
    return _new(place, _NAME, _DESTRUCTOR)


def _release(address: int) -> None:
    _exported.pop(address, None)


def _release_unused(capsule: int) -> None:
    """Release the objects of a capsule that was never used, which still has its first name."""
    if _is_valid(capsule, _NAME):
        _release(_pointer_of_dying(capsule, _NAME))


_DELETER, _DESTRUCTOR = _Deleter(_release), _Destructor(_release_unused)

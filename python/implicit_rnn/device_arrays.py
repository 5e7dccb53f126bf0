"""Arrays in the memory of a device: those of other libraries, read in place, and those of results.

Arrays are read through ``__dlpack__`` (the Python array API standard) or ``__cuda_array_interface__`` (Numba's, versions 0 to
3), and results have both: ``torch.from_dlpack(result)``, ``cupy.asarray(result)`` and the like share their memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np

from implicit_rnn import dlpack
from implicit_rnn.validation import check_shape_of_samples, refuse_nonfinite

Array = np.ndarray

KINDS = {"cpu": (), "cuda": (2, 13), "jl": (1,)}
"""DLPack's kinds of memory for the arrays of each device; arrays in host memory are NumPy's. The reference device arrays, which
are for tests, are in host memory."""

NOTHING, EVERYTHING = -1, 0
"""Values for a stream: wait for nothing; wait for the whole device."""

_LEGACY_STREAM = 1
_NEWEST_INTERFACE = 3


@dataclass(frozen=True, eq=False, repr=False)
class DeviceArray:
    """An array in the memory of a device, in C order.

    Attributes
    ----------
    device
        "cuda".
    address
        Where its memory begins.
    shape, dtype
        As for a NumPy array.
    stream
        The stream to wait for before the array is read, or ``NOTHING`` or ``EVERYTHING``.
    owner
        The object that keeps the memory alive.
    """

    device: str
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype
    stream: int
    owner: object

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: np.dtype, device: str) -> DeviceArray:
        """Memory owned by the engine, to be filled in."""
        from implicit_rnn.engines.julia.calls import Handle, call

        number, address = call("device_memory", device, dtype.name, math.prod(shape))
        return cls(device, int(address), shape, dtype, NOTHING, Handle(number))

    @classmethod
    def copy_of(cls, array: Array | DeviceArray, device: str) -> DeviceArray:
        """Memory owned by the engine with the numbers of an array, which may be in host memory."""
        from implicit_rnn.engines.julia.calls import call

        copy = cls.empty(array.shape, array.dtype, device)
        call("copy_memory", device, array.reshape(-1), copy.reshape(-1))
        return copy

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *sizes: int | tuple[int, ...]) -> DeviceArray:
        """The same memory in another shape, in which one number may be -1."""
        shape = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple) else cast("tuple[int, ...]", sizes)
        known = -math.prod(shape) if -1 in shape else 1
        whole = tuple(self.size // known if n == -1 else n for n in shape)
        if math.prod(whole) != self.size:
            raise ValueError(f"an array of shape {self.shape} cannot have the shape {shape}")
        return DeviceArray(self.device, self.address, whole, self.dtype, self.stream, self.owner)

    def numpy(self) -> Array:
        """A copy in host memory."""
        from implicit_rnn.engines.julia.calls import call

        copy = np.empty(self.shape, self.dtype)
        call("copy_memory", self.device, self.reshape(-1), copy.reshape(-1))
        return copy

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise TypeError(
            "an array in the memory of a device cannot be pickled; its method numpy() copies it to host memory"
        )

    def __array__(self, *_: object, **__: object) -> Array:
        raise TypeError("this array is in the memory of a device; its method numpy() copies it to host memory")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Numba's interface, version 3. The engine has finished its work on the array, so there is no stream to wait for."""
        if self.device != "cuda":
            raise AttributeError(f"an array of the device {self.device!r} is not in the memory of an NVIDIA card")
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": None,
            "version": _NEWEST_INTERFACE,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return KINDS[self.device][0], 0

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A capsule of DLPack before 1.0, which later versions accept. No ``stream`` has to wait for the engine."""
        if dl_device not in (None, self.__dlpack_device__()) or copy:
            raise BufferError("an array of the engine is exported in place, without a copy")
        bits = 8 * self.dtype.itemsize
        return dlpack.capsule_of(self.address, self.shape, bits, self.__dlpack_device__(), self.owner)

    def __repr__(self) -> str:
        return f"DeviceArray(shape {self.shape}, {self.dtype} on {self.device})"


# --- arrays of other libraries -------------------------------------------------------------------------------


def as_device_array(name: str, value: object, device: str) -> DeviceArray | None:
    """An array of another library on the device, in place; None for anything that is not on the device.

    Raises ``TypeError`` and ``ValueError`` for an array on the device that cannot be read without a copy, or is inconsistent.
    """
    if isinstance(value, DeviceArray):
        return value if value.device == device else None
    read = _reader(value, device)
    return None if read is None else read(name, value, device)


def is_on_device(value: object, device: str) -> bool:
    """Whether ``as_device_array`` would take it."""
    return value.device == device if isinstance(value, DeviceArray) else _reader(value, device) is not None


def _reader(value: object, device: str) -> Callable[[str, Any, str], DeviceArray] | None:
    """The function that reads an array of another library on the device, by its protocol."""
    if device == "cpu" or isinstance(value, np.ndarray):
        return None
    place = _place(value)
    if place is None:
        return _of_interface if hasattr(value, "__cuda_array_interface__") else None
    return _of_dlpack if place[0] in KINDS[device] else None


def as_samples(name: str, array: DeviceArray, columns: int, dtype: np.dtype, what: str) -> Array:
    """The checks of ``validation.as_samples`` for an array on a device, which is never converted.

    Its type is given as that of engine arguments; engines use only the attributes that it has.
    """
    check_shape_of_samples(name, array.shape, columns, what)
    check_dtype(name, array, dtype, "the network")
    check_finite(name, array)
    return cast("Array", array)


def check_dtype(name: str, array: DeviceArray, dtype: np.dtype, whose: str) -> None:
    """``TypeError`` for another dtype than the expected one, that of ``whose``."""
    if array.dtype != dtype:
        raise TypeError(
            f"{name} has dtype {array.dtype}, {whose} {dtype}, and arrays on a device are not converted: convert it there"
        )


def check_finite(name: str, array: DeviceArray) -> None:
    """``ValueError`` for NaN and infinity in an array (samples, columns)."""
    from implicit_rnn.engines.julia.calls import call

    bad, first = call("find_nonfinite", array.device, array.reshape(-1), array.shape[1])
    refuse_nonfinite(name, int(bad), len(array), int(first))


def to_host(name: str, value: object, dtype: np.dtype, device: str) -> Any:
    """The value; an array on the device is copied to host memory, without conversion."""
    there = as_device_array(name, value, device)
    if there is None:
        return value
    check_dtype(name, there, dtype, "the network")
    return there.numpy()


def _place(value: object) -> tuple[int, int] | None:
    """The place of an array according to DLPack: the kind of memory and the number of the device."""
    if isinstance(value, type) or not hasattr(value, "__dlpack_device__") or not hasattr(value, "__dlpack__"):
        return None
    kind, number = value.__dlpack_device__()
    return int(kind), int(number)


def _checked(
    name: str,
    device: str,
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dtype: np.dtype,
    stream: int,
    owner: object,
) -> DeviceArray:
    """The array, checked to be in C order; ``strides`` are in entries."""
    if strides is not None:
        usual = dlpack.c_order(shape)
        if any(n > 1 and stride != step for n, stride, step in zip(shape, strides, usual, strict=True)):
            raise ValueError(
                f"{name} of shape {shape} has the strides {strides} in entries; expected {usual}, those of C order: copy it on "
                "the device, as by tensor.contiguous() or cupy.ascontiguousarray"
            )
    if address == 0 and math.prod(shape) > 0:
        raise ValueError(f"{name} has shape {shape} and no memory (its address is 0)")
    return DeviceArray(device, address, shape, dtype, stream, owner)


# --- __cuda_array_interface__ --------------------------------------------------------------------------------


def _of_interface(name: str, owner: Any, device: str) -> DeviceArray:
    what, given = f"the __cuda_array_interface__ of {name}", owner.__cuda_array_interface__
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} is a {type(given).__name__}; expected a dictionary")
    if missing := [key for key in ("shape", "typestr", "data", "version") if key not in given]:
        raise TypeError(f"{what} has no {', '.join(missing)}")
    version = given["version"]
    if not isinstance(version, int) or not 0 <= version <= _NEWEST_INTERFACE:
        raise TypeError(f"{what} has version {version!r}; expected one up to {_NEWEST_INTERFACE}")
    if given.get("mask") is not None:
        raise TypeError(f"{name} is masked; expected an array without missing entries")
    shape = _sizes(given["shape"])
    if shape is None:
        raise TypeError(f"{what} has shape {given['shape']!r}; expected a tuple of sizes")
    try:
        dtype = np.dtype(given["typestr"])
        address, _ = given["data"]  # the second entry says whether it is read-only; it is treated as such
        address = int(address)
    except (TypeError, ValueError):
        raise TypeError(
            f"{what} has typestr {given['typestr']!r} and data {given['data']!r}; expected a type such as '<f4', and a pair "
            "of an address and a read-only flag"
        ) from None
    return _checked(
        name, device, address, shape, _strides(what, given, shape, dtype), dtype, _stream(what, given, version), owner
    )


def _sizes(given: Any) -> tuple[int, ...] | None:
    if not isinstance(given, tuple | list) or not all(isinstance(n, int | np.integer) and n >= 0 for n in given):
        return None
    return tuple(int(n) for n in given)


def _strides(what: str, given: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...] | None:
    """In entries."""
    strides = given.get("strides")
    if strides is None:
        return None
    whole = isinstance(strides, tuple | list) and all(isinstance(n, int | np.integer) for n in strides)
    if not whole or len(strides) != len(shape) or any(n % dtype.itemsize for n in strides):
        raise TypeError(f"{what} has strides {strides!r} in bytes; expected {len(shape)} multiples of {dtype.itemsize}")
    return tuple(int(n) // dtype.itemsize for n in strides)


def _stream(what: str, given: Mapping[str, Any], version: int) -> int:
    """The stream to wait for; versions before 3 do not have one."""
    if version < _NEWEST_INTERFACE:
        return EVERYTHING
    stream = given.get("stream")
    if stream is None:
        return NOTHING
    if not isinstance(stream, int) or stream <= 0:
        raise TypeError(f"{what} has stream {stream!r}; expected None, 1, 2 or the handle of a stream")
    return stream


# --- DLPack --------------------------------------------------------------------------------------------------


def _of_dlpack(name: str, value: Any, device: str) -> DeviceArray:
    _, number = value.__dlpack_device__()
    if number != 0:
        raise ValueError(
            f"{name} is on card {number}, but the engine computes on card 0, the first of CUDA_VISIBLE_DEVICES; set this "
            "variable so that both use the same card"
        )
    # The producer makes the legacy stream wait for its own stream, and the engine waits for the legacy stream.
    on_card = device == "cuda"
    capsule = value.__dlpack__(stream=_LEGACY_STREAM) if on_card else value.__dlpack__()
    memory = dlpack.memory_of(capsule)
    if memory.dtype not in ("float16", "float32", "float64"):
        raise TypeError(f"{name} has dtype {memory.dtype}; expected float32 or float64")
    stream = _LEGACY_STREAM if on_card else NOTHING
    dtype = np.dtype(memory.dtype)
    return _checked(name, device, memory.address, memory.shape, memory.strides, dtype, stream, (capsule, value))

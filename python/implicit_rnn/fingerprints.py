"""Values, functions and arrays as JSON data, the same in every process, to tell whether two of them are equal."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np

from implicit_rnn.device_arrays import DeviceArray
from implicit_rnn.options import Option, as_python

Array = np.ndarray


def plain(value: Any, outer: tuple[Any, ...] = ()) -> Any:
    """A value as JSON data, the same in every process; ``outer`` are the containers around it, which it may contain in turn."""
    if isinstance(value, Option):
        return {"name": value.name} | {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":  # whose repr would be abridged
        return fingerprint(value)
    value = as_python(value)
    if value is None or isinstance(value, bool | int | float | str):
        return "nan" if value != value else value  # which is not equal to itself
    if any(value is each for each in outer):
        return "..."
    outer = (*outer, value)
    if isinstance(value, list | tuple | np.ndarray):
        parts = (value.shape, *value.ravel()) if isinstance(value, np.ndarray) else value
        return [plain(part, outer) for part in parts]
    if isinstance(value, dict):
        return sorted(([plain(key, outer), plain(part, outer)] for key, part in value.items()), key=str)
    if isinstance(value, set | frozenset):
        return sorted((plain(part, outer) for part in value), key=str)
    if callable(value):
        return describe_function(value, outer)
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))


def describe_function(f: Any, outer: tuple[Any, ...] = ()) -> Any:
    """The name of a function and the values it holds: defaults, enclosed variables, attributes. (Its repr has its address.)

    For lambdas and nested functions, whose names need not be unique, there is a digest of the code as well, which depends on
    the version of Python. Changes to the code of functions at the top level of a module are not detected, nor to what any
    function reads from its module.
    """
    if isinstance(f, partial):
        return {"name": "functools.partial", "holds": plain([f.func, *f.args, f.keywords], outer)}
    kind = f if hasattr(f, "__qualname__") else type(f)
    name, local = f"{kind.__module__}.{kind.__qualname__}", "<" in kind.__qualname__
    code = getattr(f if kind is f else kind.__call__, "__code__", None) if local else None
    owner = f.__self__ if isinstance(f, MethodType) else f
    named = getattr(owner, "__dict__", {})
    if isinstance(owner, type):
        named = {key: part for key, part in named.items() if local and _is_of_class(key, part)}
    holds = [*(getattr(f, "__defaults__", None) or ()), *_cells(f)]
    holds += [part for part in (getattr(f, "__kwdefaults__", None), dict(named)) if part]
    described = {"name": name}
    if code is not None:
        described["code"] = hashlib.blake2b(repr(_code(code)).encode(), digest_size=16).hexdigest()
    if holds:
        described["holds"] = plain(holds, outer)
    return described if len(described) > 1 else name


def _is_of_class(name: str, part: Any) -> bool:
    """Whether an attribute of a class is one that its author wrote."""
    return not name.startswith("__") or isinstance(part, FunctionType)


def _cells(f: Any) -> Iterator[Any]:
    for cell in getattr(f, "__closure__", None) or ():
        with suppress(ValueError):  # a variable that has no value yet
            yield cell.cell_contents


def _code(part: Any) -> Any:
    """What code, or a constant in it, does, without its position in a file; the same in every process."""
    if isinstance(part, CodeType):
        arguments = (part.co_argcount, part.co_posonlyargcount, part.co_kwonlyargcount, part.co_flags)
        constants = tuple(map(_code, part.co_consts))
        return part.co_code, part.co_varnames, part.co_names, arguments, constants
    if isinstance(part, tuple):
        return tuple(map(_code, part))
    return sorted(map(repr, part)) if isinstance(part, frozenset) else repr(part)


def fingerprint(array: Array | DeviceArray | None) -> dict[str, Any] | None:
    """The shape and a digest of an array."""
    if array is None:
        return None
    values = array.numpy() if isinstance(array, DeviceArray) else np.ascontiguousarray(array)
    digest = hashlib.blake2b(values.data, digest_size=16)
    return {"shape": list(array.shape), "digest": digest.hexdigest()}

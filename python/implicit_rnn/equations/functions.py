"""The functions of equations: Julia code given as a string, and the names of the arguments of any function."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np

from implicit_rnn.engines.base import JuliaFunction

Function = JuliaFunction | Callable[..., Any]

_HEADS = tuple(
    re.compile(head)
    for head in (r"\s*\((?P<names>[^()]*)\)\s*->", r"\s*(?P<names>\w+)\s*->", r"\s*function\s*\((?P<names>[^()]*)\)")
)
_PARAMETER = re.compile(r"(?P<name>[^\W\d]\w*!?)\s*(::[^=,]+)?")


def julia(text: str) -> JuliaFunction:
    """A function given as Julia code, for ``fixed_point`` and ``root``.

    The code sees each sample as a vector z, and arguments as numbers and arrays indexed as in NumPy but from 1; it may use
    Julia's LinearAlgebra. It is compiled at its first use, once per string. It must be differentiable by ForwardDiff.jl, so
    do not declare parameters as Float64. Broadcast formulas on vectors of up to 8 entries are the fastest; these
    vectors cannot be written to. From 4096 samples on such formulas are evaluated for many samples at once, in double
    precision, in vector registers and on all threads; code that branches on values (``if``, ``?:``; not ``ifelse``) runs
    for one sample at a time. Functions such as ``sqrt``, ``log`` and powers are NaN outside their domains instead of the
    errors that Julia throws there, unless the code has a ``try``.

    Parameters
    ----------
    text
        One anonymous function, ``(z, a) -> cos.(a .* z)`` or ``function (z, a) … end``; its parameters after the first name
        the arguments.

    Raises
    ------
    TypeError
        For anything but a string.
    ValueError
        For code of another form.

    Examples
    --------
    >>> kepler = irnn.julia("(E, M, e) -> M .+ e .* sin.(E)")
    >>> kepler.arguments
    ('M', 'e')
    >>> solution = irnn.fixed_point(kepler, [1.0], args=(1.0, 0.3), engine="julia")
    >>> print(solution.value.round(6))
    [1.288091]
    """
    if not isinstance(text, str):
        raise TypeError(f"text is {text!r}; expected Julia code as a string, such as '(z, a) -> cos.(a .* z)'")
    for head in _HEADS:
        if match := head.match(text):
            return JuliaFunction(text, _parameters(match["names"], text)[1:])
    raise ValueError(
        f"the Julia code {text!r} is not of the form '(z, a) -> expression' or 'function (z, a) … end', the code of one "
        "function of z and its arguments"
    )


def argument_names(f: Function, count: int) -> tuple[str, ...]:
    """The names of the arguments after z; ``ValueError`` if f does not take ``count`` of them."""
    names, least, most = _julia_parameters(f) if isinstance(f, JuliaFunction) else _python_parameters(f)
    if most < 0:
        raise ValueError("f takes no argument; expected a function of z, and of args where there are any")
    if not least <= count <= most:
        listed = f" ({', '.join(names)})" if names else ""
        number = least if count < least else most
        raise ValueError(f"f takes z and {number} argument{'s'[: number != 1]}{listed}; args has {count}")
    if len(names) == count:
        return names
    return (*names[:count], *(f"args[{index}]" for index in range(len(names), count)))


def _parameters(names: str, text: str) -> tuple[str, ...]:
    found = []
    for part in names.split(",") if names.strip() else []:
        match = _PARAMETER.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"the Julia code {text!r} has the parameter {part.strip()!r}; expected plain names, without defaults, keywords "
                "or splats"
            )
        found.append(match["name"])
    if not found:
        raise ValueError(f"the Julia code {text!r} has no parameters; expected z and then the arguments")
    if len(set(found)) < len(found):
        raise ValueError(f"the Julia code {text!r} names a parameter twice")
    return tuple(found)


def _julia_parameters(f: JuliaFunction) -> tuple[tuple[str, ...], int, float]:
    return f.arguments, len(f.arguments), len(f.arguments)


def _python_parameters(f: Callable[..., Any]) -> tuple[tuple[str, ...], int, float]:
    """The names after the first parameter, and the least and largest number of arguments that may follow it."""
    if type(f) is FunctionType and not f.__dict__:  # what its signature says, but faster
        code = f.__code__
        names = code.co_varnames[1 : code.co_argcount]
        most = np.inf if code.co_flags & inspect.CO_VARARGS else code.co_argcount - 1
        return names, max(code.co_argcount - len(f.__defaults__ or ()) - 1, 0), most
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        return (), 0, np.inf
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in positional) - 1
    splat = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    return tuple(p.name for p in positional[1:]), max(least, 0), np.inf if splat else len(positional) - 1

"""The base of all configuration objects, the choice of one by its name, and the checks of their options."""

from __future__ import annotations

import difflib
import inspect
import sys
from abc import ABCMeta
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from functools import lru_cache
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar, get_args

import numpy as np

Value = float | int | str | None
Kind = TypeVar("Kind", bound="Option")


def as_python(value: Any) -> Any:
    """A NumPy scalar, or another number, as a Python number, which JSON can hold and which equals one passed directly."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, Real) and not isinstance(value, int | float):
        with suppress(OverflowError):  # which the checks report
            return int(value) if isinstance(value, Integral) else float(value)
    return value


class _OptionType(ABCMeta):
    """Refuses misspelt options with a list of the valid ones."""

    __instancecheck__ = type.__instancecheck__  # true and quick, as no class is registered as a virtual one

    if not TYPE_CHECKING:

        def __call__(cls, *values: Any, **options: Any) -> Any:
            check_names(cls.__name__, "option", options, [option.name for option in fields(cls)])
            return super().__call__(*map(as_python, values), **{name: as_python(v) for name, v in options.items()})

        @property
        def __signature__(cls) -> inspect.Signature:
            signature = inspect.signature(cls.__init__)
            return signature.replace(parameters=list(signature.parameters.values())[1:], return_annotation=cls)


@dataclass(frozen=True)
class Option(metaclass=_OptionType):
    """Base of all configuration objects: frozen, compared by value, and strict about the names of their options.

    Raises
    ------
    ValueError, TypeError
        For options out of range or of the wrong type; ``TypeError`` for an option that does not exist.

    Examples
    --------
    >>> irnn.Picard(damping=0.5).options()
    {'damping': 0.5, 'tol': None, 'max_iterations': 1000}
    >>> irnn.Picard().name
    'Picard'
    >>> irnn.Picard(damp=0.5)
    Traceback (most recent call last):
    TypeError: Picard has no option damp; its options are damping, tol, max_iterations; did you mean damping?
    """

    @property
    def name(self) -> str:
        """The name by which both engines know it."""
        return type(self).__name__

    def options(self) -> dict[str, Value]:
        """The options by name."""
        return asdict(self)


def is_of_package(kind: type[Option]) -> bool:
    """Whether it is a class of the package: the Julia engine and files know no others, by their names."""
    return kind.__module__.startswith("implicit_rnn.")


# --- choice by name ------------------------------------------------------------------------------------------


def choose(kind: type[Kind], value: object, argument: str) -> Kind:
    """``value`` if it is a configuration object of that kind, or the object of that name with its defaults."""
    if isinstance(value, kind):
        return value
    if isinstance(value, str):
        return _by_name(kind, value, argument)
    if isinstance(value, type) and issubclass(value, kind):
        raise TypeError(
            f"{argument} is the class {value.__name__}; pass an object: {value.__name__}({', '.join(_required(value))})"
        )
    known = list(_known(kind))
    expected = f"one of {', '.join(known)}" if len(known) > 1 else f"an object {known[0]}(...)"
    raise TypeError(f"{argument} is {value!r}; expected {expected}")


@lru_cache(maxsize=128)
def _by_name(kind: type[Kind], value: str, argument: str) -> Kind:
    known = {name: option for name, option in _known(kind).items() if not _required(option)}
    for name, option in known.items():
        if name.lower() == value.lower().replace("_", ""):
            return option()
    raise ValueError(f"{argument} is {value!r}; expected one of {', '.join(known)}{did_you_mean([value], known)}")


def describe(option: Option) -> dict[str, Any]:
    """A configuration object as plain data, from which ``from_description`` makes an equal one."""
    return {"name": option.name, "options": option.options()}


def from_description(kind: type[Kind], data: Mapping[str, Any]) -> Kind:
    """The inverse of ``describe`` for objects of a kind; ``ValueError`` if no such object exists."""
    known, name, options = _known(kind), data["name"], data["options"]
    if name not in known or set(options) - {option.name for option in fields(known[name])}:
        raise ValueError(f"there is no {kind.__name__.lower()} {name} with the options {sorted(options)}")
    return known[name](**options)


def _known(kind: type[Kind]) -> dict[str, type[Kind]]:
    """The concrete classes of that kind in this package, by their names."""
    children = [child for child in kind.__subclasses__() if is_of_package(child)]
    if not children:
        return {kind.__name__: kind}
    known: dict[str, type[Kind]] = {}
    for child in children:
        if not inspect.isabstract(child):
            known[child.__name__] = child
        known |= {name: option for name, option in _known(child).items() if not inspect.isabstract(option)}
    return known


def _required(option: type[Option]) -> list[str]:
    """The options without a default, which an object needs."""
    return [f.name for f in fields(option) if f.default is MISSING and f.default_factory is MISSING]


def check_names(owner: str, what: str, given: Iterable[str], valid: Collection[str]) -> None:
    """``TypeError`` for names that are not valid, such as options of a class or settings of a call."""
    unknown = sorted(set(given) - set(valid))
    if unknown:
        known = f"its {what}s are {', '.join(valid) or 'none'}{did_you_mean(unknown, valid)}"
        raise TypeError(f"{owner} has no {what} {', '.join(unknown)}; {known}")


def did_you_mean(names: Iterable[object], valid: Iterable[str]) -> str:
    """The end of a message that suggests the valid names nearest to misspelt ones; empty if none is near."""
    plain = {candidate.lower().replace("_", ""): candidate for candidate in valid}
    near = [difflib.get_close_matches(str(name).lower().replace("_", ""), plain, 1) for name in names]
    found = [plain[match] for matches in near for match in matches]
    return f"; did you mean {', '.join(found)}?" if found else ""


# --- checks --------------------------------------------------------------------------------------------------


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an integer, of NumPy or Python; True and False do not count."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole(name: str, value: object, least: int) -> int:
    """A whole number that is at least ``least``, checked."""
    if not is_whole(value):
        raise TypeError(f"{name} must be a whole number from {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be a whole number from {least}, got {value}")
    return int(value)


def check_count(name: str, value: object) -> int:
    """A whole number from 1, checked; counters have 32 bits."""
    count = check_whole(name, value, 1)
    if count >= 2**31:
        raise ValueError(f"{name} must be a whole number below 2**31, got {value}")
    return count


def check_flag(name: str, value: object) -> bool:
    """True or False, checked: any string, even "no", would count as true."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_number(name: str, value: object) -> None:
    """``TypeError`` unless it is a real number, ``ValueError`` for integers beyond the range of float64."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number below {sys.float_info.max:.2g}, got a larger one") from None


def check_fraction(name: str, value: float) -> None:
    """``ValueError`` unless it lies strictly between 0 and 1."""
    check_number(name, value)
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}")


def check_decay(name: str, value: float) -> None:
    """``ValueError`` unless it lies in [0, 1)."""
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_share(name: str, value: float) -> None:
    """``ValueError`` unless it lies in [0, 1]."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie from 0 to 1, got {value}")


def check_not_negative(name: str, value: float) -> None:
    """``ValueError`` unless it is finite and at least 0."""
    check_number(name, value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_positive(name: str, value: float) -> None:
    """``ValueError`` unless it is finite and above 0."""
    check_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    """``ValueError`` unless it is one of the valid strings."""
    if not isinstance(value, str) or value not in valid:
        expected = f"expected one of {', '.join(map(repr, valid))}{did_you_mean([value], valid)}"
        raise ValueError(f"{name} is {value!r}; {expected}")


OnFailure = Literal["raise", "warn", "ignore"]
"""What happens when a sample does not converge."""

_ON_FAILURE = get_args(OnFailure)


def check_on_failure(value: object) -> str:
    """What to do about unconverged samples, checked."""
    check_choice("on_failure", value, _ON_FAILURE)
    return str(value)

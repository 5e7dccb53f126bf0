"""The base of all configuration objects, the choice of one by its name, and the checks of their options."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeVar

Value = float | int | str | None
Kind = TypeVar("Kind", bound="Option")


class _OptionType(type):
    """Refuses misspelt options with a list of the valid ones."""

    if not TYPE_CHECKING:

        def __call__(cls, *values: Any, **options: Any) -> Any:
            valid = [option.name for option in fields(cls)]
            unknown = sorted(set(options) - set(valid))
            if unknown:
                raise TypeError(
                    f"{cls.__name__} has no option {', '.join(unknown)}; its options are {', '.join(valid) or 'none'}"
                )
            return super().__call__(*values, **options)


@dataclass(frozen=True)
class Option(metaclass=_OptionType):
    """Base of all configuration objects."""

    @property
    def name(self) -> str:
        """The name by which both engines know it."""
        return type(self).__name__

    def options(self) -> dict[str, Value]:
        """The options by name."""
        return asdict(self)


def choose(kind: type[Kind], value: object, argument: str) -> Kind:
    """``value`` if it is a configuration object of that kind, or the one of that name with its defaults."""
    if isinstance(value, kind):
        return value
    known = _by_name(kind)
    if isinstance(value, str) and (name := value.lower().replace("_", "")) in known:
        return known[name]()
    names = ", ".join(option.__name__ for option in known.values())
    if isinstance(value, type) and issubclass(value, kind):
        raise TypeError(f"{argument} is the class {value.__name__}; pass an object: {value.__name__}()")
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{argument} is {value!r}; expected one of {names}")


def from_description(kind: type[Kind], name: str, options: dict[str, Any]) -> Kind:
    """The configuration object of that kind, name and options; ``ValueError`` if there is none such."""
    known = {option.__name__: option for option in _leaves(kind)}
    if name not in known or set(options) - {option.name for option in fields(known[name])}:
        raise ValueError(f"there is no {kind.__name__.lower()} {name} with the options {sorted(options)}")
    return known[name](**options)


@functools.cache
def _by_name(kind: type[Kind]) -> dict[str, type[Kind]]:
    return {option.__name__.lower(): option for option in _leaves(kind)}


def _leaves(kind: type[Kind]) -> list[type[Kind]]:
    children = kind.__subclasses__()
    return [leaf for child in children for leaf in _leaves(child)] if children else [kind]


def check_count(name: str, value: object) -> int:
    """A whole number from 1, checked."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number from 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value}")
    return int(value)


def check_number(name: str, value: object) -> None:
    """``TypeError`` unless it is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_fraction(name: str, value: float) -> None:
    """``ValueError`` unless it lies strictly between 0 and 1."""
    check_number(name, value)
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}")


def check_decay(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_share(name: str, value: float) -> None:
    """``ValueError`` unless it lies from 0 to 1."""
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
    if value not in valid:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, valid))}")


FAILURE_POLICIES = ("raise", "warn", "ignore")


def check_on_failure(value: object) -> str:
    """What to do about unconverged samples, checked."""
    check_choice("on_failure", value, FAILURE_POLICIES)
    return str(value)

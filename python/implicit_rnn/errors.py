"""Every error and warning of the package that is not a plain ValueError, TypeError or MemoryError."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from implicit_rnn.solution import Solution


class EngineError(RuntimeError):
    """An engine cannot be used, or failed.

    ``julia_traceback`` holds Julia's own backtrace where the failure came from Julia, else ``None``.
    """

    def __init__(self, message: str, julia_traceback: str | None = None) -> None:
        super().__init__(message)
        self.julia_traceback = julia_traceback


class EngineWarning(UserWarning):
    """The Julia engine could not be had and the NumPy engine is used instead."""


class ConvergenceError(RuntimeError):
    """Samples did not reach an equilibrium; ``solution`` (where there is one) says which and how far they came."""

    def __init__(self, message: str, solution: Solution | None = None) -> None:
        super().__init__(message)
        self.solution = solution


class ConvergenceWarning(UserWarning):
    """As ConvergenceError, for ``on_failure="warn"``."""


class ScaleWarning(UserWarning):
    """Samples or targets are far from unit scale, at which networks learn."""


class DerivativeWarning(UserWarning):
    """A Python function has no derivative at the solution that its values would bear out; NaN stands for it."""


class RunError(RuntimeError):
    """Runs of ``runs.run_many`` failed; ``tracebacks`` holds what they raised, by their names."""

    def __init__(self, message: str, tracebacks: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.tracebacks = tracebacks or {}


class ModelFileError(ValueError):
    """A file is not a model this version can read."""


class CheckpointError(ValueError):
    """A file is not a checkpoint this version can read, or that of another run than the one to be resumed."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line of the user's code that led here, however deep in the package this is."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "implicit_rnn":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)

"""Every error and warning of the package that is not a plain ValueError, TypeError or MemoryError."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from implicit_rnn.solution import Solution


class EngineError(RuntimeError):
    """An engine cannot be used, or failed.

    Parameters
    ----------
    message
        What failed and what to do.
    julia_traceback
        Julia's own backtrace where the failure came from Julia, else ``None``; also an attribute.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, engine="numpy")
    >>> try:
    ...     net.predict([[0.5, -1.0]], solver=irnn.Chord())
    ... except irnn.EngineError as error:
    ...     print(error)
    the solver Chord is not available on the NumPy engine; use engine="julia"
    """

    def __init__(self, message: str, julia_traceback: str | None = None) -> None:
        super().__init__(message)
        self.julia_traceback = julia_traceback


class EngineWarning(UserWarning):
    """The Julia engine is not available and the NumPy engine is used instead.

    Examples
    --------
    Make it an error, so that nothing runs on the slower engine unseen:

    >>> import warnings
    >>> warnings.simplefilter("error", irnn.EngineWarning)
    """


class ConvergenceError(RuntimeError):
    """Samples did not reach an equilibrium.

    Parameters
    ----------
    message
        How many did not, why, and what to do.
    solution
        The solution (where there is one), which says which samples failed and how close they came; also an attribute.

    Examples
    --------
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
    >>> try:
    ...     net.equilibrium([[0.5, -1.0]], solver=irnn.Picard(max_iterations=3))
    ... except irnn.ConvergenceError as error:
    ...     print(error.solution.converged)
    [False]
    """

    def __init__(self, message: str, solution: Solution | None = None) -> None:
        super().__init__(message)
        self.solution = solution


class ConvergenceWarning(UserWarning):
    """Like ConvergenceError, for ``on_failure="warn"``.

    Examples
    --------
    >>> import warnings
    >>> net = irnn.Network(2, [irnn.Layer(8)], outputs=1, seed=0)
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     y = net.predict([[0.5, -1.0]], solver=irnn.Picard(max_iterations=3), on_failure="warn")
    >>> caught[0].category.__name__
    'ConvergenceWarning'
    """


class ScaleWarning(UserWarning):
    """Samples or targets are far from unit scale, at which networks learn.

    Examples
    --------
    >>> import warnings
    >>> net = irnn.Network(1, [irnn.Layer(2)], outputs=1, seed=0)
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     run = net.fit([[1e6], [2e6]], [[0.3], [0.5]], epochs=1, progress=False)
    >>> caught[0].category.__name__
    'ScaleWarning'
    """


class DerivativeWarning(UserWarning):
    """No derivative of a Python function at the solution agrees with the function's values; it is NaN.

    Examples
    --------
    >>> import warnings
    >>> solution = irnn.root(lambda z, a: z - np.abs(a), [1.0], args=(0.0,))  # a kink
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     gradient = solution.vjp([1.0])["a"]
    >>> gradient, caught[0].category.__name__
    (array(nan), 'DerivativeWarning')
    """


class RunError(RuntimeError):
    """Runs of ``runs.run_many`` failed.

    Parameters
    ----------
    message
        Which runs failed, and the error of the first.
    tracebacks
        The tracebacks of the failed runs, by their names; also an attribute.

    Examples
    --------
    >>> from implicit_rnn.errors import RunError
    >>> from implicit_rnn.runs import run_many
    >>> try:
    ...     run_many(lambda x: {"y": 1 / x}, {"one": {"x": 1}, "zero": {"x": 0}})
    ... except RunError as error:
    ...     print(error)
    1 of 2 runs failed: zero. zero: ZeroDivisionError: division by zero
    """

    def __init__(self, message: str, tracebacks: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.tracebacks = tracebacks or {}


class ModelFileError(ValueError):
    """A file is not a model this version can read.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> path = Path(tempfile.mkdtemp()) / "net.safetensors"
    >>> _ = path.write_text("no model")
    >>> try:
    ...     irnn.load(path)
    ... except irnn.ModelFileError as error:
    ...     print("refused")
    refused
    """


class CheckpointError(ValueError):
    """The checkpoint to resume from cannot be read by this version, is damaged, or belongs to another run.

    Examples
    --------
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/run.ckpt"
    >>> net = irnn.Network(1, [irnn.Layer(2)], outputs=1, seed=0)
    >>> run = net.fit([[0.1], [0.2]], [[0.3], [0.5]], epochs=2, checkpoint=path, progress=False)
    >>> try:
    ...     net.fit([[0.1], [0.2]], [[0.3], [0.7]], epochs=4, resume=path, progress=False)
    ... except irnn.CheckpointError as error:
    ...     print(str(error).partition(" is ")[2])
    of another run: Y has other values
    """


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line of the user's code that led here, however deep in the package this is, also through other libraries."""
    level, frame = 2, sys._getframe(1)
    inside = ("implicit_rnn", "numpy", "torch", "jax", "sklearn", "joblib", "contextlib")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def report_failure(message: str, on_failure: str, solution: Solution | None = None) -> None:
    """Report samples that did not converge, as ``on_failure`` says: "raise", "warn" or "ignore"."""
    if on_failure == "raise":
        raise ConvergenceError(message, solution)
    if on_failure == "warn":
        warn(message, ConvergenceWarning)


without_underflow = partial(np.errstate, under="ignore")
"""Lets numbers too small for their type underflow to zero, even where the caller's ``np.seterr`` would raise."""

_counting, _filters, _silent = threading.Lock(), ExitStack(), 0


@contextmanager
def silenced() -> Iterator[None]:
    """Suppress every ``RuntimeWarning``, such as those of NumPy and SciPy.

    Warning filters belong to the process: the first thread to enter sets them, the last to leave restores them.
    """
    global _silent
    with _counting:
        if _silent == 0:
            _filters.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", RuntimeWarning)
        _silent += 1
    try:
        yield
    finally:
        with _counting:
            _silent -= 1
            if _silent == 0:
                _filters.close()

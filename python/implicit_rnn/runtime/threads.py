"""The number of Julia's threads, and the signal handlers that several threads need, without losing Python's.

Julia stops its threads for a garbage collection by a segmentation fault that its own handler catches. With several threads
it must therefore handle signals; it would then take over others as well, which are given back to Python here.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

from implicit_rnn.errors import EngineError, EngineWarning, warn

VARIABLE = "IMPLICIT_RNN_THREADS"
OURS = {signal.SIGINT, signal.SIGTERM}
OTHERS = {getattr(signal, name) for name in ("SIGQUIT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)}
"""Signals that Julia takes over, and needs for its profiler: they are given back if they had a handler in Python."""


def requested() -> int | None:
    """The number in IMPLICIT_RNN_THREADS, ``None`` where it is not set; ``ValueError`` if it is not a number of threads."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise ValueError(f"{VARIABLE} is {text!r}; expected a whole number from 1")
    return int(text)


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def setting() -> str:
    """The number of threads Julia is to have and where it comes from, for reports; ``ValueError`` as in ``_choice``."""
    threads, origin = _choice()
    return f"{threads} ({origin})"


def _choice() -> tuple[str, str]:
    """The threads and the setting they come from; ``ValueError`` for values with which Julia would end the process."""
    threads, origin = _given()
    if not re.fullmatch("(auto|[1-9][0-9]{0,3})(,(auto|[1-9][0-9]{0,3}))?", threads.strip()):
        raise ValueError(
            f"{origin} is {threads!r}; expected a whole number from 1 to 9999 or 'auto', or two of them as in '4,1'"
        )
    return threads, origin


def _given() -> tuple[str, str]:
    wanted = requested()
    if (given := juliacall_option("threads")) is not None:
        return given, "PYTHON_JULIACALL_THREADS"
    if wanted is not None:
        return str(wanted), VARIABLE
    if given := os.environ.get("JULIA_NUM_THREADS"):
        # No interactive threads is what an option without them means, which takes no 0.
        return re.sub("^([^,]+),0$", r"\1", given), "JULIA_NUM_THREADS"
    return str(usable_cores()), "usable cores"


def juliacall_option(name: str) -> str | None:
    """The user's option for juliacall, by -X or by the environment."""
    value = sys._xoptions.get(f"juliacall-{name.replace('_', '-')}")
    return str(value) if value is not None else os.environ.get(f"PYTHON_JULIACALL_{name.upper()}")


def juliacall_settings() -> dict[str, str]:
    """The environment variables that set threads and signals for juliacall.

    Raises ``ValueError`` for an invalid IMPLICIT_RNN_THREADS and ``EngineError`` for options under which Julia would crash.
    """
    threads, _ = _choice()
    if threads == "1":
        return {"PYTHON_JULIACALL_THREADS": threads}
    if juliacall_option("handle_signals") == "no":
        raise EngineError(
            f"PYTHON_JULIACALL_HANDLE_SIGNALS=no lets Julia crash at its first garbage collection with {threads} threads; "
            f"unset it, or set {VARIABLE}=1"
        )
    return {"PYTHON_JULIACALL_THREADS": threads, "PYTHON_JULIACALL_HANDLE_SIGNALS": "yes"}


def precompilation_settings() -> dict[str, str]:
    """The environment variables for the processes in which Julia precompiles packages.

    It generates code on half of the cores, and so on one of two: on both, ImplicitRNN took 52 s instead of 67.
    """
    few = usable_cores() in (2, 3)
    return {"JULIA_IMAGE_THREADS": str(usable_cores())} if few and not os.environ.get("JULIA_IMAGE_THREADS") else {}


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Around the start of Julia, which may take signals: restores those of Python afterwards."""
    takes_signals = juliacall_option("handle_signals") == "yes"
    blocked = _blocked()
    if takes_signals:
        # Its handler of segmentation faults would come first if it were restored later, as pytest does at its end.
        faulthandler.disable()
    try:
        yield
    finally:
        if takes_signals:
            _take_back_signals(blocked)


class FaultHandler:
    """Julia's handler of segmentation faults, by which it stops its threads; restored if something has replaced it.

    Ray, for example, resets the handlers of its process when it shuts down; the next garbage collection would crash.
    """

    _LARGEST = 512
    """Bytes that hold a ``struct sigaction`` of any platform; its first field is the handler."""

    def __init__(self) -> None:
        self._sigaction = ctypes.CDLL(None).sigaction
        self._julias, self._present = (ctypes.create_string_buffer(self._LARGEST) for _ in range(2))
        self._sigaction(signal.SIGSEGV, None, self._julias)
        self._handler, self._found = (ctypes.c_void_p.from_buffer(b) for b in (self._julias, self._present))

    def restore(self) -> None:
        """Put it back if it is not in force; costs a microsecond."""
        self._sigaction(signal.SIGSEGV, None, self._present)
        if self._found.value != self._handler.value:
            self._sigaction(signal.SIGSEGV, self._julias, None)


def check_running(config: dict[str, Any], threads: int) -> None:
    """Check a Julia that another package has started in this process with that many threads.

    Raises ``EngineError`` if it would crash; warns if it does not have the requested number of threads.
    """
    if threads > 1 and config.get("opt_handle_signals") != "yes":
        raise EngineError(
            f"Julia was already started in this process, with {threads} threads but without "
            "PYTHON_JULIACALL_HANDLE_SIGNALS=yes, and would crash at a garbage collection; set that before Python starts, or "
            "call implicit_rnn.get_engine() before anything else uses Julia"
        )
    wanted = requested()
    if wanted is not None and wanted != threads:
        warn(
            f"Julia was already started in this process with {threads} thread{'s' * (threads > 1)}, so {VARIABLE}={wanted} has "
            "no effect; call implicit_rnn.get_engine() before anything else uses Julia, or set PYTHON_JULIACALL_THREADS",
            EngineWarning,
        )


def _blocked() -> set[int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ())) if hasattr(signal, "pthread_sigmask") else set()


def _take_back_signals(blocked_before: set[int]) -> None:
    ours = OURS | {number for number in OTHERS if signal.getsignal(number) != signal.SIG_DFL}
    for number in ours:
        handler = signal.getsignal(number)
        if handler is not None:  # None: it was not installed by Python
            signal.signal(number, handler)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ours - blocked_before)

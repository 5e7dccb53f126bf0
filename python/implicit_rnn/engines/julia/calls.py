"""Calls of the Julia side, and handles of the objects there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from implicit_rnn.errors import EngineError
from implicit_rnn.runtime import start

_released: deque[int] = deque()
"""Handles of collected objects: garbage may be collected on any thread, so they are sent with the next call's arguments."""


def call(name: str, *arguments: Any) -> Any:
    """Call an entry point of the Julia side; errors arrive as EngineError or MemoryError, Ctrl-C as KeyboardInterrupt at once."""
    points = start.entry_points()
    with start.LOCK:
        if _released:
            arguments += tuple([_released.popleft() for _ in range(len(_released))])
        try:
            return start.interruptible(points[name], arguments)
        except Exception as error:
            if start.is_stopped():
                raise SystemExit from None  # which ends a thread silently
            if type(error).__name__ != "JuliaError":
                raise
            reason = start.first_line(error)
            if "OutOfGPUMemoryError" in reason or "OutOfMemoryError" in reason or "Out of GPU memory" in reason:
                raise MemoryError(f"{reason}; take smaller batches, or device='cpu'") from None
            raise EngineError(reason, str(error)) from None


class Handle:
    """An object on the Julia side, released with its owner."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, release: Callable[[int], None] = _released.append) -> None:
        release(self.number)

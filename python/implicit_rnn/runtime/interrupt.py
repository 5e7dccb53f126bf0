"""Ctrl-C while Julia computes or starts: SIGINT raises the flag at which Julia's loops stop.

Python runs its handler of SIGINT, which raises KeyboardInterrupt, when the main thread is back from Julia. But at once it
writes the number of the signal to the file descriptor that ``signal.set_wakeup_fd`` names. That is a socket here, at which a
thread waits to raise the flag. A call costs no more than to name the socket and to name again what was named before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Around the start of Julia, in the main thread: Ctrl-C waits for its end, and takes the place of an error.

    A Julia that is left half started cannot be started again, and one whose processes were stopped is no reason to fall back.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # nothing of Python's happens at a Ctrl-C
        yield
        return
    come: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: come.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if come:
            handler(*come[0])


class Interrupter:
    """Stops calls of Julia by the flag at an address, a 32-bit integer."""

    def __init__(self, address: int) -> None:
        self._flag = ctypes.c_int32.from_address(address)
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._name_socket = functools.partial(signal.set_wakeup_fd, self._sender.fileno(), warn_on_full_buffer=False)
        self._other = -1
        self._main = threading.main_thread().ident
        # Held while what has come is read and acted upon, so that no signal counts after its call.
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="implicit-rnn-interrupt", daemon=True).start()

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """``function(*arguments)``, which Ctrl-C stops with ``KeyboardInterrupt``.

        On other threads than the main one, and where SIGINT has another handler than Python's own, nothing is stopped: what
        is to happen then is not ours to say, and the handler runs when the call is over.
        """
        if threading.get_ident() != self._main:
            return function(*arguments)
        if self._flag.value:
            self.settle()
        try:
            self._other = self._name_socket()
            try:
                return function(*arguments)
            finally:
                # A signal that has come by the end of this line raises KeyboardInterrupt in it.
                signal.set_wakeup_fd(self._other, warn_on_full_buffer=False)
        except KeyboardInterrupt:
            signal.set_wakeup_fd(self._other, warn_on_full_buffer=False)
            self.settle()
            raise KeyboardInterrupt from None

    def stop(self) -> None:
        """Stop the call that is running, on whatever thread."""
        self._flag.value = 1

    def settle(self) -> None:
        """Forget the interrupts that have come."""
        with self._lock:
            self._read()
            self._flag.value = 0

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._receiver, selectors.EVENT_READ)
            while True:
                selector.select()
                with self._lock:
                    come = signal.SIGINT in self._read()
                    if come and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                        self._flag.value = 1

    def _read(self) -> bytes:
        """The numbers of the signals that have come, which are passed on to whom they would have been told."""
        try:
            numbers = self._receiver.recv(4096)
        except BlockingIOError:
            return b""
        if self._other >= 0:
            with contextlib.suppress(OSError):
                os.write(self._other, numbers)
        return numbers

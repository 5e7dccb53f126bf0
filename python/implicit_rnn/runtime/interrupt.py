"""Ctrl-C while Julia computes or starts: SIGINT raises the flag at which Julia's loops stop.

Python runs its SIGINT handler, which raises KeyboardInterrupt, only when the main thread returns from Julia. But it writes
the number of the signal at once to the file descriptor set by ``signal.set_wakeup_fd``. Here this is a socket, on which a
thread waits to raise the flag. The only cost of a call is to set this descriptor and to restore the previous one.
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
    """Around the start of Julia, in the main thread: Ctrl-C waits until the start has ended, and replaces any error of it.

    A half-started Julia cannot be started again, and a start that failed because of Ctrl-C is no reason to fall back.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # Python does not handle Ctrl-C
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
        # Held while signals are read and acted upon, so that none takes effect after its call.
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="implicit-rnn-interrupt", daemon=True).start()

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """``function(*arguments)``, which Ctrl-C stops with ``KeyboardInterrupt``.

        On threads other than the main one, and if SIGINT has a handler other than Python's own, nothing is stopped: that
        handler decides what happens, and runs when the call is over.
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
        """Discard the interrupts that have arrived."""
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
        """The numbers of the signals that have arrived, which are passed on to the previous wakeup descriptor."""
        try:
            numbers = self._receiver.recv(4096)
        except BlockingIOError:
            return b""
        if self._other >= 0:
            with contextlib.suppress(OSError):
                os.write(self._other, numbers)
        return numbers

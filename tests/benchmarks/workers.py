"""The contestants as processes that serve requests, so that start-up and compilation are over when the clock runs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np

CONTESTANTS = Path(__file__).parent / "contestants"


class ContestantError(Exception):
    """A contestant cannot take part, or no longer; the message says why."""


class Worker:
    """A running contestant."""

    def __init__(self, script: str, python: str) -> None:
        # Not stdin and stdout: Julia makes them non-blocking, and libraries print.
        self._connection, theirs = Pipe()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, str(CONTESTANTS / script), str(theirs.fileno())],
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.versions: dict[str, str] = self._receive()["versions"]

    def load(self, problem: Path, activation: str, tol: float) -> list[float]:
        """Prepare a problem; seconds of the first three steps."""
        return self._ask(do="load", problem=str(problem), activation=activation, tol=tol)["seconds"]

    def time(self, steps: int) -> list[float]:
        """Seconds of each step."""
        return self._ask(do="time", steps=steps)["seconds"]

    def answer(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The gradient of the last step, and what is reported about it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "gradient.npz"
            report = self._ask(do="answer", to=str(path))
            with np.load(path) as arrays:
                return dict(arrays), report

    def close(self) -> None:
        self._connection.close()
        self._process.wait(timeout=60)

    def _ask(self, **request: object) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            self._connection.send_bytes(json.dumps(request).encode())
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            return json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            status = self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines()
            raise ContestantError(lines[-1] if lines else f"it ended with exit status {status}") from None


def start(
    scripts: Mapping[str, str], ours: str, peers_python: str, stack: contextlib.ExitStack
) -> tuple[dict[str, Worker], dict[str, str]]:
    """The contestants of these names, closed with the stack; and of the peers that are absent, why."""
    workers, absent = {}, {}
    for name, script in scripts.items():
        try:
            workers[name] = Worker(script, sys.executable if name == ours else peers_python)
            stack.callback(workers[name].close)
        except ContestantError as error:
            if name == ours:
                raise
            absent[name] = str(error)
    return workers, absent

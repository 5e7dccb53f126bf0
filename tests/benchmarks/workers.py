"""The contestants as processes that serve requests, so that start-up and compilation are over when the clock runs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np

CONTESTANTS = Path(__file__).parent / "contestants"
OURS = "implicit-rnn"
PAUSE = 0.05
"""Seconds before a block of steps, in which the threads of the contestant before go to sleep."""


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


def compete(
    scripts: Mapping[str, str],
    peers_python: str,
    cases: Iterable[Any],
    measure: Callable[[Any, dict[str, Worker]], Iterable[dict[str, Any]]],
    line: Callable[[dict[str, Any]], str],
    protocol: dict[str, Any],
) -> dict[str, Any]:
    """Let the contestants measure all cases, and print a line of each row; plain data for JSON."""
    rows = []
    with contextlib.ExitStack() as stack:
        workers, absent = start(scripts, peers_python, stack)
        for case in cases:
            for row in measure(case, workers):
                rows.append(row)
                print(line(row), flush=True)
    versions = {key: value for worker in workers.values() for key, value in worker.versions.items()}
    return {"protocol": protocol, "versions": versions, "absent": absent, "rows": rows}


def start(
    scripts: Mapping[str, str], peers_python: str, stack: contextlib.ExitStack
) -> tuple[dict[str, Worker], dict[str, str]]:
    """The contestants of these names, closed with the stack; and of the peers that are absent, why."""
    workers, absent = {}, {}
    for name, script in scripts.items():
        try:
            workers[name] = Worker(script, sys.executable if name == OURS else peers_python)
            stack.callback(workers[name].close)
        except ContestantError as error:
            if name == OURS:
                raise
            absent[name] = str(error)
    return workers, absent


def load(
    workers: Mapping[str, Worker], arrays: Mapping[str, np.ndarray], activation: str, tol: float
) -> dict[str, float]:
    """Give a problem to all; the seconds of the fastest of each one's first steps."""
    with tempfile.TemporaryDirectory() as folder:
        problem = Path(folder) / "problem.npz"
        np.savez(problem, **arrays)
        return {name: min(worker.load(problem, activation, tol)) for name, worker in workers.items()}


def time_rounds(workers: Mapping[str, Worker], steps: Mapping[str, int], rounds: int) -> dict[str, list[float]]:
    """The median seconds of so many steps of each contestant in each round, interleaved: ours, a peer, a peer, ..."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            time.sleep(PAUSE)
            seconds[name].append(float(np.median(worker.time(steps[name]))))
    return seconds


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median of the ratios of the rounds."""
    return float(np.median(np.array(a) / np.array(b)))

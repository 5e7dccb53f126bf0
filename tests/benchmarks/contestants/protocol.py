"""How a contestant serves: JSON requests and answers through the connection whose file descriptor is its argument.

{"do": "load", "problem": FILE.npz, "activation": NAME} prepares a problem and takes three steps, whatever compiles included;
{"do": "time", "steps": K} takes one step to wake up and K that are timed; {"do": "answer", "to": FILE.npz} saves the gradient.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Protocol

import numpy as np

Arrays = Mapping[str, np.ndarray]

DEVICE = "BENCHMARK_DEVICE"
"""The environment variable that names the device to compute on: cpu, where it is not set, or cuda."""


class Contestant(Protocol):
    """One way to compute the training gradient of one problem."""

    def step(self) -> None:
        """Compute the loss and its gradient with respect to R, W, b, C and d; done when this returns."""

    def gradient(self) -> dict[str, np.ndarray]:
        """The gradient of the last step by name."""

    def iterations(self) -> float:
        """Forward iterations of the last step, as this contestant counts them."""


def serve(prepare: Callable[[Arrays, str, float], Contestant], versions: dict[str, str]) -> None:
    """Answer requests until the connection is closed; ``prepare(arrays, activation, tol)`` makes a contestant."""
    connection = Connection(int(sys.argv[1]))
    connection.send_bytes(json.dumps({"versions": versions}).encode())
    contestant: Contestant | None = None
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        reply: dict[str, object] = {}
        if request["do"] == "load":
            with np.load(request["problem"]) as arrays:
                contestant = prepare(dict(arrays), request["activation"], request["tol"])
            reply["seconds"] = durations(contestant, 3)
        elif request["do"] == "time":
            assert contestant is not None
            durations(contestant, 1)
            reply["seconds"] = durations(contestant, request["steps"])
        else:
            assert contestant is not None
            np.savez(request["to"], **contestant.gradient())
            reply["iterations"] = contestant.iterations()
            reply |= contestant.report() if hasattr(contestant, "report") else {}
        connection.send_bytes(json.dumps(reply).encode())


def durations(contestant: Contestant, count: int) -> list[float]:
    """Seconds of each of so many steps, without what a contestant may have to do before each, ``before_step``."""
    times = []
    prepare = getattr(contestant, "before_step", lambda: None)
    for _ in range(count):
        prepare()
        begin = time.perf_counter()
        contestant.step()
        times.append(time.perf_counter() - begin)
    return times

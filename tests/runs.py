"""Runs for the tests of run_many, at the top of a module, so that worker processes can import them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import implicit_rnn as irnn


def square(x: float) -> dict[str, Any]:
    return {"y": x * x, "process": os.getpid()}


def count_and_square(x: float, log: str) -> dict[str, float]:
    with Path(log).open("a") as file:
        file.write(f"{x}\n")
    return {"y": x * x}


def count_and_cube(x: float, log: str) -> dict[str, float]:
    return {"y": x * count_and_square(x, log)["y"]}


def count_only(x: float, log: str) -> None:
    count_and_square(x, log)


def apply(function: Callable[[float], float], x: float) -> dict[str, float]:
    return {"y": function(x)}


def append_to(layers: list[int]) -> dict[str, list[int]]:
    layers.append(1)
    return {"y": layers}


def go_to(folder: str) -> None:
    os.chdir(folder)


def wait(x: float, log: str) -> dict[str, float]:
    with Path(log).open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(60)
    return {"y": x}


def fail_for_3(x: float) -> dict[str, float]:
    if x == 3:
        raise ValueError("3 is no number to be squared\nby this function")
    return {"y": x * x}


def exit_for_3(x: float) -> dict[str, float]:
    if x == 3:
        raise SystemExit(2)
    return {"y": x * x}


def die_for_3(x: float) -> dict[str, float]:
    if x == 3:
        os._exit(1)
    return {"y": x * x}


def threads(x: float) -> dict[str, Any]:
    from implicit_rnn.runtime import start

    julia = start.evaluate("using LinearAlgebra: BLAS; (Threads.nthreads(), BLAS.get_num_threads())")
    return {"threads": [int(n) for n in julia], "process": os.getpid()}


def fit(seed: int, engine: str) -> dict[str, Any]:
    """A short training whose result depends on every step."""
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((20, 3)), rng.standard_normal((20, 1))
    net = irnn.Network(3, [irnn.Layer(4)], outputs=1, seed=seed, engine=engine)
    net.fit(X, Y, epochs=5, batch_size=7, seed=seed, progress=False)
    return {"parameters": net.parameters.tolist()}

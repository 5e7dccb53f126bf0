"""Networks on a GPU: adding CUDA.jl to an environment, a description of the card, and a self-test against the CPU."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from implicit_rnn.errors import EngineError
from implicit_rnn.runtime import install
from implicit_rnn.runtime.environments import Environment

ADD_CUDA = """
import Pkg
Pkg.add([
    Pkg.PackageSpec(; name = "CUDA", uuid = "052768ef-5323-5732-b1bb-66c8b64840ba", version = "5"),
    Pkg.PackageSpec(; name = "GPUArraysCore", uuid = "46192b85-c4d5-4398-a991-12ede77f4527", version = "0.2"),
    Pkg.PackageSpec(; name = "KernelAbstractions", uuid = "63c18a36-062a-441e-b654-da1e3ab1ce7c", version = "0.9"),
])
"""
SIZES = ((16, 4096), (64, 4096), (256, 4096))
"""Neurons and samples of the table of times."""


def add_cuda(environment: Environment) -> None:
    """Add CUDA.jl to the project of an environment. Raises ``EngineError`` if that fails."""
    command = [environment.exe, f"--project={environment.project}", "--startup-file=no", "-e", ADD_CUDA]
    if install.run(command) != 0:
        raise EngineError(f"CUDA.jl could not be added to {environment.project}: {install.cause()}")


def describe(device: str = "cuda") -> str:
    """A description of the device: name, memory, driver; or why none works."""
    from implicit_rnn.engines.julia.calls import call

    try:
        return str(call("describe_device", device))
    except EngineError as error:
        return f"not available: {error}"


def self_test(device: str = "cuda", sizes: tuple[tuple[int, int], ...] = SIZES) -> dict[str, Any]:
    """Compute states, gradients, a fit and an equation on the device and on the CPU, and time a gradient on both.

    Returns the largest relative differences by precision, the times in ms by size (neurons x samples), and ``ok``: whether
    the differences are at rounding level. Raises ``EngineError`` if the device is not available.
    """
    differences = {dtype: _differences(device, dtype) for dtype in ("float64", "float32")}
    bounds = {"float64": 1e-6, "float32": 1e-3}
    times = {
        f"{neurons} x {samples}": {name: _milliseconds(name, neurons, samples) for name in ("cpu", device)}
        for neurons, samples in sizes
    }
    ok = all(difference < bounds[dtype] for dtype, found in differences.items() for difference in found.values())
    return {"differences": differences, "gradient, ms": times, "ok": ok}


def _differences(device: str, dtype: str) -> dict[str, float]:
    X, Y = _data(256, dtype)
    here, there = (_network(name, 48, dtype) for name in ("cpu", device))
    found = {
        "states": _difference(there.equilibrium(X).state, here.equilibrium(X).state),
        "gradient": _difference(there.loss_and_gradient(X, Y)[1], here.loss_and_gradient(X, Y)[1]),
    }
    for net in (here, there):
        net.fit(X, Y, epochs=5, batch_size=64, seed=0, progress=False)
    return found | {"fit": _difference(there.parameters, here.parameters), "equation": _equation(device, X[:, :1])}


def _equation(device: str, M: np.ndarray) -> float:
    """The difference of the solutions of Kepler's equation for mean anomalies (B, 1)."""
    from implicit_rnn import equations

    kepler = equations.julia("(E, M) -> E .- 0.5 .* sin.(E) .- M")
    here, there = (equations.root(kepler, M, args=(M,), batched="M", device=name).value for name in ("cpu", device))
    return _difference(there, here)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _milliseconds(device: str, neurons: int, samples: int) -> float:
    """The median time of several gradients in float32, after one that compiles."""
    net, (X, Y) = _network(device, neurons, "float32"), _data(samples, "float32")
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        net.loss_and_gradient(X, Y)
        times.append(1e3 * (time.perf_counter() - begin))
    return round(statistics.median(times[1:]), 3)


def _network(device: str, neurons: int, dtype: str) -> Any:
    from implicit_rnn.model.topology import Layer
    from implicit_rnn.network import Network

    return Network(16, [Layer(neurons)], outputs=4, dtype=dtype, seed=0, engine="julia").to(device)


def _data(samples: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((samples, 16)).astype(dtype), rng.standard_normal((samples, 4)).astype(dtype)

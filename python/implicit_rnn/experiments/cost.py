"""The implicit gradient costs less than backpropagation through a long chain (claim iii of arXiv 2010.10564).

The paper's own settings are not published in full; the protocol here is ours. One layer of 100 tanh neurons, R symmetric with
spectral norm 0.95, so that the fixed-point iteration is slow; 20 inputs, 2 linear outputs, 500 samples (50 on the NumPy engine),
float64. The gradient of the mean squared error with respect to all parameters is taken in three ways: by backpropagation
through K unrolled iterations (BPTT), implicitly at the equilibrium found by the same iteration (Picard), and implicitly with
the default solver. Its error is the relative Euclidean distance to the implicit gradient at a residual of 1e-13.

Each point is a separate process. Time is the median of several calls after the first. Memory is the growth of the process
during the first call, all buffers included, after a call on two samples has compiled the code: the high-water mark of the
resident set, reset before the call where the system supports that (Linux), else an upper bound that may be 0.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from implicit_rnn.engines import get_engine
from implicit_rnn.errors import EngineError
from implicit_rnn.experiments.provenance import versions
from implicit_rnn.files import write_figure, write_json
from implicit_rnn.model.constraints import Free
from implicit_rnn.model.topology import Layer
from implicit_rnn.network import Network
from implicit_rnn.solvers import Adjoint, Auto, Implicit, Picard, Solver, Unrolled

NEURONS, INPUTS, OUTPUTS = 100, 20, 2
SAMPLES = {"julia": 500, "numpy": 50}
NORM, INPUT_GAIN = 0.95, 0.5
STEPS = (5, 10, 20, 50, 100, 200, 500, 1000)
TOLERANCES = {"picard": (1e-3, 1e-5, 1e-7, 1e-9, 1e-11), "auto": (1e-3, 1e-6, 1e-9)}
EXACT = 1e-13
SECONDS, MOST_CALLS = 1.0, 20
"""Target duration of the timing of a point, and the largest number of calls in it; at least three are made."""

FILES = ("cost.json", "cost.png")
LABELS = {"unrolled": "BPTT", "picard": "implicit, Picard", "auto": "implicit, default"}

Array = np.ndarray


@dataclass(frozen=True)
class Point:
    """The cost of one method of computing the gradient."""

    method: str
    """"unrolled", "picard" or "auto"."""
    setting: float
    """Steps of the unrolled chain, or the tolerance of forward and adjoint solves."""
    iterations: float
    """Forward iterations, the mean over the samples."""
    seconds: float
    peak_bytes: int
    error: float


@dataclass(frozen=True)
class Result:
    """All points, and the information needed to repeat them."""

    points: list[Point]
    engine: str
    threads: int | None

    def of(self, method: str) -> list[Point]:
        """The points of a method."""
        return [point for point in self.points if point.method == method]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "experiment": "cost",
            "protocol": {
                "neurons": NEURONS,
                "inputs": INPUTS,
                "outputs": OUTPUTS,
                "samples": SAMPLES[self.engine],
                "spectral norm of R": NORM,
                "input gain": INPUT_GAIN,
                "dtype": "float64",
                "memory": "growth of the resident set during the first call, process of its own",
            },
            "versions": versions(),
            "engine": self.engine,
            "threads": self.threads,
            "points": [asdict(point) for point in self.points],
            "comparison": comparison(self),
        }


# --- one point -----------------------------------------------------------------------------------------------


def make_net(engine: str | None) -> Network:
    """The net of the protocol."""
    net = Network(INPUTS, [Layer(NEURONS)], outputs=OUTPUTS, constraint=Free(), dtype="float64", seed=0, engine=engine)
    A = np.random.default_rng(0).standard_normal((NEURONS, NEURONS))
    R = (A + A.T) / 2
    net.weights["R"][...] = R * (NORM / np.linalg.norm(R, 2))
    net.weights["W"][...] *= INPUT_GAIN
    return net


def samples(count: int) -> tuple[Array, Array]:
    """Inputs and targets."""
    rng = np.random.default_rng(1)
    return rng.standard_normal((count, INPUTS)), rng.standard_normal((count, OUTPUTS))


def options(method: str, setting: float) -> tuple[Solver, Adjoint]:
    """Solver and adjoint of a point."""
    if method == "unrolled":
        return Auto(), Unrolled(int(setting))
    solver = Picard(tol=setting, max_iterations=10_000) if method == "picard" else Auto(tol=setting)
    return solver, Implicit(tol=setting)


def measure(method: str, setting: float, engine: str | None) -> Point:
    """One point, in this process, which should be a new one."""
    solver, adjoint = options(method, setting)
    small = options(method, 2 if method == "unrolled" else setting)
    make_net(engine).loss_and_gradient(*samples(2), solver=small[0], adjoint=small[1])
    X, Y = samples(SAMPLES[get_engine(engine).name])
    net = make_net(engine)

    def call() -> Array:
        return net.loss_and_gradient(X, Y, solver=solver, adjoint=adjoint)[1]

    with PeakMemory() as memory:
        gradient = call()
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < SECONDS and len(seconds) < MOST_CALLS):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    exact = net.loss_and_gradient(X, Y, solver=Picard(tol=EXACT, max_iterations=10_000), adjoint=Implicit("lu"))[1]
    iterations = setting if method == "unrolled" else float(net.equilibrium(X, solver=solver).iterations.mean())
    error = float(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))
    return Point(method, setting, iterations, float(np.median(seconds)), memory.bytes, error)


class PeakMemory:
    """The growth of the resident set of the process in a ``with`` block."""

    STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    bytes: int = 0

    def __enter__(self) -> PeakMemory:
        with contextlib.suppress(OSError):  # not Linux, or not allowed
            self.RESET.write_text("5", encoding="ascii")
        self._before = self._high_water()
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = max(self._high_water() - self._before, 0)  # the system counts pages, with a delay

    def _high_water(self) -> int:
        if self.STATUS.exists():
            lines = self.STATUS.read_text(encoding="ascii").splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_in_new_process(method: str, setting: float, engine: str) -> Point:
    """One point, in a separate process."""
    command = [sys.executable, "-m", "implicit_rnn.experiments.cost", method, repr(setting), engine]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise EngineError(f"the process that measures {method} {setting:g} failed, see the messages above")
    return Point(**json.loads(done.stdout.splitlines()[-1]))


# --- all of them ---------------------------------------------------------------------------------------------


def settings(steps: Sequence[int] = STEPS) -> list[tuple[str, float]]:
    """Method and setting of all points."""
    chains = [("unrolled", float(count)) for count in steps]
    return chains + [(method, tol) for method, values in TOLERANCES.items() for tol in values]


def run(
    steps: Sequence[int] = STEPS, engine: str | None = None, report: Callable[[Point], None] = lambda point: None
) -> Result:
    """Measure all points; ``report`` is called with each. Raises ``ValueError`` for steps below 1."""
    if not steps or min(steps) < 1:
        raise ValueError(f"steps are {list(steps)}; expected numbers from 1")
    name = get_engine(engine).name
    points = []
    for method, setting in settings(steps):
        points.append(measure_in_new_process(method, setting, name))
        report(points[-1])
    return Result(points, name, _threads(name))


def _threads(engine: str) -> int | None:
    from implicit_rnn.runtime import start

    return int(start.evaluate("Threads.nthreads()")) if engine == "julia" else None


def comparison(result: Result) -> list[dict[str, Any]]:
    """For each implicit gradient the shortest measured chain that is at least as accurate, and its relative cost."""
    rows = []
    for point in result.points:
        if point.method == "unrolled":
            continue
        chain = next((p for p in result.of("unrolled") if p.error <= point.error), None)
        rows.append(
            {
                "method": point.method,
                "tolerance": point.setting,
                "error": point.error,
                "steps of BPTT": int(chain.setting) if chain else None,
                "time ratio": chain.seconds / point.seconds if chain else None,
                "memory ratio": chain.peak_bytes / point.peak_bytes if chain and point.peak_bytes else None,
            }
        )
    return rows


def table(result: Result) -> str:
    """The points and the comparison as text."""
    lines = [f"{'gradient':<18} {'steps or tol':>12} {'iterations':>11} {'ms':>9} {'peak MB':>9} {'error':>9}"]
    for p in result.points:
        setting = f"{p.setting:.0f}" if p.method == "unrolled" else f"{p.setting:.0e}"
        lines.append(
            f"{LABELS[p.method]:<18} {setting:>12} {p.iterations:>11.1f} {p.seconds * 1e3:>9.2f} "
            f"{p.peak_bytes / 1e6:>9.1f} {p.error:>9.0e}"
        )
    lines.append("")
    for row in comparison(result):
        text = f"{LABELS[row['method']]}, tol {row['tolerance']:.0e}: error {row['error']:.0e}; BPTT "
        if row["steps of BPTT"] is None:
            lines.append(text + "is less accurate with every measured number of steps")
            continue
        memory = f" and {row['memory ratio']:.1f} times the memory" if row["memory ratio"] else ""
        lines.append(
            text + f"is as accurate with {row['steps of BPTT']} steps, {row['time ratio']:.1f} times the time{memory}"
        )
    return "\n".join(lines)


def save(result: Result, folder: Path) -> list[Path]:
    """Write cost.json and cost.png; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / name for name in FILES]
    write_json(written[0], result.as_dict())
    draw(result, written[1])
    return written


def draw(result: Result, path: Path) -> None:
    """The figure: memory and time against iterations, error against time."""
    from matplotlib.figure import Figure

    from implicit_rnn.plotting import NEGATIVE, NEUTRAL, POSITIVE

    styles = {"unrolled": (NEUTRAL, "s"), "picard": (NEGATIVE, "^"), "auto": (POSITIVE, "o")}
    figure = Figure(figsize=(12, 4), layout="constrained")
    memory, duration, exactness = figure.subplots(1, 3)
    for method, (colour, marker) in styles.items():
        points = result.of(method)
        look: dict[str, Any] = {"color": colour, "marker": marker, "label": LABELS[method]}
        iterations = [p.iterations for p in points]
        memory.plot(iterations, [max(p.peak_bytes, 1e5) / 1e6 for p in points], **look)
        duration.plot(iterations, [p.seconds * 1e3 for p in points], **look)
        exactness.plot([p.seconds * 1e3 for p in points], [p.error for p in points], **look)
    memory.set(xlabel="forward iterations", ylabel="peak memory (MB)", title="Memory")
    duration.set(xlabel="forward iterations", ylabel="milliseconds per gradient", title="Time")
    exactness.set(
        xlabel="milliseconds per gradient", ylabel="relative error of the gradient", title="Error for the time"
    )
    for axes in (memory, duration, exactness):
        axes.set(xscale="log", yscale="log")
        axes.grid(color="#edf2f7")
        axes.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False)
    write_figure(path, figure)


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1], float(sys.argv[2]), sys.argv[3]))))

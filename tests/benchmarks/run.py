"""The benchmarks: python tests/benchmarks/run.py [step|...|all] [--peers-python EXE] [--out DIR]"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bridge
import cases
import equations
import figures
import fit
import gpu
import scale
import startup
import step
import tables
import tune

from implicit_rnn.experiments import cost
from implicit_rnn.runtime import threads

FIGURES = Path(__file__).parents[2] / "python" / "docs" / "figures"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=[*BENCHMARKS, "all"], default="all", help="default: all")
    parser.add_argument(
        "--peers-python", default=sys.executable, metavar="EXE",
        help="the Python that has jax, torch and torchdeq; what it lacks is reported as absent (default: this one)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("build/benchmarks"), help="folder for JSON and figures (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of step (default: %(default)s)")
    parser.add_argument("--case", nargs="+", metavar="NxB", help="only these rows of step, such as 64x256")
    parser.add_argument(
        "--variants", action="store_true", help="step: other sizes, activations, layers and precisions too"
    )
    parser.add_argument(
        "--publish", action="store_true", help="put figures into python/docs/figures and tables into python/docs"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.figures = FIGURES if options.publish else options.out
    if os.getloadavg()[0] > 0.5:
        print(f"the machine is not idle (load {os.getloadavg()[0]:.1f}): times are not to be trusted", file=sys.stderr)
    chosen = list(BENCHMARKS) if "all" in options.what else options.what
    for name in chosen:
        what, run = BENCHMARKS[name]
        print(f"\n--- {name}: {what}", flush=True)
        result = {"machine": machine()} | run(options)
        path = options.out / f"{name}.json"
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)
        if options.publish and name in tables.TABLES:
            tables.publish(name, result)
    return 0


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((text.split(":")[1].strip() for text in lines if text.startswith("model name")), model)
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": threads.setting(),
        "load": os.getloadavg()[0],
    }


def run_step(options: argparse.Namespace) -> dict[str, Any]:
    chosen = [*cases.TABLE, *(cases.VARIANTS if options.variants else ())]
    if options.case:
        chosen = [case for case in chosen if case.name.replace(" x ", "x").split()[0] in options.case]
    print(step.header())
    result = step.run(chosen, options.peers_python, options.rounds)
    for peer, reason in result["absent"].items():
        print(f"{peer} is absent: {reason}")
    figures.step(result, options.figures / "step.png")
    return result


def run_memory(options: argparse.Namespace) -> dict[str, Any]:
    result = cost.run(engine="julia")
    print(cost.table(result))
    cost.draw(result, options.figures / "cost.png")
    return result.as_dict()


def run_scale(options: argparse.Namespace) -> dict[str, Any]:
    result = scale.run()
    figures.scale(result, options.figures / "scale.png")
    return result


def run_datasets(options: argparse.Namespace) -> dict[str, Any]:
    import datasets  # needs scikit-learn, which the others do not

    return datasets.run()


BENCHMARKS: dict[str, tuple[str, Callable[[argparse.Namespace], dict[str, Any]]]] = {
    "step": ("one training gradient, ours and the peers'", run_step),
    "fit": ("training in one call, ours and jitted JAX's", lambda o: fit.run(o.peers_python, o.rounds)),
    "gpu": (
        "gradients and fits on a GPU, ours and the peers'; skipped where there is none",
        lambda o: gpu.run(o.peers_python, o.rounds),
    ),
    "equations": (
        "roots of many samples and their vjp, ours and jitted JAX's",
        lambda o: equations.run(o.peers_python, o.rounds),
    ),
    "memory": ("the implicit gradient against BPTT: time, memory, error (also: implicit-rnn cost)", run_memory),
    "scale": ("one gradient against batch, neurons and layers", run_scale),
    "startup": ("import, start of the engine, first gradient, what is compiled at run time", lambda o: startup.run()),
    "bridge": ("one call of the engine on three small arrays", lambda o: bridge.run()),
    "datasets": ("the scikit-learn estimators without tuning, on ten data sets", run_datasets),
    "tune": ("the numbers of julia/src/cpu/tuning.jl, measured again", lambda o: tune.run()),
}

if __name__ == "__main__":
    sys.exit(main())

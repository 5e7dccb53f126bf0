"""The benchmarks: python tests/benchmarks/run.py [step|...|all] [--peers-python EXE] [--out DIR]"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import cases
import figures
import step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=[*BENCHMARKS, "all"], default="all", help="default: all")
    parser.add_argument(
        "--peers-python", default=sys.executable, metavar="EXE",
        help="the Python that has jax, torch and torchdeq; what it lacks is reported as absent (default: this one)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("build/benchmarks"), help="folder for JSON (default: %(default)s)"
    )
    parser.add_argument("--figures", type=Path, help="folder for figures (default: that of --out)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of step (default: %(default)s)")
    parser.add_argument("--case", nargs="+", metavar="NxB", help="only these rows of step, such as 64x256")
    parser.add_argument(
        "--variants", action="store_true", help="step: other sizes, activations, layers and precisions too"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.figures = options.figures or options.out
    options.figures.mkdir(parents=True, exist_ok=True)
    if os.getloadavg()[0] > 0.5:
        print(f"the machine is not idle (load {os.getloadavg()[0]:.1f}): times are not to be trusted", file=sys.stderr)
    chosen = list(BENCHMARKS) if "all" in options.what else options.what
    for name in chosen:
        print(f"\n--- {name}: {BENCHMARKS[name].__doc__}", flush=True)
        result = {"machine": machine()} | BENCHMARKS[name](options)
        path = options.out / f"{name}.json"
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)
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
        "load": os.getloadavg()[0],
    }


def run_step(options: argparse.Namespace) -> dict[str, Any]:
    """one training gradient, ours and the peers'"""
    chosen = [*cases.TABLE, *(cases.VARIANTS if options.variants else ())]
    if options.case:
        chosen = [case for case in chosen if case.name.replace(" x ", "x").split()[0] in options.case]
    print(step.header())
    result = step.run(chosen, options.peers_python, options.rounds)
    for peer, reason in result["absent"].items():
        print(f"{peer} is absent: {reason}")
    figures.step(result, options.figures / "step.png")
    return result


BENCHMARKS = {"step": run_step}

if __name__ == "__main__":
    sys.exit(main())

"""`implicit-rnn doctor`: the available engines, Julia, project, versions and threads, and what is wrong with them."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import numpy as np

from implicit_rnn.engines import check_engine
from implicit_rnn.errors import EngineError
from implicit_rnn.runtime import environments, start, threads
from implicit_rnn.runtime import gpu as devices

PACKAGES = ("implicit-rnn", "juliacall", "juliapkg", "numpy", "matplotlib", "safetensors")


def diagnose(install: bool = False, gpu: bool = False) -> dict[str, Any]:
    """What is available and what is wrong with it, as plain data; starts Julia if it is installed, or may be.

    "ok" says whether an engine is ready with the current settings; with ``gpu``, also whether the self-test of the device
    passes.
    """
    report: dict[str, Any] = {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "engine setting": os.environ.get("IMPLICIT_RNN_ENGINE") or "auto",
        "numpy engine": f"ready, NumPy {np.__version__}",
    }
    if hint := _depot_hint():
        report["hint"] = hint
    try:
        check_engine(None)
        report["threads setting"] = threads.setting()
        explicit = environments.explicit_environment()
    except (EngineError, ValueError) as error:  # a contradiction, which stops every engine except one chosen by name
        ok = report["engine setting"] == "numpy" and not gpu
        return report | {"julia engine": f"not available: {error}", "ok": ok}
    without_julia = report["engine setting"] != "julia" and not gpu
    try:
        if (environment := explicit or environments.prepared_environment()) is not None:
            report["julia environment"] = {
                "from": environment.source,
                "exe": environment.exe,
                "project": environment.project,
                "needs juliacall": environments.manifest_versions(environment.project).get("PythonCall"),
            }
        environments.find_environment(may_install=install)
        report |= {"julia engine": "ready", "julia": _running_julia(), "gpu": devices.describe()}
        return report | (_self_test() if gpu else {"ok": True})
    except EngineError as error:
        return report | {"julia engine": f"not available: {error}", "ok": without_julia}


def _self_test() -> dict[str, Any]:
    try:
        return devices.self_test()
    except EngineError as error:
        return {"gpu self-test": f"not run: {error}", "ok": False}


def _depot_hint() -> str | None:
    depots = os.environ.get("JULIA_DEPOT_PATH")
    if not depots or depots.endswith(os.pathsep) or os.pathsep * 2 in depots:
        return None
    return (
        f"JULIA_DEPOT_PATH is {depots!r}, without {os.pathsep!r} at its end: Julia then precompiles its own standard libraries "
        "again, into that folder"
    )


def _running_julia() -> dict[str, Any]:
    value = start.evaluate
    return {
        "version": str(value("string(VERSION)")),
        "exe": str(value("joinpath(Sys.BINDIR, Base.julia_exename())")),
        "project": str(value('something(Base.active_project(), "none")')),
        "threads": int(value("Threads.nthreads()")),
        "BLAS": str(
            value(
                "import LinearAlgebra; "
                "join((basename(l.libname) for l in LinearAlgebra.BLAS.get_config().loaded_libs), ' ')"
            )
        ),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe(report: dict[str, Any]) -> str:
    """A diagnosis as text for people."""
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {name:<18} {entry}" for name, entry in value.items()]
        elif key != "ok":
            lines.append(f"{key + ':':<20} {value}")
    return "\n".join(lines)

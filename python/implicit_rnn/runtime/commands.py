"""`implicit-rnn setup` and `implicit-rnn doctor`: prepare a Julia environment, and tell what there is."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

import numpy as np
import platformdirs

from implicit_rnn.errors import EngineError
from implicit_rnn.runtime import embedded, environments, threads
from implicit_rnn.runtime.environments import Environment

PACKAGES = ("implicit-rnn", "juliacall", "juliapkg", "numpy", "matplotlib", "safetensors")


def setup(julia: str | None = None, project: str | None = None, cuda: bool = False) -> Environment:
    """Prepare an environment, precompile everything in it and remember it for this user.

    With ``julia`` and ``project`` an existing Julia and an instantiated project are used as they are, without network;
    otherwise juliapkg installs what is missing into the user's data folder. ``cuda`` adds CUDA.jl. Raises
    ``EngineError``.
    """
    if (julia is None) != (project is None):
        raise EngineError("--julia and --project go together: a Julia executable and a project with the packages")
    if julia is not None and project is not None:
        exe = shutil.which(julia)
        environment = Environment(
            os.path.abspath(exe) if exe else julia, os.path.abspath(project), "--julia and --project"
        )
    else:
        environment = _install()
    if cuda and "CUDA" not in environments.manifest_versions(environment.project):
        _julia(environment, 'import Pkg; Pkg.add("CUDA")', "could not add CUDA.jl")
    environment.check()
    _precompile(environment)
    path = environments.prepared_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"exe": environment.exe, "project": environment.project}, indent=2), encoding="utf-8")
    return environment


def _install() -> Environment:
    project = platformdirs.user_data_path("implicit-rnn") / f"julia-{metadata.version('implicit-rnn')}"
    settings = os.environ | {"PYTHON_JULIAPKG_PROJECT": str(project)}
    environments.resolve_with_juliapkg(settings)
    found = subprocess.run(
        [sys.executable, "-c", "import juliapkg; print(juliapkg.executable())"],
        env=settings,
        capture_output=True,
        text=True,
        check=True,
    )
    return Environment(found.stdout.splitlines()[-1], str(project), "installed by juliapkg")


def _precompile(environment: Environment) -> None:
    # A process like the user's, so that the flags of the cached code are the ones that will be asked for.
    settings = os.environ | {
        "PYTHON_JULIACALL_EXE": environment.exe,
        "PYTHON_JULIACALL_PROJECT": environment.project,
        "IMPLICIT_RNN_ENGINE": "julia",
    }
    code = "from implicit_rnn import cli; raise SystemExit(cli.main(['doctor']))"
    if subprocess.run([sys.executable, "-c", code], env=settings, stdout=sys.stderr).returncode != 0:
        raise EngineError(f"Julia did not start with the project {environment.project}, see the messages above")


def _julia(environment: Environment, code: str, failure: str) -> None:
    command = [environment.exe, f"--project={environment.project}", "--startup-file=no", "-e", code]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        raise EngineError(f"{failure}, see the messages above")


# --- doctor --------------------------------------------------------------------------------------------------


def diagnose() -> dict[str, Any]:
    """What there is and what is wrong with it, as plain data; starts Julia if it can."""
    report: dict[str, Any] = {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "engine setting": os.environ.get("IMPLICIT_RNN_ENGINE", "auto"),
        "numpy engine": f"ready, NumPy {np.__version__}",
    }
    try:
        report["threads setting"] = threads.setting()
        environment = environments.explicit_environment() or environments.prepared_environment()
    except (EngineError, ValueError) as error:
        return report | {"julia engine": f"not available: {error}", "ok": False}
    if environment is not None:
        needed = environments.manifest_versions(environment.project).get("PythonCall")
        report["julia environment"] = {
            "from": environment.source,
            "exe": environment.exe,
            "project": environment.project,
            "needs juliacall": needed,
        }
    try:
        return report | {"julia engine": "ready", "julia": _running_julia(), "ok": True}
    except EngineError as error:
        return report | {"julia engine": f"not available: {error}", "ok": False}


def _running_julia() -> dict[str, Any]:
    value = embedded.evaluate
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
        "GPU": str(value('any(id -> id.name == "CUDA", keys(Base.loaded_modules)) ? "CUDA.jl" : "none"')),
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

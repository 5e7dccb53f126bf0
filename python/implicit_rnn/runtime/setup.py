"""`implicit-rnn setup`: prepare a Julia environment and remember it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata

import platformdirs

from implicit_rnn.errors import EngineError
from implicit_rnn.runtime import environments
from implicit_rnn.runtime.environments import Environment


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

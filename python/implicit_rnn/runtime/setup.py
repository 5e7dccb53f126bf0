"""`implicit-rnn setup`: prepare a Julia environment and remember it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import platformdirs

from implicit_rnn.errors import EngineError
from implicit_rnn.runtime import environments, gpu, install, package_server
from implicit_rnn.runtime.environments import Environment

START = """
import implicit_rnn
try:
    implicit_rnn.get_engine("julia")
except implicit_rnn.EngineError as error:
    print("EngineError:", error, flush=True)  # first in the log, before what led to it
    raise
"""


def setup(julia: str | None = None, project: str | None = None, *, cuda: bool = False) -> Environment:
    """Prepare an environment, precompile everything in it and remember it for this user.

    With ``julia`` and ``project`` an existing Julia and an instantiated project are used as they are, without network, by
    all installations of this package that have none of their own; otherwise juliapkg installs anew, for this installation
    alone, what is missing or damaged, into the user's data folder. With ``cuda``, CUDA.jl is added to the project. Raises
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
    environment.check()
    if cuda:
        gpu.add_cuda(environment)
    _precompile(environment)
    environments.remember(environment)
    return environment


def remove() -> list[str]:
    """Delete what ``setup`` installed for this installation, and its record of a given Julia; returns what was deleted."""
    deleted = []
    for path in (environments.installed_path(), environments.named_path(), install.log_path()):
        if path.is_file():
            path.unlink()
            deleted.append(str(path))
    if _project().is_dir():
        shutil.rmtree(_project())
        deleted.append(str(_project()))
    return deleted


def _project() -> Path:
    return platformdirs.user_data_path("implicit-rnn") / f"julia-{environments.installation()}"


def _install() -> Environment:
    settings = os.environ | {"PYTHON_JULIAPKG_PROJECT": str(_project())}
    if settings.get("PYTHON_JULIAPKG_OFFLINE") != "yes" and not package_server.is_reachable():
        raise EngineError(
            f"the Julia package server {package_server.address()} cannot be reached; without it, use a Julia and a project "
            "that has the packages: implicit-rnn setup --julia EXE --project DIR"
        )
    install.resolve_with_juliapkg(settings, force=True)
    exe = install.julia_of_juliapkg(settings)
    return Environment(exe, str(_project()), "installed by juliapkg", ours=True)


def _precompile(environment: Environment) -> None:
    # A process like the user's, so that the cached code has the flags that will be requested.
    settings = os.environ | {
        "PYTHON_JULIACALL_EXE": environment.exe,
        "PYTHON_JULIACALL_PROJECT": environment.project,
        "IMPLICIT_RNN_ENGINE": "julia",
    }
    if install.run(install.python(START), settings) != 0:
        raise EngineError(f"Julia did not start with the project {environment.project}: {install.cause()}")

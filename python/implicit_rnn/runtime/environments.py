"""Which Julia and which packages: found and checked before anything is started."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import platformdirs

from implicit_rnn.errors import EngineError

JULIA_SOURCES = Path(__file__).parent.parent / "julia"
PACKAGE_SERVER = "https://pkg.julialang.org/registries"
PROBE_SECONDS = 4.0
SETUP_HINT = "run `implicit-rnn setup` where there is a network, or `implicit-rnn setup --julia EXE --project DIR`"


@dataclass(frozen=True)
class Environment:
    """A Julia executable, a project that has the dependencies, and how they were found."""

    exe: str
    project: str
    source: str

    def check(self) -> None:
        """EngineError where this environment cannot work with the installed juliacall."""
        if shutil.which(self.exe) is None:
            raise EngineError(f"the Julia executable {self.exe!r} ({self.source}) does not exist or cannot be run")
        if not Path(self.project).is_dir():
            raise EngineError(f"the Julia project {self.project!r} ({self.source}) is not a folder")
        versions = manifest_versions(self.project)
        missing = [name for name in ("PythonCall", *dependencies()) if name not in versions]
        if missing:
            raise EngineError(
                f"the Julia project {self.project} ({self.source}) lacks {', '.join(missing)}; in Julia, run "
                f'`using Pkg; Pkg.activate("{self.project}"); Pkg.add({json.dumps(missing)})`'
            )
        installed, needed = metadata.version("juliacall"), versions["PythonCall"]
        if needed and installed != needed:
            raise EngineError(
                f"juliacall {installed} is installed but the Julia project {self.project} has PythonCall {needed}; "
                f"they must be the same version: pip install juliacall=={needed}"
            )


def dependencies() -> list[str]:
    """The Julia packages that the shipped sources need, standard libraries left out."""
    text = (JULIA_SOURCES / "Project.toml").read_text(encoding="utf-8")
    section = text.split("[deps]")[1].split("\n[")[0]
    return [name for name in re.findall(r"^(\w+) *=", section, re.MULTILINE) if name != "LinearAlgebra"]


def manifest_versions(project: str | Path) -> dict[str, str | None]:
    """Packages of a Julia project's manifest with their versions; empty where it has none."""
    for name in ("JuliaManifest.toml", "Manifest.toml"):
        path = Path(project) / name
        if path.is_file():
            entries = re.split(r"^\[\[deps\.(\w+)\]\]$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
            found = {}
            for package, body in zip(entries[::2], entries[1::2], strict=True):
                version = re.search(r'^version = "([^"+]*)', body, re.MULTILINE)
                found[package] = version.group(1) if version else None
            return found
    return {}


# --- which environment ---------------------------------------------------------------------------------------


def prepared_path() -> Path:
    """Where `implicit-rnn setup` remembers the environment it prepared."""
    return platformdirs.user_config_path("implicit-rnn") / "environment.json"


def prepared_environment() -> Environment | None:
    """The environment that `implicit-rnn setup` prepared."""
    path = prepared_path()
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        exe, project = data["exe"], data["project"]
        if not isinstance(exe, str) or not isinstance(project, str):
            raise TypeError("exe and project must be strings")
        return Environment(exe, project, f"prepared by implicit-rnn setup, {path}")
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{path} is damaged ({error}); run `implicit-rnn setup` again or delete it") from error


def explicit_environment() -> Environment | None:
    """The environment of PYTHON_JULIACALL_EXE and PYTHON_JULIACALL_PROJECT; EngineError if only one is set."""
    exe, project = os.environ.get("PYTHON_JULIACALL_EXE") or None, os.environ.get("PYTHON_JULIACALL_PROJECT") or None
    if (exe is None) != (project is None):
        given, absent = ("EXE", "PROJECT") if exe else ("PROJECT", "EXE")
        raise EngineError(f"PYTHON_JULIACALL_{given} is set but PYTHON_JULIACALL_{absent} is not; set both, or neither")
    if exe is None or project is None:
        return None
    return Environment(exe, project, "PYTHON_JULIACALL_EXE and PYTHON_JULIACALL_PROJECT")


def find_environment() -> Environment | None:
    """The environment to start; None leaves it to juliapkg, which has resolved one or can install it now.

    In this order: PYTHON_JULIACALL_EXE with PYTHON_JULIACALL_PROJECT, what `implicit-rnn setup` prepared, juliapkg.
    Raises EngineError where none of them can work.
    """
    environment = explicit_environment() or prepared_environment()
    if environment is None:
        _require_juliapkg()
    else:
        environment.check()
    return environment


def _require_juliapkg() -> None:
    import juliapkg

    try:
        if juliapkg.resolve(dry_run=True):
            return
    except Exception as error:
        raise EngineError(f"juliapkg failed: {error}; {SETUP_HINT}") from error
    if os.environ.get("PYTHON_JULIAPKG_OFFLINE") != "yes" and not _network():
        raise EngineError(
            f"no Julia environment is prepared and the Julia package server cannot be reached; {SETUP_HINT}"
        )
    say("installing Julia and its packages (once, some minutes)")
    resolve_with_juliapkg()


def resolve_with_juliapkg(env: dict[str, str] | None = None) -> None:
    """Let juliapkg install what is needed, in a process of its own with its output on stderr."""
    command = [sys.executable, "-c", "import juliapkg; juliapkg.resolve()"]
    if subprocess.run(command, stdout=sys.stderr, env=env).returncode != 0:
        raise EngineError(f"juliapkg could not install Julia and its packages, see the messages above; {SETUP_HINT}")


def _network() -> bool:
    # In a thread of its own: name look-ups have no time-out.
    reached = threading.Event()

    def probe() -> None:
        with contextlib.suppress(OSError, ValueError):
            urllib.request.urlopen(PACKAGE_SERVER, timeout=PROBE_SECONDS).close()
            reached.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return reached.is_set()


def julia_string(text: str) -> str:
    """The text as a literal of Julia."""
    return json.dumps(text, ensure_ascii=False).replace("$", "\\$")


def say(message: str) -> None:
    """A line on stderr about what takes its time."""
    print(f"implicit-rnn: {message}", file=sys.stderr, flush=True)

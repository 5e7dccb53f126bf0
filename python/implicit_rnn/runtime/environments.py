"""The choice of Julia and its packages: found and checked before anything is started."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Container
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import platformdirs

from implicit_rnn.console import say
from implicit_rnn.errors import EngineError
from implicit_rnn.files import write_json
from implicit_rnn.runtime import install
from implicit_rnn.runtime.threads import juliacall_option

JULIA_SOURCES = Path(__file__).parent.parent / "julia"
SETUP_HINT = "run `implicit-rnn setup` where there is a network, or `implicit-rnn setup --julia EXE --project DIR`"


@dataclass(frozen=True)
class Environment:
    """A Julia executable, a project that has the dependencies, and how they were found."""

    exe: str
    project: str
    source: str
    ours: bool = False
    """whether `implicit-rnn setup` installed it, and can bring it up to date"""

    def check(self) -> None:
        """EngineError if this environment cannot work with the installed juliacall."""
        if shutil.which(self.exe) is None:
            raise EngineError(f"the Julia executable {self.exe!r} ({self.source}) does not exist or cannot be run")
        if not os.path.isdir(self.project):
            raise EngineError(f"the Julia project {self.project!r} ({self.source}) is not a folder")
        versions = manifest_versions(self.project)
        missing = _missing(versions)
        again = "run `implicit-rnn setup` again"
        if missing:
            remedy = f'in Julia, run `using Pkg; Pkg.activate("{self.project}"); Pkg.add({json.dumps(missing)})`'
            raise EngineError(
                f"the Julia project {self.project} ({self.source}) lacks {', '.join(missing)}; {again if self.ours else remedy}"
            )
        needed = versions["PythonCall"]
        try:
            installed: str | None = metadata.version("juliacall")
        except metadata.PackageNotFoundError:  # frozen, or in a zip file
            installed = needed
        if needed and installed != needed:
            remedy = f"pip install juliacall=={needed}"
            raise EngineError(
                f"juliacall {installed} is installed but the Julia project {self.project} has PythonCall {needed}; they must "
                f"be the same version: {f'{again}, or ' if self.ours else ''}{remedy}"
            )


def dependencies() -> list[str]:
    """The Julia packages that the shipped sources need, standard libraries left out."""
    text = (JULIA_SOURCES / "Project.toml").read_text(encoding="utf-8")
    section = text.split("[deps]")[1].split("\n[")[0]
    return [name for name in re.findall(r"^(\w+) *=", section, re.MULTILINE) if name not in ("LinearAlgebra", "Random")]


def manifest_versions(project: str | Path) -> dict[str, str | None]:
    """Packages of a Julia project's manifest with their versions; empty where it has none. EngineError if it cannot be read."""
    folder = Path(project)
    # As Julia takes them; of those for one version of Julia each, that of the newest is the likeliest.
    matches = [re.fullmatch(r"(Julia)?Manifest-v(\d+)\.(\d+)\.toml", path.name) for path in folder.glob("*.toml")]
    versioned = sorted((int(m[2]), int(m[3]), bool(m[1]), m[0]) for m in matches if m)
    names = [*(name for *_, name in reversed(versioned)), "JuliaManifest.toml", "Manifest.toml"]
    path = next((folder / name for name in names if os.path.isfile(folder / name)), None)
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise EngineError(f"{path}, the manifest of a Julia project, cannot be read: {error}") from error
    entries = re.split(r"^\[\[deps\.(\w+)\]\]$", text, flags=re.MULTILINE)[1:]
    found = {}
    for package, body in zip(entries[::2], entries[1::2], strict=True):
        version = re.search(r'^version = "([^"+]*)', body, re.MULTILINE)
        found[package] = version.group(1) if version else None
    return found


# --- which environment ---------------------------------------------------------------------------------------


def installation() -> str:
    """A name for this installation of the package; a user may have several, each with its own Julia packages."""
    place = f"{os.path.realpath(sys.prefix)}\n{JULIA_SOURCES.parent.resolve()}"
    return hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def installed_path() -> Path:
    """Where `implicit-rnn setup` remembers the environment that it installed for this installation."""
    return platformdirs.user_config_path("implicit-rnn") / f"environment-{installation()}.json"


def named_path() -> Path:
    """Where `implicit-rnn setup --julia EXE --project DIR` remembers these two for all installations of this user."""
    return platformdirs.user_config_path("implicit-rnn") / "environment.json"


def remember(environment: Environment) -> None:
    """Record an environment, so that it is found from now on.

    One given by the user applies to all installations that have none of their own, and to this one in any case.
    """
    path = installed_path() if environment.ours else named_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    from implicit_rnn import __version__

    record = {"exe": environment.exe, "project": environment.project, "version": __version__}
    write_json(path, record)
    if not environment.ours:
        installed_path().unlink(missing_ok=True)


def prepared_environment() -> Environment | None:
    """The environment that `implicit-rnn setup` installed for this installation, or else the one it was given."""
    for path in (installed_path(), named_path()):
        try:
            if path.is_file():
                return _recorded(path)
        except OSError as error:  # as after a `sudo`
            raise EngineError(f"{path} cannot be read: {error.strerror}; make it yours, or delete it") from error
    return None


def _recorded(path: Path) -> Environment:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        exe, project = data["exe"], data["project"]
        if not isinstance(exe, str) or not isinstance(project, str):
            raise TypeError("exe and project must be strings")
        return Environment(exe, project, f"prepared by implicit-rnn setup, {path}", ours=path == installed_path())
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{path} is damaged ({error}); run `implicit-rnn setup` again or delete it") from error


def explicit_environment() -> Environment | None:
    """The environment of PYTHON_JULIACALL_EXE and PYTHON_JULIACALL_PROJECT, or of -X; EngineError if only one is set."""
    exe, project = (juliacall_option(name) or None for name in ("exe", "project"))
    if (exe is None) != (project is None):
        given, absent = ("EXE", "PROJECT") if exe else ("PROJECT", "EXE")
        raise EngineError(f"PYTHON_JULIACALL_{given} is set but PYTHON_JULIACALL_{absent} is not; set both, or neither")
    if exe is None or project is None:
        return None
    return Environment(exe, project, "PYTHON_JULIACALL_EXE and PYTHON_JULIACALL_PROJECT")


def find_environment(may_install: bool = True) -> Environment | None:
    """The environment to start; None leaves it to juliapkg, which has resolved one or can install it now.

    In this order: PYTHON_JULIACALL_EXE with PYTHON_JULIACALL_PROJECT, what `implicit-rnn setup` prepared, juliapkg.
    Raises EngineError if none of them can work, and if juliapkg would have to install something but not ``may_install``.
    """
    environment = explicit_environment() or prepared_environment()
    if environment is None:
        return _from_juliapkg(may_install)
    environment.check()
    return environment


def _from_juliapkg(may_install: bool) -> Environment | None:
    """None if juliapkg has, or now installs, what is needed; else an earlier installation of it, if that still works."""
    # With it comes Python's OpenSSL, which a process that finds Julia ready is spared.
    from implicit_rnn.runtime import package_server

    project = _juliapkg_project()
    writeable = os.access(_nearest_folder(project), os.W_OK)
    resolved = writeable and _is_resolved()
    if resolved and not _missing(manifest_versions(project)):
        return None
    if not writeable or not (os.environ.get("PYTHON_JULIAPKG_OFFLINE") == "yes" or package_server.is_reachable()):
        if (earlier := _installed_earlier(project)) is not None:
            return earlier
        if not writeable:
            raise EngineError(
                f"juliapkg cannot install Julia packages into {project}, which is read-only; {SETUP_HINT}"
            )
        raise EngineError(
            f"no Julia environment is prepared and the Julia package server cannot be reached; {SETUP_HINT}"
        )
    if not may_install:
        raise EngineError(
            "Julia and its packages are not installed; run `implicit-rnn setup`, or `implicit-rnn doctor --install`"
        )
    say("installing Julia and its packages (once, some minutes)")
    # A resolution that failed leaves a record that says otherwise, and no manifest.
    install.resolve_with_juliapkg(force=resolved)
    return None


def _juliapkg_project() -> str:
    with contextlib.redirect_stdout(sys.stderr):  # as stdout may be read by a program
        try:
            from juliapkg.state import STATE  # juliapkg.project() would install before it returns
        except Exception as error:  # a setting that it does not accept
            raise EngineError(f"juliapkg failed: {error}") from error

    return str(STATE["project"])


def _is_resolved() -> bool:
    """Whether juliapkg considers its project up to date; to decide, it must write a lock to it."""
    with contextlib.redirect_stdout(sys.stderr):
        import juliapkg

        try:
            return bool(juliapkg.resolve(dry_run=True))
        except Exception as error:
            raise EngineError(f"juliapkg failed: {error}; {SETUP_HINT}") from error


def _missing(versions: Container[str]) -> list[str]:
    """The packages that are needed and not among those."""
    return [name for name in ("PythonCall", *dependencies()) if name not in versions]


def _nearest_folder(path: str) -> Path:
    folder = Path(path)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _installed_earlier(project: str) -> Environment | None:
    """The earlier installation in juliapkg's project, for when juliapkg cannot update it; None if it would not work."""
    try:
        record = json.loads((Path(project) / "pyjuliapkg" / "meta.json").read_text(encoding="utf-8"))
        recorded = str(record["executable"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A Julia that juliapkg downloaded lies in its project, and has moved along where that has been moved.
    places = (recorded, str(Path(project) / "pyjuliapkg" / "install" / "bin" / "julia"))
    exe = next(filter(None, map(shutil.which, places)), places[0])
    environment = Environment(exe, project, "installed earlier by juliapkg")
    try:
        environment.check()
    except EngineError:
        return None
    return environment


def julia_string(text: str) -> str:
    """The text as a Julia literal."""
    return json.dumps(text, ensure_ascii=False).replace("$", "\\$")

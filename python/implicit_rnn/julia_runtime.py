"""The start of Julia: which Julia and which packages, checked before anything is started, once per process.

The Julia sources that run are always the ones shipped with this package: they are added to Julia's load path, behind
the environment, which only has to provide their dependencies and PythonCall.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import platformdirs

from implicit_rnn import julia_threads
from implicit_rnn.errors import EngineError
from implicit_rnn.interrupt import Interrupter

EntryPoint = Callable[..., Any]

JULIA_SOURCES = Path(__file__).parent / "julia"
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
    _say("installing Julia and its packages (once, some minutes)")
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


# --- the running Julia ---------------------------------------------------------------------------------------

LOCK = threading.RLock()
"""Held around every entry into Julia: one at a time per process."""

_entry_points: dict[str, EntryPoint] | None = None
_interrupter: Interrupter | None = None
_forked = False


def _after_fork_in_child() -> None:
    global _forked
    module = sys.modules.get("juliacall")
    _forked = module is not None and bool(module.CONFIG.get("inited", False))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def check_not_forked() -> None:
    """EngineError in a process that was forked after Julia started: Julia does not survive a fork."""
    if _forked:
        raise EngineError(
            "this process was forked after Julia had started, and Julia does not survive that; start worker processes "
            'with multiprocessing.get_context("spawn") or "forkserver", or fork before the first use of the Julia engine'
        )


def entry_points() -> dict[str, EntryPoint]:
    """The functions of the Julia side, with Julia started if it was not; EngineError where that fails."""
    global _entry_points, _interrupter
    check_not_forked()
    with LOCK:
        if _entry_points is None:
            points = _start()
            _interrupter = Interrupter(points["interrupt_address"]())
            _entry_points = points
        return _entry_points


def interruptible(point: EntryPoint, arguments: tuple[Any, ...]) -> Any:
    """Call an entry point, which Ctrl-C stops; see ``Interrupter.call``."""
    assert _interrupter is not None
    return _interrupter.call(point, arguments)


def evaluate(code: str) -> Any:
    """The value of a Julia expression, for reports; not for hot paths, it is parsed each time."""
    entry_points()
    import juliacall

    with LOCK:
        return juliacall.Main.seval(code)


def _start() -> dict[str, EntryPoint]:
    if threading.current_thread() is not threading.main_thread():
        # Julia keeps the thread that starts it for good: collections and its exit hang if that one has ended.
        raise EngineError(
            "Julia has to be started by the main thread: call implicit_rnn.get_engine() there before the first use in "
            "another thread"
        )
    module = sys.modules.get("juliacall")
    running = module is not None and module.CONFIG.get("inited", False)
    if not running:
        environment = find_environment()
        if environment is not None:
            os.environ["PYTHON_JULIACALL_EXE"] = environment.exe
            os.environ["PYTHON_JULIACALL_PROJECT"] = environment.project
        os.environ.setdefault("PYTHON_JULIACALL_AUTOLOAD_IPYTHON_EXTENSION", "no")
        with julia_threads.starting():
            _import_juliacall()
    else:
        juliacall = _import_juliacall()
        julia_threads.check_running(juliacall.CONFIG, int(_evaluate("string(Threads.nthreads())")))
    try:
        return _load()
    except EngineError as error:
        where = "the Julia that was already running in this process" if running else "Julia"
        raise EngineError(
            f"{where} could not load ImplicitRNN: {first_line(error)}; `implicit-rnn doctor` tells more", str(error)
        ) from None
    finally:
        _allow_collection_from_other_threads()


def _import_juliacall() -> Any:
    try:
        import juliacall
    except Exception as error:
        raise EngineError(f"Julia did not start: {error}") from error
    return juliacall


def _load() -> dict[str, EntryPoint]:
    sources = str(JULIA_SOURCES.resolve())
    known = 'let id = Base.identify_package("ImplicitRNN"); string(id !== nothing && Base.isprecompiled(id)) end'
    _evaluate(f'(push!(LOAD_PATH, {json.dumps(sources)}); "")')
    if _evaluate(known) != "true":
        _say("precompiling the Julia sources (once)")
    begin = time.perf_counter()
    loaded = _evaluate("string(pkgdir(Base.require(Main, :ImplicitRNN)))")
    if time.perf_counter() - begin > 15:
        _say(f"precompiled in {time.perf_counter() - begin:.0f} s")
    if not os.path.samefile(loaded, sources):
        raise EngineError(
            f"the Julia project has an ImplicitRNN of its own at {loaded}, not the one of this package at {sources}; remove "
            'it from the project (`using Pkg; Pkg.rm("ImplicitRNN")`)'
        )
    extension = "Base.get_extension(Base.require(Main, :ImplicitRNN), :ImplicitRNNPythonCallExt)"
    if _evaluate(f"string({extension})") == "nothing":
        raise EngineError("its PythonCall extension was not loaded with it")
    _evaluate(f'({extension}.hand_over(); "")')
    return {str(name): _handed_over[name] for name in _handed_over}


_handed_over: dict[str, EntryPoint] = {}


def receive(points: dict[str, EntryPoint]) -> None:
    """What the Julia side calls, once, with its entry points."""
    _handed_over.update(points)


def _evaluate(code: str) -> str:
    """The string that a Julia expression gives; EngineError with Julia's message where it throws.

    This asks libjulia itself: what juliacall converts, Julia compiles at the first use, for seconds. The extension comes with
    what its own conversions need.
    """
    api = ctypes.PyDLL(None)
    evaluate, text = api.jl_eval_string, api.jl_string_ptr
    evaluate.argtypes, evaluate.restype = [ctypes.c_char_p], ctypes.c_void_p
    text.argtypes, text.restype = [ctypes.c_void_p], ctypes.c_char_p
    value = evaluate(f'try; "+" * ({code}); catch error; "-" * sprint(showerror, error); end'.encode())
    if not value:
        raise EngineError(f"Julia cannot read {code!r}")
    verdict, answer = text(value)[:1], text(value)[1:].decode()
    if verdict == b"-":
        raise EngineError(answer)
    return answer


def _allow_collection_from_other_threads() -> None:
    """Mark this thread, which Julia knows since its start, as safe for garbage collection while it runs Python.

    Otherwise a collection that starts on another Python thread waits for it forever. Every call into Julia leaves the
    safe region and comes back to it. The functions are exported by libjulia but not documented.
    """
    api = ctypes.PyDLL(None)
    try:
        enter, leave = api.jl_gc_safe_enter, api.jl_gc_safe_leave
    except AttributeError:
        return
    enter.restype, leave.argtypes, leave.restype = ctypes.c_int8, [ctypes.c_int8], None
    atexit.register(leave, enter())  # runs before juliacall's own hook, which was registered earlier


def first_line(error: BaseException) -> str:
    """The message of a Julia error without its backtrace."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _say(message: str) -> None:
    print(f"implicit-rnn: {message}", file=sys.stderr, flush=True)

"""The Julia that runs in this process: its start, once, and the only way to call it.

The Julia sources that run are always the ones shipped with this package: they are added to Julia's load path, after
the environment, which only has to provide their dependencies and PythonCall.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from implicit_rnn.console import say
from implicit_rnn.errors import EngineError
from implicit_rnn.runtime import install, interrupt, sources, threads
from implicit_rnn.runtime.environments import find_environment, julia_string
from implicit_rnn.runtime.interrupt import Interrupter

EntryPoint = Callable[..., Any]

LOCK = threading.RLock()
"""Held around every call of Julia: one at a time per process."""

_entry_points: dict[str, EntryPoint] | None = None
_interrupter: Interrupter | None = None
_fault_handler: threads.FaultHandler | None = None
_forked = False
_ending = False
SECONDS_TO_STOP = 5.0


def _is_running() -> bool:
    """Whether Julia runs in this process, started here or by another package."""
    return bool(getattr(sys.modules.get("juliacall"), "CONFIG", {}).get("inited", False))


def _after_fork_in_child() -> None:
    global _forked
    if _is_running():
        _forked = True
        # What Julia has compiled is not in the child: juliacall's hook would be a crash before what was printed is written.
        sys.modules["juliacall"].CONFIG["lib"].jl_atexit_hook = lambda status: None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def check_not_forked() -> None:
    """EngineError in a process that was forked after Julia started: Julia does not survive a fork."""
    if _forked:
        raise EngineError(
            "this process was forked after Julia had started, and Julia does not survive that; start worker processes "
            'with multiprocessing.get_context("spawn") or "forkserver" (those of a DataLoader of PyTorch with '
            'multiprocessing_context="spawn"), or fork before the first use of the Julia engine'
        )


def entry_points() -> dict[str, EntryPoint]:
    """The functions of the Julia side, with Julia started if necessary; EngineError if that fails."""
    global _entry_points, _interrupter, _fault_handler
    check_not_forked()
    if _entry_points is None:
        with LOCK:
            if _entry_points is None:
                points = _start()
                _interrupter = Interrupter(points["interrupt_address"]())
                _fault_handler = threads.FaultHandler() if os.name == "posix" else None
                _entry_points = points
                atexit.register(_end_calls)  # runs before juliacall's own hook, which was registered earlier
    if _fault_handler is not None:
        _fault_handler.restore()
    return _entry_points


def _end_calls() -> None:
    """Stop the computation of a daemon thread, and let no other thread begin, as Julia is about to end with the process.

    If it cannot be stopped, Julia is left running: ending it would crash the thread.
    """
    global _ending
    assert _interrupter is not None
    if _forked or LOCK.acquire(blocking=False):
        return
    _ending = True
    _interrupter.stop()
    if LOCK.acquire(timeout=SECONDS_TO_STOP):
        _interrupter.settle()
    else:
        sys.modules["juliacall"].CONFIG["lib"].jl_atexit_hook = lambda status: None


def is_stopped() -> bool:
    """Whether the calls of this thread are stopped, as the process ends."""
    return _ending and threading.current_thread() is not threading.main_thread()


def interruptible(point: EntryPoint, arguments: tuple[Any, ...]) -> Any:
    """Call an entry point, which Ctrl-C stops; see ``Interrupter.call``."""
    assert _interrupter is not None
    return _interrupter.call(point, arguments)


def evaluate(code: str) -> Any:
    """The value of a Julia expression, for reports; not for hot paths, since it is parsed each time."""
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
    running = _is_running()
    environment = None if running else find_environment()
    with interrupt.held():
        if running:
            juliacall = _import_juliacall()
            threads.check_running(juliacall.CONFIG, int(_evaluate("string(Threads.nthreads())")))
        else:
            extension = "PYTHON_JULIACALL_AUTOLOAD_IPYTHON_EXTENSION"
            settings = threads.juliacall_settings() | {extension: os.environ.get(extension, "no")}
            if environment is not None:
                settings |= {"PYTHON_JULIACALL_EXE": environment.exe, "PYTHON_JULIACALL_PROJECT": environment.project}
            with _environment_restored(settings), threads.signals_kept():
                _import_juliacall()
        try:
            return _load()
        except EngineError as error:
            where = "the Julia that was already running in this process" if running else "Julia"
            raise EngineError(
                f"{where} could not load ImplicitRNN: {first_line(error)}; `implicit-rnn doctor` shows more", str(error)
            ) from None
        finally:
            _allow_collection_from_other_threads()


@contextlib.contextmanager
def _environment_restored(settings: Mapping[str, str]) -> Iterator[None]:
    """Settings for the Julia of this process, which later child processes don't inherit.

    Nor do they inherit Julia's settings for its own OpenBLAS, which bypass ``os.environ``: NumPy would have one thread in them.
    """
    before = {name: os.environ[name] for name in settings if name in os.environ}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            os.environ.pop(name, None)
        os.environ.update(before)
        for name in ("OPENBLAS_DEFAULT_NUM_THREADS", "OPENBLAS_MAIN_FREE"):
            if name not in os.environ:
                os.unsetenv(name)


def _import_juliacall() -> Any:
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            # Where warnings are errors, as under python -W error, one of juliacall's would end it.
            warnings.filters = [
                ("default" if action == "error" else action, text, category, module, line)
                for action, text, category, module, line in warnings.filters
            ]
            import juliacall
    except Exception as error:
        settings = [name for name in ("JULIA_LOAD_PATH", "JULIA_DEPOT_PATH", "JULIA_BINDIR") if name in os.environ]
        hint = f"; perhaps by what is set in the environment: {', '.join(settings)}" if settings else ""
        why = str(error) or type(error).__name__
        if isinstance(error, subprocess.CalledProcessError):
            why = f"{error.cmd[0]} ended with status {error.returncode}: {install.cause(str(error.stderr))}"
        raise EngineError(f"Julia did not start: {why}{hint}") from error
    if not hasattr(juliacall, "CONFIG"):
        raise EngineError(f"{juliacall.__file__} was imported as juliacall, but is another module; rename it")
    if not hasattr(juliacall, "Main"):  # which it has in a Julia that runs Python, too
        raise EngineError(
            "juliacall did not start Julia, as PYTHON_JULIACALL_INIT or -X juliacall-init forbids it; unset that"
        )
    return juliacall


def _load() -> dict[str, EntryPoint]:
    source = str(sources.locate(_evaluate('join(DEPOT_PATH, "\\n")').splitlines()))
    known = 'let id = Base.identify_package("ImplicitRNN"); string(id !== nothing && Base.isprecompiled(id)) end'
    _evaluate(f'(push!(LOAD_PATH, {julia_string(source)}); "")')
    if _evaluate(known) != "true":
        say("precompiling the Julia sources (once)")
    begin = time.perf_counter()
    with _environment_restored(threads.precompilation_settings()):
        loaded = _evaluate("string(pkgdir(Base.require(Main, :ImplicitRNN)))")
    if time.perf_counter() - begin > 15:
        say(f"precompiled in {time.perf_counter() - begin:.0f} s")
    if not os.path.samefile(loaded, source):
        raise EngineError(
            f"the Julia project has an ImplicitRNN of its own at {loaded}, not the one of this package at {source}; use a "
            "project without it: `implicit-rnn setup`, or `implicit-rnn setup --julia EXE --project DIR`"
        )
    extension = "Base.get_extension(Base.require(Main, :ImplicitRNN), :ImplicitRNNPythonCallExt)"
    if _evaluate(f"string({extension})") == "nothing":
        raise EngineError("its PythonCall extension was not loaded with it")
    _evaluate(f'({extension}.hand_over(); "")')
    return _handed_over


_handed_over: dict[str, EntryPoint] = {}


def receive(points: dict[str, EntryPoint], arguments: list[Any]) -> None:
    """Called by the Julia side, once, with its entry points and the list through which they get their arguments."""
    _handed_over.update({name: _taking(arguments, points[name]) for name in points})


def _taking(list_of_arguments: list[Any], point: EntryPoint) -> EntryPoint:
    def call(*arguments: Any) -> Any:
        list_of_arguments[:] = arguments
        try:
            return point()
        finally:
            list_of_arguments.clear()

    return call


def _evaluate(code: str) -> str:
    """The string value of a Julia expression; EngineError with Julia's message if it throws.

    It is evaluated in Base, since the names in Main are the user's.
    This calls libjulia directly: Julia compiles juliacall's conversions at their first use, which takes seconds. The extension
    has its own conversions precompiled.
    """
    library = sys.modules["juliacall"].CONFIG.get("lib")
    api = library if isinstance(library, ctypes.PyDLL) else ctypes.PyDLL(None)
    evaluate, text = api.jl_eval_string, api.jl_string_ptr
    evaluate.argtypes, evaluate.restype = [ctypes.c_char_p], ctypes.c_void_p
    text.argtypes, text.restype = [ctypes.c_void_p], ctypes.c_char_p
    value = evaluate(
        f'Core.eval(Base, :(try; "+" * ({code}); catch thrown; "-" * sprint(showerror, thrown); end))'.encode()
    )
    if not value:
        raise EngineError(f"Julia cannot read {code!r}")
    sign, answer = text(value)[:1], text(value)[1:].decode()
    if sign == b"-":
        raise EngineError(answer)
    return answer


def _allow_collection_from_other_threads() -> None:
    """Mark this thread, known to Julia since its start, as safe for garbage collection while it runs Python.

    Otherwise a collection that starts on another Python thread waits for it forever. Every call into Julia leaves the
    safe region and returns to it. The functions are exported by libjulia but not documented.
    """
    try:
        api = ctypes.PyDLL(None)
        enter, leave = api.jl_gc_safe_enter, api.jl_gc_safe_leave
    except (AttributeError, TypeError):  # another Julia, or a platform without one name space for all libraries
        return
    enter.restype, leave.argtypes, leave.restype = ctypes.c_int8, [ctypes.c_int8], None
    state = enter()
    atexit.register(lambda: _forked or leave(state))  # runs before juliacall's own hook, which was registered earlier


def first_line(error: BaseException) -> str:
    """The message of a Julia error without its backtrace."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

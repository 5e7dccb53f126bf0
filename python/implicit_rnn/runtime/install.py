"""The installation of Julia and its packages by juliapkg, in separate processes, with a line for each phase and a log."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

import platformdirs

from implicit_rnn.console import say
from implicit_rnn.errors import EngineError

PHASES = (
    (re.compile(r"Downloading|Installing Julia|Installed Julia", re.IGNORECASE), "installing Julia"),
    (re.compile(r"Updating|Resolving|Cloning", re.IGNORECASE), "choosing the versions of the packages"),
    (re.compile(r"^ *Installed "), "downloading the packages"),
    (re.compile(r"Precompiling|precompiled", re.IGNORECASE), "precompiling the packages"),
)
"""The phases of an installation, each with the output lines that announce it."""

TRUST = "name a file of the certificates to trust in SSL_CERT_FILE and JULIA_SSL_CA_ROOTS_PATH, then "
RESOLVE = "import juliapkg; juliapkg.resolve(force={force})"
EXECUTABLE = "import json, juliapkg; print(json.dumps(juliapkg.executable()))"


def log_path() -> Path:
    """Where the output of the last installation is kept."""
    return platformdirs.user_log_path("implicit-rnn") / "install.log"


def resolve_with_juliapkg(env: Mapping[str, str] | None = None, *, force: bool = False) -> None:
    """Let juliapkg install what is needed, afresh if ``force``. Raises ``EngineError`` if it cannot."""
    begin = time.perf_counter()
    if run(python(RESOLVE.format(force=force)), env) != 0:
        why = cause()
        trust = TRUST if re.search(r"\bcert", why, re.IGNORECASE) else ""
        raise EngineError(
            f"juliapkg could not install Julia and its packages: {why} (all of it: {log_path()}); "
            f"{trust}run `implicit-rnn setup` to try again"
        )
    say(f"installed in {time.perf_counter() - begin:.0f} s")


def julia_of_juliapkg(env: Mapping[str, str]) -> str:
    """The Julia executable that juliapkg uses with these settings."""
    done = subprocess.run(python(EXECUTABLE), env=env, capture_output=True, text=True, errors="replace")
    if done.returncode != 0 or not done.stdout.strip():
        said = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        raise EngineError(f"juliapkg does not report which Julia it has installed: {said[0]}")
    return str(json.loads(done.stdout.splitlines()[-1]))


def python(code: str) -> list[str]:
    """The command that runs code in a Python like this one.

    It searches modules where this Python does, and juliapkg searches requirements there, not in the current folder.
    """
    settings = [f"-X{name}" if value is True else f"-X{name}={value}" for name, value in sys._xoptions.items()]
    path = [entry for entry in sys.path if isinstance(entry, str)]
    return [sys.executable, *settings, "-c", f"import sys; sys.path[:] = {path!a}\n{code}"]


def run(command: list[str], env: Mapping[str, str] | None = None) -> int:
    """Run a command to its end, its output in the log and a line for each of its phases on stderr; returns its exit code.

    Its child processes end with it when this process is interrupted or ended. Raises ``EngineError`` if there can be no log.
    """
    begin, phase = time.perf_counter(), -1
    with (
        _open_log() as log,
        subprocess.Popen(
            command,
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
        _exit_when_told_to_end(),
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                now = next((k for k, (pattern, _) in enumerate(PHASES) if pattern.search(line)), phase)
                if now > phase:  # juliapkg and Pkg repeat earlier phases, which are not reported again
                    phase = now
                    say(f"{PHASES[phase][1]} ({time.perf_counter() - begin:.0f} s, log in {log_path()})")
            return process.wait()
        except BaseException:
            _end(process)
            raise


@contextlib.contextmanager
def _exit_when_told_to_end() -> Iterator[None]:
    """SIGTERM and SIGHUP, which would end this process alone, raise SystemExit; the user's handlers are kept."""
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _open_log() -> TextIO:
    try:
        log_path().parent.mkdir(parents=True, exist_ok=True)
        return log_path().open("w", encoding="utf-8")
    except OSError as error:
        raise EngineError(f"the log of the installation, {log_path()}, cannot be written: {error.strerror}") from error


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and all its children."""
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, number)
            else:
                process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


def cause(output: str | None = None) -> str:
    """The cause of a failure from the output or the last log: its first error, with any list that follows, or its last line."""
    output = log_path().read_text(encoding="utf-8") if output is None else output
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # The exception in a Julia warning, which begins with its own message.
    lines = [line.removeprefix("│   exception = ") for line in lines]
    errors = [line for line in lines if re.match(r"(ERROR|.*Error|Exception)\b.*:", line)]
    if not errors:
        return (lines or ["it printed nothing"])[-1]
    entries = itertools.takewhile(lambda line: line.startswith("- "), lines[lines.index(errors[0]) + 1 :])
    return " ".join([errors[0], *entries])

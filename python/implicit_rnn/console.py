"""Output for people, in terminals and notebooks: progress bars, tables, and streams that accept any text."""

from __future__ import annotations

import codecs
import contextlib
import html
import io
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

# --- messages ------------------------------------------------------------------------------------------------


def say(message: str) -> None:
    """Print a line on stderr; errors of a missing or full stream are ignored."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"implicit-rnn: {message}", file=sys.stderr, flush=True)


# --- progress ------------------------------------------------------------------------------------------------


def progress_bar(shown: bool | None = None, **settings: Any) -> AbstractContextManager[tqdm[Any] | None]:
    """A tqdm bar on stderr or in a notebook, by default there and on a terminal; where none is shown, ``None``.

    Hidden bars of tqdm have its thread and its ``__del__``, in which Python ignores Ctrl-C.
    """
    if _in_notebook():
        return _notebook_bar_type()(**settings) if shown is not False else contextlib.nullcontext()
    if getattr(sys.stderr, "closed", sys.stderr is None) or not _are_flushed(sys.stdout, sys.stderr):
        return contextlib.nullcontext()
    if shown or (shown is None and getattr(sys.stderr, "isatty", bool)()):
        from tqdm import tqdm

        return tqdm(file=_Screen(sys.stderr), **settings)
    return contextlib.nullcontext()


class _Screen:
    """A stream for a progress bar, which raises no error where the disk is full or the pipe is closed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:  # by which ``tqdm.write`` knows a bar that is in its way
        return bool(self._stream == other)

    __hash__ = None  # type: ignore[assignment]

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def _are_flushed(*streams: Any) -> bool:
    """Whether the streams can be flushed, which tqdm does first."""
    try:
        for stream in streams:
            getattr(stream, "flush", lambda: None)()
    except (OSError, ValueError):
        return False
    return True


def _notebook_bar_type() -> type[tqdm[Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ipywidgets is missing, without which the bar is plain text
        from tqdm.auto import tqdm

    return tqdm


def _in_notebook() -> bool:
    """Whether a kernel of Jupyter runs this."""
    with contextlib.suppress(KeyError, AttributeError):
        return "IPKernelApp" in sys.modules["IPython"].get_ipython().config
    return False


# --- notebooks -----------------------------------------------------------------------------------------------


def html_table(title: str, rows: Mapping[str, str]) -> str:
    """A small table with a title, as HTML; texts are escaped."""
    cells = "".join(
        f'<tr><th style="text-align: left">{html.escape(name)}</th>'
        f'<td style="text-align: left">{html.escape(text)}</td></tr>'
        for name, text in rows.items()
    )
    return f"<table><caption>{html.escape(title)}</caption><tbody>{cells}</tbody></table>"


# --- the streams of the command ------------------------------------------------------------------------------

PLAIN = {"±": "+/-", "×": "x", "·": "*", "µ": "u", "–": "-", "→": "->", "≤": "<=", "≥": ">=", "⁻": "^-"}
"""How characters are written where the encoding of a stream lacks them; others lose their accents or become ``?``."""


def prepare_streams() -> None:
    """Make stdout and stderr accept any text, even where they do not exist (``pythonw``, ``>&-``)."""
    codecs.register_error("implicit-rnn", _in_plain_characters)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for the life of the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="implicit-rnn")


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    if character in PLAIN:
        return PLAIN[character]
    raised = "^" if unicodedata.decomposition(character).startswith("<super>") else ""
    return raised + unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"


def abandon_unwritten_output() -> None:
    """If a stream can no longer be written to (a full disk, a closed pipe), spare Python the attempt at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print warnings like the command's messages, without the line of Python that caused them."""

    def show(message: Warning | str, *where: object, **more: object) -> None:
        say(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield

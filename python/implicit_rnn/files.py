"""Atomic writing of files, and reading of files with tensors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUIET_SECONDS = 600
"""How long a temporary file is left alone: it may still be being written to a slow disk."""


def as_path(path: object, name: str = "path") -> Path:
    """The path that a string or an ``os.PathLike`` names; ``TypeError`` for anything else, ``ValueError`` for an invalid name.

    ``name`` is that of the argument.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"{name} is {path!r}; expected a file name, as a string or a pathlib.Path")
    with contextlib.suppress(UnicodeEncodeError):  # an unpaired surrogate
        if os.fsencode(path) and "\0" not in os.fspath(path):
            return Path(path)
    raise ValueError(f"{name} is {path!r}; expected a file name, as a string or a pathlib.Path")


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file in the folder of ``path``, and rename it to ``path`` once it is on the disk.

    If anything fails, ``path`` keeps its contents; otherwise it holds all of ``data``. A file that is replaced keeps its
    permissions. For a symbolic link the target is written; a device or a pipe is written directly. Raises ``OSError``
    that names ``path``.
    """
    _check_working_folder(path)
    if not path.parent.is_dir():
        reason = f"{os.strerror(errno.ENOENT)}: {path.parent}, the folder of {path.name}; make it first"
        raise FileNotFoundError(errno.ENOENT, reason)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder; expected the name of a file")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            _replace(Path(os.path.realpath(path)) if path.is_symlink() else path, data)
    except OSError as error:  # which names the temporary file, or none
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            if path.exists():  # keep its permissions, set before there is anything to read
                temporary.chmod(path.stat().st_mode & 0o777)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON to be read, as ``write_atomically``."""
    write_atomically(path, json.dumps(data, indent=2).encode())


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure of Matplotlib as PNG, as ``write_atomically``."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_atomically(path, image.getvalue())


def prepare_folder(folder: Path, names: Iterable[str] = ()) -> None:
    """Make the folder, and check before the work begins that files of these names can be written to it.

    Raises ``OSError`` that names the folder as it was given.
    """
    try:
        _check_working_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for path in (folder / name for name in names):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, f"its {path.name} is a folder")
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, f"its {path.name} may not be written")
    except FileExistsError as error:
        raise FileExistsError(error.errno, f"no results can be written to {folder}: it is not a folder") from error
    except OSError as error:
        raise type(error)(error.errno, f"no results can be written to {folder}: {error.strerror}") from error


@contextlib.contextmanager
def prepared_folder(folder: Path, names: Iterable[str] = ()) -> Iterator[None]:
    """Like ``prepare_folder``; folders it has made are removed again if nothing was written to them."""
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        prepare_folder(folder, names)
        yield
    finally:
        with contextlib.suppress(OSError):  # one that is not empty, and those above it
            for path in made:
                path.rmdir()


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of processes that were killed while writing ``path``, but not of one that is writing now."""
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    for leftover in path.parent.glob(f"{_prefix(path)}*.tmp"):
        with contextlib.suppress(OSError):  # another process was faster, or has it open
            if time.time() - leftover.stat().st_mtime > QUIET_SECONDS:
                leftover.unlink()


def read_tensors(path: Path, error: type[ValueError]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; raises ``error`` if it is invalid or truncated."""
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, file.metadata() or {}
    except (SafetensorError, TypeError, ValueError, KeyError, OverflowError, UnicodeError, AttributeError) as reason:
        raise error(
            f"{path} is not a valid safetensors file (truncated?), or has dtypes that NumPy lacks: {reason}"
        ) from reason


def _check_working_folder(path: Path) -> None:
    if not path.is_absolute():
        try:
            os.getcwd()
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "the working folder has been deleted") from error


def _prefix(path: Path) -> str:
    name = os.fsencode(path.name)
    return f".{path.name if len(name) < 200 else hashlib.sha256(name).hexdigest()}."


def _sync_folder(folder: Path) -> None:
    # The new name is on the disk only once its folder is, which not every system can open.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

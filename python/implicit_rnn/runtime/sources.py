"""The Julia sources that run: those shipped with this package, at a location that all installations share.

Compiled Julia code is valid for sources at one location. Beside Julia's own packages, under a name made from their content,
they are compiled once for each depot and version, not once for each virtual environment. Julia's ``Pkg.gc()`` deletes
the copies along with other packages that no project uses; needed ones are then copied again, and their compiled code is still
valid.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from implicit_rnn.runtime.environments import JULIA_SOURCES

MODIFIED = 315532800.0
"""The modification time of every copy (1980): Julia 1.10 compares the times of the files, not their content."""


def locate(depots: Iterable[str]) -> Path:
    """The location of the sources that Julia is to load: in one of the depots, copied to the first one if necessary.

    A checkout uses its own tree, and so does an installation whose copy cannot be written or read, or has been changed.
    """
    shipped = JULIA_SOURCES.resolve()
    if JULIA_SOURCES.is_symlink():
        return shipped
    name = _digest(shipped)
    places = [Path(depot) / "packages" / "ImplicitRNN" / name for depot in depots]
    if places and not any(map(os.path.isdir, places)):
        with contextlib.suppress(OSError):
            _copy(shipped, places[0])
    return next((place for place in places if _holds(place, name)), shipped)


def _holds(place: Path, name: str) -> bool:
    """Whether the copy at a location exists, is readable, and has the content that its name states."""
    try:
        return os.path.isdir(place) and _digest(place) == name
    except OSError:
        return False


def _files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _digest(folder: Path) -> str:
    content = hashlib.sha256()
    for path in _files(folder):
        content.update(f"{path.as_posix()}\0".encode() + hashlib.sha256((folder / path).read_bytes()).digest())
    return content.hexdigest()[:12]


def _copy(source: Path, target: Path) -> None:
    """Copy a folder atomically; if another process does the same, the second fails with an OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        copy = Path(temporary) / target.name
        for path in _files(source):
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, copy / path)
            os.utime(copy / path, (MODIFIED, MODIFIED))
        copy.rename(target)

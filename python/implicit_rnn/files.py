"""Files that appear whole or not at all, and the reading of those that hold tensors."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file in the folder of ``path``, and give it that name once it is on the disk.

    Whatever happens on the way, ``path`` holds what it held before or all of ``data``. Raises ``OSError``.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what a process that was killed while it wrote ``path`` has left behind."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def read_tensors(path: Path, error: type[ValueError]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; ``error`` where it is none, or a truncated one."""
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, file.metadata() or {}
    except SafetensorError as reason:
        raise error(f"{path} is no safetensors file, or a truncated one: {reason}") from reason


def _sync_folder(folder: Path) -> None:
    # The new name is on the disk only with its folder, which not every system can open.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

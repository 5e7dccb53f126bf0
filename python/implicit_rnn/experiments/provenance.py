"""What the numbers of an experiment come from."""

from __future__ import annotations

import platform
from importlib import metadata

import numpy as np


def versions() -> dict[str, str]:
    """The versions of what computes, and the kind of machine."""
    return {
        "implicit-rnn": metadata.version("implicit-rnn"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }

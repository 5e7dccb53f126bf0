"""What the numbers of an experiment come from."""

from __future__ import annotations

import platform

import numpy as np

import implicit_rnn


def versions() -> dict[str, str]:
    """The versions of what computes, and the kind of machine."""
    return {
        "implicit-rnn": implicit_rnn.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }

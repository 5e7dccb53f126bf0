"""The provenance of the numbers of an experiment."""

from __future__ import annotations

import platform

import numpy as np

import implicit_rnn


def versions() -> dict[str, str]:
    """The versions of the software, and the kind of machine."""
    return {
        "implicit-rnn": implicit_rnn.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }

"""The engines and the choice between them."""

from __future__ import annotations

import os
import threading

from implicit_rnn.engines.base import DEVICES, Engine
from implicit_rnn.engines.numpy import NumpyEngine
from implicit_rnn.errors import EngineError, EngineWarning, warn
from implicit_rnn.options import check_choice

ENGINES = ("auto", "julia", "numpy")

_lock = threading.Lock()
_engines: dict[str, Engine] = {}


def get_engine(name: str | None = None) -> Engine:
    """The engine of that name, started at its first use.

    Networks and equations do this themselves; call it to choose the moment, or to find out which engine is available.

    Parameters
    ----------
    name
        "julia", "numpy", or "auto": the Julia engine, or the NumPy engine with one ``EngineWarning`` that says why the
        Julia engine is not available. ``None`` reads IMPLICIT_RNN_ENGINE, else means "auto".

    Raises
    ------
    ValueError
        For an unknown name.
    EngineError
        If "julia" was requested and is not available, or if the environment's settings contradict each other.

    Examples
    --------
    >>> irnn.get_engine("numpy").name
    'numpy'
    """
    chosen = check_engine(name)
    with _lock:
        if chosen not in _engines:
            _engines[chosen] = _make(chosen)
        return _engines[chosen]


def check_engine(name: str | None) -> str:
    """The name of an engine, checked; ``None`` stands for IMPLICIT_RNN_ENGINE, else "auto"."""
    chosen = (os.environ.get("IMPLICIT_RNN_ENGINE") or "auto") if name is None else name
    check_choice("IMPLICIT_RNN_ENGINE" if name is None else "engine", chosen, ENGINES)
    return chosen


def check_device(name: str) -> None:
    """``ValueError`` unless ``name`` is the name of a device."""
    if not isinstance(name, str) or name not in DEVICES:
        raise ValueError(f"device is {name!r}; expected one of 'cpu', 'cuda', which is an NVIDIA card")


def _make(name: str) -> Engine:
    if name == "numpy":
        return _engines.get("numpy") or NumpyEngine()
    from implicit_rnn.engines.julia import JuliaEngine
    from implicit_rnn.runtime import environments, threads

    if name == "julia":
        return _engines.get("julia") or JuliaEngine()
    # A contradiction or a bad value is an error, not a reason to fall back.
    environments.explicit_environment()
    threads.setting()
    try:
        return _engines.setdefault("julia", JuliaEngine())
    except EngineError as error:
        warn(
            f"using the NumPy engine, which is slower: {error}. Silence this with IMPLICIT_RNN_ENGINE=numpy",
            EngineWarning,
        )
        return _engines.setdefault("numpy", NumpyEngine())

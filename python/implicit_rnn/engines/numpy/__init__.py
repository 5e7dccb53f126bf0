"""The NumPy engine: the reference for every result, and the fallback where Julia is not available.

Arrays have a leading axis of nets, so that many small nets are trained together: parameters P (S, P), states (S, B, N).
A single net is S = 1. The formulas are those of the Julia engine.

- ``network``: the passes of a network; ``weights`` unpacks its parameters, ``solvers`` finds equilibria, ``systems`` solves
  the linear systems of adjoints and tangents, ``unrolled`` takes steps instead of finding an equilibrium
- ``equations``: equations of Python functions; ``single`` solves one problem of few unknowns, ``fixed_points`` and ``roots``
  many; ``sizes`` defines the norms they use
- ``functions``: derivatives of a Python function, by hooks or by ``differences`` of its ``values``; ``sparsity`` finds which
  unknowns are coupled, ``operators`` replace Jacobians that are too large
"""

from __future__ import annotations

from implicit_rnn.engines.base import Equation
from implicit_rnn.engines.numpy.equations import PythonEquation
from implicit_rnn.engines.numpy.network import NumpyNetwork
from implicit_rnn.errors import EngineError
from implicit_rnn.model.topology import Topology

__all__ = ["NumpyEngine"]


class NumpyEngine:
    """See ``engines.base.Engine``."""

    name = "numpy"

    def compile(self, topology: Topology, dtype: str, device: str = "cpu") -> NumpyNetwork:
        if device != "cpu":
            raise EngineError(f"the NumPy engine computes on the CPU only; device={device!r} needs the Julia engine")
        return NumpyNetwork(topology, dtype)

    def compile_equation(self, equation: Equation) -> PythonEquation:
        return PythonEquation(equation)

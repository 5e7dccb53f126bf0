"""The Julia engine: passes NumPy arrays to ImplicitRNN.jl without a copy."""

from __future__ import annotations

from implicit_rnn.engines.base import Equation
from implicit_rnn.engines.julia.equations import JuliaEquation
from implicit_rnn.engines.julia.network import JuliaNetwork
from implicit_rnn.model.topology import Topology
from implicit_rnn.runtime import start

__all__ = ["JuliaEngine"]


class JuliaEngine:
    """See ``engines.base.Engine``. Creating it starts Julia; raises EngineError where that is not possible."""

    name = "julia"

    def __init__(self) -> None:
        start.entry_points()

    def compile(self, topology: Topology, dtype: str, device: str = "cpu") -> JuliaNetwork:
        return JuliaNetwork(topology, dtype, device)

    def compile_equation(self, equation: Equation) -> JuliaEquation:
        return JuliaEquation(equation)

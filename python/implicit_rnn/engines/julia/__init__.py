"""The Julia engine: hands NumPy arrays to ImplicitRNN.jl as they lie in memory."""

from implicit_rnn.engines.julia.network import JuliaEngine

__all__ = ["JuliaEngine"]

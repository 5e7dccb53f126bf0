"""The NumPy engine: the reference every result is checked against, and what runs where no Julia can be had.

Arrays have a leading axis of nets, so that many small nets are trained in one go: parameters P (S, P), states (S, B, N).
A single net is S = 1. The formulas are those of the Julia engine.
"""

from implicit_rnn.engines.numpy.network import NumpyEngine

__all__ = ["NumpyEngine"]

"""Fixed points and roots of any function, with derivatives by the implicit function theorem.

The function is Julia code given as text, which is compiled and runs at full speed for millions of samples, or a Python
function on NumPy arrays, which needs no Julia. ``functions`` tells what arguments it takes, ``posing`` checks what it is given,
``solving`` has the calls, ``solution`` what they return.
"""

from implicit_rnn.engines.base import JuliaFunction
from implicit_rnn.equations.functions import Function, julia
from implicit_rnn.equations.solution import ImplicitSolution
from implicit_rnn.equations.solving import fixed_point, root

__all__ = ["Function", "ImplicitSolution", "JuliaFunction", "fixed_point", "julia", "root"]

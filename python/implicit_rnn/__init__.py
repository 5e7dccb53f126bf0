"""Implicit recurrent networks: stationary inputs, lateral and feedback connections, exact equilibria and gradients.

The output of a network is the equilibrium of ``z = f(W x + R z + b)``; its gradient comes from the implicit function
theorem (S. Sanokowski, arXiv 2010.10564). The computations run in a Julia engine, or in a NumPy engine where Julia is
not available. Importing this module starts nothing.
"""

from importlib import metadata

from implicit_rnn.engines import get_engine
from implicit_rnn.equations import ImplicitSolution, fixed_point, julia, root
from implicit_rnn.errors import (
    CheckpointError,
    ConvergenceError,
    ConvergenceWarning,
    EngineError,
    EngineWarning,
    ModelFileError,
)
from implicit_rnn.model.constraints import Free, InfNorm, Monotone, Perron, Spectral
from implicit_rnn.model.guard import Guard
from implicit_rnn.model.losses import MAE, MSE, BinaryCrossEntropy, CrossEntropy, CustomLoss, Huber
from implicit_rnn.model.optimizers import LBFGS, SGD, Adam, AdamW, Momentum, Nesterov, RMSProp
from implicit_rnn.model.topology import Layer
from implicit_rnn.network import Network
from implicit_rnn.serialization import load
from implicit_rnn.solution import GradientReport, Solution, Status
from implicit_rnn.solvers import Anderson, Auto, Chord, Implicit, JacobianFree, Newton, NLsolve, Picard, Unrolled
from implicit_rnn.training import (
    Checkpoint,
    Constant,
    Cosine,
    EarlyStopping,
    OneCycle,
    Progress,
    Run,
    Step,
    StopTraining,
    WarmUp,
    fit_many,
)

try:
    __version__ = metadata.version("implicit-rnn")
except metadata.PackageNotFoundError:  # frozen, or in a zip file
    __version__ = "unknown"

__all__ = [
    "LBFGS",
    "MAE",
    "MSE",
    "SGD",
    "Adam",
    "AdamW",
    "Anderson",
    "Auto",
    "BinaryCrossEntropy",
    "Checkpoint",
    "CheckpointError",
    "Chord",
    "Constant",
    "ConvergenceError",
    "ConvergenceWarning",
    "Cosine",
    "CrossEntropy",
    "CustomLoss",
    "EarlyStopping",
    "EngineError",
    "EngineWarning",
    "Free",
    "GradientReport",
    "Guard",
    "Huber",
    "Implicit",
    "ImplicitSolution",
    "InfNorm",
    "JacobianFree",
    "Layer",
    "ModelFileError",
    "Momentum",
    "Monotone",
    "NLsolve",
    "Nesterov",
    "Network",
    "Newton",
    "OneCycle",
    "Perron",
    "Picard",
    "Progress",
    "RMSProp",
    "Run",
    "Solution",
    "Spectral",
    "Status",
    "Step",
    "StopTraining",
    "Unrolled",
    "WarmUp",
    "__version__",
    "fit_many",
    "fixed_point",
    "get_engine",
    "julia",
    "load",
    "root",
]

"""A trained network with the scaling it was trained in: angles in rad go in, length in m and damping in 1/s come out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from implicit_rnn import options, serialization
from implicit_rnn.errors import ModelFileError
from implicit_rnn.experiments.pendulum.data import Normalisation
from implicit_rnn.experiments.pendulum.models import SOLVER
from implicit_rnn.experiments.pendulum.simulation import TIMES
from implicit_rnn.network import Network
from implicit_rnn.solution import Solution
from implicit_rnn.solvers import Solver

Array = np.ndarray

NOTE = "pendulum"
"""Under which a model file has the scaling."""


@dataclass(frozen=True)
class Reader:
    """Reads the parameters of pendulums from their angles."""

    net: Network
    scaling: Normalisation
    solver: Solver = SOLVER

    def solve(self, measured: Array) -> tuple[Array, Solution]:
        """Length and damping (B, 2) for the angles (B, 32) at ``TIMES``, and the equilibria they come from."""
        solution = self.net.equilibrium(self.scaling.inputs(measured), solver=self.solver, on_failure="ignore")
        return self.scaling.parameters(self.net.read_out(solution.state)), solution

    def predict(self, measured: Array) -> Array:
        """Length and damping (B, 2) for the angles (B, 32) at ``TIMES``; ``ConvergenceError`` if there is no equilibrium."""
        return self.scaling.parameters(self.net.predict(self.scaling.inputs(measured), solver=self.solver))

    def save(self, path: str | Path) -> None:
        """Write the network and the scaling to one safetensors file."""
        note = {
            "scaling": self.scaling.as_dict(),
            "solver": options.describe(self.solver),
        }
        serialization.save(self.net, path, {NOTE: json.dumps(note)})

    @classmethod
    def load(cls, path: str | Path, engine: str | None = None) -> Reader:
        """The inverse of ``save``; ``FileNotFoundError``, and ``ModelFileError`` for any other file."""
        net = serialization.load(path, engine)
        try:
            note = json.loads(serialization.notes(path)[NOTE])
            scaling = Normalisation.from_dict(note["scaling"])
            solver = options.from_description(Solver, note["solver"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{path} is a network, but not one that the pendulum experiment has saved") from error
        if (net.topology.inputs, net.topology.output_size, scaling.input_mean.shape) != (len(TIMES), 2, TIMES.shape):
            raise ModelFileError(f"{path} does not read {len(TIMES)} angles to 2 parameters")
        shapes = {"input_mean": TIMES.shape, "input_scale": (), "target_mean": (2,), "target_scale": (2,)}
        for name, shape in shapes.items():
            array, least = np.asarray(getattr(scaling, name)), 0 if name.endswith("scale") else -np.inf
            if array.shape != shape or not (np.isfinite(array) & (array > least)).all():
                above = " above 0" if least == 0 else ""
                raise ModelFileError(
                    f"{path} has {name} of shape {array.shape} with entries {array.tolist()}; expected finite numbers{above} "
                    f"of shape {shape}: save the model again"
                )
        return cls(net, scaling, solver)

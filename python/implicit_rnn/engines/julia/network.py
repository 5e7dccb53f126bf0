"""Networks on the Julia engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from implicit_rnn.engines.base import WORST_ADJOINT, Of, Problem, Quality, Replicas, Samples, Trainer, TrainerOptions
from implicit_rnn.engines.julia.calls import Handle, call
from implicit_rnn.engines.steps import StepTrainer
from implicit_rnn.errors import EngineError
from implicit_rnn.model.losses import MSE, CustomLoss
from implicit_rnn.model.optimizers import GradientDescent
from implicit_rnn.model.topology import Topology
from implicit_rnn.options import Option, describe, is_of_package
from implicit_rnn.solution import CONVERGED, GradientReport, Solution

Array = np.ndarray


class JuliaNetwork:
    """See ``engines.base.CompiledNetwork``."""

    def __init__(self, topology: Topology, dtype: str, device: str) -> None:
        refuse_others("constraint", topology.constraint, ", or engine='numpy'")
        self.topology, self.dtype = topology, dtype
        number, parameters = call("compile", _describe(topology, dtype, device))
        self._handle = Handle(number)
        if parameters != topology.parameters:
            raise EngineError(
                f"the Julia side counts {parameters} parameters, Python {topology.parameters}; the package is damaged"
            )

    def program(self, problem: Problem) -> JuliaProgram:
        refuse_others("solver", problem.solver)
        refuse_others("adjoint", problem.adjoint)
        if not isinstance(problem.loss, CustomLoss):
            refuse_others("loss", problem.loss, " or CustomLoss, or engine='numpy'")
        return JuliaProgram(self, Handle(call("program", self._handle.number, _options(problem))), problem)


class JuliaProgram:
    """See ``engines.base.Program``."""

    def __init__(self, network: JuliaNetwork, handle: Handle, problem: Problem) -> None:
        self._network, self._handle, self._problem = network, handle, problem

    def solve(self, p: Array, X: Array, z0: Array | None, out: Solution) -> None:
        arrays = (out.state.reshape(-1), out.status, out.iterations, out.residual, out.rate, out.bound)
        call("solve", self._handle.number, p, X.reshape(-1), None if z0 is None else z0.reshape(-1), arrays)

    def read_out(self, p: Array, state: Array, out: Array) -> None:
        call("read_out", self._handle.number, (p, state.reshape(-1), out.reshape(-1)))

    def gradient(
        self, p: Array, samples: Samples, g: Array, probe: int, report: GradientReport | None = None
    ) -> tuple[float, Quality]:
        if isinstance(self._problem.loss, CustomLoss):
            return self._gradient_of_python_loss(p, samples, g, probe, report, None)
        arrays = (p, *_flat(samples), g, *_per_sample(report))
        loss, *quality = call("gradient", self._handle.number, arrays, probe)
        return loss, Quality(*quality)

    def _gradient_of_python_loss(
        self, p: Array, samples: Samples, g: Array, probe: int, report: GradientReport | None, states: Array | None
    ) -> tuple[float, Quality]:
        """Forward in Julia, the loss in Python, and back in Julia from the equilibria found.

        ``states`` (B, N) are initial guesses and become the equilibria, see ``engines.steps``.
        """
        topology, X = self._network.topology, samples.X
        found = Solution.empty(len(X), topology.neurons, X.dtype)
        self.solve(p, X, states, found)
        if states is not None:
            states[...] = np.where(found.converged[:, None], found.state, 0)
        Y = topology.read_out(p, found.state)
        loss, V = self._problem.loss.value_and_gradient(Y, samples.Y, samples.weights)
        back = GradientReport.empty(len(X)) if report is None else report
        start = found.state if self._problem.adjoint.needs_equilibrium else None
        penalty, _ = self._vjp(p, X, start, V, "outputs", g, np.empty_like(X), back, probe)
        # A sample that has not converged continues in the second solve, while the loss is that of the first.
        unsolved = found.status != CONVERGED
        back.status[unsolved], back.residual[unsolved] = found.status[unsolved], found.residual[unsolved]
        failed = (back.status != CONVERGED) | ~(back.adjoint_residual < WORST_ADJOINT)
        unconverged = int(failed.sum()) if self._problem.adjoint.needs_equilibrium else 0
        return float(loss) + penalty, Quality(
            unconverged, float(back.residual.max()), float(back.adjoint_residual.max())
        )

    def vjp(
        self,
        p: Array,
        X: Array,
        z0: Array | None,
        V: Array,
        of: Of,
        g: Array,
        dX: Array,
        report: GradientReport | None = None,
    ) -> Quality:
        return self._vjp(p, X, z0, V, of, g, dX, report, 0)[1]

    def _vjp(
        self,
        p: Array,
        X: Array,
        z0: Array | None,
        V: Array,
        of: Of,
        g: Array,
        dX: Array,
        report: GradientReport | None,
        probe: int,
    ) -> tuple[float, Quality]:
        """The Jacobian penalty of the problem, which is part of the gradient, and the quality of the solves."""
        arrays = (p, X.reshape(-1), _start(z0, X), V.reshape(-1), g, dX.reshape(-1), *_per_sample(report))
        penalty, *quality = call("vjp", self._handle.number, arrays, of == "state", probe)
        return penalty, Quality(*quality)

    def jvp(
        self,
        p: Array,
        X: Array,
        z0: Array | None,
        dp: Array,
        dX: Array,
        of: Of,
        out: Array,
        report: GradientReport | None = None,
    ) -> Quality:
        arrays = (p, X.reshape(-1), _start(z0, X), dp, dX.reshape(-1), out.reshape(-1), *_per_sample(report))
        return Quality(*call("jvp", self._handle.number, arrays, of == "state"))

    def hessian_vector_product(self, p: Array, samples: Samples, v: Array, h: Array) -> None:
        if isinstance(self._problem.loss, CustomLoss):
            raise EngineError(
                f"{self._problem.loss} has no second derivatives, which the Hessian needs; use a loss of the package"
            )
        call("hessian_vector_product", self._handle.number, (p, *_flat(samples), v, h))

    def spectral_radius(self, p: Array, X: Array, state: Array, out: Array) -> None:
        call("spectral_radius", self._handle.number, (p, X.reshape(-1), state.reshape(-1), out))

    def trainer(self, options: TrainerOptions) -> Trainer:
        optimizer, guard = options.optimizer, options.guard
        refuse_others("optimizer", optimizer, ", or engine='numpy'")
        if isinstance(self._problem.loss, CustomLoss) and isinstance(optimizer, GradientDescent):
            topology, dtype = self._network.topology, np.dtype(self._network.dtype)
            return StepTrainer(self._gradients, options, topology, dtype)
        description = {
            "name": optimizer.name.lower(),
            "options": optimizer.options(),
            "nets": options.nets,
            "batch_size": options.batch_size,
            "warm_start": options.warm_start,
            "clip": options.clip,
            "unconverged": float(guard.unconverged),
            "parameter_norm": np.inf if guard.parameter_norm is None else float(guard.parameter_norm),
        }
        return JuliaTrainer(Handle(call("trainer", self._handle.number, description)), options.nets)

    def _gradients(self, P: Array, samples: Samples, probe: int, states: Array | None) -> tuple[Array, Array, Array]:
        """The gradients net by net, for a custom loss and a trainer in Python."""
        losses, G, unconverged = np.empty(len(P)), np.empty_like(P), np.empty(len(P), np.int64)
        for s, p in enumerate(P):
            own = None if states is None else states[s]
            losses[s], quality = self._gradient_of_python_loss(p, samples, G[s], probe, None, own)
            unconverged[s] = quality.unconverged
        return losses, G, unconverged


class JuliaTrainer:
    """See ``engines.base.Trainer``."""

    def __init__(self, handle: Handle, nets: int) -> None:
        self._handle = handle
        self._nets = nets

    def train(
        self,
        nets: Replicas,
        samples: Samples,
        order: Array,
        batch_size: int,
        rates: Array,
        losses: Array,
        unconverged: Array,
    ) -> None:
        state = (nets.parameters.reshape(-1), nets.good.reshape(-1), nets.halted)
        results = (losses.reshape(-1), unconverged.reshape(-1))
        arrays = (*state, *_flat(samples), (order + 1).reshape(-1), rates, *results)
        call("train", self._handle.number, batch_size, arrays)

    def state(self) -> Array:
        numbers = np.frombuffer(call("state", self._handle.number))
        return np.column_stack([numbers[:-1].reshape(self._nets, -1), np.full(self._nets, numbers[-1])])

    def restore(self, state: Array) -> None:
        call("restore", self._handle.number, np.append(state[:, :-1], state[0, -1]))


def refuse_others(kind: str, option: Option, remedy: str = "") -> None:
    """``EngineError`` for a class of the caller's: Julia does not know it, or would confuse it with its namesake."""
    if not is_of_package(type(option)):
        raise EngineError(f"the Julia engine has no {kind} {option.name}; use one of the package{remedy}")


def _flat(samples: Samples) -> tuple[Array, Array, Array]:
    weights = np.empty(0, samples.X.dtype) if samples.weights is None else samples.weights
    return samples.X.reshape(-1), samples.Y.reshape(-1), weights


def _per_sample(report: GradientReport | None) -> tuple[Array, ...]:
    return () if report is None else (report.status, report.residual, report.adjoint_residual)


def _start(z0: Array | None, X: Array) -> Array:
    """The start for Julia, where an empty vector stands for none."""
    return np.empty(0, X.dtype) if z0 is None else z0.reshape(-1)


def _describe(topology: Topology, dtype: str, device: str) -> dict[str, Any]:
    outputs = topology.outputs
    return topology.description() | {
        "dtype": dtype,
        "device": device,
        "feedback": [[j + 1, i + 1] for j, i in topology.feedback],
        "skips": [[a + 1, b + 1] for a, b in topology.skips],
        "input_skips": [layer + 1 for layer in topology.input_skips],
        "outputs": outputs if isinstance(outputs, int) else [neuron + 1 for neuron in outputs],
        "constraint": {"name": topology.constraint.name, "values": list(topology.constraint.options().values())},
    }


def _options(problem: Problem) -> dict[str, Any]:
    return {
        "solver": describe(problem.solver),
        "adjoint": describe(problem.adjoint),
        # A custom loss stays in Python, and Julia only computes vector-Jacobian products.
        "loss": describe(MSE() if isinstance(problem.loss, CustomLoss) else problem.loss),
        "jacobian_penalty": float(problem.jacobian_penalty),
    }

"""Networks on the NumPy engine: their passes forward to the equilibrium, adjoint back, and tangents forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from implicit_rnn.engines.base import WORST_ADJOINT, Of, Problem, Quality, Samples, TrainerOptions
from implicit_rnn.engines.numpy import unrolled
from implicit_rnn.engines.numpy.solvers import METHODS, Outcome, Solve, StageEquation, transposed
from implicit_rnn.engines.numpy.systems import solve_systems
from implicit_rnn.engines.numpy.weights import StageWeights, Weights, shift
from implicit_rnn.engines.steps import StepTrainer
from implicit_rnn.errors import EngineError
from implicit_rnn.model.activations import ACTIVATIONS
from implicit_rnn.model.optimizers import GradientDescent
from implicit_rnn.model.topology import Stage, Topology
from implicit_rnn.options import Option, is_of_package
from implicit_rnn.solution import CONVERGED, NON_FINITE, GradientReport, Solution
from implicit_rnn.solvers import Adjoint, Implicit, JacobianFree, Unrolled, tolerance

Array = np.ndarray
ADJOINTS: tuple[type[Adjoint], ...] = (Implicit, JacobianFree, Unrolled)
"""Those of this engine; it knows nothing of their subclasses."""


@dataclass(frozen=True)
class NumpyNetwork:
    """See ``engines.base.CompiledNetwork``."""

    topology: Topology
    dtype: str

    def program(self, problem: Problem) -> NumpyProgram:
        if type(problem.solver) not in METHODS:
            raise _unsupported(f"the solver {problem.solver.name}", problem.solver)
        if type(problem.adjoint) not in ADJOINTS:
            raise _unsupported(f"the adjoint {problem.adjoint.name}", problem.adjoint)
        if isinstance(problem.adjoint, Implicit) and problem.adjoint.linear_solver not in ("auto", "lu"):
            raise _unsupported(f'the linear solver "{problem.adjoint.linear_solver}"')
        return NumpyProgram(self.topology, np.dtype(self.dtype), problem)


def _unsupported(what: str, option: Option | None = None) -> EngineError:
    remedy = 'engine="julia"' if option is None or is_of_package(type(option)) else "one of the package"
    return EngineError(f"{what} is not available on the NumPy engine; use {remedy}")


@dataclass
class Equilibria:
    """The result of the forward pass."""

    Z: Array
    """(S, B, N) states, and the same for S = u + R Z, the activations' arguments, and F = f(S)"""
    S: Array
    F: Array
    outcome: Outcome
    chains: list[unrolled.Chain]
    """the unrolled steps of each stage"""


class NumpyProgram:
    """See ``engines.base.Program``."""

    def __init__(self, topology: Topology, dtype: np.dtype, problem: Problem) -> None:
        self.topology = topology
        self.dtype = dtype
        self.solver = problem.solver
        self.adjoint = problem.adjoint
        self.loss = problem.loss
        self.penalty = problem.jacobian_penalty
        self.tol = tolerance(problem.solver.tol, dtype)
        self.weights = Weights(topology, dtype)

    # --- protocol ----------------------------------------------------------------------------------------
    # Statuses and residuals tell of numbers that overflow; NumPy's warnings would tell no more.

    @np.errstate(all="ignore")
    def solve(self, p: Array, X: Array, z0: Array | None, out: Solution) -> None:
        weights = self.weights.unpack(p[None])
        found = self._forward(weights, X, None if z0 is None else z0[None])
        out.state[...] = found.Z[0]
        found.outcome.write(out)
        out.bound[...] = self._certify(weights, np.abs(found.F - found.Z))[0]

    def read_out(self, p: Array, state: Array, out: Array) -> None:
        out[...] = self.topology.read_out(p, state)

    @np.errstate(all="ignore")
    def gradient(
        self, p: Array, samples: Samples, g: Array, probe: int, report: GradientReport | None = None
    ) -> tuple[float, Quality]:
        loss, gradients, outcome, residual = self._gradients(p[None], samples, probe)
        g[...] = gradients[0]
        return float(loss[0]), self._quality(outcome, residual, report)

    @np.errstate(all="ignore")
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
        P, G = p[None], g[None]
        weights = self.weights.unpack(P)
        found = self._forward(weights, X, None if z0 is None else z0[None], self._steps)
        G[...], dX[...] = 0, 0
        dZ = V[None].copy() if of == "state" else self._read_out_pullback(P, found.Z, V[None], G)
        _, residual = self._pullback(weights, X, found, dZ, G, dX=dX)
        return self._quality(found.outcome, residual, report)

    @np.errstate(all="ignore")
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
        P, dP = p[None], dp[None]
        weights = self.weights.unpack(P)
        found = self._forward(weights, X, None if z0 is None else z0[None], self._steps)
        dZ, residual = self._pushforward(weights, X, found, self.weights.tangents(weights, dP), dX)
        out[...] = (dZ if of == "state" else self._read_out_tangent(P, found.Z, dP, dZ))[0]
        return self._quality(found.outcome, residual, report)

    @property
    def _steps(self) -> int:
        """The steps of an unrolled chain, which stands in for the solver; 0 for adjoints at an equilibrium."""
        return self.adjoint.steps if isinstance(self.adjoint, Unrolled) else 0

    def _quality(self, outcome: Outcome, residual: Array, report: GradientReport | None) -> Quality:
        """How the solves of the one net went, with the residuals (1, B) of the linear systems; fills the report."""
        if report is not None:
            report.status[...] = outcome.status[0]
            report.residual[...] = outcome.residual[0]
            report.adjoint_residual[...] = residual[0]
        unconverged = int(self.failed(outcome, residual).sum())
        return Quality(unconverged, float(outcome.residual.max()), float(residual.max()))

    def failed(self, outcome: Outcome, adjoint_residual: Array) -> Array:
        """(S, B) samples whose forward or adjoint solve failed; unrolled steps need no equilibrium."""
        if not self.adjoint.needs_equilibrium:
            return np.zeros(outcome.status.shape, bool)
        return (outcome.status != CONVERGED) | ~(adjoint_residual < WORST_ADJOINT)

    def hessian_vector_product(self, p: Array, samples: Samples, v: Array, h: Array) -> None:
        raise _unsupported("the Hessian-vector product")

    @np.errstate(all="ignore")
    def spectral_radius(self, p: Array, X: Array, state: Array, out: Array) -> None:
        Z = state[None]
        out[...] = 0
        for stage, w in zip(self.topology.stages, self.weights.unpack(p[None]), strict=True):
            if stage.recurrent:
                S = self._drive(w, stage, X, Z) + Z[..., stage.rows] @ transposed(w.recurrent)
                D = self._elementwise(stage, "slope")(S, self._elementwise(stage, "value")(S))[0]
                for k, d in enumerate(D):
                    J = d[:, None] * w.recurrent[0]
                    radius = np.abs(np.linalg.eigvals(J)).max() if np.isfinite(J).all() else np.nan
                    out[k] = np.maximum(out[k], radius)

    def trainer(self, options: TrainerOptions) -> StepTrainer:
        if not isinstance(options.optimizer, GradientDescent):
            raise _unsupported(f"the optimizer {options.optimizer.name}", options.optimizer)
        return StepTrainer(self._train_gradients, options, self.topology, self.dtype)

    def _train_gradients(
        self, P: Array, samples: Samples, probe: int, states: Array | None
    ) -> tuple[Array, Array, Array]:
        loss, G, outcome, residual = self._gradients(P, samples, probe, states)
        return loss, G, self.failed(outcome, residual).sum(axis=1)

    # --- forward -----------------------------------------------------------------------------------------

    def _block(self, name: str, P: Array) -> Array:
        return self.topology.block(name).view(P)

    def _forward(self, weights: list[StageWeights], X: Array, z0: Array | None, steps: int = 0) -> Equilibria:
        nets, samples = len(weights[0].bias), len(X)
        Z = np.zeros((nets, samples, self.topology.neurons), self.dtype)
        S, F = np.zeros_like(Z), np.zeros_like(Z)
        outcome = Outcome.converged(nets, samples)
        chains: list[unrolled.Chain] = []
        for stage, w in zip(self.topology.stages, weights, strict=True):
            U = self._drive(w, stage, X, Z)
            equation = StageEquation(
                w.recurrent,
                self._elementwise(stage, "value"),
                self._elementwise(stage, "slope"),
                self.tol,
                not self.topology.constraint.unique,
            )
            chain: unrolled.Chain = []
            if not stage.recurrent:
                z, s = equation.f(U), U
                f = z
                outcome.iterations = np.maximum(outcome.iterations, 1)
                outcome.status[~np.isfinite(z).all(axis=-1)] = NON_FINITE
            else:
                start = np.zeros_like(U) if z0 is None else z0[..., stage.rows]
                if steps:
                    chain = unrolled.unroll(equation, U, start, steps)
                    _, s, z = chain[-1]
                    f = z
                else:
                    z, s, f = Solve(equation, U, start, outcome).run(self.solver)
            Z[..., stage.rows], S[..., stage.rows], F[..., stage.rows] = z, s, f
            chains.append(chain)
        return Equilibria(Z, S, F, outcome, chains)

    def _drive(self, w: StageWeights, stage: Stage, X: Array, Z: Array) -> Array:
        """U = W x + feed z_before + b: all that drives a stage from outside."""
        U = np.broadcast_to(w.bias[:, None, :], (len(w.bias), len(X), stage.neurons)).copy()
        return self._add_products(U, w, stage, X, Z)

    def _add_products(self, U: Array, w: StageWeights, stage: Stage, X: Array, Z: Array) -> Array:
        if w.input.shape[-1]:
            U += X @ transposed(w.input)
        if w.feed.shape[-1]:
            U += Z[..., : stage.rows.start] @ transposed(w.feed)
        return U

    def _elementwise(self, stage: Stage, name: str) -> Callable[..., Array]:
        """The function of that name of the activations of a stage, each on the neurons of its layer."""
        layers = self.topology.layers
        functions = [getattr(ACTIVATIONS[layers[layer].activation], name) for layer in stage.layers]
        if len(functions) == 1:
            return cast("Callable[..., Array]", functions[0])
        ranges = [shift(self.topology.rows[layer], stage.rows.start) for layer in stage.layers]
        pieces = list(zip(functions, ranges, strict=True))
        return lambda *A: np.concatenate([f(*(a[..., rows] for a in A)) for f, rows in pieces], axis=-1)

    def _certify(self, weights: list[StageWeights], residual: Array) -> Array:
        """Certified bound on max |z - z*| per sample from |f(s) - z| (S, B, N).

        It is A ‖r + L |feed| e‖ stage by stage, e the error before.
        """
        error = np.zeros(residual.shape)
        for stage, w, bounds in zip(self.topology.stages, weights, self.weights.bounds, strict=True):
            e = residual[..., stage.rows] + bounds * (error[..., : stage.rows.start] @ transposed(np.abs(w.feed)))
            if stage.recurrent:
                e = self.topology.constraint.certify(w.recurrent, w.scales, bounds, e)
            error[..., stage.rows] = e
        return np.asarray(error.max(axis=-1))

    # --- backward ----------------------------------------------------------------------------------------

    def _gradients(
        self, P: Array, samples: Samples, probe: int, states: Array | None = None
    ) -> tuple[Array, Array, Outcome, Array]:
        """Losses (S,), gradients (S, P), how the solves ended, and the adjoint residuals (S, B).

        ``states`` (S, B, N) are first iterates and become the equilibria, see ``engines.steps``.
        """
        weights = self.weights.unpack(P)
        found = self._forward(weights, samples.X, states, self._steps)
        if states is not None:
            states[...] = np.where((found.outcome.status == CONVERGED)[..., None], found.Z, 0)
        loss, dY = self.loss.value_and_gradient(self.topology.read_out(P, found.Z), samples.Y, samples.weights)
        G = np.zeros((len(P), self.topology.parameters), self.dtype)
        dZ = self._read_out_pullback(P, found.Z, dY, G)
        penalty, residual = self._pullback(weights, samples.X, found, dZ, G, probe=probe)
        return loss + penalty, G, found.outcome, residual

    def _read_out_pullback(self, P: Array, Z: Array, dY: Array, G: Array) -> Array:
        """∂L/∂z from dY = ∂L/∂y; the gradient of the readout is written to G."""
        dZ = np.zeros_like(Z)
        if self.topology.linear_readout:
            last = self.topology.rows[-1]
            dZ[..., last] = dY @ self._block("C", P)
            self._block("C", G)[...] = transposed(dY) @ Z[..., last]
            self._block("d", G)[...] = dY.sum(axis=1)
        else:
            for output, neuron in enumerate(self.topology.read_neurons):
                dZ[..., neuron] += dY[..., output]
        return dZ

    def _pullback(
        self,
        weights: list[StageWeights],
        X: Array,
        found: Equilibria,
        dZ: Array,
        G: Array,
        *,
        probe: int = 0,
        dX: Array | None = None,
    ) -> tuple[Array, Array]:
        """From dZ = ∂L/∂z, which is used up, to the gradient, written to G, and to the inputs of one net, added to dX.

        Returns the Jacobian penalties (S,) and the adjoint residuals (S, B).
        """
        topology, Z, S = self.topology, found.Z, found.S
        nets = len(Z)
        penalty, residual = np.zeros(nets), np.zeros(Z.shape[:2])
        stages = list(zip(topology.stages, weights, self.weights.bounds, found.chains, strict=True))
        for stage, w, bounds, chain in reversed(stages):
            g = self.weights.zeros(stage, nets)
            direct: Array | float = 0.0
            if stage.recurrent and self.penalty > 0:
                amount, direct = self._add_penalty(stage, w, S, Z, dZ, g, probe)
                penalty += amount
            λ, slope = dZ[..., stage.rows], self._elementwise(stage, "slope")
            if chain:
                E = unrolled.pull_back(slope, chain, w.recurrent, λ, g)
            else:
                D = slope(S[..., stage.rows], Z[..., stage.rows])
                if stage.recurrent and not isinstance(self.adjoint, JacobianFree):
                    λ = self._solve_adjoint(w.recurrent, D, λ, residual)
                E = D * λ
            E = E + direct  # ∂L/∂s
            if stage.recurrent and not chain:
                g.recurrent += transposed(E) @ Z[..., stage.rows]
            Et = transposed(E)
            if w.input.shape[-1]:
                g.input = Et @ X
                if dX is not None:
                    dX += (E @ w.input)[0]
            if w.feed.shape[-1]:
                g.feed = Et @ Z[..., : stage.rows.start]
                dZ[..., : stage.rows.start] += E @ w.feed
            g.bias = E.sum(axis=1)
            self.weights.pullback(stage, bounds, w, g, G)
        return penalty, residual

    def _add_penalty(
        self, stage: Stage, w: StageWeights, S: Array, Z: Array, dZ: Array, g: StageWeights, probe: int
    ) -> tuple[Array, Array]:
        """The Jacobian penalty of the stage (S,), and its derivative with respect to s; see ``Network.fit``.

        With a = D v and q = Jᵀv = Rᵀa, the derivatives of ‖q‖² are 2 a qᵀ with respect to R and 2 v ∘ (R q) ∘ f″(s) with
        respect to s, which acts through the equilibrium as well (added to dZ).
        """
        s, z = S[..., stage.rows], Z[..., stage.rows]
        samples = s.shape[1]
        c = self.dtype.type(self.penalty / (samples * self.topology.neurons))
        v = _rademacher(probe, samples, stage.rows).astype(self.dtype)
        a = self._elementwise(stage, "slope")(s, z) * v
        q = a @ w.recurrent
        g.recurrent += 2 * c * transposed(a) @ q
        e = 2 * c * v * (q @ transposed(w.recurrent)) * self._elementwise(stage, "curvature")(s, z)
        dZ[..., stage.rows] += e @ w.recurrent
        return float(c) * (q.astype(np.float64) ** 2).sum(axis=(1, 2)), e

    def _solve_adjoint(self, R: Array, D: Array, g: Array, residual: Array) -> Array:
        """λ with (I - RᵀD) λ = g."""
        return solve_systems(
            lambda λ: np.matmul(D * λ, R),
            lambda some: transposed(R)[:, None] * D[:, some, None, :],
            g,
            residual,
            self.adjoint,
        )

    # --- tangents ----------------------------------------------------------------------------------------

    def _pushforward(
        self, weights: list[StageWeights], X: Array, found: Equilibria, tangents: list[StageWeights], dX: Array
    ) -> tuple[Array, Array]:
        """The derivative of the states (S, B, N) along tangents of weights and inputs, and the residuals (S, B).

        Differentiating z = f(u + R z): (I - D R) z′ = D (u′ + R′ z), with D = f′.
        """
        Z, S = found.Z, found.S
        dZ, residual = np.zeros_like(Z), np.zeros(Z.shape[:2])
        for stage, w, t, chain in zip(self.topology.stages, weights, tangents, found.chains, strict=True):
            rows, slope = stage.rows, self._elementwise(stage, "slope")
            drive = self._add_products(self._drive(t, stage, X, Z), w, stage, dX, dZ)
            if chain:
                dZ[..., rows] = unrolled.push_forward(slope, chain, w.recurrent, t.recurrent, drive)
                continue
            D = slope(S[..., rows], Z[..., rows])
            if stage.recurrent:
                drive += Z[..., rows] @ transposed(t.recurrent)
            dZ[..., rows] = D * drive
            if stage.recurrent and not isinstance(self.adjoint, JacobianFree):
                dZ[..., rows] = self._solve_tangent(w.recurrent, D, dZ[..., rows], residual)
        return dZ, residual

    def _solve_tangent(self, R: Array, D: Array, b: Array, residual: Array) -> Array:
        """z′ with (I - D R) z′ = b."""
        return solve_systems(
            lambda v: D * np.matmul(v, transposed(R)),
            lambda some: D[:, some, :, None] * R[:, None],
            b,
            residual,
            self.adjoint,
        )

    def _read_out_tangent(self, P: Array, Z: Array, dP: Array, dZ: Array) -> Array:
        """The derivative of the outputs (S, B, outputs)."""
        if not self.topology.linear_readout:
            return dZ[..., self.topology.read_neurons]
        last = self.topology.rows[-1]
        return dZ[..., last] @ transposed(self._block("C", P)) + self.topology.read_out(dP, Z)


def _rademacher(probe: int, samples: int, rows: slice) -> Array:
    """±1 (samples, n) from a hash (the finaliser of SplitMix64) of probe, sample and neuron, counted from 1."""
    x: Any = (
        np.uint64(probe)
        + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, samples + 1, dtype=np.uint64)[:, None]
        + np.uint64(0xD1B54A32D192ED03) * np.arange(rows.start + 1, rows.stop + 1, dtype=np.uint64)
    )
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return np.where(x < np.uint64(1 << 63), 1, -1)

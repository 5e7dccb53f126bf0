"""The NumPy engine: problems, their two passes (forward to the equilibrium, adjoint back), and training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from implicit_rnn.engines import base
from implicit_rnn.engines.base import Halt, Problem, Quality, Replicas, Samples
from implicit_rnn.engines.numpy import solvers
from implicit_rnn.engines.numpy.equations import PythonEquation
from implicit_rnn.engines.numpy.solvers import Equation, Outcome, norm
from implicit_rnn.errors import EngineError
from implicit_rnn.model.activations import ACTIVATIONS
from implicit_rnn.model.optimizers import GradientDescent, Guard, Optimizer
from implicit_rnn.model.topology import INPUT, Stage
from implicit_rnn.solution import CONVERGED, NON_FINITE, GradientReport, Solution
from implicit_rnn.solvers import Adjoint, Implicit, JacobianFree, Unrolled

Array = np.ndarray
Chain = list[tuple[Array, Array, Array]]
"""The steps of an unrolled stage: z before, s, z after."""

ADJOINTS: tuple[type[Adjoint], ...] = (Implicit, JacobianFree, Unrolled)
"""Those of this engine; it knows nothing of their subclasses."""
_WORST_ADJOINT = 1e-3
"""A sample whose adjoint is solved to no better relative residual than this counts as unconverged."""
_TILE_NUMBERS = 1 << 22
"""Numbers in the largest temporary array of the adjoint."""


class NumpyEngine:
    """See ``engines.base.Engine``."""

    name = "numpy"

    def compile(self, problem: Problem) -> NumpyProgram:
        if not solvers.is_supported(problem.solver):
            raise _unsupported(f"the solver {problem.solver.name}")
        if type(problem.adjoint) not in ADJOINTS:
            raise _unsupported(f"the adjoint {problem.adjoint.name}")
        if isinstance(problem.adjoint, Implicit) and problem.adjoint.linear_solver not in ("auto", "lu"):
            raise _unsupported(f'the linear solver "{problem.adjoint.linear_solver}"')
        return NumpyProgram(problem)

    def compile_equation(self, equation: base.Equation) -> PythonEquation:
        return PythonEquation(equation)


def _unsupported(what: str) -> EngineError:
    return EngineError(f'{what} is not available on the NumPy engine; use engine="julia"')


@dataclass
class StageWeights:
    """What drives one stage of n neurons, each with a leading axis of nets; also holds gradients."""

    input: Array  # (S, n, d), or (S, n, 0)
    feed: Array  # (S, n, neurons of the stages before)
    raw: Array  # (S, n, n), or (S, 0, 0)
    recurrent: Array
    bias: Array  # (S, n)
    scales: Array  # (S, n), or (S, 0)


@dataclass
class Equilibria:
    """The result of the forward pass."""

    Z: Array
    """(S, B, N) states, and the same for S = u + R Z, the activations' arguments, and F = f(S)"""
    S: Array
    F: Array
    outcome: Outcome
    chains: list[Chain]
    """the unrolled steps of each stage"""


class NumpyProgram:
    """See ``engines.base.Program``."""

    def __init__(self, problem: Problem) -> None:
        self.topology = problem.topology
        self.dtype = np.dtype(problem.dtype)
        self.solver = problem.solver
        self.adjoint = problem.adjoint
        self.loss = problem.loss
        self.penalty = problem.jacobian_penalty
        tol = problem.solver.options()["tol"]
        self.tol = float(tol) if tol is not None else (1e-10 if self.dtype == np.float64 else 1e-6)
        self.bounds = [self.topology.slope_bounds(stage).astype(self.dtype) for stage in self.topology.stages]

    # --- protocol ----------------------------------------------------------------------------------------

    def solve(self, p: Array, X: Array, z0: Array | None, out: Solution) -> None:
        weights = self._unpack(p[None])
        found = self._forward(weights, X, None if z0 is None else z0[None], None)
        outcome = found.outcome
        out.state[...] = found.Z[0]
        out.status[...] = outcome.status[0]
        out.iterations[...] = outcome.iterations[0]
        out.residual[...] = outcome.residual[0]
        out.rate[...] = outcome.rate[0]
        out.bound[...] = self._certify(weights, np.abs(found.F - found.Z))[0]

    def gradient(
        self, p: Array, samples: Samples, g: Array, probe: int, report: GradientReport | None = None
    ) -> tuple[float, Quality]:
        loss, gradients, outcome, adjoint_residual = self.gradients(p[None], samples, probe)
        g[...] = gradients[0]
        if report is not None:
            report.status[...] = outcome.status[0]
            report.residual[...] = outcome.residual[0]
            report.adjoint_residual[...] = adjoint_residual[0]
        unconverged = int(self.failed(outcome, adjoint_residual).sum())
        return float(loss[0]), Quality(unconverged, float(outcome.residual.max()), float(adjoint_residual.max()))

    def failed(self, outcome: Outcome, adjoint_residual: Array) -> Array:
        """(S, B) samples whose forward or adjoint solve failed; unrolled steps need no equilibrium."""
        if not self.adjoint.needs_equilibrium:
            return np.zeros(outcome.status.shape, bool)
        return (outcome.status != CONVERGED) | ~(adjoint_residual < _WORST_ADJOINT)

    def hessian_vector_product(self, p: Array, samples: Samples, v: Array, h: Array) -> None:
        raise _unsupported("the Hessian-vector product")

    def spectral_radius(self, p: Array, X: Array, state: Array, out: Array) -> None:
        Z = state[None]
        out[...] = 0
        for stage, w in zip(self.topology.stages, self._unpack(p[None]), strict=True):
            if stage.recurrent:
                S = self._drive(w, stage, X, Z) + Z[..., stage.rows] @ _transposed(w.recurrent)
                D = self._slope(stage)(S, self._activation(stage)(S))[0]
                for k, d in enumerate(D):
                    out[k] = max(out[k], np.abs(np.linalg.eigvals(d[:, None] * w.recurrent[0])).max())

    def trainer(self, optimizer: Optimizer, nets: int, batch_size: int, clip: float, guard: Guard) -> NumpyTrainer:
        if not isinstance(optimizer, GradientDescent):
            raise _unsupported(f"the optimizer {optimizer.name}")
        return NumpyTrainer(self, optimizer, nets, clip, guard)

    # --- forward -----------------------------------------------------------------------------------------

    def _unpack(self, P: Array) -> list[StageWeights]:
        stages = []
        for stage, bounds in zip(self.topology.stages, self.bounds, strict=True):
            w = self._zero_weights(stage, len(P))
            for block in stage.blocks:
                self._target(w, stage, block)[...] = block.view(P)
            w.bias[...] = self._bias(P)[:, stage.rows]
            if stage.scales is not None:
                w.scales[...] = stage.scales.view(P)
            if stage.recurrent:
                w.recurrent = self.topology.constraint.apply(w.raw, w.scales, bounds)
            stages.append(w)
        return stages

    def _zero_weights(self, stage: Stage, nets: int) -> StageWeights:
        n = stage.neurons
        d = self.topology.inputs if any(block.source == INPUT for block in stage.blocks) else 0
        m = n if stage.recurrent else 0
        shapes = ((n, d), (n, stage.rows.start), (m, m), (m, m), (n,), (m if stage.scales is not None else 0,))
        return StageWeights(*(np.zeros((nets, *shape), self.dtype) for shape in shapes))

    def _target(self, w: StageWeights, stage: Stage, block: Any) -> Array:
        rows = _shift(self.topology.rows[block.to], stage.rows.start)
        if block.source == INPUT:
            return w.input[:, rows]
        columns = self.topology.rows[block.source]
        if columns.stop <= stage.rows.start:
            return w.feed[:, rows, columns]
        return w.raw[:, rows, _shift(columns, stage.rows.start)]

    def _block(self, name: str, P: Array) -> Array:
        return next(block for block in self.topology.blocks if block.name == name).view(P)

    def _bias(self, P: Array) -> Array:
        return self._block("b", P)

    def _forward(
        self, weights: list[StageWeights], X: Array, z0: Array | None, unrolled: Unrolled | None
    ) -> Equilibria:
        nets, samples = len(weights[0].bias), len(X)
        Z = np.zeros((nets, samples, self.topology.neurons), self.dtype)
        S, F = np.zeros_like(Z), np.zeros_like(Z)
        outcome = Outcome.converged(nets, samples)
        chains: list[Chain] = []
        for stage, w in zip(self.topology.stages, weights, strict=True):
            U = self._drive(w, stage, X, Z)
            equation = Equation(
                w.recurrent, self._activation(stage), self._slope(stage), self.tol, not self.topology.constraint.unique
            )
            chain: Chain = []
            if not stage.recurrent:
                z, s = equation.f(U), U
                f = z
                outcome.iterations = np.maximum(outcome.iterations, 1)
                outcome.status[~np.isfinite(z).all(axis=-1)] = NON_FINITE
            else:
                start = np.zeros_like(U) if z0 is None else z0[..., stage.rows]
                if unrolled:
                    chain = _unroll(equation, U, start, unrolled.steps)
                    _, s, z = chain[-1]
                    f = z
                else:
                    z, s, f = solvers.solve(self.solver, equation, U, start, outcome)
            Z[..., stage.rows], S[..., stage.rows], F[..., stage.rows] = z, s, f
            chains.append(chain)
        return Equilibria(Z, S, F, outcome, chains)

    def _drive(self, w: StageWeights, stage: Stage, X: Array, Z: Array) -> Array:
        U = np.broadcast_to(w.bias[:, None, :], (len(w.bias), len(X), stage.neurons)).copy()
        if w.input.shape[-1]:
            U += X @ _transposed(w.input)
        if w.feed.shape[-1]:
            U += Z[..., : stage.rows.start] @ _transposed(w.feed)
        return U

    def _activation(self, stage: Stage) -> Callable[[Array], Array]:
        pieces = self._pieces(stage)
        if len(pieces) == 1:
            return pieces[0][1].value
        return lambda S: np.concatenate([f.value(S[..., rows]) for rows, f in pieces], axis=-1)

    def _slope(self, stage: Stage) -> Callable[[Array, Array], Array]:
        pieces = self._pieces(stage)
        if len(pieces) == 1:
            return pieces[0][1].slope
        return lambda S, Z: np.concatenate([f.slope(S[..., rows], Z[..., rows]) for rows, f in pieces], axis=-1)

    def _pieces(self, stage: Stage) -> list[tuple[slice, Any]]:
        return [
            (_shift(self.topology.rows[layer], stage.rows.start), ACTIVATIONS[self.topology.layers[layer].activation])
            for layer in stage.layers
        ]

    def _certify(self, weights: list[StageWeights], residual: Array) -> Array:
        """Certified bound on max |z - z*| per sample from |f(s) - z| (S, B, N).

        It is A ‖r + L |feed| e‖ stage by stage, e the error before.
        """
        error = np.zeros(residual.shape)
        for stage, w, bounds in zip(self.topology.stages, weights, self.bounds, strict=True):
            e = residual[..., stage.rows] + bounds * (error[..., : stage.rows.start] @ _transposed(np.abs(w.feed)))
            if stage.recurrent:
                e = self.topology.constraint.certify(w.recurrent, w.scales, bounds, e)
            error[..., stage.rows] = e
        return np.asarray(error.max(axis=-1))

    # --- backward ----------------------------------------------------------------------------------------

    def gradients(self, P: Array, samples: Samples, probe: int) -> tuple[Array, Array, Outcome, Array]:
        """Losses (S,), gradients (S, P), how the solves ended, and the adjoint residuals (S, B)."""
        topology, X = self.topology, samples.X
        weights = self._unpack(P)
        unrolled = self.adjoint if isinstance(self.adjoint, Unrolled) else None
        found = self._forward(weights, X, None, unrolled)
        Z, S = found.Z, found.S
        G = np.zeros((len(P), topology.parameters), self.dtype)
        dZ = np.zeros_like(Z)
        if topology.linear_readout:
            last = topology.rows[-1]
            C = self._block("C", P)
            loss, dY = self._loss(Z[..., last] @ _transposed(C) + self._block("d", P)[:, None], samples)
            dZ[..., last] = dY @ C
            self._block("C", G)[...] = _transposed(dY) @ Z[..., last]
            self._block("d", G)[...] = dY.sum(axis=1)
        else:
            loss, dY = self._loss(Z[..., topology.read_neurons], samples)
            for output, neuron in enumerate(topology.read_neurons):
                dZ[..., neuron] += dY[..., output]
        residual = np.zeros(Z.shape[:2])
        stages = list(zip(topology.stages, weights, self.bounds, found.chains, strict=True))
        for stage, w, bounds, chain in reversed(stages):
            g = self._zero_weights(stage, len(P))
            direct: Array | float = 0.0
            if stage.recurrent and self.penalty > 0:
                amount, direct = self._add_penalty(stage, w, S, Z, dZ, g, probe)
                loss += amount
            E = self._backward_stage(stage, w, S, Z, dZ, chain, g, residual) + direct
            if stage.recurrent and not chain:
                g.recurrent += _transposed(E) @ Z[..., stage.rows]
            Et = _transposed(E)
            if w.input.shape[-1]:
                g.input = Et @ X
            if w.feed.shape[-1]:
                g.feed = Et @ Z[..., : stage.rows.start]
                dZ[..., : stage.rows.start] += E @ w.feed
            if stage.recurrent:
                g.raw, g.scales = topology.constraint.pullback(w.raw, w.scales, bounds, w.recurrent, g.recurrent)
            for block in stage.blocks:
                block.view(G)[...] = self._target(g, stage, block)
            self._bias(G)[:, stage.rows] = E.sum(axis=1)
            if stage.scales is not None:
                stage.scales.view(G)[...] = g.scales
        return loss, G, found.outcome, residual

    def _loss(self, Y: Array, samples: Samples) -> tuple[Array, Array]:
        return self.loss.value_and_gradient(Y, samples.Y, samples.weights)

    def _backward_stage(
        self,
        stage: Stage,
        w: StageWeights,
        S: Array,
        Z: Array,
        dZ: Array,
        chain: Chain,
        g: StageWeights,
        residual: Array,
    ) -> Array:
        """∂L/∂s = D λ for the stage; the adjoint's residual is merged into ``residual``.

        Of an unrolled stage, ∂L/∂R is added to g.recurrent.
        """
        z, λ = Z[..., stage.rows], dZ[..., stage.rows]
        slope = self._slope(stage)
        if chain:
            return _unroll_back(slope, chain, w.recurrent, λ, g)
        D = slope(S[..., stage.rows], z)
        if stage.recurrent and not isinstance(self.adjoint, JacobianFree):
            λ = self._solve_adjoint(w.recurrent, D, λ, residual)
        return D * λ

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
        a = self._slope(stage)(s, z) * v
        q = a @ w.recurrent
        g.recurrent += 2 * c * _transposed(a) @ q
        pieces = [f.curvature(s[..., rows], z[..., rows]) for rows, f in self._pieces(stage)]
        e = 2 * c * v * (q @ _transposed(w.recurrent)) * np.concatenate(pieces, axis=-1)
        dZ[..., stage.rows] += e @ w.recurrent
        return float(c) * (q.astype(np.float64) ** 2).sum(axis=(1, 2)), e

    def _solve_adjoint(self, R: Array, D: Array, g: Array, residual: Array) -> Array:
        """λ with (I - RᵀD) λ = g, by one LU factorisation per sample."""
        n = D.shape[-1]
        λ = np.empty_like(D)
        identity = np.eye(n, dtype=self.dtype)
        width = max(1, _TILE_NUMBERS // (n * n * len(D)))
        for first in range(0, D.shape[1], width):
            tile = slice(first, first + width)
            A = identity - _transposed(R)[:, None] * D[:, tile, None, :]
            solution = solvers.solve_each(A, g[:, tile, :, None])
            λ[:, tile] = solution[..., 0]
            size = np.maximum(norm(λ[:, tile]), np.finfo(self.dtype).tiny)
            residual[:, tile] = np.maximum(residual[:, tile], norm((A @ solution)[..., 0] - g[:, tile]) / size)
        return λ


def _unroll(equation: Equation, U: Array, z: Array, steps: int) -> Chain:
    chain = []
    for _ in range(steps):
        s = z @ _transposed(equation.R) + U
        after = equation.f(s)
        chain.append((z, s, after))
        z = after
    return chain


def _unroll_back(slope: Callable[[Array, Array], Array], chain: Chain, R: Array, λ: Array, g: StageWeights) -> Array:
    E = np.zeros_like(λ)
    for before, s, after in reversed(chain):
        e = slope(s, after) * λ
        E += e
        g.recurrent += _transposed(e) @ before
        λ = e @ R
    return E


class NumpyTrainer:
    """See ``engines.base.Trainer``."""

    def __init__(self, program: NumpyProgram, optimizer: GradientDescent, nets: int, clip: float, guard: Guard) -> None:
        self._program = program
        self._clip = clip
        self._guard = guard
        self._steps = 0
        self._optimizer = optimizer
        self._moments = optimizer.start((nets, program.topology.parameters), program.dtype)

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
        steps = len(rates) // len(order)
        for epoch, permutation in enumerate(order):
            running = nets.halted == Halt.RUNNING
            before = nets.parameters.copy()
            loss, failed = self._epoch(
                nets.parameters, running, samples, permutation, batch_size, rates[epoch * steps :]
            )
            losses[:, epoch] = np.where(running, loss, np.nan)
            unconverged[:, epoch] = np.where(running, failed, 0)
            self._judge(nets, running, before, loss, failed / len(samples))

    def _epoch(
        self, P: Array, running: Array, samples: Samples, permutation: Array, batch_size: int, rates: Array
    ) -> tuple[Array, Array]:
        """The mean loss of each net, NaN as soon as a loss or gradient is not finite, and its unconverged samples."""
        total, failed = np.zeros(len(P)), np.zeros(len(P), np.int64)
        alive = running.copy()
        for step, first in enumerate(range(0, len(samples), batch_size)):
            batch = _select(samples, permutation[first : first + batch_size])
            self._steps += 1
            loss, G, outcome, adjoint_residual = self._program.gradients(P, batch, self._steps)
            failed += np.where(alive, self._program.failed(outcome, adjoint_residual).sum(axis=1), 0)
            size = norm(G)
            alive &= np.isfinite(loss) & np.isfinite(size)
            total += np.where(alive, loss, np.nan) * len(batch)
            long = alive & (size > self._clip)
            G[long] *= (self._clip / size[long])[:, None]
            change = self._optimizer.step(self._moments, P, np.where(alive[:, None], G, 0), rates[step])
            P -= np.where(alive[:, None], change, 0).astype(P.dtype)
        return total / len(samples), failed

    def _judge(self, nets: Replicas, running: Array, before: Array, loss: Array, unconverged: Array) -> None:
        """Halt the nets that went wrong in this epoch, and note what was good."""
        limit = np.inf if self._guard.parameter_norm is None else self._guard.parameter_norm
        size = norm(nets.parameters)
        broken, lost = ~np.isfinite(loss), unconverged > self._guard.unconverged
        good = running & ~broken & ~lost
        nets.good[good] = before[good]
        halt = np.where(np.isfinite(size) & (size <= limit), Halt.RUNNING, Halt.TOO_LARGE)
        halt = np.where(broken, Halt.NOT_FINITE, np.where(lost, Halt.TOO_MANY_UNCONVERGED, halt))
        halted = running & (halt != Halt.RUNNING)
        nets.halted[halted] = halt[halted]
        nets.parameters[halted] = nets.good[halted]

    def state(self) -> Array:
        return np.append(self._moments.numbers(), float(self._steps))

    def restore(self, state: Array) -> None:
        self._moments.restore(state[:-1])
        self._steps = int(state[-1])


def _select(samples: Samples, chosen: Array) -> Samples:
    if len(chosen) == len(samples):
        return samples
    weights = samples.weights
    return Samples(samples.X[chosen], samples.Y[chosen], None if weights is None else weights[chosen])


def _transposed(A: Array) -> Array:
    return np.swapaxes(A, -1, -2)


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


def _shift(rows: slice, start: int) -> slice:
    return slice(rows.start - start, rows.stop - start)

"""The NumPy engine: the reference every result is checked against, and what runs where no Julia can be had.

Every array has a leading axis of nets, so that many small nets are trained in one go: parameters P (S, P), states
(S, B, N). A single net is S = 1. The formulas are those of the Julia engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from implicit_rnn.activations import ACTIVATIONS
from implicit_rnn.engines import constraints
from implicit_rnn.engines.base import Problem, Quality
from implicit_rnn.errors import EngineError
from implicit_rnn.options import SGD, Adam, Implicit, Momentum, Nesterov, Optimizer, Picard
from implicit_rnn.solution import Solution, Status
from implicit_rnn.topology import INPUT, Stage, Topology

Array = np.ndarray

_BLOW_UP = 1e6
_TILE_NUMBERS = 1 << 22
"""Numbers in the largest temporary array of the adjoint."""


class NumpyEngine:
    """See ``engines.base.Engine``."""

    name = "numpy"

    def compile(self, problem: Problem) -> NumpyProgram:
        if not isinstance(problem.solver, Picard):
            raise _unsupported(f"the solver {problem.solver.name}")
        if isinstance(problem.adjoint, Implicit) and problem.adjoint.linear_solver == "neumann":
            raise _unsupported('the linear solver "neumann"')
        return NumpyProgram(problem)


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


class NumpyProgram:
    """See ``engines.base.Program``."""

    def __init__(self, problem: Problem) -> None:
        self.topology = problem.topology
        self.dtype = np.dtype(problem.dtype)
        solver = problem.solver
        assert isinstance(solver, Picard)
        self.solver = solver
        self.tol = solver.tol if solver.tol is not None else (1e-10 if self.dtype == np.float64 else 1e-6)
        self.slopes = [slope_bounds(self.topology, stage).astype(self.dtype) for stage in self.topology.stages]

    # --- protocol ----------------------------------------------------------------------------------------

    def solve(self, p: Array, X: Array, z0: Array | None, out: Solution) -> None:
        weights = self._unpack(p[None])
        Z, _, outcome = self._forward(weights, X, None if z0 is None else z0[None])
        out.state[...] = Z[0]
        out.status[...] = outcome.status[0]
        out.iterations[...] = outcome.iterations[0]
        out.residual[...] = outcome.residual[0]
        out.rate[...] = outcome.rate[0]
        out.bound[...] = self._certify(weights, X, Z)[0]

    def gradient(self, p: Array, X: Array, Y: Array, g: Array) -> tuple[float, Quality]:
        loss, gradients, outcome, adjoint_residual = self.gradients(p[None], X, Y)
        g[...] = gradients[0]
        unconverged = int((outcome.status != Status.CONVERGED).sum())
        return float(loss[0]), Quality(unconverged, float(outcome.residual.max()), float(adjoint_residual[0]))

    def trainer(self, optimizer: Optimizer, nets: int, clip: float, batch_size: int) -> NumpyTrainer:
        return NumpyTrainer(self, optimizer, nets, clip)

    # --- forward -----------------------------------------------------------------------------------------

    def _unpack(self, P: Array) -> list[StageWeights]:
        stages = []
        for stage, slopes in zip(self.topology.stages, self.slopes, strict=True):
            w = self._zero_weights(stage, len(P))
            for block in stage.blocks:
                self._target(w, stage, block)[...] = block.view(P)
            w.bias[...] = self._bias(P)[:, stage.rows]
            if stage.scales is not None:
                w.scales[...] = stage.scales.view(P)
            if stage.recurrent:
                w.recurrent = constraints.apply(self.topology.constraint, w.raw, w.scales, slopes)
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

    def _forward(self, weights: list[StageWeights], X: Array, z0: Array | None) -> tuple[Array, Array, _Outcome]:
        nets, samples = len(weights[0].bias), len(X)
        Z = np.zeros((nets, samples, self.topology.neurons), self.dtype)
        S = np.zeros_like(Z)
        outcome = _Outcome.converged(nets, samples)
        for stage, w in zip(self.topology.stages, weights, strict=True):
            U = self._drive(w, stage, X, Z)
            if stage.recurrent:
                start = np.zeros_like(U) if z0 is None else z0[..., stage.rows].copy()
                z, s = self._picard(stage, w.recurrent, U, start, outcome)
            else:
                z, s = self._activate(stage, U), U
                outcome.iterations = np.maximum(outcome.iterations, 1)
                outcome.status[~np.isfinite(z).all(axis=-1)] = Status.NON_FINITE
            Z[..., stage.rows], S[..., stage.rows] = z, s
        return Z, S, outcome

    def _drive(self, w: StageWeights, stage: Stage, X: Array, Z: Array) -> Array:
        U = np.broadcast_to(w.bias[:, None, :], (len(w.bias), len(X), stage.neurons)).copy()
        if w.input.shape[-1]:
            U += X @ _transposed(w.input)
        if w.feed.shape[-1]:
            U += Z[..., : stage.rows.start] @ _transposed(w.feed)
        return U

    def _activate(self, stage: Stage, S: Array) -> Array:
        if len(stage.layers) == 1:
            return ACTIVATIONS[self.topology.layers[stage.layers[0]].activation].value(S)
        Z = np.empty_like(S)
        for rows, activation in self._pieces(stage):
            Z[..., rows] = activation.value(S[..., rows])
        return Z

    def _slopes(self, stage: Stage, S: Array, Z: Array) -> Array:
        D = np.empty_like(S)
        for rows, activation in self._pieces(stage):
            D[..., rows] = activation.slope(S[..., rows], Z[..., rows])
        return D

    def _pieces(self, stage: Stage) -> list[tuple[slice, Any]]:
        return [
            (_shift(self.topology.rows[layer], stage.rows.start), ACTIVATIONS[self.topology.layers[layer].activation])
            for layer in stage.layers
        ]

    def _picard(self, stage: Stage, R: Array, U: Array, Z: Array, outcome: _Outcome) -> tuple[Array, Array]:
        """Picard iteration of all samples of all nets; a sample that has converged moves no more."""
        floor = self.dtype.type(1e-3 * np.sqrt(stage.neurons))
        S, F = np.empty_like(U), Z.copy()
        previous = np.full(U.shape[:2], np.inf)
        active = np.ones(U.shape[:2], bool)
        columns: Any = slice(None)
        single = len(U) == 1
        Rt = _transposed(R)
        for iteration in range(1, self.solver.max_iterations + 1):
            if single:  # only samples still at work; several nets go on together until all are done
                columns = np.flatnonzero(active[0])
            z = Z[:, columns]
            s = z @ Rt + U[:, columns]
            f = self._activate(stage, s)
            with np.errstate(invalid="ignore", over="ignore"):
                residual = _norm(f - z)
                scale = np.maximum(_norm(f), floor)
                done = residual <= self.tol * scale
                broken = ~np.isfinite(residual)
                status = np.where(done, Status.CONVERGED, np.where(broken, Status.NON_FINITE, Status.DIVERGED))
                ended = active[:, columns] & (done | broken | (residual > _BLOW_UP * (1 + floor)))
                rate = np.where(np.isfinite(previous[:, columns]), residual / previous[:, columns], 0)
            running = active[:, columns]
            last = iteration == self.solver.max_iterations
            final = (ended | running) if last else ended
            _assign(S, columns, s, running)
            _assign(F, columns, np.where(broken[..., None], z, f), running)
            outcome.record(columns, final, np.where(ended, status, Status.MAX_ITERATIONS), iteration, residual / scale, rate)
            moved = f if self.solver.damping == 1 else z + self.dtype.type(self.solver.damping) * (f - z)
            _assign(Z, columns, moved, running & ~ended)
            previous[:, columns] = residual
            active[:, columns] = running & ~ended
            if not active.any():
                break
        return F, S

    def _certify(self, weights: list[StageWeights], X: Array, Z: Array) -> Array:
        """Certified bound on max |z - z*| per sample: A ‖r + L |feed| e‖ stage by stage, e the error before."""
        error = np.zeros(Z.shape)
        for stage, w, slopes in zip(self.topology.stages, weights, self.slopes, strict=True):
            U = self._drive(w, stage, X, Z)
            z = Z[..., stage.rows]
            f = self._activate(stage, z @ _transposed(w.recurrent) + U if stage.recurrent else U)
            e = np.abs(f - z) + slopes * (error[..., : stage.rows.start] @ _transposed(np.abs(w.feed)))
            if stage.recurrent:
                e = constraints.certify(self.topology.constraint, w.recurrent, w.scales, slopes, e)
            error[..., stage.rows] = e
        return np.asarray(error.max(axis=-1))

    # --- backward ----------------------------------------------------------------------------------------

    def gradients(self, P: Array, X: Array, Y: Array) -> tuple[Array, Array, _Outcome, Array]:
        """Losses (S,), gradients (S, P), how the solves ended, and the worst adjoint residual (S,)."""
        topology = self.topology
        weights = self._unpack(P)
        Z, S, outcome = self._forward(weights, X, None)
        G = np.zeros((len(P), topology.parameters), self.dtype)
        dZ = np.zeros_like(Z)
        if topology.linear_readout:
            last = topology.rows[-1]
            C = self._block("C", P)
            difference = Z[..., last] @ _transposed(C) + self._block("d", P)[:, None] - Y
            dY = difference * self.dtype.type(2 / Y.size)
            dZ[..., last] = dY @ C
            self._block("C", G)[...] = _transposed(dY) @ Z[..., last]
            self._block("d", G)[...] = dY.sum(axis=1)
        else:
            difference = Z[..., list(topology.outputs)] - Y  # type: ignore[arg-type]
            dY = difference * self.dtype.type(2 / Y.size)
            np.add.at(dZ, (..., list(topology.outputs)), dY)  # type: ignore[arg-type]
        loss = np.mean(difference.astype(np.float64) ** 2, axis=(1, 2))
        residual = np.zeros(len(P))
        for stage, w, slopes in zip(reversed(topology.stages), reversed(weights), reversed(self.slopes), strict=True):
            E = self._backward_stage(stage, w, S, Z, dZ, residual)
            g = self._zero_weights(stage, len(P))
            Et = _transposed(E)
            if w.input.shape[-1]:
                g.input = Et @ X
            if w.feed.shape[-1]:
                g.feed = Et @ Z[..., : stage.rows.start]
                dZ[..., : stage.rows.start] += E @ w.feed
            if stage.recurrent:
                g.raw, g.scales = constraints.pullback(
                    topology.constraint, w.raw, w.scales, slopes, w.recurrent, Et @ Z[..., stage.rows]
                )
            for block in stage.blocks:
                block.view(G)[...] = self._target(g, stage, block)
            self._bias(G)[:, stage.rows] = E.sum(axis=1)
            if stage.scales is not None:
                stage.scales.view(G)[...] = g.scales
        return loss, G, outcome, residual

    def _backward_stage(self, stage: Stage, w: StageWeights, S: Array, Z: Array, dZ: Array, residual: Array) -> Array:
        """∂L/∂s = D λ with (I - RᵀD) λ = ∂L/∂z, by one LU factorisation per sample."""
        D = self._slopes(stage, S[..., stage.rows], Z[..., stage.rows])
        g = dZ[..., stage.rows]
        if not stage.recurrent:
            return D * g
        n = stage.neurons
        E = np.empty_like(D)
        identity = np.eye(n, dtype=self.dtype)
        width = max(1, _TILE_NUMBERS // (n * n * len(D)))
        for first in range(0, D.shape[1], width):
            tile = slice(first, first + width)
            A = identity - _transposed(w.recurrent)[:, None] * D[:, tile, None, :]
            try:
                λ = np.linalg.solve(A, g[:, tile, :, None])
            except np.linalg.LinAlgError:
                λ = np.full((*g[:, tile].shape, 1), np.nan, self.dtype)
            E[:, tile] = D[:, tile] * λ[..., 0]
            size = np.maximum(_norm(g[:, tile]), np.finfo(self.dtype).tiny)
            worst = (_norm((A @ λ)[..., 0] - g[:, tile]) / size).max(axis=-1)
            residual[...] = np.maximum(residual, worst)
        return E


class NumpyTrainer:
    """See ``engines.base.Trainer``."""

    def __init__(self, program: NumpyProgram, optimizer: Optimizer, nets: int, clip: float) -> None:
        self._program = program
        self._clip = clip
        self._rule = _RULES[type(optimizer)](optimizer, (nets, program.topology.parameters), program.dtype)

    def train(
        self,
        P: Array,
        X: Array,
        Y: Array,
        order: Array,
        batch_size: int,
        rates: Array,
        losses: Array,
        unconverged: Array,
    ) -> None:
        samples = len(X)
        alive = np.ones(len(P), bool)
        step = 0
        for epoch, permutation in enumerate(order):
            total = np.zeros(len(P))
            failed = np.zeros(len(P), np.int64)
            for first in range(0, samples, batch_size):
                chosen = permutation[first : first + batch_size]
                x, y = (X, Y) if batch_size >= samples else (X[chosen], Y[chosen])
                loss, G, outcome, _ = self._program.gradients(P, x, y)
                size = _norm(G)
                alive &= np.isfinite(loss) & np.isfinite(size)
                G[size > self._clip] *= (self._clip / size[size > self._clip])[:, None]
                total += np.where(alive, loss, np.nan) * len(chosen)
                failed += (outcome.status != Status.CONVERGED).sum(axis=1)
                change = self._rule.step(np.where(alive[:, None], G, 0), rates[step])
                P -= np.where(alive[:, None], change, 0).astype(P.dtype)
                step += 1
            losses[:, epoch] = total / samples
            unconverged[:, epoch] = failed

    def state(self) -> Array:
        return self._rule.state()

    def restore(self, state: Array) -> None:
        self._rule.restore(state)


# --- optimisers, with the formulas of Optimisers.jl --------------------------------------------------------


class _Rule:
    """Moments per net, and powers of the decay rates (one column each) where the rule has them."""

    def __init__(self, optimizer: Optimizer, shape: tuple[int, int], dtype: np.dtype) -> None:
        self.optimizer = optimizer
        self.moments = [np.zeros(shape, dtype) for _ in range(self.count)]
        self.powers = np.array([self.decays(optimizer)] * shape[0], dtype)

    count = 0

    @staticmethod
    def decays(optimizer: Any) -> tuple[float, ...]:
        return ()

    def step(self, g: Array, rate: float) -> Array:
        raise NotImplementedError

    def state(self) -> Array:
        return np.concatenate([np.concatenate([m.ravel() for m in row]) for row in self._rows()]).astype(np.float64)

    def restore(self, state: Array) -> None:
        parts = np.asarray(state, np.float64).reshape(len(self.powers), -1)
        position = 0
        for array in (*self.moments, self.powers):
            array[...] = parts[:, position : position + array.shape[1]]
            position += array.shape[1]

    def _rows(self) -> list[list[Array]]:
        return [[array[s] for array in (*self.moments, self.powers)] for s in range(len(self.powers))]


class _SGDRule(_Rule):
    def step(self, g: Array, rate: float) -> Array:
        return np.asarray(rate * g)


class _MomentumRule(_Rule):
    count = 1

    def step(self, g: Array, rate: float) -> Array:
        (v,) = self.moments
        v[...] = self.optimizer.momentum * v + rate * g  # type: ignore[attr-defined]
        return v


class _NesterovRule(_Rule):
    count = 1

    def step(self, g: Array, rate: float) -> Array:
        (v,) = self.moments
        ρ = self.optimizer.momentum  # type: ignore[attr-defined]
        change = -(ρ**2) * v + (1 + ρ) * rate * g
        v[...] = ρ * v - rate * g
        return np.asarray(change)


class _AdamRule(_Rule):
    count = 2

    @staticmethod
    def decays(optimizer: Any) -> tuple[float, ...]:
        return optimizer.beta1, optimizer.beta2

    def step(self, g: Array, rate: float) -> Array:
        m, v = self.moments
        o: Any = self.optimizer
        m[...] = o.beta1 * m + (1 - o.beta1) * g
        v[...] = o.beta2 * v + (1 - o.beta2) * g * g
        power1, power2 = self.powers[:, :1], self.powers[:, 1:]
        change = m / (1 - power1) / (np.sqrt(v / (1 - power2)) + o.epsilon) * rate
        self.powers *= (o.beta1, o.beta2)
        return np.asarray(change)


_RULES: dict[type[Optimizer], type[_Rule]] = {
    SGD: _SGDRule,
    Momentum: _MomentumRule,
    Nesterov: _NesterovRule,
    Adam: _AdamRule,
}


# --- small helpers -----------------------------------------------------------------------------------------


@dataclass
class _Outcome:
    """How the solve of each sample of each net ended, all (S, B); stages are merged: the worst of each."""

    status: Array
    iterations: Array
    residual: Array
    rate: Array

    @classmethod
    def converged(cls, nets: int, samples: int) -> _Outcome:
        shape = (nets, samples)
        return cls(np.zeros(shape, np.int8), np.zeros(shape, np.int32), np.zeros(shape), np.zeros(shape))

    def record(self, columns: Any, final: Array, status: Array, iteration: int, residual: Array, rate: Array) -> None:
        for merged, values in (
            (self.status, status),
            (self.iterations, iteration),
            (self.residual, residual),
            (self.rate, rate),
        ):
            old = merged[:, columns]
            merged[:, columns] = np.where(final, np.maximum(old, values), old)


def slope_bounds(topology: Topology, stage: Stage) -> Array:
    layers = [topology.layers[layer] for layer in stage.layers]
    return np.concatenate([np.full(layer.neurons, ACTIVATIONS[layer.activation].slope_bound) for layer in layers])


def _transposed(A: Array) -> Array:
    return np.swapaxes(A, -1, -2)


def _norm(A: Array) -> Array:
    return np.asarray(np.sqrt(np.einsum("...i,...i->...", A, A)))


def _shift(rows: slice, start: int) -> slice:
    return slice(rows.start - start, rows.stop - start)


def _assign(target: Array, columns: Any, values: Array, where: Array) -> None:
    target[:, columns] = np.where(where[..., None], values, target[:, columns])

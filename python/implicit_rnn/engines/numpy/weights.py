"""The weights of the stages of a network: from its parameters, through the constraint, and back to their gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from implicit_rnn.model.topology import INPUT, Block, Stage, Topology

Array = np.ndarray


@dataclass
class StageWeights:
    """The weights of one stage of n neurons, each with a leading axis of nets; also holds gradients."""

    input: Array  # (S, n, d), or (S, n, 0)
    feed: Array  # (S, n, neurons of the stages before)
    raw: Array  # (S, n, n), or (S, 0, 0)
    recurrent: Array
    bias: Array  # (S, n)
    scales: Array  # (S, n), or (S, 0)


class Weights:
    """The layout of the weights of all stages in the parameters P (S, parameters) of S nets."""

    def __init__(self, topology: Topology, dtype: np.dtype) -> None:
        self.topology = topology
        self.dtype = dtype
        self.bounds = [topology.slope_bounds(stage).astype(dtype) for stage in topology.stages]
        self._bias = topology.block("b")

    def unpack(self, P: Array) -> list[StageWeights]:
        """The weights in force."""
        weights = self._fill(P)
        for stage, w, bounds in zip(self.topology.stages, weights, self.bounds, strict=True):
            if stage.recurrent:
                w.recurrent = self.topology.constraint.apply(w.raw, w.scales, bounds)
        return weights

    def tangents(self, weights: list[StageWeights], dP: Array) -> list[StageWeights]:
        """The derivative of the weights in force along dP."""
        tangents = self._fill(dP)
        for stage, w, t, bounds in zip(self.topology.stages, weights, tangents, self.bounds, strict=True):
            if stage.recurrent:
                t.recurrent = self.topology.constraint.pushforward(
                    w.raw, w.scales, bounds, w.recurrent, t.raw, t.scales
                )
        return tangents

    def zeros(self, stage: Stage, nets: int) -> StageWeights:
        """Those of a stage, all zero."""
        n = stage.neurons
        d = self.topology.inputs if any(block.source == INPUT for block in stage.blocks) else 0
        m = n if stage.recurrent else 0
        shapes = ((n, d), (n, stage.rows.start), (m, m), (m, m), (n,), (m if stage.scales is not None else 0,))
        return StageWeights(*(np.zeros((nets, *shape), self.dtype) for shape in shapes))

    def pullback(self, stage: Stage, bounds: Array, w: StageWeights, g: StageWeights, G: Array) -> None:
        """From ``g``, the gradient of the weights in force of a stage, to that of the parameters, written to G."""
        if stage.recurrent:
            constraint = self.topology.constraint
            g.raw, g.scales = constraint.pullback(w.raw, w.scales, bounds, w.recurrent, g.recurrent)
        for block in stage.blocks:
            block.view(G)[...] = self._target(g, stage, block)
        self._bias.view(G)[:, stage.rows] = g.bias
        if stage.scales is not None:
            stage.scales.view(G)[...] = g.scales

    def _fill(self, P: Array) -> list[StageWeights]:
        """The parameters as weights, before any constraint."""
        stages = []
        for stage in self.topology.stages:
            w = self.zeros(stage, len(P))
            for block in stage.blocks:
                self._target(w, stage, block)[...] = block.view(P)
            w.bias[...] = self._bias.view(P)[:, stage.rows]
            if stage.scales is not None:
                w.scales[...] = stage.scales.view(P)
            stages.append(w)
        return stages

    def _target(self, w: StageWeights, stage: Stage, block: Block) -> Array:
        """The part of the weights of a stage that a block of the parameters gives."""
        rows = shift(self.topology.rows[block.to], stage.rows.start)
        if block.source == INPUT:
            return w.input[:, rows]
        columns = self.topology.rows[block.source]
        if columns.stop <= stage.rows.start:
            return w.feed[:, rows, columns]
        return w.raw[:, rows, shift(columns, stage.rows.start)]


def shift(rows: slice, start: int) -> slice:
    """The same rows, counted from ``start``."""
    return slice(rows.start - start, rows.stop - start)

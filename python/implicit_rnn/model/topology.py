"""Layers, the connections that exist between them, and where each weight lies in the flat parameter vector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from implicit_rnn.errors import without_underflow
from implicit_rnn.model.activations import ACTIVATIONS
from implicit_rnn.model.constraints import Constraint, Perron
from implicit_rnn.options import check_count, check_flag, describe, did_you_mean, from_description, is_whole

INPUT = -1
"""The source of a connection that comes from the input."""


@dataclass(frozen=True)
class Layer:
    """A layer of neurons, by default connected among themselves.

    Parameters
    ----------
    neurons
        Number of neurons.
    activation
        "tanh", "sigmoid", "softplus", "relu", "elu", "gelu", "silu" or "identity".
    lateral
        Whether the neurons of the layer are connected among themselves.

    Raises
    ------
    ValueError, TypeError
        If the number of neurons is not a whole number from 1, and for an unknown activation.

    Examples
    --------
    >>> net = irnn.Network(3, [irnn.Layer(4, "relu", lateral=False), irnn.Layer(2)], outputs=1, seed=0)
    >>> print(net)
    Network(3 inputs, [4 relu, 2 tanh lateral], 1 outputs, Perron(kappa=0.95), 35 parameters, float64)
    """

    neurons: int
    activation: str = "tanh"
    lateral: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "neurons", check_count("neurons", self.neurons))
        object.__setattr__(self, "lateral", check_flag("lateral", self.lateral))
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}"
                + did_you_mean([self.activation], ACTIVATIONS)
            )


@dataclass(frozen=True)
class Block:
    """One weight array: its name, its shape and the position of its first number in the parameter vector."""

    name: str
    shape: tuple[int, ...]
    offset: int
    to: int = INPUT
    source: int = INPUT

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def view(self, flat: np.ndarray) -> np.ndarray:
        """The block in ``flat`` (..., parameters), not copied; matrices are stored column by column."""
        part = flat[..., self.offset : self.offset + self.size]
        if len(self.shape) == 1:
            return part
        rows, columns = self.shape
        return part.reshape(*flat.shape[:-1], columns, rows).swapaxes(-1, -2)


@dataclass(frozen=True)
class Stage:
    """Layers whose equilibrium must be found together: a strongly connected component of the graph of layers.

    A stage that is not recurrent is evaluated in one step, so feed-forward nets are solved exactly.
    """

    layers: range
    rows: slice
    recurrent: bool
    blocks: tuple[Block, ...]
    scales: Block | None

    @property
    def neurons(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class Topology:
    """The structure of a network; ``Network`` explains the arguments."""

    inputs: int
    layers: tuple[Layer, ...]
    feedback: tuple[tuple[int, int], ...]
    skips: tuple[tuple[int, int], ...]
    input_skips: tuple[int, ...]
    outputs: int | tuple[int, ...]
    constraint: Constraint = field(default_factory=Perron)

    @classmethod
    def build(
        cls,
        inputs: int,
        layers: Sequence[Layer | int],
        feedback: bool | Iterable[tuple[int, int]],
        skips: Iterable[tuple[int, int]],
        input_skips: Iterable[int],
        outputs: int | Sequence[int],
        constraint: Constraint,
    ) -> Topology:
        """A checked topology; layers count from 0."""
        check_count("inputs", inputs)
        stack = tuple(_as_layer(layer) for layer in _listed("layers", layers, "a list of Layer"))
        if not stack:
            raise ValueError("layers is empty; a network needs at least one Layer")
        constraint.check_activations(layer.activation for layer in stack)
        pairs_back = _feedback_pairs(feedback, len(stack))
        forward = _pairs("skips", skips, "pairs (earlier, later) of layers, such as [(0, 2)]")
        for a, b in forward:
            if not 0 <= a < b - 1 < len(stack) - 1:
                raise ValueError(
                    f"skips has {(a, b)}; expected pairs (earlier, later) of the layers 0 to {len(stack) - 1} that are not "
                    "neighbours"
                )
        seeing = "layers that see the input, such as (2,)"
        listed = _listed("input_skips", input_skips, seeing)
        extra = tuple(sorted({_whole("input_skips", layer, seeing) for layer in listed}))
        if any(not 1 <= layer < len(stack) for layer in extra):
            expected = f"layers from 1 to {len(stack) - 1}" if len(stack) > 1 else "none, as layer 0 is the only one"
            raise ValueError(f"input_skips is {extra}; expected {expected}: layer 0 sees the input in any case")
        neurons = sum(layer.neurons for layer in stack)
        return cls(int(inputs), stack, pairs_back, forward, extra, _as_outputs(outputs, neurons), constraint)

    # --- sizes -------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> tuple[slice, ...]:
        """The neurons of each layer in the state."""
        ends = np.cumsum([0, *(layer.neurons for layer in self.layers)])
        return tuple(slice(int(a), int(b)) for a, b in pairwise(ends))

    @property
    def neurons(self) -> int:
        """N, all neurons of all layers."""
        return int(self.rows[-1].stop)

    @property
    def linear_readout(self) -> bool:
        """Whether the output is C z + d of the last layer rather than a selection of neurons."""
        return isinstance(self.outputs, int)

    @property
    def read_neurons(self) -> np.ndarray:
        """The neurons of the state that the output reads, linearly or directly."""
        if isinstance(self.outputs, int):
            return np.arange(self.rows[-1].start, self.rows[-1].stop)
        return np.array(self.outputs)

    @property
    def output_size(self) -> int:
        return self.outputs if isinstance(self.outputs, int) else len(self.outputs)

    @cached_property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(block.size for block in self.blocks)

    # --- layout ------------------------------------------------------------------------------------------

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All weight arrays in their order in the parameter vector."""
        return self._layout[0]

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in the order in which they are solved."""
        return self._layout[1]

    def slope_bounds(self, stage: Stage) -> np.ndarray:
        """(n,) the bound on the slope of the activation of each neuron of a stage."""
        layers = [self.layers[layer] for layer in stage.layers]
        return np.concatenate([np.full(layer.neurons, ACTIVATIONS[layer.activation].slope_bound) for layer in layers])

    @without_underflow()
    def recurrent_weights(self, flat: np.ndarray) -> np.ndarray:
        """(N, N) the matrix R in force for the parameters ``flat``."""
        R = np.zeros((self.neurons, self.neurons), flat.dtype)
        for block in self.blocks:
            if block.source != INPUT:
                R[self.rows[block.to], self.rows[block.source]] = block.view(flat)
        for stage in self.stages:
            if stage.recurrent:
                scales = stage.scales.view(flat[None]) if stage.scales else np.empty((1, 0))
                K = R[stage.rows, stage.rows][None]
                R[stage.rows, stage.rows] = self.constraint.apply(K, scales, self.slope_bounds(stage))[0]
        return R

    def read_out(self, flat: np.ndarray, Z: np.ndarray) -> np.ndarray:
        """The outputs (..., B, outputs) of states Z (..., B, N) with the parameters ``flat`` (..., parameters)."""
        if not self.linear_readout:
            return np.asarray(Z[..., self.read_neurons])
        C, d = (block.view(flat) for block in self._readout)
        with np.errstate(all="ignore"):  # faster than a decorator; where z overflowed the status tells
            return np.asarray(Z[..., self.rows[-1]] @ C.swapaxes(-1, -2) + d[..., None, :])

    @cached_property
    def _readout(self) -> tuple[Block, Block]:
        return self.block("C"), self.block("d")

    def block(self, name: str) -> Block:
        """The weight array of that name."""
        return next(block for block in self.blocks if block.name == name)

    def views(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """The weight arrays by name, as views of ``flat`` (parameters,)."""
        return {block.name: block.view(flat) for block in self.blocks}

    @cached_property
    def _layout(self) -> tuple[tuple[Block, ...], tuple[Stage, ...]]:
        blocks: list[Block] = []
        single = len(self.layers) == 1

        def add(name: str, shape: tuple[int, ...], to: int = INPUT, source: int = INPUT) -> Block:
            offset = blocks[-1].offset + blocks[-1].size if blocks else 0
            blocks.append(Block(name, shape, offset, to, source))
            return blocks[-1]

        for to in (0, *self.input_skips):
            add("W" if single else f"W[{to}]", (self.layers[to].neurons, self.inputs), to)
        for to, layer in enumerate(self.layers):
            for source, other in enumerate(self.layers):
                if self._connected(to, source):
                    add("R" if single else f"R[{to},{source}]", (layer.neurons, other.neurons), to, source)
        weights = tuple(blocks)
        add("b", (self.neurons,))
        stages = []
        for layers in self._components():
            rows = slice(self.rows[layers[0]].start, self.rows[layers[-1]].stop)
            recurrent = len(layers) > 1 or self.layers[layers[0]].lateral
            scales = None
            if recurrent and self.constraint.scaled:
                name = "a" if single else f"a[{','.join(map(str, layers))}]"
                scales = add(name, (rows.stop - rows.start,))
            stages.append(Stage(layers, rows, recurrent, tuple(b for b in weights if b.to in layers), scales))
        if isinstance(self.outputs, int):
            add("C", (self.outputs, self.layers[-1].neurons))
            add("d", (self.outputs,))
        return tuple(blocks), tuple(stages)

    def _connected(self, to: int, source: int) -> bool:
        if to == source:
            return self.layers[to].lateral
        if source > to:
            return (source, to) in self.feedback
        return source == to - 1 or (source, to) in self.skips

    def _components(self) -> list[range]:
        # Layer l always feeds layer l + 1, so feedback from j to i closes the cycle i..j: components are intervals.
        components = []
        first = 0
        while first < len(self.layers):
            last = first
            while (reach := max((j for j, i in self.feedback if i <= last), default=last)) > last:
                last = reach
            components.append(range(first, last + 1))
            first = last + 1
        return components

    # --- description -------------------------------------------------------------------------------------

    def facts(self) -> dict[str, str]:
        """A summary for people, in a few words each."""
        connections = {
            "feedback": [f"{later}->{earlier}" for later, earlier in self.feedback],
            "skips": [f"{earlier}->{later}" for earlier, later in self.skips],
            "input skips": [f"->{layer}" for layer in self.input_skips],
        }
        layers = [f"{layer.neurons} {layer.activation}{' lateral' * layer.lateral}" for layer in self.layers]
        outputs = f"{self.output_size} outputs"
        return {
            "inputs": str(self.inputs),
            "layers": _abbreviated(layers),
            **{name: _abbreviated(arrows) for name, arrows in connections.items() if arrows},
            "outputs": outputs if self.linear_readout else f"{outputs} (neurons {_abbreviated(self.read_neurons)})",
            "constraint": str(self.constraint),
            "parameters": str(self.parameters),
        }

    def description(self) -> dict[str, Any]:
        """The topology as plain data, from which ``from_description`` makes an equal one."""
        return {
            "inputs": self.inputs,
            "layers": [dict(vars(layer)) for layer in self.layers],
            "feedback": [list(pair) for pair in self.feedback],
            "skips": [list(pair) for pair in self.skips],
            "input_skips": list(self.input_skips),
            "outputs": self.outputs if isinstance(self.outputs, int) else list(self.outputs),
            "constraint": describe(self.constraint),
        }

    @classmethod
    def from_description(cls, data: Mapping[str, Any]) -> Topology:
        """The inverse of ``description``; ``ValueError``, ``TypeError`` or ``KeyError`` for anything else."""
        constraint = from_description(Constraint, data["constraint"])
        return cls.build(
            data["inputs"],
            [Layer(**layer) for layer in data["layers"]],
            [(int(a), int(b)) for a, b in data["feedback"]],
            [(int(a), int(b)) for a, b in data["skips"]],
            data["input_skips"],
            data["outputs"],
            constraint,
        )


def _as_layer(layer: Layer | int) -> Layer:
    if isinstance(layer, Layer):
        return layer
    if is_whole(layer) and layer > 0:
        return Layer(int(layer))
    if is_whole(layer):
        raise ValueError(f"layers has {layer}; expected numbers of neurons from 1")
    raise TypeError(f"layers has {layer!r}; expected a Layer or a number of neurons")


def _feedback_pairs(feedback: bool | Iterable[tuple[int, int]], layers: int) -> tuple[tuple[int, int], ...]:
    if isinstance(feedback, bool | np.bool_):
        return tuple((j, i) for j in range(1, layers) for i in range(j)) if feedback else ()
    pairs = _pairs("feedback", feedback, "True, False or pairs (later, earlier) of layers, such as [(1, 0)]")
    for j, i in pairs:
        if not 0 <= i < j < layers:
            raise ValueError(f"feedback has {(j, i)}; expected pairs (later, earlier) of the layers 0 to {layers - 1}")
    return pairs


def _pairs(name: str, value: object, expected: str) -> tuple[tuple[int, int], ...]:
    """Pairs of layers, each once, in order."""
    pairs = [_listed(name, pair, expected) for pair in _listed(name, value, expected)]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{name} is {value!r}; expected {expected}")
    whole = {(_whole(name, first, expected), _whole(name, second, expected)) for first, second in pairs}
    return tuple(sorted(whole))


def _listed(name: str, value: Any, expected: str) -> list[Any]:
    """The entries of a list, tuple, set or array; ``TypeError`` for anything else, text included."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable) or getattr(value, "shape", (0,)) == ():
        raise TypeError(f"{name} is {value!r}; expected {expected}")
    return list(value)


def _whole(name: str, value: object, expected: str) -> int:
    if not is_whole(value):
        raise TypeError(f"{name} has {value!r}; expected {expected}")
    return int(value)


def _as_outputs(outputs: int | Sequence[int], neurons: int) -> int | tuple[int, ...]:
    if isinstance(outputs, int | np.integer):
        return check_count("outputs", outputs)
    expected = "a number of outputs or a list of neurons (whole numbers)"
    chosen = tuple(_whole("outputs", neuron, expected) for neuron in _listed("outputs", outputs, expected))
    if not chosen or any(not 0 <= neuron < neurons for neuron in chosen):
        raise ValueError(f"outputs is {list(chosen)}; expected neurons from 0 to {neurons - 1}, at least one")
    return chosen


def _abbreviated(entries: Iterable[object]) -> str:
    """The entries, or of many the first eight and the number of the others."""
    texts = [str(entry) for entry in entries]
    rest = [f"and {len(texts) - 8} more"] if len(texts) > 8 else []
    return ", ".join([*texts[:8], *rest])

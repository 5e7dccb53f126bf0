"""Which outputs of a function depend on which of its many inputs, so that many inputs can be differenced at once.

Inputs that share no output form a group: one evaluation with all of them perturbed gives the derivatives with respect to each
(Curtis, Powell and Reid, J. Inst. Maths Applics 13, 1974). The dependences are found by evaluations with NaN among the
inputs: first in large blocks of neighbours, then in quarters of the blocks, with blocks that share no output at the same time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

_MANY_BLOCKS, _DENSE = 64, 0.25
"""Where more than this share of the pairs of an output and one of so many blocks depend, groups would be too many."""


@dataclass(frozen=True)
class Group:
    """Inputs of which no two have an output in common: ``outputs[j]`` depends on ``inputs[j]`` and no other of the group."""

    inputs: Array
    outputs: Array


def find_groups(probe: Callable[[Array], Array], inputs: int, outputs: int, most: int) -> list[Group] | None:
    """All pairs of an input and an output that depends on it, in few groups; None where ``most`` evaluations do not do.

    ``probe`` tells which outputs (outputs,) become NaN if the inputs of a mask (inputs,) are NaN.
    """
    width = 1
    while width < inputs:
        width *= 4
    place = np.arange(inputs)
    i, block = np.arange(outputs), np.zeros(outputs, np.int64)
    left = most
    while width > 1:
        colour = _colours(i, block, outputs, -(-inputs // width))
        left -= 4 * (colour.max(initial=-1) + 1)
        if left < 0:
            return None
        quarter, of_input = (place % width) // (width // 4), colour[place // width]
        found_outputs, found_blocks = [], []
        for c in range(colour.max(initial=-1) + 1):
            owner = np.full(outputs, -1)
            own = colour[block] == c
            owner[i[own]] = block[own]
            for q in range(4):
                mask = (of_input == c) & (quarter == q)
                if mask.any():
                    hit = np.flatnonzero(probe(mask) & (owner >= 0))
                    found_outputs.append(hit)
                    found_blocks.append(4 * owner[hit] + q)
        i, block = (np.concatenate([np.empty(0, np.int64), *found]) for found in (found_outputs, found_blocks))
        width //= 4
        if inputs // width >= _MANY_BLOCKS and len(i) > _DENSE * outputs * (inputs // width):
            return None
    colour = _colours(i, block, outputs, inputs)
    if colour.max(initial=-1) >= most:
        return None
    order = np.argsort(colour[block], kind="stable")
    bounds = np.searchsorted(colour[block][order], np.arange(colour.max(initial=-1) + 2))
    return [Group(block[order[a:b]], i[order[a:b]]) for a, b in itertools.pairwise(bounds)]


def _colours(i: Array, block: Array, outputs: int, blocks: int) -> Array:
    """A colour for each block, -1 for those without outputs, so that blocks of one colour share no output; greedily."""
    colour = np.full(blocks, -1)
    order = np.argsort(block, kind="stable")
    i, block = i[order], block[order]
    if len(block) == len(np.unique(block)):  # one output each: their order among those of that output
        order = np.argsort(i, kind="stable")
        first = np.searchsorted(i[order], i[order])
        colour[block[order]] = np.arange(len(i)) - first
        return colour
    used = np.zeros((outputs, 8), bool)
    bounds = np.searchsorted(block, np.arange(blocks + 1))
    for b in np.flatnonzero(np.diff(bounds)):
        own = i[bounds[b] : bounds[b + 1]]
        taken = used[own].any(axis=0)
        c = int(taken.argmin())
        if taken[c]:
            c = used.shape[1]
            used = np.concatenate([used, np.zeros_like(used)], axis=1)
        used[own, c] = True
        colour[b] = c
    return colour

"""Upper bounds of dynamic sizes, for engines that lay out memory or choose kernels beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch.utils._pytree as pytree

from ..graph import Program
from ._refusals import is_empty

#: A dynamic size may be this many times the example's, and always at least the second number.
TIMES, LEAST = 4, 16

#: (flat input, axis, largest size)
Limit = tuple[int, int, int]


def limits(program: Program) -> list[Limit]:
    """The bound of each dynamic size: four times the example's or 16, within what the program itself allows."""
    leaves = pytree.tree_leaves(program.example_inputs)
    own = {(i, axis): (low, high) for i, axis, _, low, high in program.signature.limits}
    found = []
    for number, shape in enumerate(program.input_shapes()):
        for axis, size in enumerate(shape):
            if isinstance(size, str):
                low, high = own.get((number, axis), (0, math.inf))
                most = min(max(TIMES * leaves[number].shape[axis], LEAST, low), high)
                found.append((number, axis, int(most)))
    return found


def beyond(bounds: Sequence[Limit]) -> Callable[[Sequence[Any]], bool]:
    """Whether flat inputs are empty or larger than the bounds."""
    return lambda leaves: is_empty(leaves) or any(leaves[i].shape[axis] > most for i, axis, most in bounds)

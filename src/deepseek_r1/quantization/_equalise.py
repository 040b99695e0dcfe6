"""Ranges of channels made alike between two convolutions, so that one step suits them all; the float answers stay.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019. There the ranges of
weights are made alike, for one scale a tensor. Here weights have a scale for each output channel, so that the ranges of
activations are what is left to gain.

A clamp at 6 between the two does not bear scales as ReLU does. There, channels are only made larger, and only those
that stay so far below 6 on the calibration data that the clamp remains `_MARGIN` times above what was seen. What
exceeds that is cut off earlier than in the float program, as an int8 range fixed by calibration cuts it off too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graph.editing import argument, constant_of
from ._layers import CONVOLUTIONS, layer_name
from ._observe import not_finite, watch
from ._scaling import is_own, replace_constant

aten = torch.ops.aten
METHODS = ("weights", "activations")
_RELU = (aten.relu.default, aten.relu_.default)
_CLAMPS = (aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default)
_MARGIN = 2.0
#: How far one channel may be moved against another.
_LIMIT = 64.0


@dataclass
class _Pair:
    """Two convolutions with nothing but an activation function between them.

    Attributes:
        top: the value at which the function clamps, infinity if it does not.
    """

    first: Node
    second: Node
    top: float
    largest: Tensor | None = None

    def see(self, node: Node, value: Tensor) -> None:
        if not torch.isfinite(value).all():
            raise not_finite(node)
        dims = [d for d in range(value.ndim) if d != value.ndim - self.spatial - 1]
        # Behind a function that cuts off below 0, only what is above counts.
        size = (value.abs() if self.top == float("inf") and not self.relu else value.clamp_min(0)).amax(dims)
        self.largest = size if self.largest is None else torch.maximum(self.largest, size)

    @property
    def spatial(self) -> int:
        """Spatial dimensions of the convolutions."""
        return int(self.first.meta["val"].ndim) - 2 if self.first.meta["val"].ndim > 2 else 1

    @property
    def relu(self) -> bool:
        """Whether negative numbers are cut off between the two."""
        return next(iter(self.first.users)) is not self.second

    @property
    def depthwise(self) -> bool:
        """Whether each channel of the second has weights of its own."""
        return int(argument(self.second, 6, 1)) != 1


def equalise(module: GraphModule, batches: list[tuple[Any, ...]], method: str) -> list[tuple[str, str]]:
    """Changes the graph: scales channels between convolutions.

    Args:
        method: "weights" (after the source), or "activations" (largest values of each channel).

    Returns:
        Names of the pairs, and what was done.

    Raises:
        InputError: a batch gives a value that is not finite.
    """
    pairs = [p for node in module.graph.nodes if (p := _pair(module, node)) is not None]
    by_node = {pair.first: pair for pair in pairs}
    watch(module, by_node, batches, lambda node, value: by_node[node].see(node, value))
    # Scales of what was seen: a pair before divides what this one's first convolution reads, not what it gives.
    choose: Callable[[GraphModule, _Pair], Tensor] = _by_weights if method == "weights" else _by_activations
    done = []
    for pair in pairs:
        if pair.largest is None or not float(pair.largest.max()):
            continue
        scale = _allowed(pair, choose(module, pair))
        if bool((scale == 1).all()):
            continue
        _apply(module, pair, scale)
        moved = int((scale != 1).sum())
        kept = "" if pair.top == float("inf") else f"; the others come near the clamp at {pair.top:g}"
        names = f"{layer_name(pair.first)}, {layer_name(pair.second)}"
        done.append((names, f"{moved} of {len(scale)} channels{kept}"))
    return done


def _pair(module: GraphModule, first: Node) -> _Pair | None:
    if first.target not in CONVOLUTIONS or len(first.users) != 1:
        return None
    middle = next(iter(first.users))
    second, top = middle, float("inf")
    if middle.target not in CONVOLUTIONS:
        found = _clamp_of(middle)
        if found is None or len(middle.users) != 1:
            return None
        second, top = next(iter(middle.users)), found
    if second.target not in CONVOLUTIONS or second.args[0] not in (first, middle):
        return None
    channels = first.meta["val"].shape[-(first.meta["val"].ndim - 1) if first.meta["val"].ndim > 2 else 0]
    groups = argument(second, 6, 1)
    constants = [argument(first, 1), argument(second, 1)]
    if argument(first, 2) is not None:
        constants.append(argument(first, 2))
    if groups not in (1, channels) or not all(is_own(module, c) for c in constants):
        return None
    return _Pair(first, second, top)


def _clamp_of(node: Node) -> float | None:
    """Where an activation function cuts off above: infinity for ReLU; None if it is another function."""
    if node.target in _RELU:
        return float("inf")
    if node.target is aten.relu6.default:
        return 6.0
    if node.target in _CLAMPS:
        low, high = argument(node, 1, -1.0), argument(node, 2, 1.0)
        if low == 0 and isinstance(high, int | float) and high > 0:
            return float(high)
    return None


def _ranges(module: GraphModule, pair: _Pair) -> tuple[Tensor, Tensor]:
    """The largest weight that makes each channel, and the largest that reads it."""
    first, second = constant_of(module, pair.first.args[1]), constant_of(module, pair.second.args[1])
    assert first is not None
    assert second is not None
    mine = first.detach().abs().flatten(1).amax(1)
    read = second.detach().abs()
    theirs = (read if pair.depthwise else read.transpose(0, 1)).flatten(1)
    if pair.depthwise and len(theirs) != len(mine):
        theirs = theirs.reshape(len(mine), -1)
    return mine.clamp_min(1e-8), theirs.amax(1).clamp_min(1e-8)


def _by_weights(module: GraphModule, pair: _Pair) -> Tensor:
    mine, theirs = _ranges(module, pair)
    return (mine / theirs).sqrt()


def _by_activations(module: GraphModule, pair: _Pair) -> Tensor:
    assert pair.largest is not None
    size = pair.largest.clamp_min(float(pair.largest.max()) * 1e-4)
    if pair.depthwise:
        return size
    _, theirs = _ranges(module, pair)
    return (size / theirs).sqrt()


def _allowed(pair: _Pair, wanted: Tensor) -> Tensor:
    """The scale that each channel is divided by, within what the function between the two bears."""
    assert pair.largest is not None
    if pair.top == float("inf"):
        centre = wanted.log().mean().exp()
        return (wanted / centre).clamp(1 / _LIMIT, _LIMIT)
    # Relative to the channels that fill the range up to the clamp.
    seen = (pair.largest * _MARGIN / pair.top).clamp(1 / _LIMIT, 1.0)
    relative = (wanted / wanted.max()).clamp(1 / _LIMIT, 1.0)
    return torch.maximum(seen, relative)


def _apply(module: GraphModule, pair: _Pair, scale: Tensor) -> None:
    for place in (1, 2):
        node = argument(pair.first, place)
        tensor = None if node is None else constant_of(module, node)
        if tensor is not None:
            replace_constant(module, node, tensor / scale.reshape(-1, *[1] * (tensor.ndim - 1)))
    node = argument(pair.second, 1)
    tensor = constant_of(module, node)
    assert tensor is not None
    if pair.depthwise:
        each = scale.repeat_interleave(len(tensor) // len(scale))
        replace_constant(module, node, tensor * each.reshape(-1, *[1] * (tensor.ndim - 1)))
    else:
        replace_constant(module, node, tensor * scale.reshape(1, -1, *[1] * (tensor.ndim - 2)))

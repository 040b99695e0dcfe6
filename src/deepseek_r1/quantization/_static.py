"""Which values of a graph are quantised with fixed ranges, once it is known which layers are. Knows no ranges."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ..core import LayerFormat
from ..graph.editing import argument
from ._layers import Layer

aten = torch.ops.aten
_ADD = (aten.add.Tensor, aten.add_.Tensor)
#: Activation functions that engines fuse into the operator before them; the pair goes behind.
_FUSED = (
    aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default,
    aten.clamp.default, aten.clamp_min.default,
)  # fmt: skip


#: Operators whose values are those of their input, zeros aside: the same range serves both.
_MOVES = (
    aten.constant_pad_nd.default, aten.pad.default, aten.max_pool1d.default, aten.max_pool2d.default,
    aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
    aten.unsqueeze.default, aten.squeeze.dim,
)  # fmt: skip


#: Operators that keep the integers of what they read, or nearly.
_RESHAPES = (
    aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.flatten.using_ints,
    aten.mean.dim, aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.cat.default,
    aten.slice.Tensor, aten.dropout.default,
)  # fmt: skip


@dataclass(frozen=True)
class StaticPlan:
    """Values that get a pair of quantize and dequantize.

    Attributes:
        values: value -> those that read it quantised; None stands for all. What an integer operator gives is quantised
            for everybody; what it merely takes stays float for float readers.
        additions: the residual additions among the operators.
    """

    values: dict[Node, set[Node] | None]
    additions: list[Node]


def static_plan(module: GraphModule, formats: Mapping[Layer, LayerFormat], *, additions: bool) -> StaticPlan:
    """The values that static layers and residual additions read and give.

    Args:
        additions: whether residual additions of one value that is quantised anyway become integer operators; else
            only those of two, because elsewhere they would only add conversions.
    """
    static = {node for layer, fmt in formats.items() if fmt.activation == "static" for node in layer.nodes}
    wanted = _read_as_integers(module, static)
    values: dict[Node, set[Node] | None] = {}
    added = []
    for node in module.graph.nodes:
        if node in static:
            inputs = [node.args[0]]
        elif node.target in _ADD and node in wanted and _is_residual(node):
            inputs = list(node.args[:2])
            # One of two numbers that no layer gave, such as the squares of a power spectrum, is no residual, and may
            # need a wider range.
            enough = any if additions else all
            if not enough(v in values for v in inputs):
                continue
            added.append(node)
        else:
            continue
        for value in _quantisable(inputs):
            readers = values.setdefault(value, set())
            if readers is not None:
                readers.add(node)
        result = output_of(node)
        # Engines compute a linear layer in integers with float results too, a convolution only with integer ones.
        if node.target is not aten.linear.default or result in wanted:
            for value in _quantisable([result]):
                values[value] = None
    return StaticPlan(values, added)


def range_of(value: Node) -> Node:
    """The value whose range a value has: itself, or what it was moved, padded or pooled from."""
    while value.target in _MOVES and isinstance(value.args[0], Node) and _pads_with_zero(value):
        value = value.args[0]
    return value


def _pads_with_zero(node: Node) -> bool:
    if node.target is aten.constant_pad_nd.default:
        return not argument(node, 2, 0)
    return node.target is not aten.pad.default or (
        argument(node, 2, "constant") == "constant" and not argument(node, 3, None)
    )


def _read_as_integers(module: GraphModule, static: Collection[Node]) -> set[Node]:
    """Values that go to a static layer, with nothing but pooling, reshapes, and such additions in between.

    An addition whose sum a norm reads, as in a transformer, would only lose digits in 8 bits: the norm computes in
    floats.
    """
    passes = (*_FUSED, *_ADD, *_RESHAPES)
    found: set[Node] = set()
    for node in reversed(module.graph.nodes):
        if any(user in static or (user in found and user.target in passes) for user in node.users):
            found.add(node)
    return found


def _quantisable(values: Iterable[object]) -> list[Node]:
    return [v for v in values if isinstance(v, Node) and is_float(v) and not _is_output(v)]


def _is_residual(node: Node) -> bool:
    """Whether a node adds two computed float tensors of the same shape."""
    a, b = argument(node, 0), argument(node, 1)
    if not (isinstance(a, Node) and isinstance(b, Node) and a.op == b.op == "call_function" and is_float(node)):
        return False
    return is_float(a) and is_float(b) and a.meta["val"].shape == b.meta["val"].shape and a.meta["val"].ndim >= 3


def is_float(node: Node) -> bool:
    """Whether a node gives a float32 tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def output_of(node: Node) -> Node:
    """The node itself, or the activation function that is its only user."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in _FUSED:
        return users[0]
    return node


def _is_output(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)

"""The neutral form in a graph: weights stored as integers, activations in pairs of quantize and dequantize.

Knows nothing about which layers, ranges and formats were chosen, nor why.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch.fx import GraphModule, Node

from ..core import INT8_ACTIVATION, INT8_WEIGHT, UINT4, LayerFormat
from ..graph.editing import add_constant, argument, constant_of
from ..ops import pack_uint4, unpack_uint4
from ._layers import Layer
from ._observe import affine
from ._static import StaticPlan
from ._weights import StoredWeight

aten = torch.ops.aten
_q = torch.ops.quantized_decomposed


def apply_formats(
    module: GraphModule,
    formats: Mapping[Layer, LayerFormat],
    plan: StaticPlan,
    weight_of: Callable[[Layer, LayerFormat], StoredWeight],
    limits_of: Callable[[Node], tuple[float, float]],
) -> None:
    """Bring layers into their formats, and the values of a plan into fixed ranges."""
    for number, (layer, fmt) in enumerate(formats.items()):
        store_weight(module, layer, weight_of(layer, fmt), number)
    for node, readers in plan.values.items():
        insert_pair(module, node, limits_of(node), readers)
    insert_dynamic_pair(module, [n for layer, f in formats.items() if f.activation == "dynamic" for n in layer.nodes])


def store_weight(module: GraphModule, layer: Layer, stored: StoredWeight, number: int) -> None:
    """Put a weight into the graph as it is stored, and let the layer's nodes read it from there.

    Args:
        number: makes the names of what is stored unique.
    """
    first = next(n for n in module.graph.nodes if n.op == "call_function")
    if stored.scales is None:
        low = add_constant(module, first, stored.values, f"q{number}_weight")
        for node in layer.nodes:
            _compute_in_bfloat16(module, node, low)
        return
    read = _read_channels if stored.zeros is None else _read_groups
    back = read(module, first, stored, number)
    for node in layer.nodes:
        if stored.missing is not None:
            _correct_bias(module, node, stored.missing, number)
        with module.graph.inserting_before(node):
            node.replace_input_with(layer.source, module.graph.call_function(*back))


_Call = tuple[Any, tuple[Any, ...]]


def _read_channels(module: GraphModule, first: Node, stored: StoredWeight, number: int) -> _Call:
    assert stored.scales is not None, "integers have scales"
    zeros = torch.zeros(len(stored.scales), dtype=torch.int8, device=stored.scales.device)
    parts = [
        add_constant(module, first, tensor, f"q{number}_{name}")
        for name, tensor in (("weight", stored.values), ("scale", stored.scales), ("zero", zeros))
    ]
    return _q.dequantize_per_channel.default, (*parts, 0, *INT8_WEIGHT.range, torch.int8)


def _read_groups(module: GraphModule, first: Node, stored: StoredWeight, number: int) -> _Call:
    assert stored.scales is not None, "groups have scales"
    assert stored.zeros is not None, "groups have zero points"
    packed, scales, zeros = (
        add_constant(module, first, tensor, f"q{number}_{name}")
        for name, tensor in (("packed", pack_uint4(stored.values)), ("scale", stored.scales), ("zero", stored.zeros))
    )
    # The next capture puts operators in the function's place.
    with module.graph.inserting_before(first):
        values = module.graph.call_function(unpack_uint4, (packed,))
    size = stored.values.shape[1] // stored.scales.shape[1]
    limits = (*UINT4, torch.uint8, size, torch.float32)
    return _q.dequantize_per_channel_group.default, (values, scales, zeros, *limits)


def _compute_in_bfloat16(module: GraphModule, node: Node, weight: Node) -> None:
    bias = argument(node, 2)
    with module.graph.inserting_before(node):
        low = module.graph.call_function(aten.to.dtype, (node.args[0], torch.bfloat16))
        if isinstance(bias, Node):
            bias = module.graph.call_function(aten.to.dtype, (bias, torch.bfloat16))
    with module.graph.inserting_after(node):
        back = module.graph.call_function(aten.to.dtype, (node, torch.float32))
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    node.args = (low, weight, bias, *node.args[3:])


def _correct_bias(module: GraphModule, node: Node, missing: torch.Tensor, number: int) -> None:
    old = constant_of(module, argument(node, 2))
    if old is None and argument(node, 2) is not None:
        return
    bias = missing.float() if old is None else (old.detach().double() + missing).float()
    new = add_constant(module, node, bias, f"q{number}_bias")
    node.args = (*node.args[:2], new, *node.args[3:])


def insert_pair(
    module: GraphModule, node: Node, limits: tuple[float, float], users: Collection[Node] | None = None
) -> None:
    """Quantise a value with a fixed range and give each of its users, or of some of them, a dequantize node."""
    scale, zero = affine(*limits, INT8_ACTIVATION)
    fixed = (scale, zero, *INT8_ACTIVATION.range, torch.int8)
    readers = [user for user in node.users if users is None or user in users]
    # One pair for each consumer: engines match a pair with the operator behind it, and share the integer tensor.
    with module.graph.inserting_after(node):
        stored = module.graph.call_function(_q.quantize_per_tensor.default, (node, *fixed))
    anchor = stored
    for user in readers:
        with module.graph.inserting_after(anchor):
            anchor = module.graph.call_function(_q.dequantize_per_tensor.default, (stored, *fixed))
        user.replace_input_with(node, anchor)


def insert_dynamic_pair(module: GraphModule, layers: Iterable[Node]) -> None:
    """Quantise what linear layers read, each row with its own range: once for all layers that read the same."""
    made: dict[Node, tuple[Any, ...]] = {}
    low, high = INT8_ACTIVATION.range
    for node in layers:
        source: Any = node.args[0]
        if source not in made:
            with module.graph.inserting_after(source):
                chosen = module.graph.call_function(
                    _q.choose_qparams_per_token_asymmetric.default, (source, torch.int8)
                )
            with module.graph.inserting_after(chosen):
                scale = module.graph.call_function(operator.getitem, (chosen, 0))
                zero = module.graph.call_function(operator.getitem, (chosen, 1))
            with module.graph.inserting_after(scale):
                fixed = (scale, zero, low, high, torch.int8)
                stored = module.graph.call_function(_q.quantize_per_token.default, (source, *fixed))
            made[source] = (stored, *fixed, torch.float32)
        with module.graph.inserting_before(node):
            node.update_arg(0, module.graph.call_function(_q.dequantize_per_token.default, made[source]))

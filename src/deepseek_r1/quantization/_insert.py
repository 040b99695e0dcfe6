"""The neutral form in a graph: weights stored as integers, activations in pairs of quantize and dequantize.

Knows nothing about which layers, ranges and formats were chosen, nor why.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch.fx import GraphModule, Node

from ..core import INT8_ACTIVATION, INT8_WEIGHT, UINT4, Int4Format, LayerFormat
from ..graph.editing import add_constant, argument, constant_of
from ..ops import pack_uint4, unpack_uint4
from ._groups import Grouped, quantize_groups
from ._layers import Layer
from ._observe import affine, quantize_weight
from ._rounding import Moments, round_groups, round_weight

aten = torch.ops.aten
_q = torch.ops.quantized_decomposed


def store_weight(
    module: GraphModule,
    layer: Layer,
    fmt: LayerFormat,
    moments: Moments | None,
    number: int,
    clip: str,
    group_clip: str,
) -> None:
    """Store a layer's weight in a format, and let its nodes read it from there.

    Args:
        moments: of what the layer's one node reads, for compensated rounding; None rounds to the nearest.
        number: makes the names of what is stored unique.
        clip: how the range of 8-bit weights is found; `group_clip` that of 4-bit weights.
    """
    first = next(n for n in module.graph.nodes if n.op == "call_function")
    missing = None
    if fmt.weight_bits == 16:
        stored = (add_constant(module, first, layer.weight.detach().to(torch.bfloat16), f"q{number}_weight"),)
        for node in layer.nodes:
            _compute_in_bfloat16(module, node, stored[0], number)
        return
    if isinstance(fmt, Int4Format):
        grouped = quantize_groups(layer.weight, fmt.group_size, symmetric=fmt.symmetric, method=group_clip)
        if moments is not None:
            grouped, missing = round_groups(layer.weight, grouped, moments)
        back = _read_groups(module, first, grouped, number)
    else:
        values, scales = quantize_weight(layer.weight, INT8_WEIGHT, clip)
        if moments is not None:
            values, missing = round_weight(layer.weight, scales, moments, INT8_WEIGHT)
        back = _read_channels(module, first, values, scales, number)
    for node in layer.nodes:
        if missing is not None:
            _correct_bias(module, node, missing, number)
        with module.graph.inserting_before(node):
            node.replace_input_with(layer.source, module.graph.call_function(*back))


_Call = tuple[Any, tuple[Any, ...]]


def _read_channels(module: GraphModule, first: Node, values: torch.Tensor, scales: torch.Tensor, number: int) -> _Call:
    zeros = torch.zeros(len(scales), dtype=torch.int8, device=scales.device)
    stored = [
        add_constant(module, first, tensor, f"q{number}_{name}")
        for name, tensor in (("weight", values), ("scale", scales), ("zero", zeros))
    ]
    return _q.dequantize_per_channel.default, (*stored, 0, *INT8_WEIGHT.range, torch.int8)


def _read_groups(module: GraphModule, first: Node, grouped: Grouped, number: int) -> _Call:
    packed, scales, zeros = (
        add_constant(module, first, tensor, f"q{number}_{name}")
        for name, tensor in (("packed", pack_uint4(grouped.values)), ("scale", grouped.scales), ("zero", grouped.zeros))
    )
    # The next capture puts operators in the function's place.
    with module.graph.inserting_before(first):
        values = module.graph.call_function(unpack_uint4, (packed,))
    limits = (*UINT4, torch.uint8, grouped.group_size, torch.float32)
    return _q.dequantize_per_channel_group.default, (values, scales, zeros, *limits)


def _compute_in_bfloat16(module: GraphModule, node: Node, weight: Node, number: int) -> None:
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


def insert_pair(module: GraphModule, node: Node, limits: tuple[float, float]) -> None:
    """Quantise a value with a fixed range and give each of its users a dequantize node."""
    scale, zero = affine(*limits, INT8_ACTIVATION)
    fixed = (scale, zero, *INT8_ACTIVATION.range, torch.int8)
    users = list(node.users)
    # One pair for each consumer: engines match a pair with the operator behind it, and share the integer tensor.
    with module.graph.inserting_after(node):
        stored = module.graph.call_function(_q.quantize_per_tensor.default, (node, *fixed))
    anchor = stored
    for user in users:
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

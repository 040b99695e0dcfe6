"""Quantised linear layers of a graph as this package's own operators. Knows the neutral form, no engine."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch.fx import GraphModule, Node

from ..core.formats import GROUP_SIZES
from ..graph import Program
from ..graph.editing import add_call, add_constant, argument, constant_value
from ..ops import FUNCTIONS, MOST_INPUTS, pack_int4, pack_int8

aten = torch.ops.aten
_q = torch.ops.quantized_decomposed
_CHANNELS, _GROUPS = _q.dequantize_per_channel.default, _q.dequantize_per_channel_group.default
_LIMITS = (-128, 127, torch.int8)


def native_layers(program: Program) -> int:
    """How many linear layers of a program have a form that there are kernels for."""
    return sum(_fits(node) for node in program.exported.graph.nodes)


def use_native_layers(module: GraphModule) -> int:
    """Changes the graph: such layers, with an activation function behind them, become one operator each."""
    packed: dict[Any, tuple[Node, int]] = {}
    count = 0
    for node in list(module.graph.nodes):
        if _fits(node) and (bias := _bias(module, node)) is not None:
            weight = _packed(module, node.args[1], packed)
            if weight is not None:
                _replace(node, *weight, bias)
                count += 1
    return count


def _fits(node: Node) -> bool:
    """Whether a node is a linear layer with int8 activations, ranges found at each call, and 8- or 4-bit weights."""
    if node.target is not aten.linear.default or _dynamic_source(node.args[0]) is None:
        return False
    weight: Any = node.args[1]
    if not isinstance(weight, Node) or weight.meta["val"].ndim != 2:
        return False
    if weight.target is _CHANNELS:
        return bool(weight.args[3] == 0 and weight.meta["val"].shape[1] <= MOST_INPUTS)
    return weight.target is _GROUPS and argument(weight, 6) in GROUP_SIZES


def _dynamic_source(value: Any) -> Node | None:
    """What was quantised row by row, in int8 and with its own ranges, to give a value."""
    if not isinstance(value, Node) or value.target is not _q.dequantize_per_token.default:
        return None
    stored: Any = value.args[0]
    if stored.target is not _q.quantize_per_token.default or stored.args[1:] != value.args[1:6]:
        return None
    source, scale, zero, *limits = stored.args
    if scale.target is not operator.getitem or zero.target is not operator.getitem or tuple(limits) != _LIMITS:
        return None
    chosen = scale.args[0]
    if zero.args[0] is not chosen or chosen.target is not _q.choose_qparams_per_token_asymmetric.default:
        return None
    float32 = source.meta["val"].dtype is torch.float32 and value.meta["val"].dtype is torch.float32
    return source if chosen.args[0] is source and float32 else None


def _bias(module: GraphModule, node: Node) -> torch.Tensor | None:
    """The bias, zeros if there is none; None if it is not known yet."""
    given = argument(node, 2)
    if given is None:
        return torch.zeros(node.args[1].meta["val"].shape[0])  # type: ignore[union-attr]
    value = constant_value(module, given)
    return value.detach().float().contiguous() if value is not None and value.dtype is torch.float32 else None


def _packed(module: GraphModule, weight: Any, made: dict[Any, tuple[Node, int]]) -> tuple[Node, int] | None:
    """The packed form of a weight, one for all layers that share it, and the size of its groups (0 for none)."""
    # The same stored tensors, though each call of a layer may have nodes of its own for reading them.
    key = weight.target, weight.args[1], weight.args[2]
    if key in made:
        return made[key]
    values, scales, zeros = (constant_value(module, part) for part in weight.args[:3])
    if values is None or scales is None or zeros is None or scales.dtype is not torch.float32:
        return None
    size = 0
    if weight.target is _GROUPS:
        size = argument(weight, 6)
        tensor = pack_int4(values.to(torch.uint8), scales, zeros)
    elif values.dtype is torch.int8 and not bool(zeros.any()):
        tensor = pack_int8(values, scales)
    else:
        return None
    first = next(n for n in module.graph.nodes if n.op == "call_function")
    made[key] = add_constant(module, first, tensor, "packed"), size
    return made[key]


def _replace(node: Node, packed: Node, group_size: int, bias: torch.Tensor) -> None:
    last, function = _function(node)
    module = node.graph.owning_module
    assert module is not None, "graphs that are edited belong to a module"
    stored = add_constant(module, node, bias, "packed_bias")
    source = _dynamic_source(node.args[0])
    number = FUNCTIONS.index(function)
    if group_size:
        target, rest = torch.ops.dr1.int4_dynamic_linear.default, (group_size, number)
    else:
        target, rest = torch.ops.dr1.int8_dynamic_linear.default, (number,)  # type: ignore[assignment]
    new = add_call(node, target, (source, packed, stored, *rest))
    last.replace_all_uses_with(new)


def _function(node: Node) -> tuple[Node, str]:
    """The activation function that is a layer's only reader, and its name; the layer itself and "none"."""
    users = list(node.users)
    if len(users) == 1:
        user = users[0]
        if user.target in (aten.relu.default, aten.silu.default):
            return user, "relu" if user.target is aten.relu.default else "silu"
        if user.target is aten.gelu.default:
            tanh = user.kwargs.get("approximate", "none") == "tanh" or "tanh" in user.args
            return user, "gelu_tanh" if tanh else "gelu"
    return node, "none"

"""Weights of 4 bits as floats, for engines that have no kernels for them. Knows no engine."""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed
from torch.fx import GraphModule

from ..graph import Program
from ..graph.editing import add_constant, constant_value

_q = torch.ops.quantized_decomposed


def floats_of_groups(program: Program) -> int:
    """Bytes by which a program grows if its weights that are stored in groups become floats."""
    grown = 0
    for node in program.exported.graph.nodes:
        if node.target is _q.dequantize_per_channel_group.default:
            numbers = node.meta["val"].numel()
            grown += 4 * numbers - numbers // 2 - sum(part.meta["val"].nbytes for part in node.args[1:3])
    return grown


def float_groups(module: GraphModule) -> int:
    """Changes the graph: weights stored in groups become what they stand for. Returns how many there were."""
    count = 0
    for node in list(module.graph.nodes):
        if node.target is not _q.dequantize_per_channel_group.default:
            continue
        weight = constant_value(module, node)
        if weight is not None:
            node.replace_all_uses_with(add_constant(module, node, weight, "float_weight"))
            count += 1
    return count

"""Linear layers that read the same value become one wider layer (query, key and value of attention, for example)."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..editing import add_call, add_constant, argument, constant_of
from ._effects import Aliases

aten = torch.ops.aten


def merge_linears(module: GraphModule) -> int:
    """Merge linear layers with the same input into one whose output is split."""
    groups: dict[Any, list[Node]] = {}
    for node in module.graph.nodes:
        if node.target is aten.linear.default and (weight := constant_of(module, node.args[1])) is not None:
            key = (node.args[0], weight.dtype, weight.device, argument(node, 2) is None)
            groups.setdefault(key, []).append(node)
    return sum(_merge(module, nodes, number) for number, nodes in enumerate(groups.values()) if len(nodes) > 1)


def _merge(module: GraphModule, nodes: list[Node], number: int) -> bool:
    weights = [constant_of(module, n.args[1]) for n in nodes]
    biases = [constant_of(module, argument(n, 2)) for n in nodes]
    has_bias = argument(nodes[0], 2) is not None
    if has_bias and any(b is None for b in biases):
        return False
    aliases = Aliases(module)
    touched = [v for n in nodes for v in (n, *n.all_input_nodes)]
    # An output that leaves the graph has its own memory; it would become a part of a larger one.
    if not aliases.stable(*touched) or any(aliases.is_outside(n) for n in nodes):
        return False
    # A view of a part fails where the parts do not lie together, which the shapes of the whole would tell too late.
    if any(user.target is aten.view.default and not _splits_last(user, n) for n in nodes for user in n.users):
        return False
    first = nodes[0]
    weight = torch.cat([w.detach() for w in weights if w is not None])
    args: tuple[Any, ...] = (first.args[0], add_constant(module, first, weight, f"merged_{number}_weight"))
    if has_bias:
        bias = torch.cat([b.detach() for b in biases if b is not None])
        args = (*args, add_constant(module, first, bias, f"merged_{number}_bias"))
    whole = add_call(first, aten.linear.default, args)
    widths = [len(w) for w in weights if w is not None]
    parts = add_call(first, aten.split_with_sizes.default, (whole, widths, -1))
    for index, node in enumerate(nodes):
        node.replace_all_uses_with(add_call(first, operator.getitem, (parts, index)))
    return True


def _splits_last(view: Node, source: Node) -> bool:
    """Whether a view leaves all dimensions but the last as they are."""
    before, after = source.meta["val"].shape, view.meta["val"].shape
    rank = len(before) - 1
    return [str(s) for s in before[:rank]] == [str(s) for s in after[:rank]]

"""Products with a constant matrix become linear layers, without the views that made their input flat."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..editing import add_call, add_constant, argument, constant_of
from ._effects import Aliases
from ._tidy import sizes

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def name_linears(module: GraphModule) -> int:
    """Put products with a constant matrix (`addmm`, `mm`, `matmul`) into linear layers, which can be quantised."""
    turned: dict[Any, Node] = {}
    return sum(_replace(module, node, turned) for node in list(module.graph.nodes))


def _replace(module: GraphModule, node: Node, turned: dict[Any, Node]) -> bool:
    found = _product(node)
    if found is None:
        return False
    x, weight_node, bias = found
    weight = constant_of(module, weight_node)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return False
    if not isinstance(x, Node) or not x.meta["val"].is_floating_point() or x.meta["val"].ndim < 2:
        return False
    vector = constant_of(module, bias)
    if bias is not None and (vector is None or vector.shape != weight.shape[1:]):
        return False
    top, source = node, x
    # A view that flattens everything but the features, and one that undoes it, are what a linear layer does itself.
    if x.target in _VIEWS and len(node.users) == 1 and (behind := next(iter(node.users))).target in _VIEWS:
        inner: Any = x.args[0]
        before, after = sizes(inner), sizes(behind)
        if before[:-1] == after[:-1] and before[-1] == sizes(x)[-1] and after[-1] == sizes(node)[-1]:
            top, source = behind, inner
    if not Aliases(module).stable(node, top, x, source, weight_node, bias):
        return False
    # A matrix that is used several times is turned once, where it is used first.
    if weight_node.target not in turned:
        turned[weight_node.target] = add_constant(module, node, weight.detach().t().contiguous(), f"{node.name}_weight")
    new = add_call(top, aten.linear.default, (source, turned[weight_node.target], bias))
    top.replace_all_uses_with(new)
    return True


def _product(node: Node) -> tuple[Any, Any, Any] | None:
    """Left side, right side and bias of a matrix product."""
    if node.target is aten.addmm.default:
        plain = all(node.kwargs.get(name, 1) == 1 for name in ("alpha", "beta"))
        return (node.args[1], node.args[2], node.args[0]) if plain else None
    if node.target in (aten.mm.default, aten.matmul.default):
        return argument(node, 0), argument(node, 1), None
    return None

"""Passes that take nodes away without changing a number: no-operations, repeated work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..editing import argument, constant_of
from ._effects import Aliases, is_pure

aten = torch.ops.aten


def remove_identities(module: GraphModule) -> int:
    """Remove what gives its input back: dropout in evaluation mode, casts, copies, views, slices, permutations, x * 1.

    Assertions about a tensor's dtype and device go too: in a static graph they hold for every input that fits.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
            count += 1
    aliases = Aliases(module)
    for node in list(module.graph.nodes):
        same = _same_as(module, node) if node.op == "call_function" else None
        if same is None or not _like(same, node) or not aliases.stable(*node.all_input_nodes):
            continue
        if aliases.may_join(node, same):
            aliases.join(node, same)
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)
            count += 1
    return count


def share_subexpressions(module: GraphModule) -> int:
    """Compute once what is computed several times from the same values."""
    count = 0
    aliases = Aliases(module)
    seen: dict[Any, Node] = {}
    for node in list(module.graph.nodes):
        if not is_pure(node) or _is_quantisation(node) or not aliases.stable(node, *node.all_input_nodes):
            continue
        key = (node.op, node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node and aliases.may_join(node, first):
            aliases.join(node, first)
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)
            count += node.op == "call_function"
    return count


def _is_quantisation(node: Node) -> bool:
    # Engines match each of these with the operator beside it, so none is shared.
    return getattr(node.target, "namespace", "") == "quantized_decomposed"


def _key(value: Any) -> Any:
    """A value that is equal for equal arguments only: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if isinstance(value, list | tuple):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _key((value.start, value.stop, value.step)))
    return value if isinstance(value, Node) else (type(value), repr(value))


def _like(one: Node, other: Node) -> bool:
    """Whether two values have the same dtype, device and size for every size of the inputs."""
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return (a.dtype, a.device, a.layout, sizes(one)) == (b.dtype, b.device, b.layout, sizes(other))


def sizes(node: Any) -> tuple[str, ...]:
    """The sizes of a value as text; symbolic sizes are equal for all inputs exactly if their texts are."""
    return tuple(str(size) for size in node.meta["val"].shape)


def _same_as(module: GraphModule, node: Node) -> Node | None:
    """The input that a node repeats if their shapes and dtypes agree."""
    rule = _RULES.get(node.target)
    if rule is not None and rule(module, node):
        found = node.args[0]
        if node.target is aten.cat.default:
            found = found[0]  # type: ignore[index]
        return found if isinstance(found, Node) else None
    if node.target in _PERMUTATIONS:
        return _undone(node)
    if node.target in (aten.mul.Tensor, aten.add.Tensor) and constant_scalar(module, node.args[0]) is not None:
        neutral = 1 if node.target is aten.mul.Tensor else 0
        plain = constant_scalar(module, node.args[0]) == neutral and node.kwargs.get("alpha", 1) == 1
        return node.args[1] if plain and isinstance(node.args[1], Node) else None
    return None


def constant_scalar(module: GraphModule, value: Any) -> float | None:
    """The number behind a Python number or a constant of one element that nobody trains; else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    tensor = constant_of(module, value)
    if tensor is None or tensor.numel() != 1 or tensor.requires_grad or tensor.is_complex():
        return None
    return float(tensor)


def _always(module: GraphModule, node: Node) -> bool:
    return True


def _neutral(number: float) -> Callable[[GraphModule, Node], bool]:
    return lambda module, node: constant_scalar(module, argument(node, 1)) == number


def _evaluates(module: GraphModule, node: Node) -> bool:
    return argument(node, 2) is False


def _keeps_format(module: GraphModule, node: Node) -> bool:
    # A flag that is set asks for a copy.
    plain = True not in (*node.args[1:], *node.kwargs.values())
    return plain and node.kwargs.get("memory_format") in (None, torch.preserve_format)


def _whole(module: GraphModule, node: Node) -> bool:
    start, end, step = argument(node, 2), argument(node, 3, sys.maxsize), argument(node, 4, 1)
    return start in (None, 0) and end in (None, sys.maxsize) and step == 1


def _one(module: GraphModule, node: Node) -> bool:
    return len(node.args[0]) == 1  # type: ignore[arg-type]


#: Operators that give their first input back, if the condition holds and sizes and dtype stay the same.
_RULES: dict[Any, Callable[[GraphModule, Node], bool]] = {
    aten.dropout.default: _evaluates, aten.feature_dropout.default: _evaluates, aten.alpha_dropout.default: _evaluates,
    aten.to.dtype: _keeps_format, aten.to.device: _keeps_format, aten.to.dtype_layout: _keeps_format,
    aten.to.other: _keeps_format, aten._to_copy.default: _keeps_format, aten.clone.default: _keeps_format,
    aten.type_as.default: _always, aten.lift_fresh_copy.default: _always, aten.detach.default: _always,
    aten.alias.default: _always, aten.view.default: _always, aten.reshape.default: _always,
    aten.expand.default: _always, aten.expand_as.default: _always, aten.flatten.using_ints: _always,
    aten.squeeze.dim: _always, aten.squeeze.dims: _always, aten.slice.Tensor: _whole, aten.cat.default: _one,
    aten.mul.Tensor: _neutral(1), aten.div.Tensor: _neutral(1), aten.add.Tensor: _neutral(0),
    aten.sub.Tensor: _neutral(0), aten.pow.Tensor_Scalar: _neutral(1),
}  # fmt: skip
_PERMUTATIONS = (aten.permute.default, aten.transpose.int, aten.t.default)


def _order(node: Node) -> list[int] | None:
    """The permutation that a node applies, as for `permute`."""
    if node.target not in _PERMUTATIONS or "val" not in node.meta:
        return None
    rank = node.meta["val"].ndim
    if node.target is aten.permute.default:
        return [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    first, second = (0, rank - 1) if node.target is aten.t.default else (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
    order = list(range(rank))
    if rank:
        order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return order


def _undone(node: Node) -> Node | None:
    """The value before a permutation that changes nothing, or before the one that this one undoes."""
    source = node.args[0]
    order = _order(node)
    if order is None or not isinstance(source, Node):
        return None
    if order == list(range(len(order))):
        return source
    before = _order(source)
    if before is not None and [before[d] for d in order] == list(range(len(order))):
        start = source.args[0]
        return start if isinstance(start, Node) else None
    return None

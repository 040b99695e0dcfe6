"""Layer and RMS normalisation that were written out become one operator each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..editing import add_call, argument
from ._effects import Aliases
from ._tidy import constant_scalar, sizes

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """eps + mean of squares (or variance) of a value over its last dimensions, as found in the graph."""

    of: Node
    dims: tuple[int, ...]
    eps: float
    centred: bool
    read: tuple[Node, ...]


def name_norms(module: GraphModule) -> int:
    """Put layer and RMS normalisation that were written out back into one operator, with weight and bias."""
    count = 0
    for node in list(module.graph.nodes):
        found = _normalised(module, node)
        if found is None:
            continue
        value, spread = found
        x, is_layer_norm = value, False
        mean = _mean_that_was_subtracted(value, spread.dims)
        if mean is not None:
            x, is_layer_norm = mean, True
        if spread.of is not (x if spread.centred else value) or (spread.centred and not is_layer_norm):
            continue
        if not Aliases(module).stable(x, value, node, *value.all_input_nodes, *spread.read):
            continue
        count += _replace(module, node, x, spread, is_layer_norm)
    return count


def _replace(module: GraphModule, node: Node, x: Node, spread: _Spread, is_layer_norm: bool) -> bool:
    # A size that another operator fixed is a symbol still, but reads as a number.
    texts = sizes(x)[-len(spread.dims) :]
    if not x.meta["val"].is_floating_point() or not all(text.isdigit() for text in texts):
        return False
    shape = [int(text) for text in texts]
    top, weight = _affine(node, aten.mul.Tensor, shape)
    bias = None
    if is_layer_norm and weight is not None:
        top, bias = _affine(top, aten.add.Tensor, shape)
    if not Aliases(module).stable(node, top, weight, bias):
        return False
    if is_layer_norm:
        new = add_call(top, aten.layer_norm.default, (x, shape, weight, bias, spread.eps))
    else:
        new = add_call(top, aten.rms_norm.default, (x, shape, weight, spread.eps))
    if new.meta["val"].dtype != top.meta["val"].dtype:
        module.graph.erase_node(new)
        return False
    top.replace_all_uses_with(new)
    return True


def _affine(node: Node, target: Any, shape: Any) -> tuple[Node, Node | None]:
    """The node that multiplies by a weight (or adds a bias) of the given shape and is the only user; and that value."""
    user = next(iter(node.users), None)
    if user is None or len(node.users) != 1 or user.target is not target or user.kwargs.get("alpha", 1) != 1:
        return node, None
    others = [v for v in user.args[:2] if isinstance(v, Node) and v is not node]
    if len(others) != 1 or not isinstance(others[0].meta.get("val"), torch.Tensor):
        return node, None
    value = others[0].meta["val"]
    if (
        sizes(others[0]) != tuple(map(str, shape))
        or value.dtype != node.meta["val"].dtype
        or sizes(user) != sizes(node)
    ):
        return node, None
    return user, others[0]


def _normalised(module: GraphModule, node: Node) -> tuple[Node, _Spread] | None:
    """What a node divides by the root of its own spread, and that spread."""
    if node.target is aten.mul.Tensor:
        pairs = [(node.args[0], node.args[1]), (node.args[1], node.args[0])]
        roots = [(v, _root(r, (aten.rsqrt.default,), -0.5)) for v, r in pairs]
    elif node.target is aten.div.Tensor:
        roots = [(node.args[0], _root(node.args[1], (aten.sqrt.default,), 0.5))]
    else:
        return None
    for value, root in roots:
        if isinstance(value, Node) and root is not None:
            spread = _spread(module, root, value)
            if spread is not None:
                return value, spread
    return None


def _root(node: Any, targets: tuple[Any, ...], power: float) -> Node | None:
    """What stands under a root."""
    if not isinstance(node, Node):
        return None
    is_power = node.target is aten.pow.Tensor_Scalar and node.args[1] == power
    inner = node.args[0] if is_power or node.target in targets else None
    return inner if isinstance(inner, Node) else None


def _spread(module: GraphModule, root: Node, value: Node) -> _Spread | None:
    if root.target is not aten.add.Tensor or root.kwargs.get("alpha", 1) != 1:
        return None
    eps, spread = constant_scalar(module, root.args[1]), root.args[0]
    if eps is None:
        eps, spread = constant_scalar(module, root.args[0]), root.args[1]
    if eps is None or not isinstance(spread, Node):
        return None
    read: tuple[Node, ...] = (root, spread)
    of: Any = spread.args[0]
    # A variance without Bessel's correction is the mean of squares of what lies around the mean.
    is_variance = spread.target is aten.var.correction and argument(spread, 2) == 0
    is_variance |= spread.target is aten.var.dim and argument(spread, 2) is False
    keeps = argument(spread, 3 if is_variance else 2) is True
    if not is_variance:
        if spread.target is not aten.mean.dim or argument(spread, 3) is not None or not _is_square(of, value):
            return None
        read, of = (*read, of), value
    dims = _last_dims(argument(spread, 1), of) if keeps else None
    return None if dims is None else _Spread(of=of, dims=dims, eps=eps, centred=is_variance, read=read)


def _is_square(node: Node, value: Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        return node.args[0] is value and bool(node.args[1] == 2)
    if node.target is aten.square.default:
        return node.args[0] is value
    return bool(node.target is aten.mul.Tensor and node.args[0] is value and node.args[1] is value)


def _last_dims(dims: Any, of: Node) -> tuple[int, ...] | None:
    """Dimensions counted from the front, if they are the last ones."""
    rank = of.meta["val"].ndim
    plain = [dims] if isinstance(dims, int) else dims
    if not plain or not rank:
        return None
    found = tuple(sorted(d % rank for d in plain))
    return found if found == tuple(range(rank - len(found), rank)) else None


def _mean_that_was_subtracted(node: Node, dims: tuple[int, ...]) -> Node | None:
    """x, if the node is x - mean(x) over these dimensions."""
    if node.target is not aten.sub.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    x, mean = node.args[:2]
    if not isinstance(x, Node) or not isinstance(mean, Node) or mean.target is not aten.mean.dim:
        return None
    if mean.args[0] is not x or argument(mean, 2) is not True or mean.kwargs.get("dtype") is not None:
        return None
    return x if _last_dims(argument(mean, 1), x) == dims else None

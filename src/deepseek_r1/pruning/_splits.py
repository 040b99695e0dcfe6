"""Which part of a dimension that is taken apart carries the channels: the heads, not what a head is wide.

[B, L, H * D] -> [B, L, H, D]: either whole heads can leave, or the same places of each head, not both at once. What
the graph does with the parts decides. Knows shapes and names of operators; joins nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Node

from ..graph.editing import argument

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
ATTENTION = (aten.scaled_dot_product_attention.default,)
_SAME = (
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.dropout.default,
    aten.softmax.int, aten.expand.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.cumsum.default,
)  # fmt: skip
_VIEWS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
)  # fmt: skip
_PICKS = (
    aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
    aten.unbind.int,
)  # fmt: skip
#: As far as the parts of a split are followed.
_REACH = 60


def shape_of(node: Any) -> tuple[int, ...]:
    """The sizes of a value, whole numbers; empty for what is no tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else ()


def blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Which dimensions of one shape become which of another: the smallest runs with equal products.

    Example:
        >>> list(blocks((2, 10, 12), (20, 3, 4)))
        [([0, 1], [0]), ([2], [1, 2])]
    """
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(left), j + len(right)
        a, b = prod(old[k] for k in left), prod(new[k] for k in right)
        while a != b:
            if a < b:
                left.append(i)
                a, i = a * old[i], i + 1
            else:
                right.append(j)
                b, j = b * new[j], j + 1
        yield left, right


def factor(node: Node, dims: Sequence[int]) -> int:
    """Which of the dimensions that one was taken apart into carries its channels.

    The one along which later products are taken separately, such as heads; else the longest that nothing picks from.
    """
    shape = shape_of(node)
    found = {dim: _fates(node, dim) for dim in dims if shape[dim] > 1}
    if not found:
        return dims[0]
    if heads := [dim for dim, fates in found.items() if "separate" in fates and "picked" not in fates]:
        return heads[0]
    whole = [dim for dim, fates in found.items() if "picked" not in fates] or list(found)
    return max(whole, key=lambda dim: shape[dim])


def _fates(node: Node, dim: int) -> set[str]:
    """What happens to a dimension further on: "separate", "summed", "row", "picked" or "other"."""
    found: set[str] = set()
    open_, seen = [(node, dim)], set[tuple[Node, int]]()
    while open_ and len(seen) < _REACH:
        at = open_.pop()
        if at in seen:
            continue
        seen.add(at)
        for user in at[0].users:
            fate, further = _step(user, *at)
            found |= {fate} if fate else set()
            open_ += further
    return found


def _step(user: Node, node: Node, dim: int) -> tuple[str, list[tuple[Node, int]]]:
    """What one operator does to a dimension: its fate, or the dimensions in which it goes on."""
    target, rank = user.target, len(shape_of(node))
    back = dim - rank
    if target in PRODUCTS:
        return ("separate" if back < -2 else "summed" if (back == -1) == (user.args[0] is node) else "row"), []
    if target in ATTENTION:
        return "separate" if back < -2 else "summed" if back == -1 else "row", []
    if target in _VIEWS:
        return _through_view(user, node, dim)
    if target in _PICKS:
        last = target in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
        chosen = argument(user, 2 if last else 1)
        return _picked(user, node, dim, chosen if isinstance(chosen, int) else 0)
    if target is aten.cat.default:
        return ("picked", []) if int(argument(user, 1)) % rank == dim else ("", [(user, dim)])
    moved = moved_dims(user, rank)
    if moved is not None:
        return "", [(user, moved.index(dim))] if dim in moved else []
    pointwise = torch.Tag.pointwise in getattr(target, "tags", ())
    if (pointwise or target in _SAME) and shape_of(user):
        return "", [(user, len(shape_of(user)) + back)]
    return "other", []


def _picked(user: Node, node: Node, dim: int, chosen: int) -> tuple[str, list[tuple[Node, int]]]:
    chosen %= len(shape_of(node))
    if chosen == dim:
        return "picked", []
    lost = user.target in (aten.select.int, aten.unbind.int) and chosen < dim
    if user.target in (aten.select.int, aten.slice.Tensor):
        return "", [(user, dim - lost)]
    return "", [(item, dim - lost) for item in user.users]


def _through_view(user: Node, node: Node, dim: int) -> tuple[str, list[tuple[Node, int]]]:
    old, new = shape_of(node), shape_of(user)
    for left, right in blocks(old, new):
        if dim not in left:
            continue
        longer = [k for k in right if new[k] > 1]
        if sum(old[k] > 1 for k in left) == 1:
            return "", [(user, k) for k in longer if new[k] == old[dim]]
        # Merged with another, as the heads of grouped queries are: it goes on in what they make together.
        return "", [(user, k) for k in longer if len(longer) == 1]
    return "other", []


def moved_dims(node: Node, rank: int) -> list[int] | None:
    """For an operator that only moves, adds or drops dimensions: which one of its input each of its output is.

    -1 stands for a new dimension of length 1; None means that it is no such operator.
    """
    target, order = node.target, list(range(rank))
    if target is aten.permute.default:
        return [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    if target in (aten.transpose.int, aten.t.default, aten.mT.default, aten.swapaxes.default):
        a, b = (-2, -1) if target in (aten.t.default, aten.mT.default) else (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
        if rank > 1:
            order[a], order[b] = order[b], order[a]
        return order
    if target is aten.movedim.int:
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order.insert(b, order.pop(a))
        return order
    if target is aten.unsqueeze.default:
        order.insert(int(node.args[1]) % (rank + 1), -1)  # type: ignore[arg-type]
        return order
    if target in (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default):
        shape = shape_of(node.args[0])
        given = node.args[1] if len(node.args) > 1 else order
        asked = {int(d) % rank for d in (given if isinstance(given, list | tuple) else [given])}  # type: ignore[arg-type]
        return [d for d in order if not (d in asked and shape[d] == 1)]
    return None

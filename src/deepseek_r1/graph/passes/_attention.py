"""Attention that was written out, softmax(q k^T * scale + mask) v, becomes scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..editing import add_call, argument
from ._effects import Aliases
from ._tidy import constant_scalar, sizes

aten = torch.ops.aten
#: A number that is filled in for masked scores must be at most this: a score that is added to it is rounded away, so
#: that the number can as well be added.
_LEAST = -1e9


@dataclass(frozen=True, kw_only=True)
class _Mask:
    """`value` is added to the scores; or, where it is True (False, if `keeps`), they become `fill`."""

    value: Node
    fill: float | None = None
    keeps: bool = False


@dataclass(kw_only=True)
class _Walk:
    """A way upwards through a graph: what was read on it, and the numbers that were multiplied on it."""

    module: GraphModule
    read: list[Node] = field(default_factory=list)
    scale: float = 1.0
    masks: list[_Mask] = field(default_factory=list)


def fuse_attention(module: GraphModule) -> int:
    """Put attention that was written out (scale, masks, softmax) into scaled_dot_product_attention.

    Four dimensions only, with q, k and v of the same batch and heads. A row in which every key is masked by minus
    infinity gives zeros instead of NaN.
    """
    # Source of the formula: Vaswani et al., Attention Is All You Need, 2017, section 3.2.1.
    return sum(_fuse(module, node) for node in list(module.graph.nodes))


def _fuse(module: GraphModule, out: Node) -> bool:
    second = _product(out)
    walk = _Walk(module=module)
    softmax = _softmax(second[0], out) if second is not None and not second[2] else None
    if second is None or softmax is None:
        return False
    scores = _scaled(_masked(softmax.args[0], softmax, walk), walk)
    first = _product(scores)
    if first is None or len(scores.users) != 1:
        return False
    query, key, value = _scaled(first[0], walk), _scaled(first[1], walk), second[1]
    is_flipped = first[2]
    if not is_flipped and _swaps_last(key):
        key, is_flipped = _scaled(key.args[0], walk), True  # type: ignore[arg-type]
    if not _fits(query, key, value, is_flipped) or not all(_mask_fits(m, scores) for m in walk.masks):
        return False
    if not Aliases(module).stable(out, softmax, scores, query, key, value, *walk.read):
        return False
    if not is_flipped:
        key = add_call(out, aten.transpose.int, (key, -1, -2))
    arguments = (query, key, value, _one_mask(out, walk.masks), 0.0, False)
    out.replace_all_uses_with(
        add_call(out, aten.scaled_dot_product_attention.default, arguments, {"scale": walk.scale})
    )
    return True


def _product(node: Any) -> tuple[Node, Node, bool] | None:
    """The factors of a batched matrix product, and whether the second is transposed by it (an einsum can)."""
    if not isinstance(node, Node) or "val" not in node.meta:
        return None
    is_flipped = False
    if node.target is aten.matmul.default:
        factors: Any = node.args[:2]
    elif node.target is aten.einsum.default:
        letters: dict[str, str] = {}
        equation = str(node.args[0]).replace(" ", "")
        named = "".join(letters.setdefault(c, chr(97 + len(letters))) if c.isalpha() else c for c in equation)
        if named not in ("abcd,abed->abce", "abcd,abde->abce"):
            return None
        factors, is_flipped = node.args[1], named == "abcd,abed->abce"
    else:
        return None
    a, b = factors
    return (a, b, is_flipped) if isinstance(a, Node) and isinstance(b, Node) else None


def _softmax(weights: Node, user: Node) -> Node | None:
    """The softmax over the last dimension behind the weights, which nothing else may use; dropout is off."""
    while len(weights.users) == 1 and weights.target is aten.dropout.default and argument(weights, 2) is False:
        weights = weights.args[0]  # type: ignore[assignment]
    if weights.target is not aten.softmax.int or len(weights.users) != 1:
        return None
    scores: Any = weights.args[0]
    same_type = argument(weights, 2) in (None, scores.meta["val"].dtype)
    return weights if same_type and argument(weights, 1) in (-1, scores.meta["val"].ndim - 1) else None


def _masked(scores: Any, user: Node, walk: _Walk) -> Node:
    """The scores before the masks; each step in between has one user. Masks are collected on the walk."""
    while isinstance(scores, Node) and len(scores.users) == 1:
        found = _mask(scores, walk.module)
        if found is None:
            break
        inner, mask = found
        walk.read += [scores, *scores.all_input_nodes]
        walk.masks.append(mask)
        scores = inner
    return scores  # type: ignore[no-any-return]


def _mask(node: Node, module: GraphModule) -> tuple[Node, _Mask] | None:
    """What a node masks, and how."""
    if node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        one, other = node.args[:2]
        if isinstance(one, Node) and isinstance(other, Node):
            # The scores are the larger one, and come from a product.
            one, other = (one, other) if _leads_to_product(one) else (other, one)
            return one, _Mask(value=other)
        return None
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        scores, where, fill = node.args[:3]
        keeps = False
    elif node.target in (aten.where.ScalarOther, aten.where.self):
        where, scores, fill = node.args[:3]
        keeps = True
    else:
        return None
    number = constant_scalar(module, fill)
    if number is None or number > _LEAST or not isinstance(scores, Node) or not isinstance(where, Node):
        return None
    return scores, _Mask(value=where, fill=number, keeps=keeps)


def _leads_to_product(node: Node) -> bool:
    """Whether a value is a product, or one that was scaled and masked only."""
    through = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.masked_fill.Scalar, aten.masked_fill.Tensor)
    while len(node.users) == 1 and node.target in through and isinstance(node.args[0], Node):
        node = node.args[0]
    return _product(node) is not None and len(node.users) == 1


def _scaled(value: Node, walk: _Walk) -> Node:
    """A value without the numbers that it is multiplied with or divided by; these go into the walk's scale."""
    while value.target in (aten.mul.Tensor, aten.div.Tensor) and len(value.users) == 1:
        inner, number = value.args[0], constant_scalar(walk.module, value.args[1])
        if number is None and value.target is aten.mul.Tensor:
            inner, number = value.args[1], constant_scalar(walk.module, value.args[0])
        if not number or not isinstance(inner, Node) or _kind(inner) != _kind(value) or sizes(inner) != sizes(value):
            break
        walk.read += [value, *value.all_input_nodes]
        walk.scale = walk.scale * number if value.target is aten.mul.Tensor else walk.scale / number
        value = inner
    return value


def _swaps_last(node: Node) -> bool:
    if node.target is not aten.transpose.int or len(node.users) != 1:
        return False
    rank = node.meta["val"].ndim
    return {int(d) % rank for d in node.args[1:3]} == {rank - 2, rank - 1}  # type: ignore[arg-type]


def _kind(node: Node) -> tuple[torch.dtype, torch.device] | None:
    value = node.meta.get("val")
    return (value.dtype, value.device) if isinstance(value, torch.Tensor) else None


def _fits(query: Node, key: Node, value: Node, is_flipped: bool) -> bool:
    """Whether these are q [B, H, L, D], k [B, H, S, D] (or its transpose) and v [B, H, S, E]."""
    if _kind(query) is None or _kind(query) != _kind(key) or _kind(query) != _kind(value):
        return False
    q, k, v = sizes(query), sizes(key), sizes(value)
    if not query.meta["val"].is_floating_point() or not len(q) == len(k) == len(v) == 4:
        return False
    k = k if is_flipped else (*k[:2], k[3], k[2])
    # Kernels are chosen by whether the widths are equal, which must not be left open.
    known = q[3] == v[3] or (q[3].isdigit() and v[3].isdigit())
    return known and q[:2] == k[:2] == v[:2] and q[3] == k[3] and k[2] == v[2]


def _mask_fits(mask: _Mask, scores: Node) -> bool:
    """Whether a mask can be spread over the scores without making them larger."""
    kind = _kind(mask.value)
    if kind is None or kind[1] != scores.meta["val"].device:
        return False
    if kind[0] != (torch.bool if mask.fill is not None else scores.meta["val"].dtype):
        return False
    small, large = sizes(mask.value), sizes(scores)
    spread = all(a in ("1", b) for a, b in zip(reversed(small), reversed(large)))
    return 2 <= len(small) <= 4 and spread and small[-1] == large[-1]


def _one_mask(before: Node, masks: list[_Mask]) -> Node | None:
    """All masks as one argument: of truth values where that is enough, else a sum."""
    if not masks:
        return None
    only = masks[0]
    if len(masks) == 1 and only.fill == float("-inf"):
        total = only.value if only.keeps else add_call(before, aten.logical_not.default, (only.value,))
    else:
        total = _added(before, only)
        for mask in masks[1:]:
            total = add_call(before, aten.add.Tensor, (total, _added(before, mask)))
    # Kernels take masks of two or four dimensions.
    return add_call(before, aten.unsqueeze.default, (total, 0)) if total.meta["val"].ndim == 3 else total


def _added(before: Node, mask: _Mask) -> Node:
    if mask.fill is None:
        return mask.value
    where = add_call(before, aten.logical_not.default, (mask.value,)) if mask.keeps else mask.value
    dtype = before.meta["val"].dtype
    zeros = add_call(before, aten.zeros_like.default, (where,), {"dtype": dtype})
    return add_call(before, aten.masked_fill.Scalar, (zeros, where, mask.fill))

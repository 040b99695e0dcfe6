"""How channels pass through the operators that compute: products, convolutions, norms, pooling, attention.

A rule takes the ledger, the node and the dimensions of its inputs, joins what belongs together, and gives the
dimensions of the output. Operators that only move numbers are in `_rules_shape`. Knows no module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Node

from ..graph.editing import argument
from ._ledger import Atoms, Count, Dims, Ledger
from ._splits import ATTENTION, PRODUCTS, shape_of

aten = torch.ops.aten
#: What a rule gives: dimensions of the output, or of each output.
Outcome = Dims | list[Dims]


class Place:
    """A node at the walk's present position: its arguments, with the dimensions known of them."""

    def __init__(self, ledger: Ledger, node: Node, values: dict[Node, Outcome]) -> None:
        self.ledger, self.node, self.values = ledger, node, values
        self.shape = shape_of(node)

    def arg(self, index: int, default: Any = None) -> Any:
        """The argument at a position of the operator's schema."""
        value = argument(self.node, index)
        return default if value is None else value

    def dims(self, value: Any) -> Dims:
        """The dimensions of an argument; those of a number have none."""
        known = self.values.get(value) if isinstance(value, Node) else ()
        return known if isinstance(known, tuple) else ()

    @property
    def name(self) -> str:
        """What the operator is called in reasons."""
        return str(self.node.target).removeprefix("aten.").partition(".")[0]

    @property
    def module(self) -> str:
        """The name of the module in whose call the node stands."""
        stack = self.node.meta.get("nn_module_stack") or {}
        path = next(reversed(list(stack.values())))[0] if stack else ""
        return str(path).removeprefix("L['self']").removeprefix(".")

    def tensor(self, value: Any) -> str | None:
        """The name of the parameter or buffer that an argument is."""
        return str(value.target) if isinstance(value, Node) and value.op == "get_attr" else None

    def reads(self, value: Any, dim: int, positions: float) -> None:
        """A product sums along a dimension of this weight, so many times for a sample."""
        name = self.tensor(value)
        if name is not None:
            self.ledger.readers.add((name, dim))
            self.ledger.uses[name] = self.ledger.uses.get(name, 0.0) + positions


def positions(shape: Sequence[int], channels: int) -> float:
    """For how many places of a sample an output with so many channels is computed."""
    return prod(shape) / (max(shape[0], 1) * max(channels, 1)) if shape else 1.0


def linear(at: Place) -> Outcome:
    """x [..., in], weight [out, in], bias [out] -> [..., out]."""
    x, w, b = at.dims(at.arg(0)), at.dims(at.arg(1)), at.dims(at.arg(2))
    at.ledger.join(x[-1], w[-1], "its input is no channel that can be left out")
    at.reads(at.arg(1), len(w) - 1, positions(at.shape, at.shape[-1]))
    out = w[0] if len(w) == 2 else None
    if b:
        out = at.ledger.join(out, b[0], "a bias on no channel")
    return (*x[:-1], out) if len(w) == 2 else x[:-1]


def matmul(at: Place) -> Outcome:
    """[..., m, k] by [..., k, n], with leading dimensions that broadcast, vectors too; `addmm` and `baddbmm` add."""
    shift = 1 if at.node.target in (aten.addmm.default, aten.baddbmm.default) else 0
    first, second = at.arg(shift), at.arg(shift + 1)
    a, b = at.dims(first), at.dims(second)
    at.ledger.join(a[-1], b[-2] if len(b) > 1 else b[0], "a product with what is no channel")
    at.reads(first, len(a) - 1, positions(at.shape, 1))
    at.reads(second, max(len(b) - 2, 0), positions(at.shape, at.shape[-1] if at.shape else 1))
    batch = broadcast(at, [a[:-2], b[:-2]], [shape_of(first)[:-2], shape_of(second)[:-2]])
    out: Dims = (*batch, *a[-2:-1], *b[len(b) - 1 :][: len(b) > 1])
    if shift:
        return broadcast(at, [at.dims(at.arg(0)), out], [shape_of(at.arg(0)), at.shape])
    return out


def einsum(at: Place) -> Outcome:
    """Letters that are equal are one dimension; one that is summed over and in one operand only is summed as it is."""
    equation, operands = str(at.arg(0)).replace(" ", ""), list(at.arg(1))
    terms, _, result = equation.partition("->")
    if "." in equation or not _ or any(len(set(t)) < len(t) for t in terms.split(",")):
        return unknown(at)
    letters: dict[str, Atoms] = {}
    seen: set[str] = set()
    for term, operand in zip(terms.split(","), operands, strict=True):
        for dim, letter in enumerate(term):
            atoms = at.dims(operand)[dim]
            letters[letter] = at.ledger.join(letters[letter], atoms, "a product") if letter in seen else atoms
            seen.add(letter)
            if letter not in result:
                at.reads(operand, dim, positions(at.shape, 1))
    return tuple(letters[letter] for letter in result)


def attention(at: Place) -> Outcome:
    """query [..., H, L, D], key [..., G, S, D], value [..., G, S, E]; G may be a part of H (`enable_gqa`)."""
    q, k, v = (at.dims(at.arg(i)) for i in range(3))
    ledger = at.ledger
    scale = argument(at.node, 6)
    for atoms in (q[-1], k[-1]) if scale is None else ():
        ledger.pin(atoms, "attention is scaled by its width")
    ledger.join(q[-1], k[-1], "attention over what is no channel")
    ledger.join(k[-2], v[-2], "attention over what is no channel")
    batch = []
    for dim in range(len(q) - 2):
        heads, groups = q[dim], k[dim]
        ledger.join(groups, v[dim], "attention over what is no channel")
        if heads is not None and groups is not None and heads.size != groups.size:
            heads = ledger.tie(heads.reshape(groups.size, -1))
        batch.append(ledger.join(heads, groups, "attention over what is no channel"))
    mask = at.dims(at.arg(3))
    sizes = shape_of(at.arg(3))
    for back in range(3, len(mask) + 1):
        if sizes[-back] > 1:
            ledger.join(q[-back], mask[-back], "an attention mask of its own for each head")
    return (*q[:-2], q[-2], v[-1])


def convolution(at: Place) -> Outcome:
    """x [N, in, ...], weight [out, in / groups, ...] (transposed: [in, out / groups, ...]), bias [out]."""
    weight, transposed = at.arg(1), "transpose" in at.name
    x, w, b = at.dims(at.arg(0)), at.dims(weight), at.dims(at.arg(2))
    for atoms in w[2:]:
        at.ledger.pin(atoms, "the window of a convolution")
    spatial = len(w) - 2
    batch, x_in = x[: len(x) - spatial - 1], x[len(x) - spatial - 1]
    at.ledger.pin_all(x[len(x) - spatial :], "positions of a convolution")
    groups = _groups(at)
    channels = at.shape[len(x) - spatial - 1]
    at.reads(weight, 0 if transposed else 1, positions(at.shape, channels))
    if groups == 1:
        at.ledger.join(x_in, w[0 if transposed else 1], "the input is no channel that can be left out")
        out = w[1 if transposed else 0]
    else:
        out = _grouped(at, x_in, w, groups, transposed)
    if b:
        out = at.ledger.join(out, b[0], "a bias on no channel")
    return (*batch, out, *[None] * spatial)


def _groups(at: Place) -> int:
    names = [a.name for a in at.node.target._schema.arguments]  # type: ignore[union-attr]
    return int(at.arg(names.index("groups"), 1))


def _grouped(at: Place, x_in: Atoms, w: Dims, groups: int, transposed: bool) -> Atoms:
    """Whole groups leave where there are many (depthwise among them), else the same places of every group."""
    ledger = at.ledger
    first, second = w[0], w[1]
    assert first is not None, "the first dimension of a weight is never without channels"
    if x_in is None or (second is None and not transposed and shape_of(at.arg(1))[1] > 1):
        ledger.pin_all((x_in, first, second), "a grouped convolution of what is no channel")
        return first if not transposed else None
    inputs = x_in.reshape(groups, -1)
    if groups >= inputs.shape[1]:
        ledger.pin(second, "the width of a group, of which whole ones leave")
        rows = ledger.tie(first.reshape(groups, -1))
        count = ledger.join(ledger.tie(inputs), rows, "groups")
        assert count is not None
        ledger.counts.append(Count(module=at.module, attribute="groups", atoms=count))
        if not transposed:
            return first
        wide = 1 if second is None else second.size
        return count[:, None].repeat(wide, 1).ravel()
    if transposed:
        ledger.pin_all((x_in, first, second), "a grouped transposed convolution")
        return None
    # The weight's second dimension is shared by all groups, so every group gives up the same places.
    ledger.join(ledger.tie(inputs.T), second, "a group's inputs")
    ledger.tie(first.reshape(groups, -1).T)
    return first


def channel_norm(at: Place) -> Outcome:
    """Batch and instance norm: x [N, C, ...] and vectors [C]."""
    x = at.dims(at.arg(0))
    channels = x[1]
    for index in range(1, 5):
        if vector := at.dims(at.arg(index)):
            channels = at.ledger.join(channels, vector[0], "a norm over what is no channel")
    return (x[0], channels, *x[2:])


def layer_norm(at: Place) -> Outcome:
    """x [..., *shape], weight and bias [*shape]: what leaves is left out of mean and variance."""
    x = list(at.dims(at.arg(0)))
    count = len(at.arg(1))
    for vector in (at.dims(at.arg(2)), at.dims(at.arg(3)) if at.node.target is aten.layer_norm.default else ()):
        for dim in range(len(vector)):
            x[dim - count] = at.ledger.join(x[dim - count], vector[dim], "a norm over what is no channel")
    return tuple(x)


def group_norm(at: Place) -> Outcome:
    """Whole groups leave where there are many, else the same places of every group."""
    x = at.dims(at.arg(0))
    channels, groups = x[1], int(at.arg(1))
    for index in (2, 3):
        if vector := at.dims(at.arg(index)):
            channels = at.ledger.join(channels, vector[0], "a norm over what is no channel")
    if channels is not None and groups > 1:
        table = channels.reshape(groups, -1)
        if groups >= table.shape[1]:
            at.ledger.counts.append(Count(module=at.module, attribute="num_groups", atoms=at.ledger.tie(table)))
        else:
            at.ledger.tie(table.T)
    return (x[0], channels, *x[2:])


def embedding(at: Place) -> Outcome:
    """weight [words, C] by whole numbers [...] -> [..., C]."""
    w = at.dims(at.arg(0))
    at.ledger.pin(w[0], "words of an embedding")
    if (name := at.tensor(at.arg(0))) is not None:
        at.ledger.tables.add((name, 0))
    return (*[None] * len(shape_of(at.arg(1))), w[1])


def windowed(at: Place) -> Outcome:
    """Pooling and resizing of the last dimensions; those before stay what they are."""
    x = at.dims(at.arg(0))
    digits = [c for c in at.name if c.isdigit()]
    spatial = int(digits[-1]) if digits else len(x) - 2
    out: Dims = tuple(x[: len(x) - spatial])
    at.ledger.pin_all(x[len(x) - spatial :], f"positions of {at.name}")
    result: Dims = (*out, *[None] * spatial)
    value = at.node.meta.get("val")
    return [result for _ in value] if isinstance(value, tuple | list) else result


def soft(at: Place) -> Outcome:
    """Softmax and cumulative sums: shares of a whole, from which nothing can leave unnoticed."""
    x = at.dims(at.arg(0))
    dim = int(at.arg(1)) % max(len(x), 1)
    at.ledger.pin(x[dim] if x else None, f"{at.name} runs along it")
    return x


#: Reductions that see what leaves as zero, or without it.
SUMS = {
    aten.sum.default, aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim,
    aten.mean.default, aten.mean.dim, aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim,
}  # fmt: skip
EXTREMES = {aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim, aten.any.dim, aten.all.dim}
_WITH_ORDER = (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)


def reduced(node: Node) -> list[int]:
    """Dimensions of its input that a reduction sums over."""
    rank = len(shape_of(node.args[0]))
    given = argument(node, 2 if node.target in _WITH_ORDER else 1)
    if node.target in (aten.sum.default, aten.mean.default) or given is None or given == []:
        return list(range(rank))
    return [int(d) % rank for d in (given if isinstance(given, list | tuple) else [given])]


def reduction(at: Place) -> Outcome:
    """Sums, means and the like over some dimensions."""
    x, gone = at.dims(at.arg(0)), reduced(at.node)
    if at.node.target in EXTREMES:
        at.ledger.pin_all([x[d] for d in gone], f"{at.name} runs along it")
    kept: Dims = tuple(a for d, a in enumerate(x) if d not in gone)
    value = at.node.meta.get("val")
    first = value[0] if isinstance(value, tuple | list) else value
    if getattr(first, "ndim", 0) == len(x):
        kept = tuple(None if d in gone else a for d, a in enumerate(x))
    return [kept for _ in value] if isinstance(value, tuple | list) else kept


def broadcast(at: Place, operands: Sequence[Dims], shapes: Sequence[Sequence[int]]) -> Dims:
    """The dimensions of a value made index by index from others, whose dimensions of length 1 are stretched."""
    rank = max((len(s) for s in shapes), default=0)
    out: list[Atoms] = []
    for back in range(rank, 0, -1):
        here = [(d[-back], s[-back]) for d, s in zip(operands, shapes, strict=True) if len(s) >= back]
        longest = max(size for _, size in here)
        # A single channel beside many is stretched over them.
        for atoms, size in here:
            if size == 1 < longest:
                at.ledger.pin(atoms, f"{at.name} stretches it")
        same = [atoms for atoms, size in here if size == longest]
        joined = same[0]
        for atoms in same[1:]:
            joined = at.ledger.join(joined, atoms, f"{at.name} joins it with what is no channel")
        out.append(joined)
    return tuple(out)


def pointwise(at: Place) -> Outcome:
    """Any number of tensors, index by index."""
    tensors = [n for n in at.node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return broadcast(at, [at.dims(t) for t in tensors], [shape_of(t) for t in tensors])


def prelu(at: Place) -> Outcome:
    """x [N, C, ...], one slope for all or for each channel."""
    x, slope = at.dims(at.arg(0)), at.dims(at.arg(1))
    if slope and slope[0] is not None and len(x) > 1:
        return (x[0], at.ledger.join(x[1], slope[0], "slopes on what is no channel"), *x[2:])
    return x


def unknown(at: Place) -> Outcome:
    """Nothing is known of the operator: what it reads stays as it is. Checks and sizes compute nothing."""
    if at.name.startswith(("_assert", "sym_", "numel", "size")):
        return blank(at.node)
    for node in at.node.all_input_nodes:
        known = at.values.get(node, ())
        for dims in known if isinstance(known, list) else [known]:
            at.ledger.pin_all(dims, f"the operator {at.node.target} is not understood")
    return blank(at.node)


def blank(node: Node) -> Outcome:
    """An output without channels."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        return [tuple([None] * v.ndim) if isinstance(v, torch.Tensor) else () for v in value]
    return tuple([None] * value.ndim) if isinstance(value, torch.Tensor) else ()


#: Index by index, though torch does not say so of them.
_UNTAGGED = (
    aten.hardswish.default, aten.hardswish_.default, aten.mish_.default, aten.gelu_.default, aten.relu6_.default,
    aten.log_sigmoid.default, aten.rsub.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Scalar,
    aten.masked_fill_.Tensor, aten.floor_divide.default, aten.multiply.Tensor, aten.multiply.Scalar,
    aten.divide.Tensor, aten.divide.Scalar, aten.true_divide.Scalar, aten.negative.default, aten.where.ScalarOther,
    aten.where.ScalarSelf, aten.where.Scalar, aten.__and__.Tensor, aten.__and__.Scalar,
)  # fmt: skip
Rule = Callable[[Place], Outcome]
_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
)  # fmt: skip
_WINDOWS = (
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.avg_pool1d.default,
    aten.avg_pool2d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default, aten.adaptive_max_pool1d.default,
    aten.adaptive_max_pool2d.default, aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec, aten.upsample_linear1d.vec,
    aten.max_pool2d_with_indices.default,
)  # fmt: skip
COMPUTING: dict[Any, Rule] = {
    aten.linear.default: linear,
    **dict.fromkeys((*PRODUCTS, aten.mm.default, aten.addmm.default, aten.mv.default, aten.dot.default), matmul),
    aten.einsum.default: einsum,
    **dict.fromkeys(ATTENTION, attention),
    **dict.fromkeys(_CONVOLUTIONS, convolution),
    **dict.fromkeys((aten.batch_norm.default, aten.instance_norm.default), channel_norm),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), layer_norm),
    aten.group_norm.default: group_norm,
    aten.prelu.default: prelu,
    **dict.fromkeys(_UNTAGGED, pointwise),
    aten.embedding.default: embedding,
    **dict.fromkeys(_WINDOWS, windowed),
    **dict.fromkeys((aten.softmax.int, aten.log_softmax.int, aten.cumsum.default), soft),
    **dict.fromkeys((*SUMS, *EXTREMES), reduction),
}

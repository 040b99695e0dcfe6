"""How channels pass through the operators that only move numbers: views, cuts, joins, moves. Knows no module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ._ledger import Atoms, Ledger
from ._rules import Outcome, Place, Rule, blank, unknown
from ._splits import blocks, factor, moved_dims, shape_of

aten = torch.ops.aten


def same(at: Place) -> Outcome:
    """The output has the dimensions of the first input."""
    return at.dims(at.arg(0))


def moved(at: Place) -> Outcome:
    """Dimensions in another order, or one of length 1 more or less."""
    x = at.dims(at.arg(0))
    order = moved_dims(at.node, len(x))
    assert order is not None, at.node
    return tuple(None if d < 0 else x[d] for d in order)


def view(at: Place) -> Outcome:
    """Reshaping: dimensions are merged and taken apart, in runs whose products agree."""
    x, old = at.dims(at.arg(0)), shape_of(at.arg(0))
    out: list[Atoms] = [None] * len(at.shape)
    for left, right in blocks(old, at.shape):
        real_left, real_right = [d for d in left if old[d] > 1], [d for d in right if at.shape[d] > 1]
        if not any(x[d] is not None for d in left):
            continue
        if len(real_left) == 1 and len(real_right) == 1:
            out[real_right[0]] = x[real_left[0]]
        elif len(real_right) == 1:
            out[real_right[0]] = _merged(at.ledger, [x[d] for d in real_left], [old[d] for d in real_left])
        elif len(real_left) == 1:
            chosen = factor(at.node, real_right)
            out[chosen] = _apart(
                at.ledger, x[real_left[0]], [at.shape[d] for d in real_right], real_right.index(chosen)
            )
        elif [old[d] for d in real_left] == [at.shape[d] for d in real_right]:
            for a, b in zip(real_left, real_right, strict=True):
                out[b] = x[a]
        else:
            at.ledger.pin_all([x[d] for d in left], "a view that cuts across dimensions")
    return tuple(out)


def _merged(ledger: Ledger, parts: Sequence[Atoms], sizes: Sequence[int]) -> Atoms:
    """The dimension that several make together; the longest of them that has channels gives it its own."""
    having = [d for d, atoms in enumerate(parts) if atoms is not None]
    chosen = max(having, key=lambda d: sizes[d])
    for d in having:
        if d != chosen:
            ledger.pin(parts[d], "it is merged with another dimension of channels")
    atoms = parts[chosen]
    assert atoms is not None, "chosen among those that have channels"
    along = atoms.reshape([-1 if d == chosen else 1 for d in range(len(sizes))])
    whole: Atoms = np.ascontiguousarray(np.broadcast_to(along, sizes)).ravel()
    return whole


def _apart(ledger: Ledger, atoms: Atoms, sizes: Sequence[int], chosen: int) -> Atoms:
    """The part of a dimension that keeps its channels: what lies at one place of it leaves as a whole."""
    if atoms is None:
        return None
    tied: Atoms = ledger.tie(np.moveaxis(atoms.reshape(sizes), chosen, 0).reshape(sizes[chosen], -1))
    return tied


def expand(at: Place) -> Outcome:
    """Dimensions of length 1 are stretched; the others stay."""
    x, old = at.dims(at.arg(0)), shape_of(at.arg(0))
    out: list[Atoms] = [None] * len(at.shape)
    for back in range(1, len(x) + 1):
        if at.shape[-back] == old[-back]:
            out[-back] = x[-back]
        else:
            at.ledger.pin(x[-back], "expand stretches it")
    return tuple(out)


def repeat(at: Place) -> Outcome:
    """The whole value again and again: [C] -> [C, C]."""
    x = at.dims(at.arg(0))
    times = list(at.arg(1))
    lead = len(times) - len(x)
    return (*[None] * lead, *(a if a is None else np.tile(a, int(n)) for a, n in zip(x, times[lead:], strict=True)))


def repeat_interleave(at: Place) -> Outcome:
    """Each index again and again: [a, b] -> [a, a, b, b]."""
    x, dim, times = list(at.dims(at.arg(0))), at.arg(2), at.arg(1)
    if not isinstance(dim, int) or not isinstance(times, int):
        return unknown(at)
    atoms = x[dim]
    x[dim] = None if atoms is None else np.repeat(atoms, times)
    return tuple(x)


def cut(at: Place) -> Outcome:
    """`slice`: a run of indices. What is cut off is no longer seen, and so may leave as well."""
    x, dim = list(at.dims(at.arg(0))), int(at.arg(1, 0))
    dim %= max(len(x), 1)
    atoms = x[dim]
    if atoms is not None:
        start, end, step = (at.arg(i) for i in (2, 3, 4))
        x[dim] = atoms[slice(start, end, step or 1)]
        if x[dim].size != atoms.size:  # type: ignore[union-attr]
            _whole(at, atoms, [x[dim]], f"{at.name} takes indices that are written down")
    return tuple(x)


def _whole(at: Place, atoms: Any, pieces: Sequence[Atoms], reason: str) -> None:
    """Cutting by numbers in the code works only while equal shares of the pieces leave, which nobody can promise."""
    for piece in pieces:
        at.ledger.pin(piece, reason)
    at.ledger.pin(atoms, reason)


def pick(at: Place) -> Outcome:
    """`select`: one index, by its number."""
    x = at.dims(at.arg(0))
    dim = int(at.arg(1)) % len(x)
    at.ledger.pin(x[dim], "an index is selected by its number")
    return (*x[:dim], *x[dim + 1 :])


def unbind(at: Place) -> Outcome:
    """Every index by itself."""
    x = at.dims(at.arg(0))
    dim = int(at.arg(1, 0)) % len(x)
    at.ledger.pin(x[dim], "its indices are taken apart")
    return [(*x[:dim], *x[dim + 1 :]) for _ in at.node.meta["val"]]


def parts(at: Place) -> Outcome:
    """`split` and `chunk`: runs of indices one after the other.

    The runs are found again by their equal lengths, or by lengths in the code. So equal runs give up the same places;
    runs of different lengths stay free, and their lengths have to be attributes that can follow.
    """
    x = at.dims(at.arg(0))
    dim = int(at.arg(2, 0)) % len(x)
    sizes = [shape_of_value(v)[dim] for v in at.node.meta["val"]]
    atoms = x[dim]
    if atoms is None:
        return [x for _ in sizes]
    cuts = np.split(atoms, np.cumsum(sizes)[:-1])
    if len(set(sizes)) == 1:
        at.ledger.tie(np.stack(cuts, axis=1))
    return [(*x[:dim], piece, *x[dim + 1 :]) for piece in cuts]


def shape_of_value(value: Any) -> tuple[int, ...]:
    """The sizes of a traced tensor, whole numbers."""
    return tuple(int(n) for n in value.shape)


def halved(at: Place) -> Outcome:
    """`glu`: the first half of a dimension, gated by the second, place by place."""
    x, dim = list(at.dims(at.arg(0))), int(at.arg(1, -1))
    atoms = x[dim]
    if atoms is not None:
        x[dim] = at.ledger.tie(atoms.reshape(2, -1).T)
    return tuple(x)


def item(at: Place) -> Outcome:
    """One of several outputs."""
    source, index = at.node.args[0], at.node.args[1]
    known = at.values.get(source)  # type: ignore[arg-type]
    return known[index] if isinstance(known, list) and isinstance(index, int) else blank(at.node)


def joined(at: Place) -> Outcome:
    """`cat`: one behind the other along a dimension; the other dimensions are one."""
    tensors, dim = list(at.arg(0)), int(at.arg(1, 0)) % max(len(at.shape), 1)
    tensors = [t for t in tensors if len(shape_of(t)) == len(at.shape)]
    all_dims = [at.dims(t) for t in tensors]
    out: list[Atoms] = list(all_dims[0])
    for d in range(len(at.shape)):
        if d != dim:
            for dims in all_dims[1:]:
                out[d] = at.ledger.join(out[d], dims[d], "cat with what is no channel")
    along = [dims[dim] for dims in all_dims]
    if all(a is None for a in along):
        out[dim] = None
    else:
        reason = "it lies beside what is no channel"
        sizes = [shape_of(t)[dim] for t in tensors]
        whole = [a if a is not None else at.ledger.pinned(n, reason) for a, n in zip(along, sizes, strict=True)]
        out[dim] = np.concatenate(whole)
    return tuple(out)


def stacked(at: Place) -> Outcome:
    """`stack`: along a new dimension."""
    tensors, dim = list(at.arg(0)), int(at.arg(1, 0)) % len(at.shape)
    out: list[Atoms] = list(at.dims(tensors[0]))
    for t in tensors[1:]:
        for d, atoms in enumerate(at.dims(t)):
            out[d] = at.ledger.join(out[d], atoms, "stack with what is no channel")
    out.insert(dim, None)
    return tuple(out)


def padded(at: Place) -> Outcome:
    """Padding of the last dimensions, by pairs from the last one on."""
    x = list(at.dims(at.arg(0)))
    widths = [int(n) for n in at.arg(1)]
    for pair in range(len(widths) // 2):
        if widths[2 * pair] or widths[2 * pair + 1]:
            at.ledger.pin(x[-1 - pair], "it is padded")
            x[-1 - pair] = None
    return tuple(x)


def indexed(at: Place) -> Outcome:
    """`x[i, j]`: leading dimensions picked by tensors of numbers; what lies behind stays."""
    x, numbers = at.dims(at.arg(0)), list(at.arg(1))
    if any(n is None for n in numbers):
        return unknown(at)
    at.ledger.pin_all(x[: len(numbers)], "indices are picked by number")
    rest = x[len(numbers) :]
    return (*[None] * (len(at.shape) - len(rest)), *rest)


def turned(at: Place) -> Outcome:
    """`flip` and `roll`: the dimensions that are turned must stay."""
    x = at.dims(at.arg(0))
    given = at.arg(1 if at.node.target is aten.flip.default else 2, ())
    for d in given if isinstance(given, list | tuple) else [given]:
        at.ledger.pin(x[int(d)], f"{at.name} moves its indices")
    return x


MOVING: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.detach_.default,
            aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.alpha_dropout.default,
            aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default,
            aten.lift_fresh_copy.default, aten.zeros_like.default, aten.ones_like.default, aten.type_as.default,
        ),
        same,
    ),
    **dict.fromkeys(
        (
            aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default, aten.movedim.int,
            aten.swapaxes.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
        ),
        moved,
    ),
    **dict.fromkeys(
        (
            aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
            aten.unflatten.int, aten.view_as.default,
        ),
        view,
    ),
    **dict.fromkeys((aten.expand.default, aten.expand_as.default, aten.broadcast_to.default), expand),
    aten.repeat.default: repeat,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.slice.Tensor: cut,
    aten.select.int: pick,
    aten.unbind.int: unbind,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default), parts),
    **dict.fromkeys((aten.cat.default, aten.concat.default), joined),
    aten.stack.default: stacked,
    aten.glu.default: halved,
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), padded),
    aten.index.Tensor: indexed,
    **dict.fromkeys((aten.flip.default, aten.roll.default), turned),
}  # fmt: skip

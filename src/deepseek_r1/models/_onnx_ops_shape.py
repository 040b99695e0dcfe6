"""ONNX operators that move, pick or make elements: shapes, slices, gathers, constants.

Each function takes the node's attributes, then the inputs. `Shape` gives a list of Python numbers, and the operators
that exporters put after it keep it one. Semantics after the ONNX operator specification (opset 7 to 22).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._onnx_values import (
    HOST_SIZE,
    axes_of,
    dtype_of,
    is_host,
    number,
    numbers,
    product,
    register,
    tensor,
    tensors,
    unsupported,
)

Attrs = Mapping[str, Any]


@register("Identity")
def identity(attrs: Attrs, x: Any) -> Any:
    """The input."""
    return x


@register("Shape")
def shape(attrs: Attrs, x: Any) -> list[Any]:
    """The sizes of the dimensions from `start` to `end`."""
    sizes = list(x.shape) if isinstance(x, Tensor) else ([len(x)] if isinstance(x, list) else [])
    return sizes[attrs.get("start", 0) : attrs.get("end")]


@register("Size")
def size(attrs: Attrs, x: Any) -> Any:
    """The number of elements."""
    return product(x.shape) if isinstance(x, Tensor) else (len(x) if isinstance(x, list) else 1)


@register("ConstantOfShape")
def constant_of_shape(attrs: Attrs, sizes: Any) -> Any:
    """A tensor (or, for short integer vectors, a list) filled with one value."""
    value, dtype = attrs.get("value", 0.0), dtype_of(attrs, attrs.get("value_type", 1))
    wanted = numbers(sizes)
    if len(wanted) == 1 and isinstance(wanted[0], int) and wanted[0] <= HOST_SIZE and dtype == torch.int64:
        return [value] * wanted[0]
    return torch.full(wanted, value, dtype=dtype)


@register("Reshape")
def reshape(attrs: Attrs, x: Any, sizes: Any = None) -> Any:
    """Another shape; 0 copies a dimension, -1 is inferred."""
    wanted = numbers(attrs["shape"] if sizes is None else sizes)
    if is_host(x):
        if wanted in ([-1], [1], [len(numbers(x))]):
            return numbers(x)
        if not wanted:
            return number(x)
        x = tensor(x)
    if not attrs.get("allowzero"):
        wanted = [x.shape[i] if isinstance(s, int) and s == 0 else s for i, s in enumerate(wanted)]
    return x.reshape(wanted)


@register("Flatten")
def flatten(attrs: Attrs, x: Tensor) -> Tensor:
    """Two dimensions: those before `axis`, and the rest."""
    axis = attrs.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 0:
        return x.reshape(1, -1)
    x = x.flatten(axis) if axis < x.dim() else x.unsqueeze(-1)
    return x.flatten(0, axis - 1)


@register("Transpose")
def transpose(attrs: Attrs, x: Any) -> Any:
    """Another order of dimensions, by default reversed."""
    if is_host(x):
        return x
    return x.permute(attrs.get("perm") or list(range(x.dim()))[::-1])


@register("Squeeze")
def squeeze(attrs: Attrs, x: Any, axes: Any = None) -> Any:
    """Without the given dimensions of size 1, or without all such."""
    if is_host(x):
        return number(x) if len(numbers(x)) == 1 else x
    dims = axes_of(attrs, axes)
    return x.squeeze() if dims is None else x.squeeze(tuple(dims))


@register("Unsqueeze")
def unsqueeze(attrs: Attrs, x: Any, axes: Any = None) -> Any:
    """With new dimensions of size 1."""
    dims = axes_of(attrs, axes) or []
    if is_host(x):
        if not isinstance(x, list) and len(dims) == 1:
            return [x]
        x = tensor(x)
    rank = x.dim() + len(dims)
    for dim in sorted(d % rank for d in dims):
        x = x.unsqueeze(dim)
    return x


@register("Concat")
def concat(attrs: Attrs, *values: Any) -> Any:
    """Values one after the other along one dimension."""
    if all(is_host(v) for v in values):
        return [n for v in values for n in numbers(v)]
    return torch.cat(tensors(*values), dim=attrs.get("axis", 1))


@register("Split")
def split(attrs: Attrs, x: Any, sizes: Any = None) -> Any:
    """Pieces along one dimension, of given or of equal sizes (the last one may be smaller)."""
    axis, count = attrs.get("axis", 0), attrs["outputs"]
    wanted = attrs.get("split") if sizes is None else numbers(sizes)
    if isinstance(x, list):
        step = -(-len(x) // count)
        bounds = wanted or [min(step, len(x) - i * step) for i in range(count)]
        starts = [sum(bounds[:i]) for i in range(len(bounds))]
        pieces = [x[s : s + n] for s, n in zip(starts, bounds, strict=True)]
        return pieces[0] if count == 1 else tuple(pieces)
    parts = torch.split(x, -(-x.shape[axis] // count) if wanted is None else wanted, dim=axis)
    return parts[0] if count == 1 else parts


@register("Slice")
def slice_(attrs: Attrs, x: Any, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Any:
    """Ranges of some dimensions, with steps that may be negative."""
    first = numbers(attrs["starts"] if starts is None else starts)
    last = numbers(attrs["ends"] if ends is None else ends)
    dims = axes_of(attrs, axes) or list(range(len(first)))
    jumps = [1] * len(first) if steps is None else numbers(steps)
    if isinstance(x, list):
        return x[first[0] : last[0] : jumps[0]]
    x = tensor(x)
    for dim, start, end, jump in zip(dims, first, last, jumps, strict=True):
        if jump < 0:
            # torch has no negative steps: walk the kept indices instead.
            kept = range(x.shape[dim])[start:end:jump]
            x = x.index_select(dim, torch.tensor(list(kept), dtype=torch.int64, device=x.device))
        else:
            index: list[Any] = [slice(None)] * (dim % x.dim())
            x = x[(*index, slice(start, end, jump))]
    return x


@register("Gather")
def gather(attrs: Attrs, x: Any, indices: Any) -> Any:
    """Slices of `x` along one axis; negative indices count from the end."""
    if isinstance(x, list) and is_host(indices):
        return [x[i] for i in indices] if isinstance(indices, list) else x[indices]
    axis, x = attrs.get("axis", 0), tensor(x, indices if isinstance(indices, Tensor) else None)
    if not is_host(indices):
        indices = indices.to(torch.int64)
    elif isinstance(indices, list):
        indices = tensor(indices, x)
    else:
        return x.select(axis, indices)
    index: list[Any] = [slice(None)] * (axis % x.dim())
    return x[(*index, indices)]


def _positive(x: Tensor, indices: Any, axis: int) -> Tensor:
    indices = tensor(indices, x).to(torch.int64)
    return torch.where(indices < 0, indices + x.shape[axis], indices)


@register("GatherElements")
def gather_elements(attrs: Attrs, x: Tensor, indices: Any) -> Tensor:
    """One element for each index, along one axis."""
    axis = attrs.get("axis", 0)
    return torch.gather(x, axis, _positive(x, indices, axis))


@register("GatherND")
def gather_nd(attrs: Attrs, x: Tensor, indices: Any) -> Tensor:
    """Slices of `x` addressed by the last dimension of `indices`."""
    if attrs.get("batch_dims"):
        raise unsupported(attrs, "batch_dims in GatherND")
    return x[tensor(indices, x).to(torch.int64).unbind(-1)]


@register("ScatterND")
def scatter_nd(attrs: Attrs, x: Tensor, indices: Any, updates: Any) -> Tensor:
    """A copy of `x` with some slices replaced, or added to."""
    how = attrs.get("reduction", "none")
    if how not in ("none", "add"):
        raise unsupported(attrs, f"reduction {how!r} in ScatterND")
    places = tensor(indices, x).to(torch.int64).unbind(-1)
    return torch.index_put(x, places, tensor(updates, x, x.dtype), accumulate=how == "add")


@register("ScatterElements", "Scatter")
def scatter_elements(attrs: Attrs, x: Tensor, indices: Any, updates: Any) -> Tensor:
    """A copy of `x` with some elements replaced, or combined with new ones, along one axis."""
    axis, how = attrs.get("axis", 0), attrs.get("reduction", "none")
    at, new = _positive(x, indices, axis), tensor(updates, x, x.dtype)
    if how == "none":
        return torch.scatter(x, axis, at, new)
    return torch.scatter_reduce(x, axis, at, new, {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[how])


@register("Expand")
def expand(attrs: Attrs, x: Any, sizes: Any) -> Tensor:
    """Broadcast to a shape; a 1 in the shape keeps the input's size."""
    x, wanted = tensor(x), numbers(sizes)
    rank = max(x.dim(), len(wanted))
    own = [1] * (rank - x.dim()) + list(x.shape)
    wanted = [1] * (rank - len(wanted)) + wanted
    return x.expand([o if isinstance(w, int) and w == 1 else w for o, w in zip(own, wanted, strict=True)])


@register("Tile")
def tile(attrs: Attrs, x: Any, repeats: Any) -> Any:
    """The input repeated along each dimension."""
    if isinstance(x, list):
        return x * number(repeats)
    return tensor(x).repeat(numbers(repeats))


@register("Range")
def range_(attrs: Attrs, start: Any, limit: Any, delta: Any) -> Any:
    """Numbers from `start` to before `limit`; a list where all is known and short."""
    a, b, step = number(start), number(limit), number(delta)
    if all(isinstance(v, int) for v in (a, b, step)) and len(range(a, b, step)) <= HOST_SIZE:
        return list(range(a, b, step))
    return torch.arange(a, b, step)


@register("Pad")
def pad(attrs: Attrs, x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
    """Elements added (or, where negative, removed) at both ends of the dimensions."""
    amounts = numbers(attrs["pads"] if pads is None else pads)
    fill = attrs.get("value", 0.0) if value is None else number(value)
    x = tensor(x)
    dims = [a % x.dim() for a in numbers(axes)] if axes is not None else list(range(x.dim()))
    half = len(dims)
    ends = dict(zip(dims, zip(amounts[:half], amounts[half:], strict=True), strict=True))
    pairs = [n for d in reversed(range(x.dim())) for n in ends.get(d, (0, 0))]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        attrs.get("mode", "constant")
    ]
    if mode == "constant":
        return F.pad(x, pairs, value=fill)
    # torch pads the last one to three dimensions in these modes.
    spatial = max(1, x.dim() - 2)
    if any(isinstance(p, int) and p != 0 for p in pairs[2 * spatial :]):
        raise unsupported(attrs, f"Pad of batch or channels with mode {attrs['mode']!r}")
    return F.pad(x, pairs[: 2 * spatial], mode=mode)


@register("Trilu")
def trilu(attrs: Attrs, x: Tensor, k: Any = None) -> Tensor:
    """The upper or lower triangle."""
    diagonal = 0 if k is None else number(k)
    return torch.triu(x, diagonal) if attrs.get("upper", 1) else torch.tril(x, diagonal)


@register("EyeLike")
def eye_like(attrs: Attrs, x: Tensor) -> Tensor:
    """Ones on a diagonal, in the shape of the input."""
    ones = torch.ones_like(x, dtype=x.dtype)
    k = attrs.get("k", 0)
    return torch.triu(torch.tril(ones, k), k)


@register("OneHot")
def one_hot(attrs: Attrs, indices: Any, depth: Any, values: Any) -> Tensor:
    """`values[1]` at each index, `values[0]` elsewhere, along a new axis."""
    indices, count = tensor(indices).to(torch.int64), int(number(depth))
    indices = torch.where(indices < 0, indices + count, indices)
    hot = indices.unsqueeze(-1) == torch.arange(count, device=indices.device)
    off_on = tensor(values, indices)
    axis = attrs.get("axis", -1)
    return torch.where(hot, off_on[1], off_on[0]).movedim(-1, axis)


@register("NonZero")
def nonzero(attrs: Attrs, x: Any) -> Tensor:
    """Indices of the elements that are not zero, one row for each dimension."""
    return torch.nonzero(tensor(x)).t()

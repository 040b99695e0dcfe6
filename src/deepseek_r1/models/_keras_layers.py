"""Keras' dense, embedding, normalisation, merging and reshaping layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ._keras_modules import Einsum, Scale
from ._keras_values import Call, First, NoTranslationError, Value, fill_, layer, valued, weight


def _floating(call: Call, value: Value) -> fx.Node:
    """The value as float32 where the graph says that it holds integers."""
    node = call.own(value)
    return node if value.dtype.startswith("float") else call.run(torch.Tensor.to, node, torch.float32)


@layer("Dense")
def dense(call: Call) -> Any:
    """nn.Linear."""
    op = call.op

    def make() -> nn.Module:
        w = weight(op.kernel)
        linear = nn.Linear(w.shape[0], w.shape[1], bias=op.use_bias, dtype=w.dtype)
        fill_(linear, weight=w.T)
        return fill_(linear, bias=weight(op.bias)) if op.use_bias else linear

    return call.activated(call.module(make, _floating(call, call.x)), op.activation)


@layer("EinsumDense")
def einsum_dense(call: Call) -> Any:
    """torch.einsum with a parameter."""
    op = call.op
    y = call.module(
        lambda: Einsum(op.equation, weight(op.kernel), None if op.bias is None else weight(op.bias)), call.x
    )
    return call.activated(y, op.activation)


@layer("Embedding")
def embedding(call: Call) -> Any:
    """nn.Embedding; indices may come as any type of number."""
    op, value = call.op, call.x
    if value.origin:
        bounds = call.builder.bounds
        bounds[value.origin] = min(bounds.get(value.origin, op.input_dim), op.input_dim)

    def make() -> nn.Module:
        w = weight(op.embeddings)
        return fill_(nn.Embedding(w.shape[0], w.shape[1], dtype=w.dtype), weight=w)

    return call.module(make, call.run(torch.Tensor.to, value, torch.int64))


@layer("BatchNormalization")
def batch_norm(call: Call) -> Any:
    """nn.BatchNorm. In training torch takes the unbiased variance into its running one, Keras the biased."""
    op, value = call.op, call.x
    axis = op.axis % value.rank
    if axis not in (1, value.rank - 1) or value.rank > 5 or call.mask("mask", 2, value) is not None:
        raise NoTranslationError("another axis than the channels', or a mask")
    first = value.rank > 2 and axis != 1
    kind: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[value.rank]

    def make() -> nn.Module:
        mean = weight(op.moving_mean)
        norm = kind(len(mean), eps=op.epsilon, momentum=1 - op.momentum, dtype=mean.dtype)
        scale = weight(op.gamma) if op.scale else None
        shift = weight(op.beta) if op.center else None
        return fill_(norm, weight=scale, bias=shift, running_mean=mean, running_var=weight(op.moving_variance))

    y = call.module(make, call.first(value) if first else call.own(value))
    return First(y) if first else y


@layer("LayerNormalization", "RMSNormalization")
def layer_norm(call: Call) -> Any:
    """nn.LayerNorm, nn.RMSNorm."""
    op, value = call.op, call.x
    axes = sorted(a % value.rank for a in (op.axis if isinstance(op.axis, list | tuple) else [op.axis]))
    if axes != list(range(axes[0], value.rank)) or getattr(op, "rms_scaling", False):
        raise NoTranslationError("axes that are not the last ones, or rms_scaling")
    shape = [int(value.shape[a] or 0) for a in axes]
    if type(op).__name__ == "RMSNormalization":
        return call.module(lambda: fill_(nn.RMSNorm(shape, eps=op.epsilon), weight=weight(op.scale)), value)

    def make() -> nn.Module:
        norm = nn.LayerNorm(shape, eps=op.epsilon, elementwise_affine=op.scale or op.center)
        if not (op.scale or op.center):
            return norm
        return fill_(norm, weight=weight(op.gamma) if op.scale else None, bias=weight(op.beta) if op.center else None)

    return call.module(make, value)


@layer("GroupNormalization")
def group_norm(call: Call) -> Any:
    """nn.GroupNorm."""
    op, value = call.op, call.x
    if op.axis % value.rank != value.rank - 1 or not (op.scale and op.center):
        raise NoTranslationError("another axis than the last, or no scale or center")
    groups, channels = op.groups, int(value.shape[-1] or 0)
    make = lambda: nn.GroupNorm(channels if groups == -1 else groups, channels, eps=op.epsilon)  # noqa: E731
    return First(call.module(lambda: fill_(make(), weight=weight(op.gamma), bias=weight(op.beta)), call.first(value)))


@layer("UnitNormalization")
def unit_norm(call: Call) -> Any:
    """Division by the length along the axes."""
    axis = call.op.axis
    return call.run(F.normalize, call.x, dim=list(axis) if isinstance(axis, list | tuple) else axis, eps=1e-12)


@layer("Normalization")
def normalization(call: Call) -> Any:
    """(x - mean) / deviation with fixed numbers."""
    op = call.op
    if op.mean is None:
        raise NoTranslationError("no mean and variance yet")
    deviation = torch.clamp(torch.sqrt(weight(op.variance)), min=1e-7)
    mean = call.builder.buffer(f"{call.name}.mean", weight(op.mean))
    scale = call.builder.buffer(f"{call.name}.deviation", deviation)
    x = _floating(call, call.x)
    if op.invert:
        return call.run(torch.add, call.run(torch.mul, x, scale), mean)
    return call.run(torch.div, call.run(torch.sub, x, mean), scale)


@layer("Rescaling")
def rescaling(call: Call) -> Any:
    """x * scale + offset."""
    op = call.op
    y = call.run(torch.mul, _floating(call, call.x), _number_or_array(op.scale))
    return y if isinstance(op.offset, int | float) and op.offset == 0 else call.run(
        torch.add, y, _number_or_array(op.offset)
    )  # fmt: skip


def _number_or_array(value: Any) -> Any:
    return value if isinstance(value, int | float) else weight(torch.tensor(value, dtype=torch.float32)).numpy()


@layer("LayerScale")
def layer_scale(call: Call) -> Any:
    """A trained factor for each channel."""
    return call.module(lambda: Scale(weight(call.op.gamma)), call.x)


@layer("Identity", "ActivityRegularization", "InputLayer")
def identity(call: Call) -> Any:
    """The input."""
    return call.x


@layer("Masking")
def masking(call: Call) -> Any:
    """Zeros where a whole step has the mask's value."""
    return call.run(zeros_where, call.x, float(call.op.mask_value))


def zeros_where(x: Tensor, value: float) -> Tensor:
    """The steps of [N, T, ...], those that hold nothing but `value` set to zero."""
    return x * (x != value).any(-1, keepdim=True)


@layer("Flatten")
def flatten(call: Call) -> Any:
    """The places one after another, their channels together, as Keras orders them."""
    op, value = call.op, call.x
    if op.data_format == "channels_first" and value.rank > 2:
        return call.run(torch.flatten, call.run(torch.movedim, value, 1, -1), 1)
    if value.rank == 1:
        return call.run(torch.unsqueeze, value, -1)
    return _same(call.run(torch.flatten, value, 1), value)


def _same(node: fx.Node, value: Value) -> Value:
    """The result of a change of shape only: still the input's own numbers."""
    return Value(rank=0, shape=(), dtype=value.dtype, own=node, origin=value.origin)


@layer("Reshape")
def reshape(call: Call) -> Any:
    """Another shape with the same batch."""
    return _same(call.run(reshaped, call.x, [int(n) for n in call.op.target_shape]), call.x)


def reshaped(x: Tensor, shape: list[int]) -> Tensor:
    """The tensor with `shape` behind its batch."""
    return x.reshape(x.shape[0], *shape)


@layer("Permute")
def permute(call: Call) -> Any:
    """torch.permute of all but the batch."""
    return call.run(torch.permute, call.x, [0, *call.op.dims])


@layer("RepeatVector")
def repeat_vector(call: Call) -> Any:
    """[N, F] -> [N, n, F]."""
    return call.run(torch.Tensor.expand, call.run(torch.unsqueeze, call.x, 1), -1, int(call.op.n), -1)


def merge(call: Call, values: list[Value], function: Callable[..., Any]) -> Any:
    """A function of two tensors, element by element, over all values."""
    if len({v.rank for v in values}) != 1:
        raise NoTranslationError("tensors of different rank")
    if any(v.own is None for v in values):
        node = call.first(values[0])
        for value in values[1:]:
            node = call.run(function, node, call.first(value))
        return First(node)
    node = call.own(values[0])
    for value in values[1:]:
        node = call.run(function, node, value)
    return node


_MERGERS: dict[str, Callable[..., Any]] = {
    "Add": torch.add, "Subtract": torch.sub, "Multiply": torch.mul, "Average": torch.add,
    "Maximum": torch.maximum, "Minimum": torch.minimum,
}  # fmt: skip


@layer(*_MERGERS)
def merger(call: Call) -> Any:
    """Element by element over the inputs."""
    kind, values = type(call.op).__name__, list(call.args[0])
    result = merge(call, values, _MERGERS[kind])
    if kind != "Average":
        return result
    node = result.node if isinstance(result, First) else result
    node = call.run(torch.div, node, len(values))
    return First(node) if isinstance(result, First) else node


def concatenated(call: Call, values: list[Value], axis: int) -> Any:
    """torch.cat, of channels without a permutation."""
    rank = values[0].rank
    axis = axis % rank
    if rank > 2 and any(v.own is None for v in values):
        place = 0 if axis == 0 else 1 if axis == rank - 1 else axis + 1
        return First(call.run(torch.cat, [call.first(v) for v in values], place))
    return call.run(torch.cat, values, axis)


@layer("Concatenate")
def concatenate(call: Call) -> Any:
    """torch.cat."""
    return concatenated(call, list(call.args[0]), call.op.axis)


@layer("Dot")
def dot(call: Call) -> Any:
    """Products summed over one axis of each input."""
    a, b = call.args[0]
    axes = (call.op.axes, call.op.axes) if isinstance(call.op.axes, int) else tuple(call.op.axes)
    if a.rank > 3 or b.rank > 3:
        raise NoTranslationError("tensors of rank 4 or more")
    letters = ["nab"[: a.rank], "ncd"[: b.rank]]
    i, j = axes[0] % a.rank, axes[1] % b.rank
    left, right = letters[0].replace(letters[0][i], "s"), letters[1].replace(letters[1][j], "s")
    out = "n" + "".join(c for c in left[1:] + right[1:] if c != "s")
    x: Any = a
    y: Any = b
    if call.op.normalize:
        x, y = call.run(F.normalize, a, dim=axes[0]), call.run(F.normalize, b, dim=axes[1])
    result = call.run(torch.einsum, f"{left},{right}->{out}", x, y)
    return call.run(torch.unsqueeze, result, -1) if out == "n" else result


@layer("TimeDistributed")
def time_distributed(call: Call) -> Any:
    """The layer on all steps at once: [N, T, ...] -> [N * T, ...] and back."""
    op, value = call.op, call.x
    inside = op.layer
    if call.mask("mask", 2, value) is not None:
        raise NoTranslationError("a mask")
    steps = Value(
        rank=value.rank - 1,
        shape=(None, *value.shape[2:]),
        dtype=value.dtype,
        own=call.run(torch.flatten, value, 0, 1),
    )
    if hasattr(inside, "_nodes_by_depth") or getattr(inside, "_functional", None) is not None:
        (result,) = call.builder.inline(inside, [steps], f"{call.name}.")
        node = call.own(result)
    else:
        result = call.builder.translate(inside, call.name, (steps,), {})
        # Only what keeps the rank gives channels first.
        node = call.own(result if isinstance(result, Value) else valued(result, (None,) * steps.rank))
    return call.run(steps_apart, node, call.own(value))


def steps_apart(y: Tensor, x: Tensor) -> Tensor:
    """[N * T, ...] as [N, T, ...], where x is [N, T, ...]."""
    return y.unflatten(0, (x.shape[0], x.shape[1]))

"""keras.ops operations between layers: arithmetic, comparisons, reductions, shapes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._keras_layers import concatenated, merge
from ._keras_values import Call, NoTranslationError, Value, operation

_BINARY: dict[str, Callable[..., Any]] = {
    "Add": torch.add, "Subtract": torch.sub, "Multiply": torch.mul, "Divide": torch.true_divide,
    "TrueDivide": torch.true_divide, "Power": torch.pow, "Maximum": torch.maximum, "Minimum": torch.minimum,
    "Equal": torch.eq, "NotEqual": torch.ne, "Greater": torch.gt, "GreaterEqual": torch.ge, "Less": torch.lt,
    "LessEqual": torch.le, "LogicalAnd": torch.logical_and, "LogicalOr": torch.logical_or,
    "FloorDivide": torch.floor_divide, "Mod": torch.remainder,
}  # fmt: skip
_TENSORS_ONLY = ("Maximum", "Minimum", "LogicalAnd", "LogicalOr")

_UNARY: dict[str, Callable[..., Any]] = {
    "Absolute": torch.abs, "Negative": torch.neg, "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt,
    "Rsqrt": torch.rsqrt, "Square": torch.square, "Sign": torch.sign, "Floor": torch.floor, "Ceil": torch.ceil,
    "Round": torch.round, "Sin": torch.sin, "Cos": torch.cos, "Erf": torch.erf, "LogicalNot": torch.logical_not,
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Relu6": F.relu6, "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh, "Silu": F.silu, "Softplus": F.softplus, "Softsign": F.softsign, "Selu": torch.selu,
    "HardSigmoid": F.hardsigmoid, "HardSilu": F.hardswish, "LogSigmoid": F.logsigmoid, "Mish": F.mish,
    "ZerosLike": torch.zeros_like, "OnesLike": torch.ones_like,
}  # fmt: skip


@operation(*_BINARY)
def binary(call: Call) -> Any:
    """Two tensors, or a tensor and a number."""
    kind = type(call.op).__name__
    left, right = call.args[0], call.given("x2", 1)
    function = _BINARY[kind]
    both = [v for v in (left, right) if isinstance(v, Value)]
    if len(both) == 2 and both[0].rank == both[1].rank:
        return merge(call, both, function)
    numbers = [v for v in (left, right) if isinstance(v, int | float)]
    if numbers and kind in _TENSORS_ONLY:
        limit = {"Maximum": "min", "Minimum": "max"}.get(kind)
        if limit is None:
            raise NoTranslationError("a truth value that is no tensor")
        return call.pointwise(both[0], torch.clamp, **{limit: numbers[0]})
    if numbers and isinstance(left, Value):
        return call.pointwise(left, function, right)
    if numbers:
        return call.pointwise(both[0], _swapped(function), left)
    return call.run(function, left, right)


def _swapped(function: Callable[..., Any]) -> Callable[..., Any]:
    names: dict[Any, Callable[..., Any]] = {torch.add: torch.add, torch.mul: torch.mul, torch.sub: torch.rsub}
    if function in names:
        return names[function]
    swapped: dict[Any, Callable[..., Any]] = {torch.true_divide: number_over, torch.pow: number_to}
    if function not in swapped:
        raise NoTranslationError("a number on the left")
    return swapped[function]


def number_over(x: Tensor, number: float) -> Tensor:
    """number / x."""
    return number / x


def number_to(x: Tensor, number: float) -> Tensor:
    """number ** x."""
    return torch.pow(number, x)


@operation(*_UNARY)
def unary(call: Call) -> Any:
    """Element by element."""
    return call.pointwise(call.x, _UNARY[type(call.op).__name__])


@operation("Gelu")
def gelu(call: Call) -> Any:
    """F.gelu."""
    return call.pointwise(call.x, F.gelu, approximate="tanh" if call.op.approximate else "none")


@operation("LeakyRelu")
def leaky_relu(call: Call) -> Any:
    """F.leaky_relu."""
    return call.pointwise(call.x, F.leaky_relu, float(call.op.negative_slope))


@operation("Softmax", "LogSoftmax")
def softmax(call: Call) -> Any:
    """Along one axis."""
    if not isinstance(call.op.axis, int):
        raise NoTranslationError("several axes, or none")
    return call.run(torch.softmax if type(call.op).__name__ == "Softmax" else torch.log_softmax, call.x, call.op.axis)


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "Mean": torch.mean, "Sum": torch.sum, "Max": torch.amax, "Min": torch.amin, "Any": torch.any, "All": torch.all,
}  # fmt: skip


@operation(*_REDUCTIONS)
def reduction(call: Call) -> Any:
    """Over some axes or all."""
    op, value = call.op, call.x
    axis = op.axis if op.axis is not None else list(range(value.rank))
    axes = [axis] if isinstance(axis, int) else list(axis)
    if type(op).__name__ in ("Max", "Min") and getattr(op, "initial", None) is not None:
        raise NoTranslationError("an initial value")
    return call.run(_REDUCTIONS[type(op).__name__], value, axes, keepdim=bool(op.keepdims))


@operation("Matmul")
def matmul(call: Call) -> Any:
    """torch.matmul."""
    return call.run(torch.matmul, call.args[0], call.given("x2", 1))


@operation("Einsum")
def einsum(call: Call) -> Any:
    """torch.einsum."""
    return call.run(torch.einsum, call.op.subscripts, *call.args)


@operation("Concatenate")
def concatenate(call: Call) -> Any:
    """torch.cat."""
    return concatenated(call, list(call.args[0]), call.op.axis)


@operation("Stack")
def stack(call: Call) -> Any:
    """torch.stack."""
    return call.run(torch.stack, list(call.args[0]), call.op.axis)


@operation("Reshape")
def reshape(call: Call) -> Any:
    """Another shape; a batch that the graph leaves open stays open."""
    value, shape = call.x, list(call.op.newshape)
    if any(n is None for n in shape[1:]):
        raise NoTranslationError("a size that is not known")
    if shape[0] in (None, -1) and value.shape[0] is None:
        # With a batch of 0 a size of -1 would be anything.
        return call.run(with_batch, value, [int(n) for n in shape[1:]])
    return call.run(torch.reshape, value, [int(n) for n in shape])


def with_batch(x: Tensor, shape: list[int]) -> Tensor:
    """The tensor with `shape` behind its first dimension, whatever that comes to."""
    return x.reshape(-1, *shape) if -1 not in shape else x.reshape(x.shape[0], *shape)


@operation("Transpose")
def transpose(call: Call) -> Any:
    """torch.permute."""
    axes = call.op.axes or list(reversed(range(call.x.rank)))
    return call.run(torch.permute, call.x, [int(a) for a in axes])


@operation("ExpandDims")
def expand_dims(call: Call) -> Any:
    """torch.unsqueeze, several axes one after another."""
    axes = [call.op.axis] if isinstance(call.op.axis, int) else sorted(call.op.axis)
    node = call.own(call.x)
    for axis in axes:
        node = call.run(torch.unsqueeze, node, axis)
    return node


@operation("Squeeze")
def squeeze(call: Call) -> Any:
    """torch.squeeze of named axes."""
    if call.op.axis is None:
        raise NoTranslationError("no axis")
    return call.run(torch.squeeze, call.x, call.op.axis)


@operation("GetItem")
def get_item(call: Call) -> Any:
    """Indices and slices."""
    return call.run(operator.getitem, call.args[0], call.given("key", 1))


@operation("Cast")
def cast(call: Call) -> Any:
    """Another type."""
    dtype = getattr(torch, str(call.op.dtype), None)
    if dtype is None:
        raise NoTranslationError(f"the type {call.op.dtype}")
    return call.run(torch.Tensor.to, call.x, dtype)


@operation("Where")
def where(call: Call) -> Any:
    """torch.where."""
    return call.run(torch.where, call.args[0], call.given("x1", 1), call.given("x2", 2))


@operation("Clip")
def clip(call: Call) -> Any:
    """torch.clamp."""
    op = call.op
    return call.pointwise(call.x, torch.clamp, op.x_min, op.x_max)

"""ONNX arithmetic: elementwise operators, comparisons, activations, reductions, products, quantisation.

Each function takes the node's attributes, then the inputs. Semantics after the ONNX operator specification
(opset 7 to 22). Knows nothing about graphs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._onnx_values import (
    axes_of,
    dtype_of,
    is_host,
    on_hosts,
    product,
    register,
    tensor,
    tensors,
    unsupported,
)

Attrs = Mapping[str, Any]


def _divide(a: Any, b: Any) -> Any:
    """Integers are divided towards zero, as ONNX wants; sizes are never negative, so // does it for symbols."""
    if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat):
        return a / b
    return a // b if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else int(a / b)


def _divide_tensors(a: Any, b: Any) -> Tensor:
    sample = a if isinstance(a, Tensor) else b
    return a / b if sample.is_floating_point() else torch.div(*tensors(a, b), rounding_mode="trunc")


def _power(a: Any, b: Any) -> Any:
    result = torch.pow(a, b) if isinstance(b, Tensor) or isinstance(a, Tensor) else a**b
    # ONNX keeps the base's type whatever the exponent's is.
    return result.to(a.dtype) if isinstance(a, Tensor) and isinstance(result, Tensor) else result


def _publish(op_type: str, function: Callable[..., Any]) -> None:
    """Register a function made here, under the name that the generated code shows."""
    function.__name__ = function.__qualname__ = f"onnx_{op_type.lower()}"
    function.__doc__ = f"ONNX {op_type}."
    register(op_type)(function)


def _binary(op_type: str, on_host: Callable[..., Any], on_tensor: Callable[..., Any], numbers_too: bool = True) -> None:
    """Register an operator of two inputs; `numbers_too` says that `on_tensor` takes one number beside a tensor."""

    def apply(attrs: Attrs, a: Any, b: Any) -> Any:
        if is_host(a) and is_host(b):
            return on_hosts(on_host, a, b)
        if not numbers_too or isinstance(a, list) or isinstance(b, list):
            a, b = tensors(a, b)
        return on_tensor(a, b)

    _publish(op_type, apply)


for _name, _on_host, _on_tensor in (
    ("Add", operator.add, operator.add),
    ("Sub", operator.sub, operator.sub),
    ("Mul", operator.mul, operator.mul),
    ("Div", _divide, _divide_tensors),
    ("Pow", operator.pow, _power),
    ("Equal", operator.eq, operator.eq),
    ("Greater", operator.gt, operator.gt),
    ("GreaterOrEqual", operator.ge, operator.ge),
    ("Less", operator.lt, operator.lt),
    ("LessOrEqual", operator.le, operator.le),
):
    _binary(_name, _on_host, _on_tensor)
for _name, _on_host, _on_tensor in (
    ("And", lambda a, b: a and b, torch.logical_and),
    ("Or", lambda a, b: a or b, torch.logical_or),
    ("Xor", operator.xor, torch.logical_xor),
    ("BitwiseAnd", operator.and_, torch.bitwise_and),
    ("BitwiseOr", operator.or_, torch.bitwise_or),
    ("BitwiseXor", operator.xor, torch.bitwise_xor),
):
    _binary(_name, _on_host, _on_tensor, numbers_too=False)


@register("Min", "Max", "Sum", "Mean")
def variadic(attrs: Attrs, *values: Any) -> Any:
    """Elementwise over any number of inputs."""
    kind = attrs["op"]
    if all(is_host(v) for v in values):
        if kind == "Mean":
            return on_hosts(lambda *v: sum(v) / len(v), *values)
        symbolic = {"Min": torch.sym_min, "Max": torch.sym_max, "Sum": operator.add}[kind]
        total = values[0]
        for value in values[1:]:
            total = on_hosts(symbolic, total, value)
        return total
    each = tensors(*values)
    result = each[0]
    for value in each[1:]:
        result = {"Min": torch.minimum, "Max": torch.maximum}.get(kind, torch.add)(result, value)
    return result / len(each) if kind == "Mean" else result


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan,
    "BitwiseNot": torch.bitwise_not, "Atanh": torch.atanh, "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf,
    "Exp": torch.exp, "HardSwish": F.hardswish, "IsNaN": torch.isnan, "Log": torch.log, "Mish": F.mish,
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign,
    "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip


def _unary(op_type: str, function: Callable[[Tensor], Tensor]) -> None:
    def apply(attrs: Attrs, x: Any) -> Any:
        return function(tensor(x))

    _publish(op_type, apply)


for _name, _function in _UNARY.items():
    _unary(_name, _function)


@register("Neg", "Abs", "Floor", "Ceil", "Sqrt", "Not")
def unary_on_both(attrs: Attrs, x: Any) -> Any:
    """Operators of one input that also occur in shape arithmetic."""
    kind = attrs["op"]
    if is_host(x):
        on_host: dict[str, Callable[[Any], Any]] = {
            "Neg": operator.neg, "Abs": abs, "Floor": lambda v: float(math.floor(v)),
            "Ceil": lambda v: float(math.ceil(v)), "Sqrt": torch.sym_sqrt, "Not": operator.not_,
        }  # fmt: skip
        return on_hosts(on_host[kind], x)
    on_tensor: dict[str, Callable[[Tensor], Tensor]] = {
        "Neg": torch.neg, "Abs": torch.abs, "Floor": torch.floor, "Ceil": torch.ceil, "Sqrt": torch.sqrt,
        "Not": torch.logical_not,
    }  # fmt: skip
    return on_tensor[kind](x)


@register("IsInf")
def isinf(attrs: Attrs, x: Tensor) -> Tensor:
    """Infinite values of the wanted signs."""
    found = torch.zeros_like(x, dtype=torch.bool)
    if attrs.get("detect_positive", 1):
        found = found | torch.isposinf(x)
    return found | torch.isneginf(x) if attrs.get("detect_negative", 1) else found


@register("Mod")
def mod(attrs: Attrs, a: Any, b: Any) -> Any:
    """Remainder with the divisor's sign, or with the dividend's (`fmod`)."""
    if is_host(a) and is_host(b):
        return on_hosts(math.fmod if attrs.get("fmod") else operator.mod, a, b)
    a, b = tensors(a, b)
    return torch.fmod(a, b) if attrs.get("fmod") else torch.remainder(a, b)


@register("Where")
def where(attrs: Attrs, condition: Any, a: Any, b: Any) -> Any:
    """Elements of `a` where the condition holds, of `b` elsewhere."""
    if is_host(condition) and is_host(a) and is_host(b):
        return on_hosts(lambda c, x, y: x if c else y, condition, a, b)
    if not (is_host(condition) or isinstance(a, list) or isinstance(b, list) or (is_host(a) and is_host(b))):
        return torch.where(condition, a, b)
    a, b = (tensor(a), tensor(b)) if is_host(a) and is_host(b) else tensors(a, b)
    return torch.where(tensor(condition, a), a, b)


@register("Clip")
def clip(attrs: Attrs, x: Any, low: Any = None, high: Any = None) -> Any:
    """Values between two bounds (inputs since opset 11, attributes before)."""
    low = attrs.get("min") if low is None else low
    high = attrs.get("max") if high is None else high
    low, high = ((v[0] if isinstance(v, list) else v) for v in (low, high))
    x = tensor(x)
    if low is None and high is None:
        return x
    return F.relu6(x) if (low, high) == (0, 6) else torch.clamp(x, low, high)


@register("LeakyRelu", "Elu", "Celu", "ThresholdedRelu", "Selu", "HardSigmoid", "Shrink")
def shaped_activation(attrs: Attrs, x: Tensor) -> Tensor:
    """Activations with parameters, at ONNX's defaults."""
    kind = attrs["op"]
    alpha = attrs.get("alpha")
    if kind == "LeakyRelu":
        return F.leaky_relu(x, 0.01 if alpha is None else alpha)
    if kind == "Elu":
        return F.elu(x, 1.0 if alpha is None else alpha)
    if kind == "Celu":
        return F.celu(x, 1.0 if alpha is None else alpha)
    if kind == "ThresholdedRelu":
        return F.threshold(x, 1.0 if alpha is None else alpha, 0.0)
    if kind == "Selu":
        alpha, gamma = attrs.get("alpha", 1.67326319217681884765625), attrs.get("gamma", 1.05070102214813232421875)
        return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))
    if kind == "Shrink":
        bias, edge = attrs.get("bias", 0.0), attrs.get("lambd", 0.5)
        return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, torch.zeros_like(x)))
    return torch.clamp(x * attrs.get("alpha", 0.2) + attrs.get("beta", 0.5), 0, 1)


@register("PRelu")
def prelu(attrs: Attrs, x: Tensor, slope: Any) -> Tensor:
    """Leaky ReLU with a learnt slope that broadcasts to `x`."""
    return torch.where(x > 0, x, x * tensor(slope, x, x.dtype))


@register("Gelu")
def gelu(attrs: Attrs, x: Tensor) -> Tensor:
    """GELU, exact or with tanh."""
    return F.gelu(x, approximate=attrs.get("approximate", "none"))


@register("Swish")
def swish(attrs: Attrs, x: Tensor) -> Tensor:
    """x * sigmoid(alpha * x)."""
    alpha = attrs.get("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@register("Softmax", "LogSoftmax")
def softmax(attrs: Attrs, x: Tensor) -> Tensor:
    """Softmax over one axis; before opset 13 over all axes from `axis` on."""
    function = F.softmax if attrs["op"] == "Softmax" else F.log_softmax
    if attrs["opset"] >= 13:
        return function(x, dim=attrs.get("axis", -1))
    axis = attrs.get("axis", 1) % x.dim()
    if axis == x.dim() - 1:
        return function(x, dim=axis)
    return function(x.flatten(axis), dim=axis).reshape(x.shape)


@register("Cast", "CastLike")
def cast(attrs: Attrs, x: Any, like: Any = None) -> Any:
    """Another element type. Host values stay on the host where Python has the type."""
    if isinstance(like, Tensor):
        return tensor(x, like).to(like.dtype)
    if like is not None:
        first = like[0] if isinstance(like, list) else like
        dtype = torch.float32 if isinstance(first, float) else torch.int64
    else:
        dtype = dtype_of(attrs, attrs["to"])
    if not is_host(x):
        return x.to(dtype)
    if dtype == torch.bool:
        return on_hosts(bool, x)
    if dtype.is_floating_point:
        return on_hosts(torch.sym_float, x)
    return on_hosts(torch.sym_int, on_hosts(lambda v: int(v) if isinstance(v, bool) else v, x))


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, dims, keep: x.abs().sum(dims, keepdim=keep),
    "ReduceL2": lambda x, dims, keep: x.square().sum(dims, keepdim=keep).sqrt(),
    "ReduceLogSum": lambda x, dims, keep: x.sum(dims, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, dims, keep: torch.logsumexp(x, dims, keepdim=keep),
    "ReduceMax": lambda x, dims, keep: x.amax(dims, keepdim=keep),
    "ReduceMean": lambda x, dims, keep: x.mean(dims, keepdim=keep),
    "ReduceMin": lambda x, dims, keep: x.amin(dims, keepdim=keep),
    "ReduceSum": lambda x, dims, keep: x.sum(dims, keepdim=keep, dtype=x.dtype),
    "ReduceSumSquare": lambda x, dims, keep: x.square().sum(dims, keepdim=keep, dtype=x.dtype),
}
_HOST_REDUCTIONS: dict[str, Callable[[list[Any]], Any]] = {
    "ReduceMax": max,
    "ReduceMin": min,
    "ReduceProd": product,
    "ReduceSum": sum,
}


@register(*_REDUCTIONS, "ReduceProd")
def reduce(attrs: Attrs, x: Any, axes: Any = None) -> Any:
    """Reductions over some axes, or over all of them."""
    kind, keep = attrs["op"], bool(attrs.get("keepdims", 1))
    dims = axes_of(attrs, axes)
    if not dims and attrs.get("noop_with_empty_axes"):
        return x
    if isinstance(x, list) and kind in _HOST_REDUCTIONS:
        result = _HOST_REDUCTIONS[kind](x)
        return [result] if keep else result
    x = tensor(x)
    dims = sorted(d % x.dim() for d in dims) if dims else list(range(x.dim()))
    if kind == "ReduceProd":
        for dim in reversed(dims):
            x = x.prod(dim, keepdim=keep)
        return x
    return _REDUCTIONS[kind](x, dims, keep)


@register("ArgMax", "ArgMin")
def argmax(attrs: Attrs, x: Tensor) -> Tensor:
    """Index of the extreme value along one axis."""
    axis, keep = attrs.get("axis", 0) % x.dim(), bool(attrs.get("keepdims", 1))
    find = torch.argmax if attrs["op"] == "ArgMax" else torch.argmin
    if attrs.get("select_last_index"):
        return x.shape[axis] - 1 - find(x.flip(axis), dim=axis, keepdim=keep)
    return find(x, dim=axis, keepdim=keep)


@register("CumSum")
def cumsum(attrs: Attrs, x: Any, axis: Any) -> Tensor:
    """Running sums, from either end, with or without the element itself."""
    x, dim = tensor(x), axis[0] if isinstance(axis, list) else axis
    source = x.flip(dim) if attrs.get("reverse") else x
    result = source.cumsum(dim, dtype=x.dtype)
    if attrs.get("exclusive"):
        result = result - source
    return result.flip(dim) if attrs.get("reverse") else result


@register("TopK")
def topk(attrs: Attrs, x: Tensor, k: Any = None) -> Tensor | tuple[Tensor, Tensor]:
    """The k largest or smallest values along one axis, and where they are."""
    count = attrs["k"] if k is None else (k[0] if isinstance(k, list) else k)
    largest = bool(attrs.get("largest", 1))
    # Of equal values the one with the lower index comes first, which torch.topk does not promise.
    axis = attrs.get("axis", -1)
    values, indices = (v.narrow(axis, 0, count) for v in torch.sort(x, dim=axis, descending=largest, stable=True))
    return values if attrs["outputs"] == 1 else (values, indices)


@register("MatMul")
def matmul(attrs: Attrs, a: Any, b: Any) -> Tensor:
    """Matrix product as numpy's."""
    return torch.matmul(*tensors(a, b))


@register("Gemm")
def gemm(attrs: Attrs, a: Tensor, b: Tensor, c: Any = None) -> Tensor:
    """alpha * A B + beta * C, as F.linear where it is one."""
    alpha, beta = attrs.get("alpha", 1.0), attrs.get("beta", 1.0)
    a = a.t() if attrs.get("transA") else a
    if alpha == beta == 1.0 and attrs.get("transB") and (c is None or (isinstance(c, Tensor) and c.dim() == 1)):
        return F.linear(a, b, c)
    result = torch.matmul(a, b.t() if attrs.get("transB") else b)
    result = result if alpha == 1.0 else alpha * result
    if c is None:
        return result
    c = tensor(c, result, result.dtype)
    return result + (c if beta == 1.0 else beta * c)


@register("Einsum")
def einsum(attrs: Attrs, *values: Any) -> Tensor:
    """Einstein summation."""
    equation = attrs["equation"]
    return torch.einsum(equation, *tensors(*values))


def _along(attrs: Attrs, x: Tensor, value: Any, dtype: torch.dtype | None = None) -> Any:
    """A scale or zero point in the shape that broadcasts to `x`: one number, or a vector along `axis`."""
    if is_host(value) and (not isinstance(value, list) or len(value) == 1):
        return value[0] if isinstance(value, list) else value
    vector = tensor(value, x) if dtype is None else tensor(value, x, dtype)
    if vector.numel() == 1:
        return vector.reshape(())
    if vector.dim() != 1 or attrs.get("block_size"):
        raise unsupported(attrs, "blocked quantisation")
    axis = attrs.get("axis", 1) % x.dim()
    return vector.reshape([-1 if d == axis else 1 for d in range(x.dim())])


@register("QuantizeLinear")
def quantize_linear(attrs: Attrs, x: Tensor, scale: Any, zero_point: Any = None) -> Tensor:
    """clamp(round(x / scale) + zero_point), halves to even, per tensor or per channel."""
    element = attrs["types"][2] if len(attrs["types"]) > 2 and attrs["types"][2] else attrs.get("output_dtype") or 2
    dtype = zero_point.dtype if isinstance(zero_point, Tensor) else dtype_of(attrs, element)
    if dtype not in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32):
        raise unsupported(attrs, f"quantising to {dtype}")
    limits = torch.iinfo(dtype)
    stored = torch.round(x / _along(attrs, x, scale))
    if zero_point is not None:
        stored = stored + _along(attrs, x, zero_point, x.dtype)
    return torch.clamp(stored, limits.min, limits.max).to(dtype)


@register("DequantizeLinear")
def dequantize_linear(attrs: Attrs, x: Tensor, scale: Any, zero_point: Any = None) -> Tensor:
    """(x - zero_point) * scale, per tensor or per channel."""
    dtype = scale.dtype if isinstance(scale, Tensor) else torch.float32
    x = tensor(x).to(dtype)
    if zero_point is not None:
        x = x - _along(attrs, x, zero_point, dtype)
    return x * _along(attrs, x, scale)

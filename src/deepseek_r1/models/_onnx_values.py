"""What flows between ONNX operators once they are Python functions, and the table of those functions.

A value is a tensor, or a *host* value: a number, a bool, a torch.SymInt, or a flat list of them. Shape arithmetic stays
on host values, so a symbolic batch survives torch.export. Knows nothing about files or graphs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import UnsupportedOpError

#: Operator type -> function(attributes, *inputs). An absent optional input is None.
OPERATORS: dict[str, Callable[..., Any]] = {}

#: Longest integer constant that is kept as a list of numbers instead of a buffer.
HOST_SIZE = 32

#: Inputs whose values decide shapes or the choice of a kernel: they are read when the graph is built.
STATIC_INPUTS: dict[str, tuple[int, ...]] = {
    "Clip": (1, 2), "ConstantOfShape": (0,), "CumSum": (1,), "Dropout": (1, 2), "Expand": (1,), "OneHot": (1,),
    "Pad": (1, 2, 3), "Range": (0, 1, 2), "Reshape": (1,), "Resize": (1, 2, 3), "Slice": (1, 2, 3, 4), "Split": (1,),
    "Squeeze": (1,), "Tile": (1,), "TopK": (1,), "Trilu": (1,), "Unsqueeze": (1,), "Upsample": (1,),
    "ReduceL1": (1,), "ReduceL2": (1,), "ReduceLogSum": (1,), "ReduceLogSumExp": (1,), "ReduceMax": (1,),
    "ReduceMean": (1,), "ReduceMin": (1,), "ReduceProd": (1,), "ReduceSum": (1,), "ReduceSumSquare": (1,),
}  # fmt: skip

#: Float inputs that no optimizer should move.
FROZEN_INPUTS: dict[str, tuple[int, ...]] = {
    "BatchNormalization": (3, 4), "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2),
}  # fmt: skip

#: Where a float initializer of one element is a literal of the formula (a scale, an exponent), not a weight.
LITERAL_OPS = ("Div", "Max", "Min", "Mul", "Pow", "Sqrt", "Where")

#: onnx.TensorProto element type -> torch dtype.
DTYPES: dict[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 16: torch.bfloat16,
}  # fmt: skip


def register(*op_types: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function computes these operator types. Its first argument is the node's attributes.

    Beside ONNX's own attributes there are `op`, `opset`, `node` (for messages), `outputs` (how many are used) and
    `types` (element types of the inputs that are constants, 0 for the others).
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for op_type in op_types:
            assert op_type not in OPERATORS, f"{op_type} is defined twice"
            OPERATORS[op_type] = function
        return function

    return add


def unsupported(attrs: Mapping[str, Any], what: str) -> UnsupportedOpError:
    """The error for a form of an operator that has no translation."""
    return UnsupportedOpError(
        f"{attrs['node']}: {what} is not supported by load_onnx (opset {attrs['opset']}). Export the model again "
        "without it, or replace this node by supported ones."
    )


def dtype_of(attrs: Mapping[str, Any], element_type: int) -> torch.dtype:
    """The torch dtype of an ONNX element type."""
    if element_type not in DTYPES:
        raise unsupported(attrs, f"element type {element_type}")
    return DTYPES[element_type]


def is_host(value: Any) -> bool:
    """Whether `value` is a number or a list of numbers rather than a tensor."""
    return not isinstance(value, Tensor)


def tensor(value: Any, like: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """`value` as a tensor on the device of `like`; host floats become float32, integers int64."""
    if isinstance(value, Tensor):
        return value if dtype is None else value.to(dtype)
    device = None if like is None else like.device
    if dtype is None:
        first = value[0] if isinstance(value, list) and value else value
        dtype = torch.bool if isinstance(first, bool) else torch.int64
        dtype = torch.float32 if isinstance(first, float | torch.SymFloat) else dtype
    symbolic: Any = (torch.SymInt, torch.SymFloat)
    if isinstance(value, list) and any(isinstance(v, symbolic) for v in value):
        # torch.tensor would burn the symbols in.
        return torch.stack([torch.scalar_tensor(v, dtype=dtype, device=device) for v in value])
    if isinstance(value, symbolic):
        return torch.scalar_tensor(value, dtype=dtype, device=device)
    return torch.tensor(value, dtype=dtype, device=device)


def tensors(*values: Any) -> list[Tensor]:
    """All values as tensors on one device; host numbers take the dtype of the first real tensor."""
    like = next((v for v in values if isinstance(v, Tensor)), None)
    return [tensor(v, like, None if like is None or isinstance(v, Tensor) else like.dtype) for v in values]


def numbers(value: Any) -> list[Any]:
    """A flat list of Python numbers. A tensor is read, which torch.export cannot follow when it is an input."""
    if isinstance(value, Tensor):
        return list(value.reshape(-1).tolist())
    return list(value) if isinstance(value, list | tuple) else [value]


def number(value: Any) -> Any:
    """One Python number."""
    return numbers(value)[0]


def axes_of(attrs: Mapping[str, Any], axes: Any) -> list[int] | None:
    """Axes given as an input (newer opsets) or as an attribute (older ones)."""
    found = axes if axes is not None else attrs.get("axes")
    return None if found is None else [int(a) for a in numbers(found)]


def on_hosts(function: Callable[..., Any], *values: Any) -> Any:
    """Apply a Python function element by element to host values, with broadcasting of single numbers."""
    lists = [v for v in values if isinstance(v, list)]
    if not lists:
        return function(*values)
    size = max(len(v) for v in lists)
    rows = [(v if len(v) == size else v * size) if isinstance(v, list) else [v] * size for v in values]
    return [function(*row) for row in zip(*rows, strict=True)]


def product(values: Sequence[Any]) -> Any:
    """The product of numbers, symbolic ones included."""
    result: Any = 1
    for value in values:
        result = operator.mul(result, value)
    return result

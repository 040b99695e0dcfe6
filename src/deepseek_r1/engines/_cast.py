"""A float32 program in a lower floating-point type, by a rewrite of its graph. Knows no engine.

It follows what a module does after `.to(dtype)`: parameters and activations are in the low type; products,
convolutions and normalisations take all their inputs in it; a cast to float32 that the model asks for stays. Buffers
keep float32 until one of those operators reads them, because tables of positions lose their meaning in 8 bits
of mantissa. Inputs and outputs keep their types.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node

from ..core import UnsupportedOpError
from ..graph import Program, rewrite
from ..graph.editing import constant_of

aten = torch.ops.aten
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

#: Operators that want one type for all their floating-point inputs; they get the low one.
_UNIFORM = frozenset(
    f"aten::{name}"
    for name in (
        "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "dot", "einsum", "bilinear",
        "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        "scaled_dot_product_attention", "embedding", "embedding_bag", "layer_norm", "native_layer_norm", "rms_norm",
        "group_norm", "native_group_norm", "instance_norm", "batch_norm", "prelu",
        "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    )
)  # fmt: skip
#: Operators that write a value into a tensor: (position of the tensor, position of the value that takes its type).
_WRITES = {
    "aten::index_put": (0, 2), "aten::index_put_": (0, 2), "aten::index_copy": (0, 3), "aten::index_copy_": (0, 3),
    "aten::index_add": (0, 3), "aten::scatter": (0, 3), "aten::scatter_": (0, 3), "aten::scatter_add": (0, 3),
    "aten::masked_scatter": (0, 2), "aten::slice_scatter": (0, 1), "aten::select_scatter": (0, 1),
}  # fmt: skip


def cast(program: Program, precision: str) -> Program:
    """The program with weights and activations in "bf16" or "fp16"; it takes and gives what it took and gave.

    Raises:
        UnsupportedOpError: the program is not fp32, or has nested graphs (control flow).

    Example:
        >>> from deepseek_r1.graph import capture
        >>> low = cast(capture(torch.nn.Linear(4, 2), torch.randn(3, 4)), "bf16")
        >>> low(torch.randn(3, 4)).dtype, low.precision
        (torch.float32, 'bf16')
    """
    if reason := cannot_cast(program):
        raise UnsupportedOpError(f"{program.name!r} cannot be computed in {precision}: {reason}.")
    return rewrite(program, lambda module: _to_low(module, DTYPES[precision]), precision=precision)


def cannot_cast(program: Program) -> str:
    """Why a program has no lower floating-point form; empty if it has one."""
    if program.precision != "fp32":
        return f"it is {program.precision} already"
    if any(n.op == "get_attr" for n in program.exported.graph.nodes):
        return "it has nested graphs"
    return ""


def _to_low(module: GraphModule, dtype: torch.dtype) -> None:
    _cast_parameters(module, dtype)
    largest = torch.finfo(dtype).max
    for node in list(module.graph.nodes):
        name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
        if node.target is aten._assert_tensor_metadata.default:
            # It says which type a cast of the float32 graph was given.
            module.graph.erase_node(node)
        elif node.op == "placeholder" and _is_float32(node):
            _cast_behind(node, dtype)
        elif node.op == "output":
            _change_arguments(node, partial(_converted, module, node, torch.float32))
        elif node.op == "call_function":
            _change_arguments(node, partial(_clamped, largest))
            if name in _UNIFORM:
                _change_arguments(node, partial(_converted, module, node, dtype))
            elif name in _WRITES:
                _follow_type(node, *_WRITES[name])


def _change_arguments(node: Node, change: Callable[[Any], Any]) -> None:
    node.args, node.kwargs = pytree.tree_map(change, (node.args, node.kwargs))


def _is_float32(value: Any) -> bool:
    found = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(found, torch.Tensor) and found.dtype is torch.float32


def _converted(module: GraphModule, user: Node, dtype: torch.dtype, value: Any) -> Any:
    """A node that was float32, cast in front of its user; anything else as it is."""
    if not _is_float32(value) or (value.target is aten.to.dtype and value.args[1] is dtype):
        return value
    constant = constant_of(module, value)
    if constant is not None and constant.dtype is dtype:
        return value
    with user.graph.inserting_before(user):
        return user.graph.call_function(aten.to.dtype, (value, dtype))


def _cast_behind(node: Node, dtype: torch.dtype) -> None:
    users = list(node.users)
    last = node
    while last.next.op == "placeholder":
        last = last.next
    with node.graph.inserting_after(last):
        made = node.graph.call_function(aten.to.dtype, (node, dtype))
    made.meta["val"] = node.meta["val"]
    for user in users:
        user.replace_input_with(node, made)


def _follow_type(node: Node, target: int, value: int) -> None:
    if len(node.args) <= value or not all(_is_float32(node.args[i]) for i in (target, value)):
        return
    with node.graph.inserting_before(node):
        made = node.graph.call_function(aten.type_as.default, (node.args[value], node.args[target]))
    node.update_arg(value, made)


def _clamped(largest: float, value: Any) -> Any:
    """Masks are written with the most negative float32, which float16 does not have."""
    if not isinstance(value, float) or not largest < abs(value) < float("inf"):
        return value
    return largest if value > 0 else -largest


def _cast_parameters(module: GraphModule, dtype: torch.dtype) -> None:
    copies: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is None or tensor.dtype is not torch.float32:
                continue
            if id(tensor) not in copies:
                copies[id(tensor)] = torch.nn.Parameter(tensor.detach().to(dtype), tensor.requires_grad)
            part._parameters[name] = copies[id(tensor)]

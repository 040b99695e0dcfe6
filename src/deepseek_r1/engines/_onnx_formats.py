"""Layer formats in ONNX: weights of 4 bits in blocks, and activations whose range is found at run time.

PyTorch's exporter has no translation for the operators of these formats. It gets one into standard operators (opset
21), and what comes out is then brought into the form that engines fuse. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
import torch.ao.quantization.fx._decomposed
from onnx import numpy_helper
from onnxscript import opset21 as op
from torch.fx import GraphModule, Node

from ..graph import Program, rewrite
from ..graph.editing import add_constant, constant_value
from ._onnx_unused import drop_unused

_q = torch.ops.quantized_decomposed
_UINT4 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.UINT4)
#: Blocks in which int8 weights are stored: the largest that divides the inputs.
_BLOCKS = (128, 64, 32, 16)
#: The first with weights in blocks and types of 4 bits.
OPSET = 21


def _blocks(values: Any, scales: Any, zeros: Any, low: int, high: int, dtype: int, size: int, out: int = 1) -> Any:
    return op.DequantizeLinear(values, scales, zeros, axis=1, block_size=size)


def _choose(value: Any, dtype: int) -> Any:
    # ONNX has one range for the whole tensor.
    _, scale, zero = op.DynamicQuantizeLinear(value)
    return scale, zero


def _store(value: Any, scale: Any, zero: Any, low: int, high: int, dtype: int) -> Any:
    return op.QuantizeLinear(value, scale, zero)


def _read(value: Any, scale: Any, zero: Any, low: int, high: int, dtype: int, out_dtype: int = 1) -> Any:
    return op.DequantizeLinear(value, scale, zero)


#: What the exporter is told of operators that it does not know.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    _q.dequantize_per_channel_group.default: _blocks,
    _q.choose_qparams_per_token_asymmetric.default: _choose,
    _q.quantize_per_token.default: _store,
    _q.dequantize_per_token.default: _read,
}


def needs_translation(program: Program) -> bool:
    """Whether the program has layers in these formats, or linear layers with int8 weights and float activations."""
    return any(node.target in TRANSLATIONS or _is_weight_only(node) for node in program.exported.graph.nodes)


def _is_weight_only(node: Node) -> bool:
    if node.target is not torch.ops.aten.linear.default:
        return False
    value, weight = (str(getattr(source, "target", "")) for source in node.args[:2])
    return "dequantize_per_channel" in weight and "dequantize" not in value


def unpacked(program: Program) -> Program:
    """The program with its 4-bit weights one to a byte, as constants that the exporter takes over as they are.

    It is for export only: in PyTorch, unsigned numbers less their zero points would wrap around.
    """

    def change(module: GraphModule) -> int:
        count = 0
        for node in list(module.graph.nodes):
            if node.target is _q.dequantize_per_channel_group.default:
                values, zeros = (constant_value(module, node.args[place]) for place in (0, 2))
                if values is not None and zeros is not None:
                    node.update_arg(0, add_constant(module, node, values, "values"))
                    node.update_arg(2, add_constant(module, node, zeros.to(torch.uint8), "zeros"))
                    count += 1
        return count

    return rewrite(program, change)


def lower_blocks(model: onnx.ModelProto) -> int:
    """Store weights in blocks, turned as the product behind them wants them; returns how many there were.

    ONNX Runtime fuses a product of floats with a [K, N] matrix in blocks along K into one kernel that reads the stored
    numbers. It does not for int8 with one scale a column, whose scales are therefore repeated for each block.
    """
    blocks = _Blocks(model)
    for node in list(model.graph.node):
        if node.op_type == "DequantizeLinear":
            blocks.lower(node)
    if blocks.count:
        blocks.finish()
    return blocks.count


class _Blocks:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._model, self._graph = model, model.graph
        self._constants = {i.name: i for i in model.graph.initializer}
        self._makers = {output: node for node in model.graph.node for output in node.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._instead: dict[str, list[onnx.NodeProto]] = {}
        self.count = 0

    def lower(self, node: onnx.NodeProto) -> None:
        """Replace a node that reads a stored matrix, and the products that read it."""
        if any(name not in self._constants for name in node.input):
            return
        size = next((a.i for a in node.attribute if a.name == "block_size"), 0)
        parts = [numpy_helper.to_array(self._constants[name]) for name in node.input]
        name, made = node.output[0], list[onnx.NodeProto]()
        users = self._users.get(name, [])
        turning = [u for u in users if u.op_type == "Transpose" or _is_turned_product(u)]
        if not size:
            if len(turning) < len(users) or any(self._reads_integers(u) for u in turning):
                return
            size = self._block_of_column(node, parts)
        if not size:
            return
        self.count += 1
        if len(turning) < len(users):
            made.append(self._read(parts, name, size, turned=False))
        if turning:
            made.append(self._read(parts, f"{name}_turned", size, turned=True))
        for user in turning:
            if user.op_type == "Transpose":
                self._rename(user.output[0], f"{name}_turned")
                self._instead[user.output[0]] = []
            else:
                self._instead[user.output[0]] = _product(user, f"{name}_turned")
        self._instead[name] = made

    def _reads_integers(self, node: onnx.NodeProto) -> bool:
        """Whether the product that a node is, or turns a matrix for, takes stored activations."""
        products = self._users.get(node.output[0], []) if node.op_type == "Transpose" else [node]
        makers = [self._makers.get(product.input[0]) for product in products]
        return any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)

    @staticmethod
    def _block_of_column(node: onnx.NodeProto, parts: list[Any]) -> int:
        """Changes `parts`, an int8 matrix [N, K] with N scales, to blocks; returns their size, 0 if it cannot."""
        values, scales = parts[:2]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if values.dtype != np.int8 or values.ndim != 2 or axis != 0 or scales.shape != (len(values),):
            return 0
        size = next((s for s in _BLOCKS if values.shape[1] % s == 0), 0)
        if size:
            parts[1:] = [np.repeat(scales[:, None], values.shape[1] // size, 1)]
        return size

    def _read(self, parts: list[Any], name: str, size: int, *, turned: bool) -> onnx.NodeProto:
        names = []
        for suffix, part in zip(("values", "scales", "zeros"), parts):
            value = part.astype(_UINT4) if part.dtype == np.uint8 else part
            value = np.ascontiguousarray(value.T) if turned else value
            names.append(f"{name}_{suffix}")
            self._graph.initializer.append(numpy_helper.from_array(value, names[-1]))
        return onnx.helper.make_node("DequantizeLinear", names, [name], axis=0 if turned else 1, block_size=size)

    def _rename(self, old: str, new: str) -> None:
        for user in self._users.get(old, []):
            for number, name in enumerate(user.input):
                if name == old:
                    user.input[number] = new

    def finish(self) -> None:
        """Put the new nodes in place and take out what nobody reads."""
        nodes = [new for node in self._graph.node for new in self._instead.get(node.output[0], [node])]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        drop_unused(self._model)


def _is_turned_product(node: onnx.NodeProto) -> bool:
    """Whether a Gemm is a plain product with the transpose of a matrix, and perhaps a bias."""
    if node.op_type != "Gemm":
        return False
    options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    plain = options.get("alpha", 1.0) == 1.0 and options.get("beta", 1.0) == 1.0 and not options.get("transA")
    return plain and bool(options.get("transB"))


def _product(node: onnx.NodeProto, matrix: str) -> list[onnx.NodeProto]:
    out = node.output[0]
    if len(node.input) < 3 or not node.input[2]:
        return [onnx.helper.make_node("MatMul", [node.input[0], matrix], [out])]
    return [
        onnx.helper.make_node("MatMul", [node.input[0], matrix], [f"{out}_product"]),
        onnx.helper.make_node("Add", [f"{out}_product", node.input[2]], [out]),
    ]

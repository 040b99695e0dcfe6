"""The other int8 form of an ONNX model: products whose activations are quantised as they come. Knows no engine.

A linear layer of a quantised Program has a fixed range for its input. Here the range is found at each call instead,
which costs a pass over the activations and spares one over the outputs: with few rows (decoding a token) it is the
faster form in ONNX Runtime, and always the more exact one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ._onnx_unused import drop_unused

#: Precision of this form, as engines name it.
INT8_DYNAMIC = "int8-dynamic"


def quantize_dynamically(model: onnx.ModelProto, *, every: bool) -> int:
    """Give products with a stored int8 matrix activations quantised at run time; returns how many there were.

    Args:
        every: also products whose activations have a fixed range. All other pairs of quantize and dequantize on
            activations are then taken out: they are what the fixed ranges needed. Else only pairs with a range found
            at run time are, which kernels for 4-bit weights find themselves.
    """
    editor = _Editor(model, every)
    count = 0
    for node in list(model.graph.node):
        if node.op_type in ("MatMul", "Gemm"):
            count += editor.replace(node)
    if count or not every:
        editor.finish()
    return count


class _Editor:
    def __init__(self, model: onnx.ModelProto, every: bool) -> None:
        self._model, self._graph, self._every = model, model.graph, every
        self._constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
        self._makers = {output: node for node in model.graph.node for output in node.output}
        self._instead: dict[str, list[onnx.NodeProto]] = {}
        self._stored: dict[str, tuple[str, str, str]] = {}
        self._weights: dict[str, tuple[str, str] | None] = {}

    def replace(self, node: onnx.NodeProto) -> bool:
        """Whether a product was rewritten."""
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        gemm = node.op_type == "Gemm"
        if gemm and (options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0 or options.get("transA")):
            return False
        source = self._before_pair(node.input[0])
        weight = self._weight(node.input[1], bool(options.get("transB")))
        if source is None or weight is None:
            return False
        made: list[onnx.NodeProto] = []
        stored = self._quantized(source, made)
        out, stem = node.output[0], f"{node.output[0]}_dynamic"
        biased = gemm and len(node.input) > 2 and bool(node.input[2])
        make = onnx.helper.make_node
        made += [
            make("MatMulInteger", [stored[0], weight[0], stored[2]], [f"{stem}_int32"]),
            make("Cast", [f"{stem}_int32"], [f"{stem}_float"], to=onnx.TensorProto.FLOAT),
            make("Mul", [stored[1], weight[1]], [f"{stem}_scale"]),
            make("Mul", [f"{stem}_float", f"{stem}_scale"], [f"{stem}_product" if biased else out]),
        ]
        if biased:
            made.append(make("Add", [f"{stem}_product", node.input[2]], [out]))
        self._instead[out] = made
        return True

    def finish(self) -> None:
        """Put the new nodes in place, take out the other pairs and what nobody reads."""
        nodes = [new for node in self._graph.node for new in self._instead.get(node.output[0], [node])]
        renamed = {
            node.output[0]: before
            for node in nodes
            if node.op_type == "DequantizeLinear" and (before := self._before_pair(node.output[0])) is not None
        }
        for node in nodes:
            for number, name in enumerate(node.input):
                while name in renamed:
                    node.input[number] = name = renamed[name]
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        drop_unused(self._model)

    def _before_pair(self, name: str) -> str | None:
        """What was quantised and dequantised again to give this value."""
        back = self._makers.get(name)
        if back is None or back.op_type != "DequantizeLinear":
            return None
        there = self._makers.get(back.input[0])
        if there is None or there.op_type != "QuantizeLinear":
            return None
        range_ = self._makers.get(there.input[1])
        dynamic = range_ is not None and range_.op_type == "DynamicQuantizeLinear"
        return there.input[0] if dynamic or self._every else None

    def _quantized(self, source: str, made: list[onnx.NodeProto]) -> tuple[str, str, str]:
        if source not in self._stored:
            names = (f"{source}_dynamic_stored", f"{source}_dynamic_scale", f"{source}_dynamic_zero")
            made.append(onnx.helper.make_node("DynamicQuantizeLinear", [source], names))
            self._stored[source] = names
        return self._stored[source]

    def _weight(self, name: str, turned: bool) -> tuple[str, str] | None:
        """Names of the [K, N] int8 matrix and of its N scales."""
        node = self._makers.get(name)
        if node is not None and node.op_type == "Transpose" and not turned:
            turned, node = True, self._makers.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        # Equal numbers may be stored once for layers of other scales.
        key = f"{node.input[0]} {node.input[1]} {turned}"
        if key not in self._weights:
            self._weights[key] = self._turned(node, turned)
        return self._weights[key]

    def _turned(self, node: onnx.NodeProto, turned: bool) -> tuple[str, str] | None:
        parts: list[Any] = [self._constants.get(name) for name in node.input]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if any(part is None for part in parts) or parts[0].ndim != 2 or parts[0].dtype != np.int8:
            return None
        # One scale a column of the product, and none of them shifted.
        if axis % 2 != (0 if turned else 1) or parts[1].ndim != 1 or (len(parts) > 2 and parts[2].any()):
            return None
        values = np.ascontiguousarray(parts[0].T) if turned else parts[0]
        names = (f"{node.input[0]}_{'turned' if turned else 'columns'}", f"{node.input[1]}_columns")
        for name, value in zip(names, (values, parts[1])):
            if name not in self._constants:
                self._constants[name] = value
                self._graph.initializer.append(numpy_helper.from_array(value, name))
        return names

"""Pairs of quantize and dequantize that ONNX Runtime is better off without. Knows no engine's session.

Its integer products give floats: a pair behind one that is read as floats again costs two passes over the values and
some accuracy, and saves nothing. And a padding between two pairs of the same range hides the convolution behind it from
the one before, although the convolution can pad by itself: with the stored zero, which stands for 0.0 exactly.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from ._onnx_unused import drop_unused

_PRODUCTS = ("MatMul", "Gemm")
#: Operators that have an integer form between pairs.
_INTEGER = (
    "Add", "Mul", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax",
    "Relu", "Clip",
)  # fmt: skip


def drop_pairs(model: onnx.ModelProto) -> int:
    """Take such pairs out; returns how many."""
    editor = _Pairs(model)
    count = 0
    for node in list(model.graph.node):
        if node.op_type == "QuantizeLinear":
            count += editor.behind_product(node)
        elif node.op_type == "Conv":
            count += editor.around_padding(node)
    if count:
        drop_unused(model)
    return count


class _Pairs:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._constants = {i.name: i for i in model.graph.initializer}
        self._makers = {output: node for node in model.graph.node for output in node.output}
        self._outputs = {o.name for o in model.graph.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)

    def behind_product(self, store: onnx.NodeProto) -> int:
        """Let float readers of an integer product read it before it is stored."""
        if not self._is_product(self._makers.get(store.input[0])):
            return 0
        count = 0
        for back in self._users.get(store.output[0], []):
            name = back.output[0] if back.op_type == "DequantizeLinear" else ""
            readers = self._users.get(name, [])
            if not name or name in self._outputs or not readers or any(self._is_integer(r) for r in readers):
                continue
            for reader in readers:
                self._read_instead(reader, name, store.input[0])
            count += 1
        return count

    def _is_product(self, node: onnx.NodeProto | None) -> bool:
        """Whether a node is a product of integers, or adds a constant to one."""
        if node is not None and node.op_type == "Add":
            product = next((self._makers.get(n) for n in node.input if n not in self._constants), None)
            return any(n in self._constants for n in node.input) and self._is_product_node(product)
        return self._is_product_node(node)

    def _is_product_node(self, node: onnx.NodeProto | None) -> bool:
        return node is not None and node.op_type in _PRODUCTS and all(self._is_stored(n) for n in node.input[:2])

    def _is_stored(self, name: str) -> bool:
        node = self._makers.get(name)
        if node is not None and node.op_type == "Transpose":
            node = self._makers.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    def _is_integer(self, node: onnx.NodeProto) -> bool:
        """Whether a reader becomes an integer operator of what it reads."""
        if node.op_type in ("Conv", *_PRODUCTS):
            return all(self._is_stored(name) for name in node.input[:2])
        if node.op_type not in _INTEGER:
            return False
        stores = any(user.op_type == "QuantizeLinear" for name in node.output for user in self._users.get(name, []))
        return stores and all(self._is_stored(name) or name in self._constants for name in node.input if name)

    def around_padding(self, conv: onnx.NodeProto) -> int:
        """Let a convolution pad for itself what was stored, padded, and stored again with the same range."""
        chain = self._chain(conv.input[0], ("DequantizeLinear", "QuantizeLinear", "Pad", "DequantizeLinear"))
        options = {a.name: a for a in conv.attribute}
        if chain is None or ("auto_pad" in options and options["auto_pad"].s != b"NOTSET"):
            return 0
        back, store, pad, before = chain
        if not all(self._same(back.input[i], before.input[i]) and store.input[i] == back.input[i] for i in (1, 2)):
            return 0
        sides = self._sides(pad)
        if sides is None:
            return 0
        dims = len(sides) // 2
        old = list(options["pads"].ints) if "pads" in options else [0] * (2 * dims)
        if len(old) != 2 * dims:
            return 0
        for attribute in [a for a in conv.attribute if a.name == "pads"]:
            conv.attribute.remove(attribute)
        conv.attribute.append(onnx.helper.make_attribute("pads", [a + b for a, b in zip(old, sides)]))
        self._read_instead(conv, conv.input[0], before.output[0])
        return 1

    def _chain(self, name: str, kinds: tuple[str, ...]) -> list[onnx.NodeProto] | None:
        """The nodes behind each other that end in a value, none of them read by anybody else but the last."""
        found: list[onnx.NodeProto] = []
        for kind in kinds:
            node = self._makers.get(name)
            if node is None or node.op_type != kind:
                return None
            if kind != kinds[-1] and (len(self._users.get(name, [])) != 1 or name in self._outputs):
                return None
            found.append(node)
            name = node.input[0]
        return found

    def _same(self, one: str, other: str) -> bool:
        if one == other:
            return True
        if one not in self._constants or other not in self._constants:
            return False
        first, second = (numpy_helper.to_array(self._constants[name]) for name in (one, other))
        return np.array_equal(first, second)

    def _sides(self, pad: onnx.NodeProto) -> list[int] | None:
        """Zeros at the beginning and the end of each spatial dimension; None if that is not what it does."""
        mode = next((a.s for a in pad.attribute if a.name == "mode"), b"constant")
        given = [self._constants.get(name) for name in pad.input[1:] if name]
        if mode != b"constant" or any(g is None for g in given) or (len(pad.input) > 3 and pad.input[3]):
            return None
        values = [numpy_helper.to_array(g) for g in given if g is not None]
        if len(values) > 1 and values[1].any():
            return None
        sides = [int(v) for v in values[0]]
        rank = len(sides) // 2
        if rank < 3 or min(sides) < 0 or any(sides[i] or sides[rank + i] for i in (0, 1)):
            return None
        return [*sides[2:rank], *sides[rank + 2 :]]

    def _read_instead(self, reader: onnx.NodeProto, old: str, new: str) -> None:
        for i, name in enumerate(reader.input):
            if name == old:
                reader.input[i] = new
        self._users[old] = [u for u in self._users.get(old, []) if u is not reader]
        self._users.setdefault(new, []).append(reader)

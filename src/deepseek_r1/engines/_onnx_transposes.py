"""Exported attention swaps the last two dimensions of its keys by way of three; here that becomes one Transpose.

PyTorch's exporter reshapes the keys to [-1, length, width], transposes, and reshapes back, with sizes that it reads
from the keys' own shape. ONNX Runtime folds a Transpose into the product behind it, but not one between two Reshapes,
so that each call would copy all keys. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from ._onnx_unused import drop_unused, reads


def ranks_of(model: onnx.ModelProto) -> dict[str, int]:
    """Number of dimensions of each value that the model says it of."""
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}


def join_transposes(model: onnx.ModelProto, ranks: Mapping[str, int]) -> int:
    """Put one Transpose in the place of Reshape, Transpose, Reshape where they swap the last two dimensions.

    Args:
        ranks: see `ranks_of`; where one is not known, nothing is changed.

    Returns:
        How many there were.
    """
    found = _Shapes(model)
    count = 0
    for node in model.graph.node:
        first, last = found.maker(node.input[0]) if node.input else None, found.only_user(node)
        if node.op_type != "Transpose" or _perm(node) != [0, 2, 1] or first is None or last is None:
            continue
        if first.op_type != "Reshape" or last.op_type != "Reshape" or last.input[0] != node.output[0]:
            continue
        source = first.input[0]
        rank = ranks.get(source, 0)
        if rank < 3 or not found.swaps(source, rank, first.input[1], last.input[1]):
            continue
        node.input[0] = source
        del node.attribute[:]
        perm = [*range(rank - 2), rank - 1, rank - 2]
        node.attribute.append(onnx.helper.make_attribute("perm", perm))
        # The reshape behind it is found to be unused below.
        node.output[0], last.output[0] = last.output[0], node.output[0]
        count += 1
    if count:
        drop_unused(model)
    return count


def _perm(node: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [])


class _Shapes:
    """What the graph computes of sizes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._makers = {output: node for node in model.graph.node for output in node.output}
        self._constants = {i.name: i for i in model.graph.initializer}
        self._outputs = {o.name for o in model.graph.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in reads(node):
                self._users.setdefault(name, []).append(node)

    def maker(self, name: str) -> onnx.NodeProto | None:
        return self._makers.get(name)

    def only_user(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        users = self._users.get(node.output[0], []) if node.output else []
        return users[0] if len(users) == 1 and node.output[0] not in self._outputs else None

    def swaps(self, source: str, rank: int, there: str, back: str) -> bool:
        """Whether the two shapes are [-1, second to last, last] and [the first ones, last, second to last]."""
        one, other = self.maker(there), self.maker(back)
        if one is None or other is None or one.op_type != "Concat" or other.op_type != "Concat":
            return False
        if len(one.input) != 3 or self._constant(one.input[0]) != [-1]:
            return False
        axes = list(range(rank))
        asked = [self._axes(source, rank, name) for name in one.input[1:]]
        given = [self._axes(source, rank, name) for name in other.input]
        if None in asked or None in given:
            return False
        swapped = [axis for part in given for axis in part or []]
        return asked == [axes[-2:-1], axes[-1:]] and swapped == [*axes[:-2], axes[-1], axes[-2]]

    def _axes(self, source: str, rank: int, name: str) -> list[int] | None:
        """The axes of `source` whose sizes this value holds; None if it holds anything else."""
        node = self.maker(name)
        if node is None or node.op_type != "Slice" or len(node.input) != 3:
            return None
        whole = self.maker(node.input[0])
        bounds = [self._constant(limit) for limit in node.input[1:]]
        if whole is None or whole.op_type != "Shape" or whole.input[0] != source:
            return None
        if any(a.name != "start" or a.i != 0 for a in whole.attribute):
            return None
        if any(limit is None or len(limit) != 1 for limit in bounds):
            return None
        (start,), (end,) = (limit or [0] for limit in bounds)
        return list(range(rank))[start:end]

    def _constant(self, name: str) -> list[int] | None:
        made = self.maker(name)
        if name in self._constants:
            value = numpy_helper.to_array(self._constants[name])
        elif made is not None and made.op_type == "Constant" and made.attribute[0].name == "value":
            value = numpy_helper.to_array(made.attribute[0].t)
        else:
            return None
        return [int(v) for v in value] if value.ndim == 1 and np.issubdtype(value.dtype, np.integer) else None

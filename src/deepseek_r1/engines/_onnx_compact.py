"""Bytes of an ONNX model of integers that are neither weights nor needed to run it. Knows no engine."""

from __future__ import annotations

import itertools
import string

import numpy as np
import onnx
from onnx import numpy_helper

#: Fewer scales than this in a constant are not worth the node that widens them.
_WORTH = 16
_LETTERS = string.ascii_lowercase + string.digits


def compact(model: onnx.ModelProto) -> None:
    """Store scales of weights in 16 bits where they are no less exact, and number the values in between.

    Runtimes widen the scales when they load the model, as they fold all that is constant. Inputs, outputs and stored
    tensors keep their names; nodes are called as what they give.
    """
    _halve_scales(model)
    _number(model)


def _halve_scales(model: onnx.ModelProto) -> None:
    constants = {i.name: i for i in model.graph.initializer}
    scales = {
        n.input[1] for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in constants and n.input[1] in constants
    }  # fmt: skip
    made = []
    for name in sorted(scales):
        value = numpy_helper.to_array(constants[name])
        if value.dtype != np.float32 or value.size < _WORTH:
            continue
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), value):
            continue
        constants[name].CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
        made.append(onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*made, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _number(model: onnx.ModelProto) -> None:
    """Rename what nodes give; bodies of loops and branches see outer names, so models with such stay as they are."""
    nodes = model.graph.node
    if any(a.HasField("g") or a.graphs for n in nodes for a in n.attribute):
        return
    kept = {v.name for part in (model.graph.input, model.graph.output, model.graph.initializer) for v in part}
    free = (name for name in _names() if name not in kept)
    new = {name: next(free) for node in nodes for name in node.output if name and name not in kept}
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
        node.name = next(filter(None, node.output))


def _names() -> itertools.chain[str]:
    """a, b, ..., then pairs, then threes: a letter first, as identifiers have it."""
    return itertools.chain.from_iterable(
        ("".join((first, *rest)) for first in string.ascii_lowercase for rest in itertools.product(_LETTERS, repeat=n))
        for n in itertools.count()
    )

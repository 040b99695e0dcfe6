"""The retarget pass that lets ONNX Runtime fuse integer kernels, and keeps it from making others. Knows no session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ._onnx_unused import drop_unused

#: An old node and a new one to stand before it.
_Insertion = tuple[onnx.NodeProto, onnx.NodeProto]
#: Largest bias in steps of input scale x weight scale: int32 with a bit to spare for the products.
_MOST_STEPS = 2.0**30


def retarget(model: onnx.ModelProto) -> int:
    """Shift activations from int8 to uint8 (zero point + 128), which is exact; returns how many pairs were shifted.

    ONNX Runtime's x86 kernels multiply unsigned activations with signed weights, and its fusion of
    convolution + ReLU needs the zero point at the bottom of the range, which for uint8 is 0.
    Biases behind quantised inputs become int32 with scale input x weight, as the same kernels want them; float layers
    between integer ones are marked as such, see `_guard_floats`.
    """
    constants = {i.name: i for i in model.graph.initializer}
    shifted: dict[str, str] = {}
    count = 0
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        zero = node.input[2]
        if node.input[0] in constants or zero not in constants:
            continue
        if zero not in shifted:
            value = numpy_helper.to_array(constants[zero])
            if value.dtype != np.int8:
                continue
            shifted[zero] = f"{zero}_u8"
            moved = (value.astype(np.int16) + 128).astype(np.uint8)
            model.graph.initializer.append(numpy_helper.from_array(moved, shifted[zero]))
        node.input[2] = shifted[zero]
        count += 1
    if count:
        _integer_biases(model)
        _guard_floats(model)
        drop_unused(model)
    return count


#: Where a node stands that adds a bias, which of its inputs that is, and the pairs before the product's operands.
_Biased = tuple[int, int, onnx.NodeProto, onnx.NodeProto]


def _biased_products(model: onnx.ModelProto, constants: Mapping[str, Any]) -> Iterator[_Biased]:
    """Products of integers with a stored bias.

    A matrix product and the addition behind it count where all sizes are fixed: there ONNX Runtime makes one operator
    of both, for which it has an integer kernel only if the bias is an integer too.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    fixed = all(d.HasField("dim_value") for i in model.graph.input for d in i.type.tensor_type.shape.dim)
    for number, node in enumerate(model.graph.node):
        product, place = node, 2
        if node.op_type == "Add" and fixed:
            place = int(node.input[0] not in constants)
            product = makers.get(node.input[1 - place], node)
            place = place if product.op_type == "MatMul" else len(node.input)
        elif node.op_type not in ("Conv", "Gemm"):
            continue
        if place >= len(node.input) or node.input[place] not in constants:
            continue
        x, weight = (makers.get(name) for name in product.input[:2])
        if weight is not None and weight.op_type == "Transpose":
            weight = makers.get(weight.input[0])
        if x is None or weight is None or {x.op_type, weight.op_type} != {"DequantizeLinear"}:
            continue
        if x.input[1] in constants and weight.input[1] in constants:
            yield number, place, x, weight


def _integer_biases(model: onnx.ModelProto) -> None:
    constants = {i.name: i for i in model.graph.initializer}
    added: list[_Insertion] = []
    for number, place, x, weight in list(_biased_products(model, constants)):
        node = model.graph.node[number]
        bias = numpy_helper.to_array(constants[node.input[place]])
        if bias.dtype != np.float32 or bias.ndim != 1:
            continue
        scale = _product_scale(model, constants, x, weight, bias)
        if scale is None:
            continue
        stem = f"bias_{number}"
        stored = np.round(bias / scale.astype(np.float64)).astype(np.int32)
        model.graph.initializer.append(numpy_helper.from_array(stored, f"{stem}_int32"))
        make = onnx.helper.make_node
        if numpy_helper.to_array(constants[weight.input[1]]).shape == bias.shape:
            # A product of constants, which every runtime folds, is four bytes a channel less to store.
            added.append((node, make("Mul", [x.input[1], weight.input[1]], [f"{stem}_scale"], name=f"{stem}_mul")))
        else:
            model.graph.initializer.append(numpy_helper.from_array(scale, f"{stem}_scale"))
        back = make("DequantizeLinear", [f"{stem}_int32", f"{stem}_scale"], [f"{stem}_float"], axis=0)
        node.input[place] = f"{stem}_float"
        added.append((node, back))
    _insert_before(model, added)


def _product_scale(
    model: onnx.ModelProto, constants: dict[str, Any], x: onnx.NodeProto, weight: onnx.NodeProto, bias: Any
) -> Any:
    """Input scale x weight scale for each channel; None if the bias cannot be counted in it.

    A channel whose weights are next to nothing (one that died in training, behind a folded batch norm) has a scale so
    small that its bias is more steps than int32 holds. Its weights are rounded to a scale at which it fits, where they
    matter as little as before: all of them together are then less than a millionth of the bias.
    """
    x_scale, w_scale = (numpy_helper.to_array(constants[p.input[1]]).astype(np.float64) for p in (x, weight))
    scale = np.broadcast_to(x_scale * w_scale, bias.shape) if w_scale.size in (1, bias.size) else None
    if scale is None or x_scale.size != 1:
        return None
    steps = np.abs(bias) / scale
    if steps.max(initial=0) <= _MOST_STEPS:
        return scale.astype(np.float32)
    values = numpy_helper.to_array(constants[weight.input[0]]) if weight.input[0] in constants else None
    axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
    if values is None or w_scale.ndim != 1 or values.shape[axis] != bias.size:
        return None
    wider = np.maximum(w_scale, np.abs(bias) / _MOST_STEPS / x_scale)
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    rounded = np.round(values * (w_scale / wider).reshape(shape)).astype(values.dtype)
    for place, value in ((0, rounded), (1, wider.astype(np.float32))):
        name = f"{weight.input[place]}_wider"
        constants[name] = numpy_helper.from_array(value, name)
        model.graph.initializer.append(constants[name])
        weight.input[place] = name
    return (x_scale * wider.astype(np.float32)).astype(np.float32)


def _guard_floats(model: onnx.ModelProto) -> None:
    """Hide from float layers that what they read was dequantised.

    ONNX Runtime takes a float convolution or Gemm between DequantizeLinear and QuantizeLinear for one whose weights
    were forgotten, and rounds them to 8 bits with one scale for the whole layer (its `WeightBiasQuantization`, on by
    default). A sum of one value in between is exact, costs one copy, and is no part of that pattern.
    """
    constants = {i.name for i in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    added: list[_Insertion] = []
    for number, node in enumerate(model.graph.node):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or node.input[1] not in constants:
            continue
        before = makers.get(node.input[0])
        if before is not None and before.op_type == "DequantizeLinear":
            hidden = f"float_{number}"
            added.append((node, onnx.helper.make_node("Sum", [node.input[0]], [hidden], name=f"{hidden}_sum")))
            node.input[0] = hidden
    _insert_before(model, added)


def _insert_before(model: onnx.ModelProto, added: list[_Insertion]) -> None:
    """Put new nodes before the ones that read them."""
    nodes = list(model.graph.node)
    for node, new in added:
        nodes.insert(next(i for i, n in enumerate(nodes) if n is node), new)
    del model.graph.node[:]
    model.graph.node.extend(nodes)

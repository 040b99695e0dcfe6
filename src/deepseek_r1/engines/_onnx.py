"""A Program as an ONNX model, and the retarget pass that lets ONNX Runtime fuse integer kernels."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from ..core import UnsupportedOpError
from ..graph import Program, recurrent_shapes
from ..graph.quiet import quiet_torch
from ._onnx_dynamic import INT8_DYNAMIC, quantize_dynamically
from ._onnx_formats import OPSET, TRANSLATIONS, lower_blocks, needs_translation, unpacked
from ._onnx_pairs import drop_pairs
from ._onnx_transposes import join_transposes, ranks_of
from ._onnx_unused import drop_unused

#: One above the 2 GiB that a single protobuf message can hold is refused; larger models need external data.
_LIMIT_BYTES = 2 * 10**9


def needs_external_data(program: Program) -> bool:
    """Whether the program's weights are more than one ONNX file can hold."""
    return program.parameters_bytes > _LIMIT_BYTES


def to_onnx(program: Program, *, external_data: bool = False, precision: str | None = None) -> onnx.ModelProto:
    """The program in ONNX, inputs named as in the graph, outputs `output` or `output_0`, `output_1`, ...

    Opset 20; 21 if layers have 4 bits or dynamic activations, see `_onnx_formats`. Quantised programs get the form that
    ONNX Runtime fuses, see `retarget`.

    Args:
        external_data: take models of any size; the caller writes their weights to a file of their own.
        precision: "int8-dynamic" for products whose activations are quantised at run time, see `_onnx_dynamic`; else
            the program's own.

    Raises:
        UnsupportedOpError: an operator has no ONNX form, or the model is larger than one file may be.
    """
    if needs_external_data(program) and not external_data:
        raise UnsupportedOpError(
            f"{program.name!r} has {program.parameters_bytes / 1e9:.1f} GB of weights; an ONNX file holds at most 2."
        )
    names = [n for n in program.exported.graph_signature.user_outputs if n is not None]
    if any(not isinstance(n, str) for n in names):
        plain = [n for n in names if not isinstance(n, str)]
        raise UnsupportedOpError(f"{program.name!r} gives {plain} beside its tensors; ONNX gives tensors only.")
    outputs = ["output"] if len(names) == 1 else [f"output_{i}" for i in range(len(names))]
    special = needs_translation(program)
    if special:
        program = unpacked(program)
    try:
        # Without gradients, because torch decomposes attention with a learned mask by two kernels otherwise, and the
        # reshape that is a view behind the one is none behind the other.
        silent = contextlib.redirect_stdout(io.StringIO())
        with torch.no_grad(), quiet_torch(), recurrent_shapes(decomposing=True), silent:
            exported = torch.onnx.export(
                program.exported, (), dynamo=True, opset_version=OPSET if special else 20, verbose=False,
                input_names=program.input_names(), output_names=outputs,
                custom_translation_table=TRANSLATIONS if special else None,
            )  # fmt: skip
        assert exported is not None
        model: onnx.ModelProto = exported.model_proto
    except Exception as e:  # the exporter has a class of its own for each stage
        raise UnsupportedOpError(f"{program.name!r} has no ONNX form: {_reason(e)}") from e
    join_transposes(model, ranks_of(model))
    _tidy(model, program)
    if special:
        lower_blocks(model)
    if special or precision == INT8_DYNAMIC:
        quantize_dynamically(model, every=precision == INT8_DYNAMIC)
    drop_pairs(model)
    retarget(model)
    for node in model.graph.node:
        # By name the profiler tells operators apart.
        node.name = node.name or f"node_{node.output[0]}"
    return model


def _reason(error: BaseException) -> str:
    """The first cause in one line; the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:300]}"


def _tidy(model: onnx.ModelProto, program: Program) -> None:
    """Take out stack traces (they carry the user's paths) and call the first dynamic dimension `batch`."""
    del model.graph.value_info[:]
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
        if isinstance(part, onnx.NodeProto):
            part.doc_string = ""
    # The exporter calls a size dynamic that the model fixed while it was captured; the program knows better.
    shapes = dict(zip(program.input_names(), program.input_shapes(), strict=True))
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            if isinstance(size, int):
                dim.dim_value = size
    names: dict[str, str] = {}
    for value in (*model.graph.input, *model.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                free = "batch" if axis == 0 and "batch" not in names.values() else f"dim_{len(names)}"
                dim.dim_param = names.setdefault(dim.dim_param, free)


def retarget(model: onnx.ModelProto) -> int:
    """Shift activations from int8 to uint8 (zero point + 128), which is exact; returns how many pairs were shifted.

    ONNX Runtime's x86 kernels multiply unsigned activations with signed weights, and its fusion of
    convolution + ReLU needs the zero point at the bottom of the range, which for uint8 is 0.
    Biases behind quantised inputs become int32 with scale input x weight, as the same kernels want them.
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
    added: list[tuple[onnx.NodeProto, onnx.NodeProto]] = []
    for number, place, x, weight in list(_biased_products(model, constants)):
        node = model.graph.node[number]
        bias = numpy_helper.to_array(constants[node.input[place]])
        x_scale, w_scale = (numpy_helper.to_array(constants[p.input[1]]).astype(np.float64) for p in (x, weight))
        scale = (x_scale * w_scale).astype(np.float32)
        if bias.dtype != np.float32 or bias.ndim != 1 or scale.size not in (1, bias.size):
            continue
        stored = np.round(bias / scale.astype(np.float64))
        if np.abs(stored).max(initial=0) > 2**31 - 1:
            continue
        stem = f"bias_{number}"
        model.graph.initializer.append(numpy_helper.from_array(stored.astype(np.int32), f"{stem}_int32"))
        model.graph.initializer.append(
            numpy_helper.from_array(np.broadcast_to(scale, bias.shape).copy(), f"{stem}_scale")
        )
        zero = np.zeros(bias.shape, dtype=np.int32)
        model.graph.initializer.append(numpy_helper.from_array(zero, f"{stem}_zero"))
        back = onnx.helper.make_node(
            "DequantizeLinear", [f"{stem}_int32", f"{stem}_scale", f"{stem}_zero"], [f"{stem}_float"], axis=0
        )
        node.input[place] = f"{stem}_float"
        added.append((node, back))
    nodes = list(model.graph.node)
    for node, back in added:
        nodes.insert(next(i for i, n in enumerate(nodes) if n is node), back)
    del model.graph.node[:]
    model.graph.node.extend(nodes)

"""A Program as an ONNX model."""

from __future__ import annotations

import contextlib
import io

import onnx
import torch

from ..core import UnsupportedOpError
from ..graph import Program, recurrent_shapes
from ..graph.quiet import quiet_torch
from ._onnx_compact import compact
from ._onnx_dynamic import INT8_DYNAMIC, quantize_dynamically
from ._onnx_formats import OPSET, TRANSLATIONS, lower_blocks, needs_translation, unpacked
from ._onnx_integer import retarget
from ._onnx_pairs import drop_pairs
from ._onnx_transposes import join_transposes, ranks_of

#: One above the 2 GiB that a single protobuf message can hold is refused; larger models need external data.
_LIMIT_BYTES = 2 * 10**9


def needs_external_data(program: Program) -> bool:
    """Whether the program's weights are more than one ONNX file can hold."""
    return program.parameters_bytes > _LIMIT_BYTES


def to_onnx(program: Program, *, external_data: bool = False, precision: str | None = None) -> onnx.ModelProto:
    """The program in ONNX, inputs named as in the graph, outputs `output` or `output_0`, `output_1`, ...

    Opset 20; 21 if layers have 4 bits or dynamic activations, see `_onnx_formats`. Quantised programs get the form that
    ONNX Runtime fuses, see `_onnx_integer`.

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
    if retarget(model) or special:
        compact(model)
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

"""Parity of a translated ONNX model with onnxruntime, on random or given inputs. Knows nothing of the translation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx

from ..core import ArtifactError, InputError, Report, UnsupportedOpError
from ._conversion import TOLERANCE, first_line, given_arrays, judge

#: Where values are rounded to integers, two right answers differ by whole steps.
TOLERANCE_ROUNDED = 2e-2
#: Sizes tried for dynamic dimensions: (batch, sequence-like, picture-like).
_SIZES = ((2, 8, 64), (3, 12, 96))
_OTHER_SIZES = ((1, 8, 64), (2, 16, 32), (2, 32, 224), (2, 128, 128), (1, 1, 1))
_PASSING = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def open_session(file: Path) -> onnxruntime.InferenceSession:
    """The file in onnxruntime.

    Raises:
        ArtifactError: onnxruntime finds the graph invalid.
        UnsupportedOpError: onnxruntime has no kernel for a node, so nothing could be compared.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Plain kernels: fused ones may round quantised values elsewhere than the file says.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's errors have no common base class of their own
        if type(e).__name__ == "NotImplemented":
            raise UnsupportedOpError(
                f"{file}: onnxruntime has no kernel for it, so nothing could be compared: {first_line(e)} "
                "Convert it to a newer opset with onnx.version_converter.convert_version(model, 17)."
            ) from e
        raise ArtifactError(f"{file} is damaged: {first_line(e)} Export or download it again.") from e


def check(
    module: fx.GraphModule,
    session: onnxruntime.InferenceSession,
    file: Path,
    model: onnx.ModelProto,
    example_inputs: Any = None,
) -> Report:
    """Run both sides and compare: twice, with different sizes, where dimensions are dynamic.

    Raises:
        CheckFailedError: an output or the loss differs by more than the tolerance.
        InputError: onnxruntime accepts none of the inputs made here.
    """
    report = Report(f"load_onnx {file.name}")
    rounded = any(node.op_type in ("QuantizeLinear", "Round", "Floor") for node in model.graph.node)
    limit = TOLERANCE_ROUNDED if rounded else TOLERANCE
    for feeds, wanted in _runs(session, model, module, example_inputs):
        shapes = ", ".join(f"{name} {list(v.shape)}" for name, v in feeds.items())
        got = _run(module, feeds, f"{file} (inputs: {shapes})")
        outputs = zip(module.meta["output_names"], [got] if isinstance(got, Tensor) else got, wanted, strict=True)
        judge(report, str(file), list(outputs), engine="onnxruntime", shapes=shapes, limit=limit)
    return report


def _run(module: fx.GraphModule, feeds: Mapping[str, np.ndarray[Any, Any]], what: str) -> Any:
    try:
        with torch.no_grad():
            return module(*(torch.from_numpy(v) for v in feeds.values()))
    except UnsupportedOpError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as e:
        # What onnxruntime runs and torch does not is an operator without a kernel, or a translation that is wrong.
        raise UnsupportedOpError(
            f"{what}: the translated module fails where onnxruntime runs: {type(e).__name__}: {first_line(e)}"
        ) from e


def _runs(
    session: onnxruntime.InferenceSession, model: onnx.ModelProto, module: fx.GraphModule, example_inputs: Any
) -> list[tuple[dict[str, np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]]:
    """Inputs that onnxruntime accepts, with its outputs."""
    names = module.meta["output_names"]
    if example_inputs is not None:
        inputs = module.meta["input_names"]
        feeds = dict(zip(inputs, given_arrays(inputs, example_inputs), strict=True))
        try:
            return [(feeds, session.run(names, feeds))]
        except Exception as e:
            raise InputError(f"onnxruntime refuses the example inputs: {first_line(e)}") from e
    wanted = 2 if any(not isinstance(d, int) for i in session.get_inputs() for d in i.shape) else 1
    bounds = index_bounds(model)
    found, last = [], ""
    for attempt, sizes in enumerate(_SIZES + _OTHER_SIZES):
        feeds = _random(session, sizes, bounds, seed=attempt)
        try:
            found.append((feeds, session.run(names, feeds)))
        except Exception as e:
            last = first_line(e)
        if len(found) == wanted:
            return found
    if not found:
        raise InputError(
            f"onnxruntime accepted none of the random inputs that were tried, the last one with: {last} "
            "Give load_onnx real ones: example_inputs=(tensor, ...)."
        )
    return found


def _random(
    session: onnxruntime.InferenceSession, sizes: tuple[int, int, int], bounds: dict[str, int], seed: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs; a symbol that occurs twice gets the same size."""
    rng = np.random.default_rng(seed)
    symbols: dict[str, int] = {}
    feeds = {}
    for info in session.get_inputs():
        shape = []
        for axis, dim in enumerate(info.shape):
            if isinstance(dim, int):
                shape.append(dim)
                continue
            kind = 0 if axis == 0 else (2 if len(info.shape) == 4 and axis >= 2 else 1)
            shape.append(symbols.setdefault(dim or f"{info.name}.{axis}", sizes[kind]))
        dtype = _NUMPY.get(info.type)
        if dtype is None:
            raise InputError(f"the input {info.name!r} is a {info.type}; give load_onnx example_inputs=(tensor, ...).")
        if np.issubdtype(dtype, np.floating):
            feeds[info.name] = rng.standard_normal(shape).astype(dtype)
            continue
        value = rng.integers(0, bounds.get(info.name, 2), shape)
        if value.ndim and value.size:
            # A mask of nothing but zeros has no defined attention.
            value[..., 0] = min(1, bounds.get(info.name, 2) - 1)
        feeds[info.name] = value.astype(dtype)
    return feeds


_NUMPY: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}  # fmt: skip


def index_bounds(model: onnx.ModelProto) -> dict[str, int]:
    """For each input that indexes a constant table: the table's length."""
    tables = {t.name: tuple(t.dims) for t in model.graph.initializer}
    origin = {i.name: i.name for i in model.graph.input}
    bounds: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in _PASSING and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        if node.op_type == "Gather" and node.input[0] in tables and node.input[1] in origin:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            source, length = origin[node.input[1]], tables[node.input[0]][axis]
            bounds[source] = min(bounds.get(source, length), length)
    return bounds

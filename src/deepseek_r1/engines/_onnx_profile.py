"""Times of the operators of an ONNX model as ONNX Runtime runs it, fused and reordered."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..runtime import RUNTIMES
from .base import OperatorTime

#: First runs that are not counted.
_WARMUP = 3
_SUFFIX = "_kernel_time"


class OnnxProfile:
    """A model opened for profiling.

    Args:
        model: its file.
        inputs: which flat input of the program each input is.
    """

    def __init__(self, model: Path, inputs: Mapping[str, int], threads: int) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="deepseek-r1-", ignore_cleanup_errors=True)
        self._inputs = inputs
        self._optimised = Path(self._scratch.name) / "optimised.onnx"
        self._session = RUNTIMES.get("onnxruntime")(
            model, threads=threads, write_optimised=self._optimised, profile=Path(self._scratch.name) / "profile"
        )

    def __call__(self, leaves: Sequence[Any]) -> None:
        """Run once."""
        self._session.run({name: leaves[i].detach().contiguous().numpy() for name, i in self._inputs.items()})

    def finish(self) -> list[OperatorTime]:
        """The operators in the order in which they ran."""
        events = json.loads(Path(self._session.end_profile()).read_text())
        weights = _weights(onnx.load(self._optimised, load_external_data=False))
        self._scratch.cleanup()
        times: dict[str, list[float]] = {}
        about: dict[str, dict[str, Any]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
                name = event["name"].removesuffix(_SUFFIX)
                times.setdefault(name, []).append(event["dur"] / 1e3)
                about[name] = event["args"]
        return [
            OperatorTime(
                kind=about[name]["op_name"],
                # A loop's body runs several times a run: its operators count once for each.
                ms=float(np.median(values[_WARMUP:] or values)),
                weight=weights.get(name, 0),
                elements=_elements(about[name]),
            )
            for name, values in times.items()
        ]


def _weights(model: onnx.ModelProto) -> dict[str, int]:
    """Numbers in the constant that each node multiplies with, or makes floats of, by name of the node."""
    constants = {i.name: math.prod(i.dims) for i in model.graph.initializer if len(i.dims) >= 2}
    for node in model.graph.node:
        # Stored numbers that are made floats at each call.
        if node.op_type in ("DequantizeLinear", "Transpose") and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    found = {}
    for node in model.graph.node:
        sizes = {a.name: a.i for a in node.attribute}
        if node.op_type == "MatMulNBits":
            found[node.name] = sizes["K"] * sizes["N"]
        elif node.op_type == "DequantizeLinear":
            found[node.name] = constants.get(node.input[0], 0)
        elif any(word in node.op_type for word in ("Conv", "MatMul", "Gemm")):
            found[node.name] = max((constants.get(name, 0) for name in node.input), default=0)
    return found


def _elements(about: dict[str, Any]) -> int:
    shapes = [shape for entry in about.get("input_type_shape", []) for shape in entry.values()]
    return max((math.prod(shape) for shape in shapes), default=0)

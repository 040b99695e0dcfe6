"""ONNX Runtime on the CPU as an engine. It opens models through `runtime`, so what is raced is what is shipped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..graph import Program
from ..runtime import RUNTIMES
from ._eager import eager_runner
from ._onnx import to_onnx
from .base import Engine, Runner

_MODEL, _INPUTS = "model.onnx", "inputs.json"


class OnnxRuntimeEngine(Engine):
    """Exports to ONNX and runs that."""

    name = "onnxruntime"
    portable = True

    def unavailable(self) -> str:
        """Needs the package."""
        return "" if find_spec("onnxruntime") else "onnxruntime is not installed: pip install onnxruntime"

    def unsupported(self, program: Program) -> str:
        """CPU tensors only, of types that numpy has."""
        for tensor in program.exported.state_dict.values():
            if tensor.device.type != "cpu":
                return f"its weights are on {tensor.device}; this engine runs on the CPU"
            if tensor.dtype is torch.bfloat16:
                return "bfloat16 weights have no numpy type"
        return ""

    def build(self, program: Program, folder: Path, precision: str) -> None:
        """Export to ONNX."""
        model = to_onnx(program)
        # The exporter drops inputs that no operator reads.
        names = [i.name for i in model.graph.input]
        positions = [program.input_names().index(name) for name in names]
        (folder / _INPUTS).write_text(json.dumps(dict(zip(names, positions))))
        (folder / _MODEL).write_bytes(model.SerializeToString())

    def open(self, folder: Path, program: Callable[[], Program]) -> Runner:
        """Open a session."""
        inputs: dict[str, int] = json.loads((folder / _INPUTS).read_text())
        session = RUNTIMES.get("onnxruntime")(folder / _MODEL)
        of_nothing = cache(lambda: eager_runner(program()))

        def run(leaves: Sequence[Any]) -> list[torch.Tensor]:
            # ONNX Runtime gives wrong shapes for some reductions of an empty batch (ArgMax, as of 1.31).
            if not all(leaves[i].numel() for i in inputs.values()):
                return of_nothing()(leaves)
            feeds = {name: leaves[i].detach().contiguous().numpy() for name, i in inputs.items()}
            return [torch.from_numpy(v) for v in session.run(feeds)]

        return run

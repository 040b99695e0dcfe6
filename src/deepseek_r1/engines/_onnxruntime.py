"""ONNX Runtime on the CPU as an engine. It opens models through `runtime`, so what is raced is what is shipped."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from ..graph import Program
from ..runtime import RUNTIMES
from ._eager import EagerEngine
from ._onnx import to_onnx
from .base import Runner


class OnnxRuntimeEngine:
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

    def compile(self, program: Program) -> Runner:
        """Export, open a session."""
        model = to_onnx(program)
        names = [i.name for i in model.graph.input]
        # The exporter drops inputs that no operator reads.
        positions = [program.input_names().index(name) for name in names]
        session = RUNTIMES.get("onnxruntime")(model.SerializeToString())

        # ONNX Runtime gives wrong shapes for some reductions of an empty batch (ArgMax, as of 1.31).
        of_nothing = EagerEngine().compile(program)

        def run(leaves: Sequence[Any]) -> list[torch.Tensor]:
            if not all(leaves[i].numel() for i in positions):
                return of_nothing(leaves)
            feeds = {name: leaves[i].detach().contiguous().numpy() for name, i in zip(names, positions)}
            return [torch.from_numpy(v) for v in session.run(feeds)]

        return run

"""ONNX Runtime on the CPU as an engine. It opens models through `runtime`, so what is raced is what is shipped.

No bf16 or fp16: its CPU kernels for them are few, and the rest would be cast back and forth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import onnx
import torch

from ..graph import Program
from ..runtime import RUNTIMES
from . import _session
from ._onnx_dynamic import INT8_DYNAMIC
from ._onnx_profile import OnnxProfile
from .base import Engine, Profile, Runner

_q = torch.ops.quantized_decomposed
_INTEGER_KERNELS = frozenset(
    {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm"}
    | {"DynamicQuantizeMatMul", "MatMulNBits"}
)


class OnnxRuntimeEngine(Engine):
    """Exports to ONNX and runs that, on as many threads as PyTorch has."""

    name = "onnxruntime"
    portable = True
    keeps_groups = True

    def unavailable(self) -> str:
        """Needs the package."""
        return "" if find_spec("onnxruntime") else "onnxruntime is not installed: pip install onnxruntime"

    def unsupported(self, program: Program) -> str:
        """CPU tensors only, of types that numpy has."""
        return _session.unsupported(program)

    def precisions(self, program: Program) -> list[str]:
        """For a quantised program of mostly linear layers also with their activations quantised at run time."""
        return [program.precision, *([INT8_DYNAMIC] if _is_mostly_linear(program) else [])]

    def build(self, program: Program, folder: Path, precision: str) -> None:
        """Export to ONNX."""
        _session.write_model(program, folder, precision)

    def open(self, folder: Path, program: Callable[[], Program]) -> Runner:
        """Open a session."""
        session = RUNTIMES.get("onnxruntime")(folder / _session.MODEL, threads=torch.get_num_threads())
        return _session.session_runner(session, folder, program)

    def profile(self, folder: Path) -> Profile:
        """Times of ONNX Runtime's own profiler."""
        return OnnxProfile(folder / _session.MODEL, _session.input_places(folder), torch.get_num_threads())

    def integer_kernels(self, folder: Path) -> int:
        """How many products and convolutions are integer kernels after ONNX Runtime's own optimisation."""
        with tempfile.TemporaryDirectory(prefix="deepseek-r1-") as scratch:
            optimised = Path(scratch) / "optimised.onnx"
            RUNTIMES.get("onnxruntime")(folder / _session.MODEL, write_optimised=optimised)
            nodes = onnx.load(optimised, load_external_data=False).graph.node
        return sum(node.op_type in _INTEGER_KERNELS for node in nodes)


def _is_mostly_linear(program: Program) -> bool:
    """Whether it is quantised with ranges that were fixed, and mostly in linear layers."""
    nodes = program.exported.graph.nodes
    if program.precision != "int8" or not any(n.target is _q.quantize_per_tensor.default for n in nodes):
        return False
    stored = [n for n in nodes if n.target is _q.dequantize_per_channel.default]
    linear = sum(any(user.target is torch.ops.aten.linear.default for user in n.users) for n in stored)
    return linear > len(stored) / 2

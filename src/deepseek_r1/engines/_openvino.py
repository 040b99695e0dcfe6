"""OpenVINO on the CPU as an engine. It opens models through `runtime`, so what is raced is what is shipped.

Programs reach it through ONNX: its own reader of exported programs makes fixed sizes dynamic, and refuses
quantised programs (as of 2026.4).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..core import probe
from ..graph import Program
from ..runtime import RUNTIMES
from ..runtime._openvino import load_openvino
from . import _session
from .base import Engine, Runner

_MODEL, _ABOUT = "model.xml", "about.json"


class OpenVinoEngine(Engine):
    """Exports to ONNX, converts that to OpenVINO's own files, and runs it on as many threads as PyTorch has."""

    name = "openvino"
    portable = True
    keeps_groups = True

    def unavailable(self) -> str:
        """Needs the package."""
        return "" if find_spec("openvino") else "openvino is not installed: pip install 'deepseek-r1[openvino]'"

    def unsupported(self, program: Program) -> str:
        """CPU tensors only, of types that numpy has."""
        return _session.unsupported(program)

    def precisions(self, program: Program) -> list[str]:
        """bf16 beside fp32, where the CPU computes in it."""
        fast = {"avx512_bf16", "amx_bf16"} & set(probe().isa)
        return [program.precision, *(["bf16"] if fast and program.precision == "fp32" else [])]

    def build(self, program: Program, folder: Path, precision: str) -> None:
        """Write the model in OpenVINO's form, uncompressed; it is compiled for the CPU when it is opened."""
        openvino = load_openvino()
        source = _session.write_model(program, folder)
        # The `.bin` file is written beside the `.xml`; both read the weights out of the ONNX file first.
        openvino.save_model(openvino.Core().read_model(source), folder / _MODEL, compress_to_fp16=False)
        for file in (source, folder / _session.WEIGHTS):
            file.unlink(missing_ok=True)
        (folder / _ABOUT).write_text(json.dumps({"precision": "bf16" if precision == "bf16" else "fp32"}))

    def open(self, folder: Path, program: Callable[[], Program]) -> Runner:
        """Compile the model for this CPU."""
        return _session.session_runner(self._session(folder), folder, program)

    def integer_kernels(self, folder: Path) -> int:
        """How many products and convolutions of the compiled graph are in integers."""
        return sum(precision in ("i8", "u8") for _, precision in self._session(folder).layers())

    @staticmethod
    def _session(folder: Path) -> Any:
        precision = json.loads((folder / _ABOUT).read_text())["precision"]
        return RUNTIMES.get("openvino")(folder / _MODEL, threads=torch.get_num_threads(), precision=precision)

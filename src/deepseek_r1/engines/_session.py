"""What the engines that run an ONNX export share: the file, the order of its inputs, and torch to numpy and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch

from ..graph import Program
from ._onnx import needs_external_data, to_onnx
from ._refusals import changes_state, eager_where, is_empty, not_on_the_cpu
from .base import Runner

MODEL, WEIGHTS, INPUTS = "model.onnx", "weights.bin", "inputs.json"


class Session(Protocol):
    """An opened model: named numpy arrays in, all outputs in order out."""

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        """Run once."""


def unsupported(program: Program) -> str:
    """Why a program cannot be run as ONNX on the CPU with numpy in between."""
    for tensor in program.exported.state_dict.values():
        if tensor.dtype is torch.bfloat16:
            return "bfloat16 weights have no numpy type"
    return not_on_the_cpu(program) or changes_state(program)


def write_model(program: Program, folder: Path, precision: str | None = None) -> Path:
    """Write the ONNX model and which of the program's inputs it takes; returns the model's path."""
    model = to_onnx(program, external_data=True, precision=precision)
    # The exporter drops inputs that no operator reads.
    names = [i.name for i in model.graph.input]
    positions = [program.input_names().index(name) for name in names]
    (folder / INPUTS).write_text(json.dumps(dict(zip(names, positions))))
    if needs_external_data(program):
        onnx.save_model(model, folder / MODEL, save_as_external_data=True, location=WEIGHTS)
    else:
        (folder / MODEL).write_bytes(model.SerializeToString())
    return folder / MODEL


def input_places(folder: Path) -> dict[str, int]:
    """Which of the program's flat inputs each input of the model is."""
    places: dict[str, int] = json.loads((folder / INPUTS).read_text())
    return places


def session_runner(session: Session, folder: Path, program: Callable[[], Program]) -> Runner:
    """A session on the program's flat inputs; empty inputs go to PyTorch."""
    inputs = input_places(folder)

    def run(leaves: Sequence[Any]) -> list[torch.Tensor]:
        feeds = {name: leaves[i].detach().contiguous().numpy() for name, i in inputs.items()}
        return [torch.from_numpy(v) for v in session.run(feeds)]

    # ONNX Runtime gives wrong shapes for some reductions of an empty batch (ArgMax, as of 1.31).
    return eager_where(is_empty, run, program)

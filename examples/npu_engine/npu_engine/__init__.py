"""A simulated fixed-point accelerator as an engine of deepseek-r1, as a third party would write one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepseek_r1.engines import Engine, Runner
from deepseek_r1.graph import Program

from .compiler import Refused, compile_commands
from .machine import Machine

__all__ = ["NpuEngine"]

_STREAM, _MEMORY = "commands.json", "memory.npz"


class NpuEngine(Engine):
    """Compiles quantised programs to the accelerator's command stream."""

    name = "npu_sim"
    portable = True

    def unsupported(self, program: Program) -> str:
        """What in the program the accelerator has no command for."""
        try:
            compile_commands(program)
        except Refused as e:
            return str(e)
        return ""

    def build(self, program: Program, folder: Path, precision: str) -> None:
        """Write the command stream and the contents of the weight memory."""
        commands, memory = compile_commands(program)
        (folder / _STREAM).write_text(json.dumps(commands))
        np.savez(folder / _MEMORY, **memory)

    def open(self, folder: Path, program: Callable[[], Program]) -> Runner:
        """Load both into a machine."""
        commands = json.loads((folder / _STREAM).read_text())
        with np.load(folder / _MEMORY, allow_pickle=False) as stored:
            machine = Machine(commands, dict(stored))

        def run(leaves: Sequence[Any]) -> list[torch.Tensor]:
            return [torch.from_numpy(v) for v in machine.run([v.detach().numpy() for v in leaves])]

        return run

    def integer_kernels(self, folder: Path) -> int:
        """How many products and convolutions are commands of the accelerator: all, or the program is refused."""
        commands = json.loads((folder / _STREAM).read_text())
        return sum(c["command"] in ("conv", "product") for c in commands["stream"])

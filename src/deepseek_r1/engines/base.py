"""What an engine is, and the registry of engines. A third party offers one by the entry-point group."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..core import Registry
from ..graph import Program


class Runner(Protocol):
    """A compiled program: flat inputs in, flat tensor outputs out, in the program's order."""

    def __call__(self, leaves: Sequence[Any], /) -> list[torch.Tensor]:
        """Run once."""


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """What one operator of a compiled program took, in the order in which they run.

    Attributes:
        kind: the engine's name for the operator.
        ms: median, in milliseconds.
        weight: numbers in the matrix or kernel that it multiplies with, or makes floats of, if that is a constant;
            else 0.
        elements: numbers in the largest of its other inputs.
    """

    kind: str
    ms: float
    weight: int
    elements: int


class Profile(Protocol):
    """A compiled program that is being timed operator by operator."""

    def __call__(self, leaves: Sequence[Any], /) -> None:
        """Run once."""

    def finish(self) -> list[OperatorTime]:
        """Times over all runs but the first few; ends the profile."""


class Engine(ABC):
    """Compiles a Program to files, and opens those files as something that runs.

    The two steps may happen in different processes: what `build` writes is all that `open` has, so that a compiled
    program can be raced in a process of its own and kept for the next start.

    Attributes:
        name: the name it is registered under.
        portable: whether its result can be shipped without torch.
        keeps_groups: whether weights of 4 bits stay that small in its files, instead of becoming floats.
    """

    name: str
    portable: bool = False
    keeps_groups: bool = False

    def unavailable(self) -> str:
        """Why the engine cannot run on this machine; empty if it can."""
        return ""

    def unsupported(self, program: Program) -> str:
        """Why the engine cannot take this program; empty if it can (building may still fail)."""
        return ""

    def precisions(self, program: Program) -> list[str]:
        """Precisions it can compute this program in, the program's own first: names of `core.formats.PRECISIONS`,
        or "int8-dynamic" for a quantised program whose activations are quantised at run time instead."""
        return [program.precision]

    @abstractmethod
    def build(self, program: Program, folder: Path, precision: str) -> None:
        """Compile into an empty folder; may raise anything: the race then drops the candidate and says so."""

    @abstractmethod
    def open(self, folder: Path, program: Callable[[], Program]) -> Runner:
        """What `build` compiled, ready to run. The folder may be gone once this returns.

        Args:
            folder: where `build` wrote.
            program: gives the program, or the one that it was simplified from, whose answers are the same; may be
                slow the first time, so ask only if the files are not enough.
        """

    def profile(self, folder: Path) -> Profile | None:
        """What `build` compiled, to be timed operator by operator; None if the engine cannot."""
        return None


def compile_program(
    engine: Engine, program: Program, precision: str | None = None, *, fallback: Program | None = None
) -> Runner:
    """Build and open in this process, in the program's own precision unless told otherwise.

    Args:
        fallback: what the runner holds on to for inputs that the engine cannot take, in the program's place.
    """
    with tempfile.TemporaryDirectory(prefix="deepseek-r1-", ignore_cleanup_errors=True) as folder:
        engine.build(program, Path(folder), precision or program.precision)
        return engine.open(Path(folder), lambda: fallback or program)


#: Engines by name; `get` gives a class that is called without arguments.
ENGINES = Registry(
    "engine",
    "deepseek_r1.engines",
    {
        "cudagraph": "deepseek_r1.engines._cudagraph:CudaGraphEngine",
        "eager": "deepseek_r1.engines._eager:EagerEngine",
        "executorch": "deepseek_r1.engines._executorch:ExecuTorchEngine",
        "inductor": "deepseek_r1.engines._inductor:InductorEngine",
        "native": "deepseek_r1.engines._native:NativeEngine",
        "null": "deepseek_r1.engines._null:NullEngine",
        "onnxruntime": "deepseek_r1.engines._onnxruntime:OnnxRuntimeEngine",
        "openvino": "deepseek_r1.engines._openvino:OpenVinoEngine",
        "tensorrt": "deepseek_r1.engines._tensorrt:TensorRtEngine",
    },
)

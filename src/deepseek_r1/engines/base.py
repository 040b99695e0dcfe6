"""What an engine is, and the registry of engines. A third party offers one by the entry-point group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ..core import Registry
from ..graph import Program


class Runner(Protocol):
    """A compiled program: flat inputs in, flat tensor outputs out, in the program's order."""

    def __call__(self, leaves: Sequence[Any], /) -> list[torch.Tensor]:
        """Run once."""


class Engine(Protocol):
    """Compiles a Program to something that runs.

    Attributes:
        name: the name it is registered under.
        portable: whether its result can be shipped without torch.
    """

    name: str
    portable: bool

    def unavailable(self) -> str:
        """Why the engine cannot run on this machine; empty if it can."""

    def unsupported(self, program: Program) -> str:
        """Why the engine cannot take this program; empty if it can (compiling may still fail)."""

    def compile(self, program: Program) -> Runner:
        """Compile; may raise anything: the race then drops the candidate and says so."""


#: Engines by name; `get` gives a class that is called without arguments.
ENGINES = Registry(
    "engine",
    "deepseek_r1.engines",
    {
        "eager": "deepseek_r1.engines._eager:EagerEngine",
        "null": "deepseek_r1.engines._null:NullEngine",
        "onnxruntime": "deepseek_r1.engines._onnxruntime:OnnxRuntimeEngine",
    },
)

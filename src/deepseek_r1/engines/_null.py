"""An engine that computes nothing: zeros of the right shapes. For tests of pipelines; never raced unless named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..graph import Program
from .base import Engine, Runner


class NullEngine(Engine):
    """Answers with zeros."""

    name = "null"
    keeps_groups = True

    def build(self, program: Program, folder: Path, precision: str) -> None:
        """Nothing to compile."""

    def open(self, folder: Path, program: Callable[[], Program]) -> Runner:
        """Outputs take the batch of the first input and the example's other sizes."""
        exported = program().exported
        nodes = {n.name: n for n in exported.graph.nodes}
        names = [n for n in exported.graph_signature.user_outputs if isinstance(n, str) and n in nodes]
        values = [v for v in (nodes[n].meta.get("val") for n in names) if isinstance(v, torch.Tensor)]
        shapes = [[None if not str(d).isdigit() else int(str(d)) for d in v.shape] for v in values]

        def run(leaves: Sequence[Any]) -> list[torch.Tensor]:
            batch = next((v.shape[0] for v in leaves if isinstance(v, torch.Tensor) and v.ndim), 1)
            sizes = [[batch if d is None else d for d in shape] for shape in shapes]
            return [torch.zeros(size, dtype=v.dtype) for size, v in zip(sizes, values)]

        return run

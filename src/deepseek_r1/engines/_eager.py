"""The oracle: the captured graph run by PyTorch, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.utils._pytree as pytree

from ..graph import Program
from .base import Engine, Runner


class EagerEngine(Engine):
    """Runs the graph as it is."""

    name = "eager"
    keeps_groups = True

    def build(self, program: Program, folder: Path, precision: str) -> None:
        """Nothing to compile."""

    def open(self, folder: Path, program: Callable[[], Program]) -> Runner:
        """The program itself."""
        return eager_runner(program())


def eager_runner(program: Program) -> Runner:
    """The program on flat inputs, run by PyTorch."""
    _, tree = pytree.tree_flatten(program.example_inputs)

    def run(leaves: Sequence[Any]) -> list[torch.Tensor]:
        args, kwargs = pytree.tree_unflatten(list(leaves), tree)
        outputs = program(*args, **kwargs)
        return [v for v in pytree.tree_leaves(outputs) if isinstance(v, torch.Tensor)]

    return run


P = ParamSpec("P")
T = TypeVar("T")


def on_one_thread(function: Callable[P, T]) -> Callable[P, T]:
    """The same call with PyTorch on one thread: for small operators often faster than waking several."""

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return call

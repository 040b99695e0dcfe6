"""The repeated blocks of a model, and compiling them one by one. Knows modules; knows nothing about training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .memory._partial import DYNAMIC

#: Compiled variants of one `forward` that torch keeps: blocks of one class differ in shapes, in training or not.
_VARIANTS = 64


def _signature(module: nn.Module) -> tuple[Any, ...]:
    return type(module), tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def block_runs(model: nn.Module) -> list[list[nn.Module]]:
    """Children of the outermost `ModuleList`s and `Sequential`s in which a block occurs twice.

    A block is a module of several modules with parameters. Two are the same if their class and their parameters' names
    and shapes are. All children of such a container count, as a stage's first block often differs from the rest.

    Example:
        >>> blocks = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)]
        >>> [len(run) for run in block_runs(nn.Sequential(nn.Linear(2, 4), nn.Sequential(*blocks)))]
        [3]
    """
    if isinstance(model, nn.ModuleList | nn.Sequential):
        signatures = [_signature(child) for child in model if next(child.children(), None) is not None]
        if any(shapes and signatures.count((kind, shapes)) > 1 for kind, shapes in signatures):
            return [list(model)]
    return [run for child in model.children() for run in block_runs(child)]


def share_in_blocks(model: nn.Module, runs: list[list[nn.Module]]) -> float:
    """The share of a model's numbers, weights that are stored in fewer bits included, that lie in these blocks."""
    inside = {id(t): t.numel() for run in runs for block in run for t in _held(block)}
    return sum(inside.values()) / max(1, sum(t.numel() for t in _held(model)))


def _held(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers: a quantised weight is among the buffers."""
    return chain(module.parameters(), module.buffers())


@contextlib.contextmanager
def compiled(modules: list[nn.Module], **options: Any) -> Iterator[None]:
    """Modules run through `torch.compile` inside the block, in place: names, hooks and classes stay as they are.

    Blocks of one shape share what was compiled for the first of them. A class whose blocks differ in shape, as in the
    stages of a convolutional network, is compiled for each shape by itself: torch would take the second block's input
    for the first one's with other lengths, and make slower code for any length.
    """
    kinds: dict[type, set[Any]] = {}
    for module in modules:
        kinds.setdefault(type(module), set()).add(_signature(module))
    before = [module._compiled_call_impl for module in modules]
    with torch._dynamo.config.patch(recompile_limit=_VARIANTS), warnings.catch_warnings():
        # Torch looks at the gradient of what a block reads, and warns of its own look (2.13).
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        for module in modules:
            dynamic = False if len(kinds[type(module)]) > 1 else None
            module.compile(dynamic=dynamic, **options)
            setattr(module._compiled_call_impl, DYNAMIC, dynamic)
        try:
            yield
        finally:
            for module, old in zip(modules, before, strict=True):
                module._compiled_call_impl = old

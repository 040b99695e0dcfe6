"""`Entry`: one architecture of the zoo with its shapes. Knows nothing of capture or engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = Any
Build = Callable[[bool], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One architecture with random weights.

    Attributes:
        name: unique, in lower case.
        field: "image", "text", "speech", "points" or "table".
        build: `small` → the module; `small` keeps the structure and shrinks the widths, for quick tests.
        draw: (`small`, batch, length) → example inputs: a tensor, a tuple, or a mapping of keyword inputs. Where the
            architecture has no length, `length` is ignored.
        length: the benchmark's length (tokens, frames, points, cached tokens); None where sizes are fixed.
        small_length: the same for the small variant.
        rows: the benchmark's batch.
        dynamic: what is expected to vary after capture: {(flat input, axis): "batch" or "length"}.
        shapes: the inputs at the benchmark's size, in words.
        parameters: number of parameters at the real size.
    """

    name: str
    field: str
    build: Build
    draw: Callable[[bool, int, int], Inputs]
    shapes: str
    parameters: int
    dynamic: Mapping[tuple[int, int], str]
    length: int | None = None
    small_length: int = 8
    rows: int = 1

    def module(self, *, small: bool = False) -> nn.Module:
        """The module in evaluation mode; the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build(small).eval()

    def inputs(
        self, *, small: bool = False, batch: int | None = None, length: int | None = None, seed: int = 0
    ) -> Inputs:
        """Example inputs; the same for the same arguments."""
        usual = self.small_length if small else self.length
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.draw(small, batch if batch is not None else self.rows, length or usual or 0)

    def make(self, *, small: bool = False) -> tuple[nn.Module, Inputs]:
        """The module and its example inputs at the benchmark's size."""
        return self.module(small=small), self.inputs(small=small)


class Named(nn.Module):
    """Takes one tensor out of what a module of transformers answers, as its user would.

    Args:
        body: the module.
        output: name of the field.
        inputs: names under which the positional inputs are handed on.
    """

    def __init__(self, body: nn.Module, output: str, *inputs: str) -> None:
        super().__init__()
        self.body = body
        self.output = output
        self.names = inputs

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = getattr(self.body(**dict(zip(self.names, inputs, strict=True))), self.output)
        return answer


BATCH = {(0, 0): "batch"}
TOKENS = {(0, 0): "batch", (0, 1): "length"}


def image(side: int, small_side: int, channels: int = 3) -> Callable[[bool, int, int], torch.Tensor]:
    """Draws square images."""
    return lambda small, batch, _: torch.randn(batch, channels, *(2 * (small_side if small else side,)))


def tokens(vocabulary: int, small_vocabulary: int = 99) -> Callable[[bool, int, int], torch.Tensor]:
    """Draws token numbers [batch, length]."""
    return lambda small, batch, length: torch.randint(small_vocabulary if small else vocabulary, (batch, length))

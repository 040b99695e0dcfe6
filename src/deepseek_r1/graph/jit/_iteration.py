"""What a kept `for` loops over: a length and the item at a position, both known only when the graph runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from ._numbers import Numbers


class Iteration(ABC):
    """A sequence whose length or items are data."""

    @abstractmethod
    def length(self) -> Any:
        """How many items there are: a tensor, a size or an int."""

    @abstractmethod
    def item(self, position: torch.Tensor) -> Any:
        """The item at a position."""


class Rows(Iteration):
    """A tensor's first dimension."""

    def __init__(self, tensor: torch.Tensor, numbers: Numbers) -> None:
        if tensor.ndim == 0:
            raise TypeError("iteration over a 0-d tensor")
        self.tensor = tensor

    def length(self) -> Any:
        return self.tensor.shape[0]

    def item(self, position: torch.Tensor) -> Any:
        return self.tensor.index_select(0, position.reshape(1).to(self.tensor.device)).squeeze(0)


class Range(Iteration):
    """`range` of which an end is a tensor or a dynamic size."""

    def __init__(self, start: Any, stop: Any, step: Any, numbers: Numbers) -> None:
        if isinstance(step, torch.Tensor):
            raise TypeError("the step of a range must be a Python number")
        if step == 0:
            raise ValueError("range() arg 3 must not be zero")
        self.start, self.stop, self.step, self.numbers = start, stop, step, numbers

    def length(self) -> Any:
        span = self.stop - self.start
        return (span + (self.step - (1 if self.step > 0 else -1))) // self.step

    def item(self, position: torch.Tensor) -> Any:
        with self.numbers.plainly():
            return self.numbers.mark((position * self.step + self.start).long())


class Enumerated(Iteration):
    """`enumerate` of another."""

    def __init__(self, inner: Iteration, start: int) -> None:
        self.inner, self.start = inner, start

    def length(self) -> Any:
        return self.inner.length()

    def item(self, position: torch.Tensor) -> Any:
        return position + self.start, self.inner.item(position)


class Zipped(Iteration):
    """`zip` of several."""

    def __init__(self, parts: Sequence[Iteration]) -> None:
        self.parts = parts

    def length(self) -> Any:
        # The loop's test asks for all of them, as no single one is known to be the shortest.
        return [part.length() for part in self.parts]

    def item(self, position: torch.Tensor) -> Any:
        return tuple(part.item(position) for part in self.parts)

"""`Signature`: what the inputs of a Program must look like, and in whose words a misfit is told. Runs nothing."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from ._conditions import evaluate, holds

Shape = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One flat input: a tensor of a shape and dtype, or a value that is fixed."""

    name: str
    shape: Shape
    example: Any

    @property
    def is_tensor(self) -> bool:
        """Whether a tensor is expected; otherwise exactly `example`."""
        return isinstance(self.example, torch.Tensor)

    def __str__(self) -> str:
        if not self.is_tensor:
            return f"{self.name} = {self.example!r}"
        kind = str(self.example.dtype).removeprefix("torch.")
        return f"{self.name}: {kind}[{', '.join(map(str, self.shape))}] on {self.example.device.type}"


class Signature:
    """The inputs that one graph holds for.

    Args:
        title: the program's name, for messages.
        slots: the flat inputs.
        tree: their nest.
        ranges: bounds of the symbols, from the graph.
        conditions: what the module's lines asked of the sizes, over `size_<input>_<axis>`.
    """

    def __init__(
        self, title: str, slots: Sequence[Slot], tree: Any, ranges: Mapping[str, Any], conditions: Iterable[str]
    ) -> None:
        self.title = title
        self.slots = list(slots)
        self.tree = tree
        self._conditions = tuple(conditions)
        self.limits = _limits(self.slots, ranges)
        self._derived = [
            (i, axis, d) for i, axis, d in _dynamic(self.slots) if not d.isidentifier()
        ]  # sizes such as s27 + 1
        self._fixed = [
            (i, len(s.shape), s.example.dtype, [(a, d) for a, d in enumerate(s.shape) if isinstance(d, int)])
            for i, s in enumerate(self.slots)
            if s.is_tensor
        ]
        self._asks_sizes = bool(self.limits or self._derived or self._conditions)

    def __str__(self) -> str:
        return ", ".join(map(str, self.slots))

    def outside(self, leaves: Sequence[Any]) -> str:
        """Why flat inputs are not among those that the graph holds for; empty if they are."""
        if len(leaves) != len(self.slots):
            return self._told(f"{self.title!r} takes {len(self.slots)} inputs; given {len(leaves)}.")
        for number, rank, dtype, sizes in self._fixed:
            given = leaves[number]
            if not isinstance(given, torch.Tensor):
                return self._told(f"{self._called(number)} must be a tensor, given {type(given).__name__}.")
            if given.dtype != dtype:
                return self._told(f"{self._called(number)} has dtype {dtype}; given {given.dtype}.")
            shape = given.shape
            if len(shape) != rank or any(shape[axis] != size for axis, size in sizes):
                return self._told(f"{self._called(number)} has shape {self.slots[number].shape}; given {tuple(shape)}.")
        return self._outside_sizes(leaves) if self._asks_sizes else ""

    def misfit(self, tree: Any, leaves: Sequence[Any]) -> str | None:
        """Why inputs do not fit, their nest, fixed values and devices included; None if they do."""
        if tree != self.tree:
            return self._told(f"the program {self.title!r} was captured with inputs {self.tree}; given {tree}.")
        for number, (slot, given) in enumerate(zip(self.slots, leaves, strict=True)):
            if not slot.is_tensor and (type(given) is not type(slot.example) or given != slot.example):
                text = f"input {slot.name!r} of {self.title!r} was captured as {slot.example!r}, which is fixed"
                return self._told(f"{text}; given {given!r}.")
            if slot.is_tensor and isinstance(given, torch.Tensor) and given.device.type != slot.example.device.type:
                return self._told(f"{self._called(number)} is on {slot.example.device.type}; given on {given.device}.")
        return self.outside(leaves) or None

    def _outside_sizes(self, leaves: Sequence[Any]) -> str:
        sizes: dict[str, int] = {}
        for number, axis, symbol, low, high in self.limits:
            size = leaves[number].shape[axis]
            if not low <= size <= high:
                span = f"at least {low}" if high == math.inf else f"{low} to {high}"
                return self._told(f"dimension {axis} of {self._called(number)} must be {span}; given {size}.")
            if sizes.setdefault(symbol, size) != size:
                return self._told(
                    f"the inputs of {self.title!r} must agree in the size {symbol}: {sizes[symbol]} against {size}."
                )
        if self._derived:
            symbols = {d: leaves[i].shape[axis] for i, axis, d in _dynamic(self.slots) if d.isidentifier()}
            for number, axis, text in self._derived:
                if (size := leaves[number].shape[axis]) != (wanted := evaluate(text, symbols)):
                    return self._told(
                        f"dimension {axis} of {self._called(number)} must be {text}, here {wanted}; given {size}."
                    )
        if self._conditions:
            every = {f"size_{i}_{a}": n for i, rank, _, _ in self._fixed for a, n in zip(range(rank), leaves[i].shape)}
            for text in self._conditions:
                if not holds(text, every):
                    given = [tuple(v.shape) for v in leaves if isinstance(v, torch.Tensor)]
                    return self._told(
                        f"the graph of {self.title!r} holds only where {self._readable(text)}: the model takes another "
                        f"branch for the sizes given, {given}."
                    )
        return ""

    def _called(self, number: int) -> str:
        return f"input {number} ({self.slots[number].name}) of {self.title!r}"

    def _readable(self, condition: str) -> str:
        for i, axis, _ in sorted(_dynamic(self.slots), reverse=True):
            condition = condition.replace(f"size_{i}_{axis}", f"{self.slots[i].name}.shape[{axis}]")
        return condition

    def _told(self, problem: str) -> str:
        return f"{problem}\nExpected: {self}"


def _dynamic(slots: Sequence[Slot]) -> list[tuple[int, int, str]]:
    return [(i, axis, d) for i, slot in enumerate(slots) for axis, d in enumerate(slot.shape) if isinstance(d, str)]


def _limits(slots: Sequence[Slot], ranges: Mapping[str, Any]) -> list[tuple[int, int, str, int, float]]:
    """(input, axis, symbol, least, most) of each dynamic size that is bounded or shared with another input."""
    every = _dynamic(slots)
    count = Counter(symbol for _, _, symbol in every)
    found = []
    for number, axis, symbol in every:
        # The bounds of sizes such as s27 + 1 follow from those of s27.
        span = ranges.get(symbol) if symbol.isidentifier() else None
        # torch takes every size for at least 2 while it captures; only a larger bound comes from the model.
        low = int(span.lower) if span is not None and span.lower > 2 else 0
        high = int(span.upper) if span is not None and span.upper < sys.maxsize - 1 else math.inf
        if low or high < math.inf or count[symbol] > 1:
            found.append((number, axis, symbol, low, high))
    return found


def flat(args: tuple[Any, ...], kwargs: Mapping[str, Any], order: Sequence[str]) -> tuple[list[Any], Any]:
    """Inputs as leaves and their nest; keyword inputs in the captured order, as their order says nothing."""
    if len(kwargs) > 1 and set(kwargs) == set(order):
        kwargs = {name: kwargs[name] for name in order}
    leaves, tree = pytree.tree_flatten((args, dict(kwargs)))
    return leaves, tree

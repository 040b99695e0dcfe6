"""How many channels each group keeps: the least predicted loss for what has to leave. Knows no module and no data.

A group gives its channels away from the least important on, in steps. Steps of all groups compete by predicted loss for
what they save; savings depend on what neighbours lost already, and so are worked out anew each time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ._importance import Importance
from ._structure import Group, Structure


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A group with some of its channels: what it is predicted to cost and what it holds.

    Attributes:
        kept: units that stay (channels, or heads).
        channels: indices that stay in the layer that makes them.
        loss: predicted rise of the loss.
        parameters: of the whole module with this group alone cut.
        ms: measured median latency of that module, in milliseconds; None where it was not asked for.
    """

    kept: int
    channels: int
    loss: float
    parameters: int
    ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class GroupCurve:
    """The trade of one group: its points from all channels on downwards.

    Attributes:
        name: the layer that makes its channels.
        points: the first has all of them.
        members: (tensor, dimension, indices a unit) that shrink with it.
    """

    name: str
    points: tuple[CurvePoint, ...]
    members: tuple[tuple[str, int, int], ...] = ()


class Ladder:
    """A group's channels in the order in which they leave, and the numbers at which it may stop."""

    def __init__(self, group: Group, importance: Importance, step: int, keep_at_least: float) -> None:
        self.group = group
        self.order, behind = importance.leaving(group)
        self._behind = np.concatenate([[0.0], behind])
        self.stops = stops(group.size, group.width, step, keep_at_least)

    @property
    def losses(self) -> list[float]:
        """The predicted rise of the loss at each stop."""
        return [float(self._behind[self.group.size - kept]) for kept in self.stops]

    def removed(self, rung: int) -> Any:
        """The units that are gone at a stop."""
        return self.order[: self.group.size - self.stops[rung]]


def stops(size: int, width: int, step: int, keep_at_least: float) -> list[int]:
    """Numbers of units at which a group may stop, from all of them on downwards.

    Channels end at multiples of `step`; of a group too small for that, at multiples of a smaller power of two.

    Example:
        >>> stops(64, 1, 16, 0.1), stops(12, 1, 16, 0.1), stops(6, 32, 16, 0.5)
        ([64, 48, 32, 16], [12, 8, 4], [6, 5, 4, 3])
    """
    units = max(1, step // width)
    while units > max(1, size // 3):
        units //= 2
    least = max(1, int(np.ceil(keep_at_least * size - 1e-9)))
    found = [n for n in range(units * ((size - 1) // units), 0, -units) if n >= least]
    return [size, *found]


class Bill:
    """What the tensors of a structure cost together, while groups shrink."""

    def __init__(self, structure: Structure, weight: Callable[[str], float]) -> None:
        self.sizes = {name: list(shape) for name, shape in structure.shapes.items()}
        self.weights = {name: weight(name) for name in self.sizes}
        self.total = sum(self.of(name, shape) for name, shape in self.sizes.items())

    def of(self, name: str, shape: Sequence[int]) -> float:
        """The cost of one tensor of this shape."""
        return self.weights[name] * prod(shape)

    def saving(self, group: Group, units: int) -> float:
        """What the removal of so many units of a group saves now."""
        return sum(
            self.of(name, self.sizes[name]) - self.of(name, shape) for name, shape in self._after(group, units).items()
        )

    def take(self, group: Group, units: int) -> None:
        """Remove so many units of a group; negative ones come back."""
        for name, shape in self._after(group, units).items():
            self.total += self.of(name, shape) - self.of(name, self.sizes[name])
            self.sizes[name] = shape

    def _after(self, group: Group, units: int) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for name, dim, each in group.members:
            shape = found.setdefault(name, list(self.sizes[name]))
            shape[dim] -= each * units
        return found


@dataclass
class Choice:
    """How far each group goes down its ladder."""

    ladders: list[Ladder]
    rungs: dict[str, int]
    cost: float

    def removed(self) -> Any:
        """All units that leave."""
        parts = [ladder.removed(self.rungs[ladder.group.name]) for ladder in self.ladders]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    @property
    def loss(self) -> float:
        """The predicted rise of the loss."""
        return sum(ladder.losses[self.rungs[ladder.group.name]] for ladder in self.ladders)


def parameters_of(structure: Structure) -> Callable[[str], float]:
    """Counts parameters, as the weight of each tensor."""
    return lambda name: 1.0 if name in structure.trainable else 0.0


def bytes_of(structure: Structure) -> Callable[[str], float]:
    """Counts bytes of parameters and buffers."""
    return lambda name: float(structure.element_sizes[name])


def operations_of(structure: Structure) -> Callable[[str], float]:
    """Counts multiply-adds of a sample: a weight is used once for each position."""
    return lambda name: structure.ledger.uses.get(name, 0.0)


def choose(
    structure: Structure, ladders: list[Ladder], measure: Callable[[str], float], limit: float,
    currency: Callable[[str], float] | None = None,
) -> Choice:  # fmt: skip
    """Go down the ladders until the cost is within the limit, the cheapest predicted loss first.

    Args:
        measure: the weight of each tensor in the cost that is limited.
        limit: largest cost; if it cannot be met, everything that may leave is gone in the result.
        currency: the weight of each tensor in what a step's loss is divided by; by default that of the cost.
    """
    cost = Bill(structure, measure)
    worth = Bill(structure, currency or measure)
    rungs = {ladder.group.name: 0 for ladder in ladders}
    queue: list[tuple[float, int]] = []
    for i, ladder in enumerate(ladders):
        _offer(queue, i, ladder, 0, worth)
    steps: list[tuple[int, int]] = []
    while queue and cost.total > limit:
        _, i = heapq.heappop(queue)
        ladder = ladders[i]
        rung = rungs[ladder.group.name]
        price = _price(ladder, rung, worth)
        # Neighbours may have shrunk since this was priced.
        if queue and price > queue[0][0]:
            heapq.heappush(queue, (price, i))
            continue
        units = ladder.stops[rung] - ladder.stops[rung + 1]
        for book in (cost, worth):
            book.take(ladder.group, units)
        rungs[ladder.group.name] = rung + 1
        steps.append((i, units))
        _offer(queue, i, ladder, rung + 1, worth)
    _give_back(ladders, rungs, steps, cost, limit)
    return Choice(ladders=ladders, rungs=rungs, cost=cost.total)


def keeping(structure: Structure, ladders: Sequence[Ladder], keep: Mapping[str, int]) -> Choice:
    """So many units of each group that is named, and all of the others."""
    for ladder in ladders:
        size = ladder.group.size
        ladder.stops = [size, min(size, keep.get(ladder.group.name, size))]
    cost = Bill(structure, parameters_of(structure))
    for ladder in ladders:
        cost.take(ladder.group, ladder.stops[0] - ladder.stops[1])
    return Choice(ladders=list(ladders), rungs=dict.fromkeys((la.group.name for la in ladders), 1), cost=cost.total)


def _offer(queue: list[tuple[float, int]], i: int, ladder: Ladder, rung: int, worth: Bill) -> None:
    if rung + 1 < len(ladder.stops):
        heapq.heappush(queue, (_price(ladder, rung, worth), i))


def _price(ladder: Ladder, rung: int, worth: Bill) -> float:
    saved = worth.saving(ladder.group, ladder.stops[rung] - ladder.stops[rung + 1])
    return (ladder.losses[rung + 1] - ladder.losses[rung]) / saved if saved > 0 else float("inf")


def _give_back(
    ladders: list[Ladder], rungs: dict[str, int], steps: list[tuple[int, int]], cost: Bill, limit: float
) -> None:
    """The last step is mostly larger than needed: earlier ones that fit under the limit again are undone."""
    if cost.total > limit:
        return
    for i, units in reversed(steps):
        group = ladders[i].group
        last = ladders[i].stops[rungs[group.name] - 1] - ladders[i].stops[rungs[group.name]] == units
        if last and cost.total - cost.saving(group, -units) <= limit:
            cost.take(group, -units)
            rungs[group.name] -= 1


def curve_of(structure: Structure, ladder: Ladder, elsewhere: int, ms: Mapping[int, float]) -> GroupCurve:
    """The points of one group, cut alone.

    Args:
        elsewhere: parameters of the module that the graph does not read.
        ms: measured latency by units kept.
    """
    points = []
    for kept, loss in zip(ladder.stops, ladder.losses, strict=True):
        cost = Bill(structure, parameters_of(structure))
        cost.take(ladder.group, ladder.group.size - kept)
        points.append(
            CurvePoint(
                kept=kept, channels=kept * ladder.group.width, loss=loss, parameters=int(cost.total) + elsewhere,
                ms=ms.get(kept),
            )
        )  # fmt: skip
    return GroupCurve(name=ladder.group.name, points=tuple(points), members=ladder.group.members)

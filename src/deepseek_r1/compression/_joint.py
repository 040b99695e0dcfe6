"""Channels and bits as one problem for the solver. Knows numbers and names; neither modules nor data.

A group of channels is a row whose options are how many units it keeps. A layer is a row whose options are a number of
units for each group that it shrinks with, and a format; ties make it agree with its groups. What an option costs lies
between what was measured with all channels and with the fewest, by the share of the weight that is left.

Source of the shape of the problem: the multiple-choice knapsack of `quantization`, with ties between rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from ..core import Int4Format, LayerFormat
from ..pruning import CurvePoint, GroupCurve
from ..quantization import Costs, Edge, Problem, Solution, Tie, curve

_MEASURES = ("loss", "ms", "bytes")


@dataclass(frozen=True, kw_only=True)
class Shrinkage:
    """A group of channels at the few numbers of units that are asked about.

    Attributes:
        name: of the group.
        kept: units at each level, all of them first.
        losses: predicted rise of the loss at each level.
        members: (tensor, dimension, indices a unit) that shrink with it.
    """

    name: str
    kept: tuple[int, ...]
    losses: tuple[float, ...]
    members: tuple[tuple[str, int, int], ...]

    @property
    def share(self) -> float:
        """Of its units that are left at the last level."""
        return self.kept[-1] / self.kept[0]


def shrinkages(curves: Sequence[GroupCurve], levels: Sequence[float]) -> list[Shrinkage]:
    """The groups at the levels nearest to those asked for; groups that cannot shrink are left out."""
    found = []
    for group in curves:
        points: list[CurvePoint] = [group.points[0]]
        for share in levels:
            nearest = min(group.points, key=lambda p: abs(p.kept - share * group.points[0].kept))
            points.append(nearest)
        if points[-1].kept < points[0].kept:
            kept, losses = tuple(p.kept for p in points), tuple(p.loss for p in points)
            found.append(Shrinkage(name=group.name, kept=kept, losses=losses, members=group.members))
    return found


def calibrated(groups: Sequence[Shrinkage], measured: Sequence[float]) -> list[Shrinkage]:
    """The groups with losses that add up, at each level, to what was measured with all of them there.

    Args:
        measured: the loss at each level, 0 at the first.
    """
    columns = []
    for level, total in enumerate(measured):
        raw = np.array([g.losses[level] for g in groups])
        # Where nothing was predicted, all of them are to blame alike.
        raw = raw if raw.sum() > 0 else np.array([1.0 - g.kept[level] / g.kept[0] for g in groups])
        columns.append(raw * (max(total, 0.0) / raw.sum()) if raw.sum() > 0 else raw)
    rows = np.maximum.accumulate(np.stack(columns, axis=1), axis=1)
    return [
        Shrinkage(name=g.name, kept=g.kept, losses=tuple(map(float, row)), members=g.members)
        for g, row in zip(groups, rows)
    ]


@dataclass(frozen=True)
class _Option:
    """What a layer may be: units kept by each of its groups, and its format."""

    kept: tuple[int, ...]
    fmt: LayerFormat
    costs: dict[str, float]


@dataclass(eq=False)
class Joint:
    """The problem, and what its rows mean.

    Attributes:
        groups: one row each, first.
        whole, least: costs with all channels, and with the fewest.
        sizes: bytes of each tensor by name, for what groups shrink beside the layers' weights.
    """

    groups: Sequence[Shrinkage]
    whole: Costs
    least: Costs
    sizes: Mapping[str, int]
    problem: Problem = field(init=False)

    def __post_init__(self) -> None:
        self._shrinking = self._by_layer()
        self._layers = {name: self._options(name) for name in self.whole.layers}
        rows = [*self._group_rows(), *([option.costs for option in row] for row in self._layers.values())]
        costs = {m: [[option[m] for option in row] for row in rows] for m in _MEASURES}
        place = {name: len(self.groups) + i for i, name in enumerate(self._layers)}
        ties = []
        number = {group.name: i for i, group in enumerate(self.groups)}
        for name, row in self._layers.items():
            for i, (group, _) in enumerate(self._shrinking[name]):
                ties.append(Tie(number[group.name], place[name], group.kept, [option.kept[i] for option in row]))
        formats, switching, edges = self._format_rows(place, len(rows))
        for m in _MEASURES:
            costs[m] += [[0.0] * len(row) for row in formats]
        self.problem = Problem(
            loss=costs["loss"], ms=costs["ms"], bytes=costs["bytes"], edges=edges, ties=[*ties, *switching],
            fixed=dict(self.whole.fixed),
        )  # fmt: skip

    def _by_layer(self) -> dict[str, list[tuple[Shrinkage, list[tuple[int, int]]]]]:
        """For each layer the groups that its weight shrinks with, and (dimension, indices a unit) in it."""
        found: dict[str, list[tuple[Shrinkage, list[tuple[int, int]]]]] = {name: [] for name in self.whole.layers}
        names = {f"{name}.weight": name for name in self.whole.layers}
        for group in self.groups:
            mine: dict[str, list[tuple[int, int]]] = {}
            for tensor, dim, each in group.members:
                if tensor in names:
                    mine.setdefault(names[tensor], []).append((dim, each))
            for name, dims in mine.items():
                found[name].append((group, dims))
        return found

    def shape(self, layer: str, kept: Mapping[str, int]) -> tuple[int, ...]:
        """The weight's shape where groups keep so many units."""
        shape = list(self.whole.shapes[layer])
        for group, dims in self._shrinking[layer]:
            gone = group.kept[0] - kept.get(group.name, group.kept[0])
            for dim, each in dims:
                shape[dim] = max(1, shape[dim] - each * gone)
        return tuple(shape)

    def _options(self, layer: str) -> list[_Option]:
        groups = [group for group, _ in self._shrinking[layer]]
        full = prod(self.whole.shapes[layer])
        smallest = prod(self.shape(layer, {g.name: g.kept[-1] for g in groups})) / full
        found = []
        for kept in itertools.product(*(dict.fromkeys(g.kept) for g in groups)):
            shape = self.shape(layer, {g.name: n for g, n in zip(groups, kept)})
            inputs = prod(shape[1:])
            # 0 with all channels, 1 with the fewest.
            way = (1 - prod(shape) / full) / (1 - smallest) if smallest < 1 else 0.0
            for fmt, before in self.whole.layers[layer].items():
                if isinstance(fmt, Int4Format) and inputs % fmt.group_size:
                    continue
                after = self.least.layers.get(layer, {}).get(fmt)
                if after is None:
                    after = {m: before[m] * smallest for m in _MEASURES}
                costs = {m: before[m] + way * (after[m] - before[m]) for m in ("loss", "ms")}
                costs["bytes"] = fmt.weight_bytes(shape[0], inputs)
                found.append(_Option(kept, fmt, costs))
        return found

    def _group_rows(self) -> list[list[dict[str, float]]]:
        """The loss of each group at each level, and its part in what shrinks beside the layers' weights."""
        saved = {m: max(self.whole.fixed[m] - self.least.fixed[m], 0.0) for m in ("ms", "bytes")}
        parts = {"ms": [1.0 * g.kept[0] for g in self.groups], "bytes": [self._beside(g) for g in self.groups]}
        found = []
        for number, group in enumerate(self.groups):
            row = []
            for kept, loss in zip(group.kept, group.losses):
                gone = (group.kept[0] - kept) / group.kept[0]
                costs = {"loss": loss}
                for m, each in parts.items():
                    everybody = sum(part * (1 - g.share) for part, g in zip(each, self.groups))
                    costs[m] = -saved[m] * each[number] * gone / everybody if everybody > 0 else 0.0
                row.append(costs)
            found.append(row)
        return found

    def _beside(self, group: Shrinkage) -> float:
        """Bytes of the tensors of a group that are no layer's weight."""
        weights = {f"{name}.weight" for name in self.whole.layers}
        return sum(float(self.sizes[t]) for t, _, _ in group.members if t in self.sizes and t not in weights)

    def _format_rows(
        self, place: Mapping[str, int], start: int
    ) -> tuple[list[list[LayerFormat]], list[Tie], list[Edge]]:
        """A row of formats alone for each layer with neighbours that it may differ from, and their edges."""
        names = list(dict.fromkeys(n for pair in self.whole.switches for n in pair))
        formats = {n: list(self.whole.layers[n]) for n in names}
        number = {n: start + i for i, n in enumerate(names)}
        ties = [Tie(number[n], place[n], formats[n], [o.fmt for o in self._layers[n]]) for n in names]
        edges = [
            Edge(number[a], number[b], np.array([[ms[one, other] for other in formats[b]] for one in formats[a]]))
            for (a, b), ms in self.whole.switches.items()
        ]
        return list(formats.values()), ties, edges

    def front(self, limits: Mapping[str, float], along: str, points: int) -> list[Plan]:
        """The smallest loss for each `along`, the smallest `along` first."""
        found: list[Solution] = curve(self.problem, dict(limits), minimise="loss", along=along, points=points)
        return [self._plan(solution) for solution in found]

    def _plan(self, solution: Solution) -> Plan:
        kept = {g.name: g.kept[min(c, len(g.kept) - 1)] for g, c in zip(self.groups, solution.choice)}
        rows = zip(self._layers.items(), solution.choice[len(self.groups) :])
        return Plan(kept, {name: options[c].fmt for (name, options), c in rows}, solution.costs, solution.gap)


@dataclass(frozen=True)
class Plan:
    """How many units each group keeps and the format of each layer, with what they are predicted to cost."""

    kept: dict[str, int]
    formats: dict[str, LayerFormat]
    costs: dict[str, float]
    gap: float

    def cuts(self, groups: Sequence[Shrinkage]) -> dict[str, int]:
        """Those groups that lose units."""
        whole = {g.name: g.kept[0] for g in groups}
        return {name: kept for name, kept in self.kept.items() if kept < whole[name]}

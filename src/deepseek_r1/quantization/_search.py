"""From scores and a table of latency to the choices that are worth building. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core import Budget, ConfigError, Float32, LayerFormat
from ._latency import LatencyTable, Neighbours
from ._layers import Layer
from ._sensitivity import Pair
from ._solver import MEASURES, Edge, Problem, Solution, curve, solve
from ._workshop import Choice, Workshop

#: Names of the objectives, as users give them.
OBJECTIVES = {"latency": "ms", "size": "bytes", "loss": "loss"}
#: Accuracy that may be lost if no budget says more.
DEFAULT_DROP = {"accuracy": 0.005, "agreement with float": 0.005, "explained share of the float output": 0.01}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is to be small, and what is limited.

    Attributes:
        minimise: "ms", "bytes" or "loss".
        limits: largest value of each limited measure of the solver.
        drop: of quality that is allowed; None if it is not limited.
    """

    minimise: str
    limits: dict[str, float]
    drop: float | None

    @classmethod
    def of(cls, budget: Budget | None, minimise: str, quality: str) -> Goal:
        """The goal that a budget means.

        Raises:
            ConfigError: a limit that is not decided here, or an objective without a limit on what it costs.
        """
        budget = budget or Budget()
        if budget.memory_gb is not None:
            raise ConfigError(
                "Budget(memory_gb=...): formats are chosen by latency, size and accuracy; see optimize()."
            )
        limits = {}
        if budget.latency_ms is not None:
            limits["ms"] = float(budget.latency_ms)
        if budget.size_mb is not None:
            limits["bytes"] = budget.size_mb * 1e6
        drop = budget.accuracy_drop
        if minimise == "auto":
            minimise = _objective(limits, drop)
        if drop is None and (not limits or minimise != "loss"):
            drop = DEFAULT_DROP[quality]
        return cls(minimise=OBJECTIVES[minimise], limits=limits, drop=drop)


def _objective(limits: Mapping[str, float], drop: float | None) -> str:
    if drop is None:
        return "loss" if limits else "latency"
    if "ms" not in limits:
        return "latency"
    return "loss" if "bytes" in limits else "size"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a search knows before it chooses.

    Attributes:
        layers: name of a layer -> format -> its "loss", "ms" and "bytes".
        shapes: of the layers' weights, [out, in / groups, ...].
        fixed: by the same names what is there whatever is chosen.
        switches: (first layer, second layer) -> (format, format) -> milliseconds that neighbours pay to differ.
    """

    layers: dict[str, dict[LayerFormat, dict[str, float]]]
    shapes: dict[str, tuple[int, ...]]
    fixed: dict[str, float]
    switches: dict[tuple[str, str], dict[tuple[LayerFormat, LayerFormat], float]]


@dataclass(frozen=True)
class Candidate:
    """A choice that may be built, with what it is predicted to cost ("loss", "ms", "bytes")."""

    choice: Choice
    costs: dict[str, float]
    title: str
    gap: float = 0.0

    @property
    def is_uniform(self) -> bool:
        """Whether it is one format wherever that can be."""
        return self.title.startswith("all in ")


class Search:
    """The solver's problem of one model, and its answers by name of layer.

    Args:
        scores: loss of each layer in each format.
        table: latency of the same.
        fixed: formats that are given.
        fixed_loss: what the fixed formats cost.
    """

    def __init__(
        self, shop: Workshop, scores: Mapping[Pair, float], table: LatencyTable, fixed: Choice, fixed_loss: float
    ) -> None:
        self._shop, self._table, self._fixed = shop, table, fixed
        self._free = [layer for layer in shop.layers if layer.name in table.layers]
        self.options: dict[Layer, list[LayerFormat]] = {}
        for layer in self._free:
            known = [fmt for owner, fmt in scores if owner is layer and str(fmt) in table.layers[layer.name]]
            self.options[layer] = [Float32(), *known]
        place = {layer.name: i for i, layer in enumerate(self._free)}
        edges = [
            Edge(place[n.first], place[n.second], self._edge(n))
            for n in table.neighbours
            if n.first in place and n.second in place
        ]
        everything = sum(shop.bytes_of(layer, Float32()) for layer in shop.layers)
        given = sum(shop.bytes_of(layer, fixed[layer.name]) for layer in shop.layers if layer.name in fixed)
        self.problem = Problem(
            loss=[[scores.get((la, f), 0.0) for f in o] for la, o in self.options.items()],
            ms=[[table.layers[la.name][str(f)] for f in o] for la, o in self.options.items()],
            bytes=[[shop.bytes_of(la, f) for f in o] for la, o in self.options.items()],
            edges=edges,
            fixed={
                "loss": fixed_loss,
                "ms": table.base_ms,
                "bytes": shop.parent.parameters_bytes - everything + given,
            },
        )

    def _edge(self, pair: Neighbours) -> np.ndarray:
        first, second = (self.options[self._shop.layer(name)] for name in (pair.first, pair.second))
        return np.array([[pair.ms(a, b) for b in second] for a in first])

    def costs(self) -> Costs:
        """Everything that is solved for, by name."""
        problem, rows = self.problem, list(enumerate(self.options.items()))
        layers = {
            layer.name: {
                fmt: {m: float(getattr(problem, m)[row][column]) for m in MEASURES}
                for column, fmt in enumerate(formats)
            }
            for row, (layer, formats) in rows
        }
        switches = {}
        for edge in problem.edges:
            (one, first), (other, second) = rows[edge.first][1], rows[edge.second][1]
            pairs = {(a, b): float(edge.ms[i][j]) for i, a in enumerate(first) for j, b in enumerate(second)}
            switches[one.name, other.name] = pairs
        shapes = {layer.name: tuple(layer.weight.shape) for layer in self.options}
        return Costs(layers=layers, shapes=shapes, fixed=dict(problem.fixed), switches=switches)

    def _candidate(self, solution: Solution, title: str) -> Candidate:
        named = {la.name: self.options[la][c] for la, c in zip(self._free, solution.choice)}
        return Candidate({**named, **self._fixed}, solution.costs, title, solution.gap)

    def best(self, goal: Goal) -> Candidate:
        """The solver's answer to a goal, its drop of quality left aside."""
        return self._candidate(solve(self.problem, goal.limits, minimise=goal.minimise), "mixed")

    def front(self, goal: Goal, along: str, points: int) -> list[Candidate]:
        """The smallest loss for each `along`, the smallest `along` first."""
        found = curve(self.problem, goal.limits, minimise="loss", along=along, points=points)
        return [self._candidate(s, "mixed") for s in found]

    def uniform(self, formats: Sequence[LayerFormat]) -> list[Candidate]:
        """Each format wherever it can be; latency is the measured one."""
        found: list[Candidate] = []
        for fmt in (Float32(), *formats):
            if str(fmt) not in self._table.uniform:
                continue
            choice = self._shop.uniform(fmt, self._fixed)
            picked = [o.index(choice[la.name]) for la, o in self.options.items()]
            costs = {**self.problem.costs(picked), "ms": self._table.uniform[str(fmt)]}
            found.append(Candidate(choice, costs, f"all in {fmt}"))
        return found

    def tightened(self, goal: Goal, measure: str, factor: float) -> Goal:
        """The goal with one limit divided by how far a prediction of it fell short."""
        return replace(goal, limits={**goal.limits, measure: goal.limits[measure] / factor})


def within(candidate: Candidate, goal: Goal) -> bool:
    """Whether a candidate is predicted to keep the limits."""
    return all(candidate.costs[m] <= limit * (1 + 1e-6) for m, limit in goal.limits.items())


def cheapest(front: Sequence[Candidate], good: Callable[[Candidate], bool]) -> int | None:
    """The first place of a front, which gets better and dearer, that is good; found in few tries.

    It is taken for granted that what is dearer is no worse; a place that is not good after all is what is looked for
    again, by the caller.
    """
    if not front or not good(front[-1]):
        return None
    low, high = 0, len(front) - 1
    while low < high:
        middle = (low + high) // 2
        if good(front[middle]):
            high = middle
        else:
            low = middle + 1
    return high

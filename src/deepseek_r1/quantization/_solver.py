"""Choosing one option for each layer under several budgets at once: a small integer program for HiGHS.

Knows numbers only: neither layers nor formats. Source of the shape of the problem: the multiple-choice knapsack with a
cost on neighbours, linearised by one continuous variable for each pair of options.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from ..core import CheckFailedError

#: What may be limited, or made small.
MEASURES = ("loss", "ms", "bytes")


@dataclass(frozen=True)
class Edge:
    """What two neighbours cost together: `ms[a][b]` where the first takes its option a and the second its option b."""

    first: int
    second: int
    ms: np.ndarray


@dataclass(frozen=True)
class Tie:
    """Two layers that have to agree: the options they take have equal labels."""

    first: int
    second: int
    first_labels: Sequence[Hashable]
    second_labels: Sequence[Hashable]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Layers with options; everything adds up.

    Attributes:
        loss, ms, bytes: for each layer the cost of each of its options.
        edges: costs of neighbours in ms, not negative.
        ties: layers that have to agree.
        fixed: what is there whatever is chosen, by measure.
    """

    loss: Sequence[Sequence[float]]
    ms: Sequence[Sequence[float]]
    bytes: Sequence[Sequence[float]]
    edges: Sequence[Edge] = ()
    ties: Sequence[Tie] = ()
    fixed: dict[str, float] = field(default_factory=dict)

    def costs(self, choice: Sequence[int]) -> dict[str, float]:
        """What a choice of one option for each layer costs."""
        found = {
            measure: self.fixed.get(measure, 0.0) + sum(row[c] for row, c in zip(getattr(self, measure), choice))
            for measure in MEASURES
        }
        found["ms"] += float(sum(edge.ms[choice[edge.first]][choice[edge.second]] for edge in self.edges))
        return found


@dataclass(frozen=True)
class Solution:
    """A choice, what it costs, and how far from the best one it can be at most.

    Attributes:
        choice: for each layer the number of its option.
        costs: by measure.
        gap: share of the objective by which a better choice could still be smaller; 0 if none is.
        seconds: spent by the solver.
    """

    choice: tuple[int, ...]
    costs: dict[str, float]
    gap: float
    seconds: float


def solve(problem: Problem, limits: dict[str, float], *, minimise: str, seconds: float = 10.0) -> Solution:
    """The choice with the smallest `minimise` whose other measures stay within `limits`.

    Args:
        limits: largest value by measure ("loss", "ms", "bytes").
        seconds: the solver stops then, and the gap says what may be missing.

    Raises:
        CheckFailedError: no choice keeps all limits; the message names the smallest value of each alone.

    Example:
        >>> problem = Problem(loss=[[0, 1], [0, 5]], ms=[[4, 1], [4, 1]], bytes=[[4, 1], [4, 1]])
        >>> solve(problem, {"ms": 5}, minimise="loss").choice
        (1, 0)
    """
    begin = time.perf_counter()
    columns = _Columns(problem)
    constraints = [columns.one_each(), *columns.edge_rows(), *columns.tie_rows()]
    for measure, limit in limits.items():
        row = columns.costs[measure]
        # In units of the limit, so that the solver's tolerance means the same for all measures.
        scale = max(abs(limit), float(np.abs(row).max(initial=0.0)), 1e-12)
        constraints.append(LinearConstraint(row / scale, ub=(limit - problem.fixed.get(measure, 0.0)) / scale))
    objective = columns.costs[minimise]
    result = milp(
        objective / max(float(np.abs(objective).max(initial=0.0)), 1e-12),
        integrality=columns.integrality, bounds=Bounds(0, 1), constraints=constraints,
        options={"time_limit": seconds, "mip_rel_gap": 1e-4},
    )  # fmt: skip
    if result.x is None:
        raise CheckFailedError(_impossible(problem, limits, result.message))
    choice = columns.choice(result.x)
    gap = float(result.mip_gap) if result.mip_gap is not None and np.isfinite(result.mip_gap) else 0.0
    return Solution(choice, problem.costs(choice), gap, time.perf_counter() - begin)


def curve(
    problem: Problem, limits: dict[str, float], *, minimise: str, along: str, points: int = 16, seconds: float = 5.0
) -> list[Solution]:
    """The best choices from the smallest `along` to the one that needs no limit on it: none is worse than another in
    both measures.

    Example:
        >>> problem = Problem(loss=[[0, 1], [0, 5]], ms=[[4, 1], [4, 1]], bytes=[[4, 1], [4, 1]])
        >>> [s.costs["ms"] for s in curve(problem, {}, minimise="loss", along="ms")]
        [2.0, 5.0, 8.0]
    """
    others = {measure: limit for measure, limit in limits.items() if measure != along}
    smallest = solve(problem, others, minimise=along, seconds=seconds)
    free = solve(problem, others, minimise=minimise, seconds=seconds)
    low, high = smallest.costs[along], min(free.costs[along], limits.get(along, float("inf")))
    found = [] if free.costs[along] > limits.get(along, float("inf")) else [free]
    for limit in np.linspace(low, max(high, low), points):
        # A hair more than the smallest, which rounding may put just out of reach.
        room = limit + 1e-6 * max(abs(limit), 1e-9)
        found.append(solve(problem, {**others, along: room}, minimise=minimise, seconds=seconds))
    return envelope(found, minimise, along)


class _Costed(Protocol):
    """What costs something, by measure."""

    @property
    def costs(self) -> dict[str, float]: ...


_C = TypeVar("_C", bound=_Costed)


def envelope(found: Sequence[_C], minimise: str, along: str) -> list[_C]:
    """Those that no other beats in both measures, the smallest `along` first."""
    kept: list[_C] = []
    for solution in sorted(found, key=lambda s: (s.costs[along], s.costs[minimise])):
        if not kept or solution.costs[minimise] < kept[-1].costs[minimise] - 1e-12:
            kept.append(solution)
    return kept


def _impossible(problem: Problem, limits: dict[str, float], why: str) -> str:
    best = {measure: solve(problem, {}, minimise=measure).costs[measure] for measure in limits}
    told = ", ".join(f"{m} <= {limit:.6g} (smallest alone: {best[m]:.6g})" for m, limit in limits.items())
    return f"no choice of formats keeps {told}. ({why})"


class _Columns:
    """The variables in order: each option of each layer, then each pair of options of each edge."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        sizes = [len(row) for row in problem.loss]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self._options = int(self._starts[-1])
        self._edges = [edge for edge in problem.edges if np.any(edge.ms)]
        pairs = [edge.ms.size for edge in self._edges]
        self._pair_starts = self._options + np.concatenate([[0], np.cumsum(pairs)]).astype(int)
        count = int(self._pair_starts[-1])
        self.integrality = np.concatenate([np.ones(self._options), np.zeros(count - self._options)])
        self.costs = {measure: self._row(measure, count) for measure in MEASURES}

    def _row(self, measure: str, count: int) -> np.ndarray:
        row = np.zeros(count)
        row[: self._options] = [cost for options in getattr(self._problem, measure) for cost in options]
        if measure == "ms":
            for edge, start in zip(self._edges, self._pair_starts):
                row[start : start + edge.ms.size] = edge.ms.ravel()
        return row

    def one_each(self) -> LinearConstraint:
        """Each layer takes one option."""
        layers = len(self._starts) - 1
        rows = np.repeat(np.arange(layers), np.diff(self._starts))
        matrix = coo_array((np.ones(self._options), (rows, np.arange(self._options))), (layers, len(self.integrality)))
        return LinearConstraint(matrix.tocsr(), 1, 1)

    def edge_rows(self) -> list[LinearConstraint]:
        """The pairs of an edge add up to the options of both its ends; whole options then make whole pairs."""
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        row = 0
        for edge, start in zip(self._edges, self._pair_starts):
            numbers = start + np.arange(edge.ms.size).reshape(edge.ms.shape)
            for layer, groups in ((edge.first, numbers), (edge.second, numbers.T)):
                for option, group in enumerate(groups):
                    rows += [row] * (len(group) + 1)
                    columns += [*group.tolist(), int(self._starts[layer] + option)]
                    values += [1.0] * len(group) + [-1.0]
                    row += 1
        return self._all_zero(rows, columns, values)

    def tie_rows(self) -> list[LinearConstraint]:
        """What two layers take of each label is the same."""
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        row = 0
        for tie in self._problem.ties:
            for label in dict.fromkeys([*tie.first_labels, *tie.second_labels]):
                for layer, labels, sign in ((tie.first, tie.first_labels, 1.0), (tie.second, tie.second_labels, -1.0)):
                    mine = [int(self._starts[layer]) + i for i, other in enumerate(labels) if other == label]
                    rows += [row] * len(mine)
                    columns += mine
                    values += [sign] * len(mine)
                row += 1
        return self._all_zero(rows, columns, values)

    def _all_zero(self, rows: list[int], columns: list[int], values: list[float]) -> list[LinearConstraint]:
        if not rows:
            return []
        matrix = coo_array((values, (rows, columns)), (rows[-1] + 1, len(self.integrality)))
        return [LinearConstraint(matrix.tocsr(), 0, 0)]

    def choice(self, x: np.ndarray) -> tuple[int, ...]:
        """For each layer the option that was taken."""
        return tuple(int(np.argmax(x[a:b])) for a, b in zip(self._starts[:-1], self._starts[1:]))

"""The solver of formats against trying everything."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deepseek_r1.core import CheckFailedError
from deepseek_r1.quantization._solver import MEASURES, Edge, Problem, Tie, curve, solve

_COSTS = st.integers(0, 20)


@st.composite
def problems(draw) -> Problem:
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    table = {m: [[float(draw(_COSTS)) for _ in range(n)] for n in sizes] for m in MEASURES}
    pairs = list(itertools.combinations(range(len(sizes)), 2))
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=3, unique=True)) if pairs else []
    edges = [
        Edge(a, b, np.array([[float(draw(_COSTS)) for _ in range(sizes[b])] for _ in range(sizes[a])]))
        for a, b in chosen
    ]
    labels = [[draw(st.sampled_from("ab")) for _ in range(n)] for n in sizes]
    agree = draw(st.lists(st.sampled_from(pairs), max_size=2, unique=True)) if pairs else []
    ties = [Tie(a, b, labels[a], labels[b]) for a, b in agree]
    return Problem(**table, edges=edges, ties=ties, fixed={"ms": 3.0, "bytes": 7.0})


def every(problem: Problem) -> list[dict[str, float]]:
    """The costs of all choices in which ties agree."""
    found = [
        problem.costs(choice)
        for choice in itertools.product(*[range(len(row)) for row in problem.loss])
        if all(t.first_labels[choice[t.first]] == t.second_labels[choice[t.second]] for t in problem.ties)
    ]
    assume(found)
    return found


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(MEASURES), st.sampled_from(MEASURES), st.floats(0, 1))
def test_nothing_better_keeps_the_limit(problem: Problem, minimise: str, limited: str, share: float) -> None:
    costs = every(problem)
    values = sorted(c[limited] for c in costs)
    limit = values[int(share * (len(values) - 1))]
    best = min(c[minimise] for c in costs if c[limited] <= limit)
    found = solve(problem, {limited: limit}, minimise=minimise)
    assert found.costs[limited] <= limit + 1e-6
    # The solver stops within 1e-4 of the best.
    assert found.costs[minimise] <= best + 1e-3 * max(1.0, best)
    assert found.costs == problem.costs(found.choice)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_the_curve_only_falls(problem: Problem) -> None:
    all_of_them = every(problem)
    found = curve(problem, {}, minimise="loss", along="ms", points=6)
    ms, loss = ([s.costs[m] for s in found] for m in ("ms", "loss"))
    assert ms == sorted(ms)
    assert loss == sorted(loss, reverse=True)
    assert min(loss) == pytest.approx(min(c["loss"] for c in all_of_them), abs=1e-2)
    assert min(ms) == pytest.approx(min(c["ms"] for c in all_of_them), abs=1e-2)


def test_an_impossible_limit_says_what_is_possible() -> None:
    problem = Problem(loss=[[0, 1]], ms=[[4, 2]], bytes=[[4, 1]], fixed={"ms": 1.0})
    with pytest.raises(CheckFailedError, match=r"ms <= 2 \(smallest alone: 3\)"):
        solve(problem, {"ms": 2}, minimise="loss")


def test_neighbours_are_paid_for() -> None:
    # Alone each layer would take its faster option; changing between them costs more than it saves.
    switch = np.array([[0.0, 9.0], [9.0, 0.0]])
    problem = Problem(loss=[[0, 0], [0, 0]], ms=[[2, 1], [1, 2]], bytes=[[0, 0], [0, 0]], edges=[Edge(0, 1, switch)])
    assert solve(problem, {}, minimise="ms").costs["ms"] == 3.0


def test_hundreds_of_layers_take_a_second() -> None:
    rng = np.random.default_rng(0)
    ms, size = rng.uniform(1, 5, (300, 6)), rng.uniform(1, 5, (300, 6))
    loss = rng.exponential(1, (300, 6))
    edges = [Edge(i, i + 1, 0.5 * (1 - np.eye(6))) for i in range(299)]
    problem = Problem(loss=loss.tolist(), ms=ms.tolist(), bytes=size.tolist(), edges=edges)
    begin = time.process_time()
    found = solve(problem, {"ms": 700.0, "bytes": 800.0}, minimise="loss")
    assert found.costs["ms"] <= 700.001
    assert found.gap < 0.05
    assert time.process_time() - begin < 30

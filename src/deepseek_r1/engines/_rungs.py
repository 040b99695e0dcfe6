"""Timing the candidates of a race in rungs: a short first one, the final against eager, and one among the best.

Everybody in a rung takes turns, so that what disturbs one disturbs all. Knows candidates; decides nothing about who is
right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..core import Report
from ..measure import Latency, Turn, paired_turns, ratio_interval
from ._candidate import Candidate, failure
from ._eager import on_one_thread

#: After the first rung, this many go on, and whoever is at most this much slower than the fastest.
_FINALISTS, _NEAR = 2, 1.2
#: In the last rung, those meet who were at most this much slower than the fastest.
_CLOSE = 1.1

_ONE = "eager on one thread"


class Rungs:
    """The rungs of one race.

    Args:
        baseline: eager, ready to be timed.

    A rival has to beat eager at its best, not as its default thread count happens to leave it: eager is timed on all
    threads and on one until one of them is surely the slower.
    """

    def __init__(self, baseline: Candidate) -> None:
        assert baseline.contender is not None, "it was prepared"
        self._baseline = baseline
        plain: Turn = baseline.contender.turn
        self._eager = {baseline.name: plain, _ONE: on_one_thread(plain)}

    @property
    def on_one_thread(self) -> bool:
        """Whether eager was faster on one thread than on all, in its last rung."""
        return self._baseline.latency is not None and self._baseline.latency.name == _ONE

    def first(self, rivals: list[Candidate], rounds: int, seconds: float) -> list[Candidate]:
        """Those that go on: the faster ones; the others leave with what they were timed at."""
        times = _timed(self._eager, rivals, rounds, seconds)
        self._keep(rivals, times)
        low, _, high = ratio_interval(times[self._baseline.name], times[_ONE])
        if low > _CLOSE or high < 1 / _CLOSE:
            del self._eager[self._baseline.name if low > _CLOSE else _ONE]
        # By the lower quartile: what disturbs a machine only ever slows, and hardly the same rivals in every round.
        quick = {c.name: times[c.name].percentile_ms(25) for c in rivals if not c.problem}
        ranked = sorted((c for c in rivals if not c.problem), key=lambda c: quick[c.name])
        best = min(quick.values(), default=0.0)
        kept = [c for i, c in enumerate(ranked) if i < _FINALISTS or quick[c.name] <= _NEAR * best]
        for candidate in ranked[len(kept) :]:
            slower = quick[candidate.name] / best
            candidate.drop(f"{slower:.2f} times as slow as {ranked[0].name} in the first rounds")
        return kept

    def final(self, rivals: list[Candidate], rounds: int, seconds: float) -> Latency:
        """Everybody against eager; returns eager's second time under another name.

        Its difference from itself is what noise alone can do.
        """
        again = {f"{name} again": turn for name, turn in self._eager.items()}
        times = _timed(self._eager | again, rivals, rounds, seconds)
        return times[f"{self._keep(rivals, times)} again"]

    def fastest(self, sure: list[Candidate], rounds: int, seconds: float, report: Report) -> Candidate | None:
        """The fastest of those that surely beat eager: who came close to each other meet once more, without eager.

        None if there are none, or none is left.
        """
        lead = min((c.median_ms for c in sure), default=0.0)
        close = [c for c in sure if c.median_ms <= _CLOSE * lead]
        if len(close) > 1:
            times = _timed({}, close, rounds, seconds)
            close = [c for c in close if not c.problem]
            if not close:
                return None
            best = min(close, key=lambda c: _relative(times[c.name], [times[o.name] for o in close]))
            for other in close:
                if other is not best:
                    low, middle, high = ratio_interval(times[other.name], times[best.name])
                    how = f"{best.name} {middle:.3f}x as fast as {other.name}, 95 % {low:.3f} to {high:.3f}"
                    report.facts[f"last rung, {other.name}"] = how
            return best
        return close[0] if close else None

    def _keep(self, rivals: list[Candidate], times: dict[str, Latency]) -> str:
        """Take the better of eager's times as the bar; returns its name."""
        name = min(self._eager, key=lambda n: times[n].median_ms)
        self._baseline.latency = times[name]
        for candidate in rivals:
            candidate.bar = times[name]
        return name


def _relative(one: Latency, everybody: Sequence[Latency]) -> float:
    """Median over the rounds of its time, relative to the round's mean."""
    rounds = np.mean([latency.seconds for latency in everybody], axis=0)
    return float(np.median(np.asarray(one.seconds) / rounds))


def _timed(eager: dict[str, Turn], rivals: list[Candidate], rounds: int, seconds: float) -> dict[str, Latency]:
    turns = eager | {c.name: _turn(c) for c in rivals}
    times = paired_turns(turns, rounds=rounds, max_seconds=seconds)
    if eager:
        for candidate in rivals:
            candidate.latency = times[candidate.name]
    return times


def _turn(candidate: Candidate) -> Turn:
    # A rival that fails in the middle of the race costs only itself.
    def turn(settle_s: float, calls: int) -> float:
        if candidate.problem or candidate.contender is None:
            return math.inf
        try:
            return candidate.contender.turn(settle_s, calls)
        except Exception as e:
            candidate.drop(failure(e))
            return math.inf

    return turn

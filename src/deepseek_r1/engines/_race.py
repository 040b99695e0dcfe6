"""The race: candidates are checked against a float64 reference and timed in turns; the fastest right one wins.

A candidate that fails, gives wrong answers or is not surely faster than eager PyTorch cannot win. Candidates are built
one after the other; the slower half leaves after a few rounds, the rest goes on (successive halving: Jamieson and
Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, 2016), and the best meet once more.
This module knows candidates as contenders; it does not know engines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core import Budget, InputError, Report, progress
from ..measure import ENOUGH_ROUNDS, QUIET_SPREAD, compare, ratio_interval
from ._accuracy import judge
from ._candidate import Candidate, failure
from ._config import RaceConfig
from ._process import ChildError
from ._rungs import Rungs

#: A float32 candidate may be this many times as far from the float64 reference as eager float32 is.
ERROR_MULTIPLE = 20.0
#: ... and is never asked for more than this, relative to the largest output.
ERROR_FLOOR = 2e-6
#: Accuracy that a precision below the model's own may cost when no budget says otherwise.
DEFAULT_ACCURACY_DROP = 0.005
#: What the difference of two shares of samples may be off by.
ROUNDING = 1e-9

Leaves = Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the candidates are judged on.

    Attributes:
        probe: flat inputs that are timed.
        reference: outputs of the float64 reference on `probe`.
        batches: (flat inputs, labels or None) of the dataset; may be empty.
        kind: what the first output holds, one of `data.TASKS`.
    """

    probe: Leaves
    reference: list[torch.Tensor]
    batches: list[tuple[Leaves, Any]]
    kind: str = "auto"


def race(
    baseline: Candidate, rivals: list[Candidate], task: Task, budget: Budget, report: Report, config: RaceConfig
) -> tuple[Candidate, bool]:
    """The winner, and whether that is decided: a busy machine may hide that somebody is faster.

    It is `baseline` (eager) if nobody is right and surely faster. Adds rows, skips and a plot to `report`.
    """
    try:
        return _race(baseline, rivals, task, budget, report, config)
    finally:
        for candidate in (baseline, *rivals):
            candidate.close()


def _race(
    baseline: Candidate, rivals: list[Candidate], task: Task, budget: Budget, report: Report, config: RaceConfig
) -> tuple[Candidate, bool]:
    baseline.contender = baseline.prepare()
    judged = _Judged(baseline, task, budget, report, any(not c.exact for c in rivals))
    with progress.bar("race", len(rivals) + 2) as advance:
        for candidate in rivals:
            _qualify(candidate, judged, task, budget)
            advance(1, candidate.name)
        alive = [c for c in rivals if not c.problem]
        if budget.memory_gb is not None:
            alive = _measure_memory(baseline, alive, budget, report)
        rungs = Rungs(baseline)
        alive = rungs.first(alive, max(8, config.rounds // 10), config.seconds)
        advance(1, "final")
        again = rungs.final(alive, config.rounds, config.seconds)
        advance(1, "")
    alive = [c for c in alive if not c.problem]
    assert baseline.latency is not None, "it was timed"
    noise = ratio_interval(again, baseline.latency)
    if rungs.on_one_thread:
        report.facts["eager"] = f"timed on one thread, which is faster here than {torch.get_num_threads()}"
    timed = [c for c in rivals if math.isfinite(c.median_ms)]
    sure = _surely_faster(baseline, max(noise[2], 1 / noise[0]), alive, timed, budget, report)
    winner = rungs.fastest(sure, config.rounds, config.seconds / 2, report) or baseline
    for candidate in rivals:
        if candidate.problem:
            report.skip(candidate.name, candidate.problem)
    quiet = _describe(baseline, alive, winner, noise, judged.allowed, report)
    return winner, quiet or winner is not baseline


def _qualify(candidate: Candidate, judged: _Judged, task: Task, budget: Budget) -> None:
    """Build it and check its answers; whoever fails is out."""
    try:
        candidate.contender = candidate.prepare()
    except Exception as e:  # a rival may fail in any way; it costs the rival only
        why = str(e)[:300] if isinstance(e, ChildError) else f"{type(e).__name__}: {str(e)[:300]}"
        candidate.drop(f"compiling failed: {why}")
        return
    problem = judged.wrong(candidate, task) or judged.lossy(candidate, task) or _too_large(candidate, budget)
    if problem:
        candidate.drop(problem)


def _answer(candidate: Candidate, leaves: Leaves) -> list[torch.Tensor]:
    assert candidate.contender is not None, "it was prepared"
    return candidate.contender.answer(leaves)


def _numpy(outputs: list[torch.Tensor]) -> list[Any]:
    return [o.detach().cpu().double().numpy() for o in outputs]


class _Judged:
    """What the plain model answers, and how far a candidate may be from it."""

    def __init__(self, baseline: Candidate, task: Task, budget: Budget, report: Report, lossy: bool) -> None:
        self._reference = _numpy(task.reference)
        own = compare(self._reference, _numpy(_answer(baseline, task.probe))).max_rel
        self.allowed = max(ERROR_MULTIPLE * own, ERROR_FLOOR)
        self._report = report
        self._drop = DEFAULT_ACCURACY_DROP if budget.accuracy_drop is None else budget.accuracy_drop
        if not task.batches or not lossy:
            return
        self._labels = [label for _, label in task.batches]
        self._floats = [_answer(baseline, leaves) for leaves, _ in task.batches]
        self._plain = judge(self._floats, self._floats, self._labels, task.kind)
        baseline.accuracy = self._plain[0].value
        samples = self._plain[0].samples
        if 0 < self._drop * samples < 1:
            told = self._plain[0].allowed(self._drop)
            report.note(
                f"accuracy was judged on {samples} samples, too few to tell a loss of {self._drop:g} from none; "
                f"{told:.4f} is the nearest that they can tell and was allowed"
            )

    def wrong(self, candidate: Candidate, task: Task) -> str:
        """Why its answers on the probe are wrong; empty if they are not."""
        try:
            error = compare(self._reference, _numpy(_answer(candidate, task.probe))).max_rel
        except ChildError as e:
            return failure(e)
        except ValueError as e:
            return f"wrong outputs: {e}"
        except Exception as e:
            return failure(e)
        if candidate.exact and not error <= self.allowed:
            return f"wrong: error {error:.1e} against float64, allowed {self.allowed:.1e}"
        return "" if error < math.inf else "wrong: outputs that are not finite"

    def lossy(self, candidate: Candidate, task: Task) -> str:
        """Why a lower precision's accuracy is not enough; empty if it is."""
        if candidate.exact:
            return ""
        try:
            answers = [_answer(candidate, leaves) for leaves, _ in task.batches]
        except Exception as e:
            return failure(e)
        scores = judge(answers, self._floats, self._labels, task.kind)
        candidate.accuracy = scores[0].value
        problem = ""
        for number, (before, after) in enumerate(zip(self._plain, scores, strict=True)):
            name = f"accuracy, {candidate.name}" if number == 0 else f"output {number}, {candidate.name}"
            self._report.add(name, after.value, before=before.value, how=after.how)
            lost, allowed = before.value - after.value, after.allowed(self._drop)
            if not lost <= allowed + ROUNDING and not problem:
                problem = f"loses {lost:.4f} of accuracy ({after.how}), allowed {allowed:.4f}"
        return problem


def _measure_memory(
    baseline: Candidate, alive: list[Candidate], budget: Budget, report: Report
) -> list[Candidate]:  # fmt: skip
    assert budget.memory_gb is not None, "only called where memory is limited"
    for candidate in (baseline, *alive):
        try:
            candidate.peak_bytes = candidate.measure_peak() if candidate.measure_peak else None
        except InputError as e:
            candidate.drop(f"its peak memory could not be measured: {str(e)[:200]}")
        if candidate.peak_bytes is not None:
            how = "a fresh process with PyTorch that opens and runs it"
            report.add(f"peak memory, {candidate.name}", candidate.peak_bytes / 1e6, unit="MB", how=how)
    for candidate in alive:
        if not candidate.problem and (problem := _too_hungry(candidate, budget)):
            candidate.drop(problem)
    return [c for c in alive if not c.problem]


def _too_large(candidate: Candidate, budget: Budget) -> str:
    if budget.size_mb is not None and candidate.size_bytes > budget.size_mb * 1e6:
        return f"{candidate.size_bytes / 1e6:.4g} MB, the budget is {budget.size_mb:g} MB"
    return ""


def _too_hungry(candidate: Candidate, budget: Budget) -> str:
    if budget.memory_gb is not None and (candidate.peak_bytes is None or candidate.peak_bytes > budget.memory_gb * 1e9):
        measured = "not measured" if candidate.peak_bytes is None else f"{candidate.peak_bytes / 1e9:.3f} GB"
        return f"peak memory {measured}, the budget is {budget.memory_gb:g} GB"
    return ""


def _surely_faster(
    baseline: Candidate, spread: float, alive: list[Candidate], timed: list[Candidate], budget: Budget, report: Report
) -> list[Candidate]:
    """The candidates that beat eager by more than `spread`, what eager differs from itself by."""
    plain_is_out = bool(_too_large(baseline, budget) or _too_hungry(baseline, budget))
    sure: list[Candidate] = []
    for candidate in timed:
        assert candidate.latency is not None, "it was timed"
        assert candidate.bar is not None, "so was eager"
        low, middle, high = ratio_interval(candidate.bar, candidate.latency)
        report.add(
            f"latency, {candidate.name}", candidate.latency.median_ms, before=candidate.bar.median_ms, unit="ms",
            how=f"{middle:.2f}x eager, 95 % interval {low:.2f} to {high:.2f}, {len(candidate.latency.seconds)} rounds",
        )  # fmt: skip
        if candidate not in alive:
            continue
        if low > max(spread, 1.0) or plain_is_out:
            sure.append(candidate)
        else:
            report.skip(
                candidate.name, f"not surely faster than eager, which differs from itself by up to {spread:.2f}x"
            )
    return sure


def _describe(
    baseline: Candidate, alive: list[Candidate], winner: Candidate, noise: tuple[float, float, float],
    allowed: float, report: Report,
) -> bool:  # fmt: skip
    """Say how it went; returns whether the machine was quiet enough for a verdict."""
    timed = [c for c in (baseline, *alive) if c.latency is not None]
    report.plot(
        "histogram", "Latency", {c.name: [s * 1e3 for s in c.latency.seconds] for c in timed if c.latency},
        x_label="ms per call", y_label="rounds", caption="Distribution of the paired rounds of the final.",
    )  # fmt: skip
    report.facts["noise of the race"] = f"eager against itself {noise[1]:.3f}x, 95 % {noise[0]:.3f} to {noise[2]:.3f}"
    rounds = len(timed[0].latency.seconds) if timed[0].latency else 0
    quiet = max(noise[2], 1 / noise[0]) <= QUIET_SPREAD
    if not quiet:
        report.note(
            f"the machine was busy: eager against itself gave {noise[0]:.2f} to {noise[2]:.2f}; run again when it is "
            "quiet for numbers to quote"
        )
    if rounds < ENOUGH_ROUNDS:
        report.note(
            f"there was time for {rounds} rounds only; RaceConfig(seconds=...) gives more, for numbers to quote"
        )
    report.facts["allowed error of exact candidates"] = f"{allowed:.1e} relative to the largest output"
    report.note(
        f"chosen: {winner.name}"
        if winner is not baseline
        else "chosen: eager, because no candidate was right and surely faster"
    )
    return quiet and rounds >= ENOUGH_ROUNDS

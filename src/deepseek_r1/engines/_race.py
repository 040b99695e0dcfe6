"""The race: candidates are checked against a float64 reference and timed in turns; the fastest right one wins.

A candidate that fails, gives wrong answers or is not surely faster than eager PyTorch cannot win. This module knows
candidates as functions on flat inputs; it does not know engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..core import Budget, InputError, Report, progress
from ..measure import ENOUGH_ROUNDS, QUIET_SPREAD, Latency, compare, paired_latency, ratio_interval
from ._accuracy import judge
from ._eager import on_one_thread
from .base import Runner

#: A float32 candidate may be this many times as far from the float64 reference as eager float32 is.
ERROR_MULTIPLE = 20.0
#: ... and is never asked for more than this, relative to the largest output.
ERROR_FLOOR = 2e-6
#: Accuracy that a precision below float32 may cost when no budget says otherwise.
DEFAULT_ACCURACY_DROP = 0.005

_AGAIN, _ONE, _ONE_AGAIN = "eager again", "eager on one thread", "eager on one thread again"

Leaves = Sequence[Any]
Run = Runner


@dataclass
class Candidate:
    """One way to run the model.

    Attributes:
        run: flat inputs to flat outputs, for judging answers.
        call: what is timed: the object that the user would get, called on the probe.
        size_bytes: bytes of its weights.
        float32: whether it must match the float64 reference about as well as the plain model does; otherwise, as a
            lower precision than the model's own, it is judged by the task metric.
        problem: why it is out, empty while it is in.
        measure_peak: gives the peak memory of a fresh process that runs it, in bytes; called if a budget limits that.
    """

    name: str
    run: Run
    call: Callable[[], Any] | None
    size_bytes: int
    float32: bool
    latency: Latency | None = None
    accuracy: float | None = None
    problem: str = ""
    measure_peak: Callable[[], int] | None = field(default=None, repr=False)
    peak_bytes: int | None = None
    tag: Any = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the candidates are judged on.

    Attributes:
        probe: flat inputs that are timed.
        reference: outputs of the float64 reference on `probe`.
        batches: (flat inputs, labels or None) of the dataset; may be empty.
    """

    probe: Leaves
    reference: list[torch.Tensor]
    batches: list[tuple[Leaves, Any]]


def race(baseline: Candidate, rivals: list[Candidate], task: Task, budget: Budget, report: Report) -> Candidate:
    """The winner; `baseline` (eager) if nobody is right and surely faster. Adds rows, skips and a plot to `report`."""
    allowed = _check_answers(baseline, rivals, task, report)
    _check_accuracy(baseline, rivals, task, budget, report)
    alive = [c for c in rivals if not c.problem]
    with progress.bar("race", None):
        functions = {baseline.name: _call(baseline, task.probe), **{c.name: _call(c, task.probe) for c in alive}}
        functions[_ONE] = on_one_thread(functions[baseline.name])
        # Eager runs again under other names: the difference from itself is what noise alone can do.
        functions[_AGAIN], functions[_ONE_AGAIN] = functions[baseline.name], functions[_ONE]
        latencies = paired_latency(functions, rounds=60, max_seconds=8)
    alive = [c for c in alive if not c.problem]
    for candidate in (baseline, *alive):
        candidate.latency = latencies[candidate.name]
    # A rival has to beat eager as it is at its best, not as its default thread count happens to leave it.
    name, again = min(((baseline.name, _AGAIN), (_ONE, _ONE_AGAIN)), key=lambda pair: latencies[pair[0]].median_ms)
    bar, noise = latencies[name], ratio_interval(latencies[again], latencies[name])
    if name == _ONE:
        report.facts["eager"] = f"timed on one thread, which is faster here than {torch.get_num_threads()}"
    if budget.memory_gb is not None:
        alive = _measure_memory(baseline, alive, report)
    winner = _choose(baseline, bar, max(noise[2], 1 / noise[0]), alive, budget, report)
    for candidate in rivals:
        if candidate.problem:
            report.skip(candidate.name, candidate.problem)
    _describe(baseline, alive, winner, noise, allowed, report)
    return winner


def _call(candidate: Candidate, probe: Leaves) -> Callable[[], Any]:
    # A rival that fails in the middle of the race costs only itself.
    call = candidate.call or (lambda: candidate.run(probe))

    def timed() -> Any:
        if candidate.problem:
            return None
        try:
            return call()
        except Exception as e:
            candidate.problem = _failure(e)
            return None

    return timed


def _try(candidate: Candidate, leaves: Leaves) -> list[torch.Tensor] | None:
    try:
        return candidate.run(leaves)
    except Exception as e:
        candidate.problem = _failure(e)
        return None


def _failure(e: Exception) -> str:
    return f"failed: {type(e).__name__}: {str(e)[:200]}"


def _numpy(outputs: list[torch.Tensor]) -> list[Any]:
    return [o.detach().cpu().double().numpy() for o in outputs]


def _check_answers(baseline: Candidate, rivals: list[Candidate], task: Task, report: Report) -> float:
    reference = _numpy(task.reference)
    own = compare(reference, _numpy(baseline.run(task.probe))).max_rel
    allowed = max(ERROR_MULTIPLE * own, ERROR_FLOOR)
    for candidate in rivals:
        outputs = _try(candidate, task.probe)
        if outputs is None:
            continue
        try:
            error = compare(reference, _numpy(outputs)).max_rel
        except ValueError as e:
            candidate.problem = f"wrong outputs: {e}"
            continue
        if candidate.float32 and not error <= allowed:
            candidate.problem = f"wrong: error {error:.1e} against float64, allowed {allowed:.1e}"
        elif not error < float("inf"):
            candidate.problem = "wrong: outputs that are not finite"
    return allowed


def _check_accuracy(baseline: Candidate, rivals: list[Candidate], task: Task, budget: Budget, report: Report) -> None:
    lossy = [c for c in rivals if not c.float32 and not c.problem]
    if not task.batches:
        for candidate in lossy:
            candidate.problem = "below float32, and no dataset to check its accuracy on: give optimize dataset="
        return
    labels = [label for _, label in task.batches]
    floats = [baseline.run(leaves) for leaves, _ in task.batches]
    plain = judge(floats, floats, labels)
    baseline.accuracy = plain[0].value
    drop = DEFAULT_ACCURACY_DROP if budget.accuracy_drop is None else budget.accuracy_drop
    if lossy and 0 < drop * plain[0].samples < 1:
        report.note(f"accuracy was judged on {plain[0].samples} samples, too few to tell a loss of {drop:g} from none")
    for candidate in lossy:
        tried = [_try(candidate, leaves) for leaves, _ in task.batches]
        answers = [outputs for outputs in tried if outputs is not None]
        if candidate.problem:
            continue
        scores = judge(answers, floats, labels)
        candidate.accuracy = scores[0].value
        for number, (before, after) in enumerate(zip(plain, scores, strict=True)):
            name = f"accuracy, {candidate.name}" if number == 0 else f"output {number}, {candidate.name}"
            report.add(name, after.value, before=before.value, how=after.how)
            lost = before.value - after.value
            if not lost <= drop and not candidate.problem:
                candidate.problem = f"loses {lost:.4f} of accuracy ({after.how}), allowed {drop:.4f}"


def _measure_memory(baseline: Candidate, alive: list[Candidate], report: Report) -> list[Candidate]:
    for candidate in (baseline, *alive):
        try:
            candidate.peak_bytes = candidate.measure_peak() if candidate.measure_peak else None
        except InputError as e:
            candidate.problem = f"its peak memory could not be measured: {str(e)[:200]}"
        if candidate.peak_bytes is not None:
            how = "a fresh process with PyTorch that loads, compiles and runs it"
            report.add(f"peak memory, {candidate.name}", candidate.peak_bytes / 1e6, unit="MB", how=how)
    return [c for c in alive if not c.problem]


def _over(candidate: Candidate, budget: Budget) -> str:
    """Why a candidate does not fit the budget's size and memory; empty if it does."""
    if budget.size_mb is not None and candidate.size_bytes > budget.size_mb * 1e6:
        return f"{candidate.size_bytes / 1e6:.4g} MB, the budget is {budget.size_mb:g} MB"
    if budget.memory_gb is not None and (candidate.peak_bytes is None or candidate.peak_bytes > budget.memory_gb * 1e9):
        measured = "not measured" if candidate.peak_bytes is None else f"{candidate.peak_bytes / 1e9:.3f} GB"
        return f"peak memory {measured}, the budget is {budget.memory_gb:g} GB"
    return ""


def _choose(
    baseline: Candidate, bar: Latency, spread: float, alive: list[Candidate], budget: Budget, report: Report
) -> Candidate:
    """The fastest candidate that beats `bar` by more than `spread`, what eager differs from itself by."""
    plain_is_out = bool(_over(baseline, budget))
    sure: list[Candidate] = []
    for candidate in alive:
        assert candidate.latency is not None, "whoever is alive was timed"
        low, middle, high = ratio_interval(bar, candidate.latency)
        report.add(
            f"latency, {candidate.name}", candidate.latency.median_ms, before=bar.median_ms, unit="ms",
            how=f"{middle:.2f}x eager, 95 % interval {low:.2f} to {high:.2f}, {len(candidate.latency.seconds)} rounds",
        )  # fmt: skip
        if reason := _over(candidate, budget):
            report.skip(candidate.name, reason)
        elif low > max(spread, 1.0) or plain_is_out:
            sure.append(candidate)
        else:
            report.skip(
                candidate.name, f"not surely faster than eager, which differs from itself by up to {spread:.2f}x"
            )
    return min(sure, key=lambda c: c.latency.median_ms if c.latency else np.inf, default=baseline)


def _describe(
    baseline: Candidate, alive: list[Candidate], winner: Candidate, noise: tuple[float, float, float],
    allowed: float, report: Report,
) -> None:  # fmt: skip
    timed = [c for c in (baseline, *alive) if c.latency is not None]
    report.plot(
        "histogram", "Latency", {c.name: [s * 1e3 for s in c.latency.seconds] for c in timed if c.latency},
        x_label="ms per call", y_label="rounds", caption="Distribution of the paired rounds of the race.",
    )  # fmt: skip
    report.facts["noise of the race"] = f"eager against itself {noise[1]:.3f}x, 95 % {noise[0]:.3f} to {noise[2]:.3f}"
    rounds = len(timed[0].latency.seconds) if timed[0].latency else 0
    if max(noise[2], 1 / noise[0]) > QUIET_SPREAD or rounds < ENOUGH_ROUNDS:
        report.note(
            f"the machine was busy: {rounds} rounds, and eager against itself gave {noise[0]:.2f} to {noise[2]:.2f}; "
            "run again when it is quiet for numbers to quote"
        )
    report.facts["allowed error of float32 candidates"] = f"{allowed:.1e} relative to the largest output"
    report.note(
        f"chosen: {winner.name}"
        if winner is not baseline
        else "chosen: eager, because no candidate was right and surely faster"
    )

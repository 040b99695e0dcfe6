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
from ..data import class_hits
from ..measure import Latency, compare, paired_latency, ratio_interval
from ._eager import on_one_thread
from .base import Runner

#: A float32 candidate may be this many times as far from the float64 reference as eager float32 is.
ERROR_MULTIPLE = 20.0
#: ... and is never asked for more than this, relative to the largest output.
ERROR_FLOOR = 2e-6
#: Accuracy that a precision below float32 may cost when no budget says otherwise.
DEFAULT_ACCURACY_DROP = 0.005

_AGAIN, _ONE = "eager again", "eager on one thread"

Leaves = Sequence[Any]
Run = Runner


@dataclass
class Candidate:
    """One way to run the model.

    Attributes:
        size_bytes: bytes of its weights.
        float32: whether it must match the float64 reference; otherwise the task metric judges it.
        problem: why it is out, empty while it is in.
        measure_peak: gives the peak memory of a fresh process that runs it, in bytes; called if a budget limits that.
    """

    name: str
    run: Run
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
        # The baseline runs a second time under another name: their difference is what noise alone can do.
        functions = {baseline.name: lambda: baseline.run(task.probe), **{c.name: _call(c, task.probe) for c in alive}}
        functions[_AGAIN] = functions[baseline.name]
        functions[_ONE] = on_one_thread(functions[baseline.name])
        latencies = paired_latency(functions, rounds=60, max_seconds=6)
    alive = [c for c in alive if not c.problem]
    for candidate in (baseline, *alive):
        candidate.latency = latencies[candidate.name]
    noise = ratio_interval(latencies[_AGAIN], latencies[baseline.name])
    # A rival has to beat eager as it is at its best, not as its default thread count happens to leave it.
    baseline.latency = min(latencies[baseline.name], latencies[_ONE], key=lambda t: t.median_ms)
    if baseline.latency is latencies[_ONE]:
        report.facts["eager"] = f"timed on one thread, which is faster here than {torch.get_num_threads()}"
    if budget.memory_gb is not None:
        alive = _measure_memory(baseline, alive, report)
    winner = _choose(baseline, alive, budget, report)
    for candidate in rivals:
        if candidate.problem:
            report.skip(candidate.name, candidate.problem)
    _describe(baseline, alive, winner, noise, allowed, report)
    return winner


def _call(candidate: Candidate, probe: Leaves) -> Callable[[], Any]:
    # A rival that fails in the middle of the race costs only itself.
    return lambda: None if candidate.problem else _try(candidate, probe)


def _try(candidate: Candidate, leaves: Leaves) -> list[torch.Tensor] | None:
    try:
        return candidate.run(leaves)
    except Exception as e:
        candidate.problem = f"failed: {type(e).__name__}: {str(e)[:200]}"
        return None


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
    floats = [baseline.run(leaves)[0] for leaves, _ in task.batches]
    baseline.accuracy, how = task_metric(floats, floats, [labels for _, labels in task.batches])
    drop = DEFAULT_ACCURACY_DROP if budget.accuracy_drop is None else budget.accuracy_drop
    for candidate in lossy:
        outputs = [_try(candidate, leaves) for leaves, _ in task.batches]
        if candidate.problem:
            continue
        firsts = [o[0] for o in outputs if o is not None]
        candidate.accuracy, _ = task_metric(firsts, floats, [labels for _, labels in task.batches])
        lost = baseline.accuracy - candidate.accuracy
        report.add(f"accuracy, {candidate.name}", candidate.accuracy, before=baseline.accuracy, how=how)
        if not lost <= drop:
            candidate.problem = f"loses {lost:.4f} of accuracy, allowed {drop:.4f}"


def task_metric(outputs: list[torch.Tensor], floats: list[torch.Tensor], labels: list[Any]) -> tuple[float, str]:
    """How good answers are, 0 to 1, and how that was judged.

    Class labels give accuracy. Without them: the share of rows whose largest entry is where the float model has it,
    or, for single numbers, the share of their variance that is reproduced.

    Args:
        outputs: answers, [batch, ..., classes] each.
        floats: the float model's answers.
        labels: class indices or None for each batch.
    """
    hits = [class_hits(out, label) for out, label in zip(outputs, labels)]
    right = [h for h in hits if h is not None]
    if len(right) == len(outputs):
        found = torch.cat(right).float()
        return float(found.mean()), f"accuracy on {len(found)} labels"
    if all(b.ndim == 0 or b.shape[-1] < 2 for b in floats):
        a, b = (torch.cat([v.flatten().double() for v in values]) for values in (outputs, floats))
        spread = ((b - b.mean()) ** 2).sum().clamp_min(1e-300)
        return 1 - float(((a - b) ** 2).sum() / spread), f"explained variance of the float model's {len(b)} values"
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).float().flatten() for a, b in zip(outputs, floats)])
    return float(same.mean()), f"agreement with the float model on {len(same)} rows"


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
        return f"{candidate.size_bytes / 1e6:.2f} MB, the budget is {budget.size_mb:g} MB"
    if budget.memory_gb is not None and (candidate.peak_bytes is None or candidate.peak_bytes > budget.memory_gb * 1e9):
        measured = "not measured" if candidate.peak_bytes is None else f"{candidate.peak_bytes / 1e9:.3f} GB"
        return f"peak memory {measured}, the budget is {budget.memory_gb:g} GB"
    return ""


def _choose(baseline: Candidate, alive: list[Candidate], budget: Budget, report: Report) -> Candidate:
    assert baseline.latency is not None, "the baseline is always timed"
    plain_is_out = bool(_over(baseline, budget))
    sure: list[Candidate] = []
    for candidate in alive:
        assert candidate.latency is not None, "whoever is alive was timed"
        low, middle, high = ratio_interval(baseline.latency, candidate.latency)
        report.add(
            f"latency, {candidate.name}", candidate.latency.median_ms, before=baseline.latency.median_ms, unit="ms",
            how=f"{middle:.2f}x eager, 95 % interval {low:.2f} to {high:.2f}, {len(candidate.latency.seconds)} rounds",
        )  # fmt: skip
        if reason := _over(candidate, budget):
            report.skip(candidate.name, reason)
        elif low > 1.0 or plain_is_out:
            sure.append(candidate)
        else:
            report.skip(candidate.name, "not surely faster than eager")
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
    report.facts["allowed error of float32 candidates"] = f"{allowed:.1e} relative to the largest output"
    report.note(
        f"chosen: {winner.name}"
        if winner is not baseline
        else "chosen: eager, because no candidate was right and surely faster"
    )

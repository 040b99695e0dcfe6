"""The report of a search for formats: what was chosen and why, what it costs by prediction and measurement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from ..core import Report
from ._latency import FLOAT as FLOAT32
from ._latency import LatencyTable
from ._search import Candidate, Goal, Search, within
from ._sensitivity import Pair
from ._verify import FLOAT, MIXED, UNIFORM, Verdict, loss_interval

_UNITS = {"ms": ("latency", "ms", 1.0), "bytes": ("weights", "MB", 1e6), "loss": ("loss", "", 1.0)}


def describe(
    report: Report, verdict: Verdict, search: Search, scores: Mapping[Pair, float], table: LatencyTable,
    uniform: Sequence[Candidate], goal: Goal, points: int,
) -> None:  # fmt: skip
    """Fill the report of a choice that keeps its budget."""
    _measurements(report, verdict, goal)
    for name, count in Counter(str(fmt) for fmt in verdict.candidate.choice.values()).items():
        report.add(f"layers in {name}", count, before=len(verdict.candidate.choice) if name == FLOAT32 else 0)
    _layers(report, verdict, search, scores, table)
    _curve(report, search, uniform, goal, points, verdict)
    for note in verdict.notes:
        report.note(note)
    if table.how:
        report.note(f"latency of layers: {table.how}, on {table.engine}")


def _measurements(report: Report, verdict: Verdict, goal: Goal) -> None:
    mixed, plain = verdict.measured[MIXED], verdict.measured[FLOAT]
    rounds = len(mixed.latency.seconds)
    report.add("latency", mixed.latency.median_ms, before=plain.latency.median_ms, unit="ms", how=f"median of {rounds}")
    report.add("weights", mixed.weights_bytes, before=plain.weights_bytes, unit="bytes", how="parameters and buffers")
    report.add("file", mixed.file_bytes, before=plain.file_bytes, unit="bytes", how="what the engine keeps")
    low, middle, high = loss_interval(mixed.drops)
    samples = len(mixed.drops)
    report.add(
        "quality lost", middle, before=0.0,
        how=f"{samples} held-out samples, 95 % of bootstraps between {low:.4g} and {high:.4g}",
    )  # fmt: skip
    report.add("loss", float(mixed.losses.mean()), before=0.0, how=f"on the engine, {samples} held-out samples")
    predicted = verdict.candidate.costs
    report.add("predicted latency", predicted["ms"], unit="ms", how="sum over layers")
    report.add("predicted loss", predicted["loss"], how="sum over layers, on calibration data")
    if verdict.uniform is not None:
        best = verdict.measured[UNIFORM]
        report.add("best format for all layers", verdict.uniform.title.removeprefix("all in "))
        report.add("its latency", best.latency.median_ms, unit="ms", how="in turns with the choice")
        report.add("its weights", best.weights_bytes, unit="bytes")
        report.add("its loss", float(best.losses.mean()), how="on the engine, held-out samples")
    report.add("solver's gap", verdict.candidate.gap, how="share by which a better choice may exist")
    if goal.drop is not None:
        report.check("quality", middle <= goal.drop, f"{middle:.4g} lost, {goal.drop:g} allowed")
        if high > goal.drop:
            report.note(f"{samples} held-out samples do not prove that no more than {goal.drop:g} is lost")
    for measure, limit in goal.limits.items():
        name, unit, scale = _UNITS[measure]
        value = mixed.costs()[measure]
        report.check(f"{name} budget", value <= limit, f"{value / scale:.4g} {unit}, budget {limit / scale:.4g} {unit}")


def _layers(
    report: Report, verdict: Verdict, search: Search, scores: Mapping[Pair, float], table: LatencyTable
) -> None:
    choice = verdict.candidate.choice
    loss = max(sum(scores.get((la, choice[la.name]), 0.0) for la in search.options), 1e-300)
    for layer, options in search.options.items():
        fmt = choice[layer.name]
        row = table.layers[layer.name]
        fastest = min(options, key=lambda f: row[str(f)])
        why = (
            f"{row[str(fmt)]:.4g} ms (float {row[FLOAT32]:.4g}), {scores.get((layer, fmt), 0.0) / loss:.0%} of the loss"
        )
        if fmt != fastest:
            why += f"; {fastest}, {row[str(fastest)]:.4g} ms, would lose {scores.get((layer, fastest), 0.0) / loss:.0%}"
        report.add(f"layer {layer.name}", str(fmt), before=FLOAT32, how=why)


def _curve(
    report: Report, search: Search, uniform: Sequence[Candidate], goal: Goal, points: int, verdict: Verdict | None
) -> None:
    along = "bytes" if goal.minimise == "bytes" else "ms"
    name, unit, scale = _UNITS[along]
    free = Goal(minimise="loss", limits={}, drop=None)

    def place(candidate: Candidate) -> list[float]:
        return [candidate.costs[along] / scale, float(np.log10(max(candidate.costs["loss"], 1e-12)))]

    series = {
        "a format for each layer": [place(c) for c in search.front(free, along, points)],
        "one for all": [place(c) for c in uniform],
    }
    if verdict is not None:
        series["chosen"] = [place(verdict.candidate)]
    report.plot(
        "scatter", "Loss that each latency costs" if along == "ms" else "Loss that each size costs", series,
        x_label=f"{name}, {unit}, predicted", y_label="log10 of the loss, predicted",
        caption="Lower left is better; points of one format for all layers that lie above the others are beaten.",
    )  # fmt: skip


def describe_failure(
    report: Report, search: Search, uniform: Sequence[Candidate], goal: Goal, points: int, why: str
) -> None:
    """Fill the report of a budget that cannot be kept: the best of each measure, and the curve."""
    free = Goal(minimise="loss", limits={}, drop=None)
    for measure, (name, unit, scale) in _UNITS.items():
        best = search.best(Goal(minimise=measure, limits={}, drop=None))
        report.add(f"smallest {name}", best.costs[measure] / scale, unit=unit, how="predicted, alone")
        if measure in goal.limits and not within(best, Goal(minimise=measure, limits=goal.limits, drop=None)):
            report.note(f"{name}: {goal.limits[measure] / scale:.4g} {unit} cannot be kept")
    front = search.front(free, "ms", points)
    report.facts["curve"] = [c.costs for c in front]
    report.check("budget", False, why)
    _curve(report, search, uniform, goal, points, None)

"""What a DSDataLoader says about itself, as a Report. Knows plans and positions, and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from ..core import Report
from ._batching import Plan
from ._pass import Position

_BECAME = {"truncate": "cut to max_length", "skip": "left out", "error": "refused"}


def loader_report(
    *,
    batching: str,
    why: str,
    plan: Plan | None,
    counts: dict[str, int] | None,
    lengths_s: float,
    position: Position | None,
    too_long: str,
    workers: int,
    decisions: Sequence[str],
    notes: Sequence[str],
) -> Report:
    """The report of a loader, from what it knows so far."""
    report = Report("data loader")
    report.note(f"batching: {batching} ({why})")
    if plan is not None:
        _add_plan(report, plan, lengths_s, _BECAME[too_long])
    if counts is not None:
        _add_stream(report, counts, plan, _BECAME[too_long])
    if position is not None and position.batch:
        _add_times(report, position)
    report.add("workers", workers, how="for the next pass")
    for text in decisions:
        report.note(f"workers: {text}")
    for text in notes:
        report.note(text)
    return report


def _add_plan(report: Report, plan: Plan, lengths_s: float, became: str) -> None:
    report.add("samples", int(plan.lengths.size))
    report.add("batches of a pass", plan.batches)
    report.add("padded lengths", ", ".join(map(str, plan.shapes)))
    report.add("samples of a batch" if not plan.packed else "rows of a batch", ", ".join(map(str, plan.sizes)))
    report.add("fill", plan.fill, how="share of the batches' tokens that are samples'")
    report.add("finding the lengths", lengths_s, unit="s", how="once, before the first pass")
    _add_too_long(report, plan.too_long, plan.max_length, became, f"; {plan.lost_tokens:,} tokens lost")


def _add_stream(report: Report, counts: dict[str, int], plan: Plan | None, became: str) -> None:
    if not counts["samples"]:
        report.note("workers read the stream, so its samples were not counted here")
        return
    report.add("samples", counts["samples"], how="read from the stream in this process")
    if counts["rows"]:
        report.add("fill", counts["tokens"] / counts["row tokens"], how="share of the rows' tokens that are samples'")
    _add_too_long(report, counts["too long"], counts["max length"], became, "")


def _add_too_long(report: Report, count: int, max_length: int, became: str, lost: str) -> None:
    report.add("samples too long", count, how=f"more than {max_length} tokens")
    if count:
        report.skip(f"{count} samples of more than {max_length} tokens", became + lost)


def _add_times(report: Report, position: Position) -> None:
    total = position.waited_s + position.computed_s
    how = f"mean of {position.batch} batches of pass {position.epoch + 1}"
    report.add("waiting for a batch", position.waited_s / position.batch * 1e3, unit="ms", how=how)
    report.add("between batches", position.computed_s / position.batch * 1e3, unit="ms", how=how)
    report.add("share of time spent waiting", position.waited_s / total if total else 0.0, how=how)

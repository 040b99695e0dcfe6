"""The Report of a training run, from its history. Knows nothing about how it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core import Report, probe
from ._objective import Objective
from ._progress import Progress

#: Fields of the configuration that change no number of a run, so that a resumed run may differ in them.
_HARMLESS = {
    "save_dir", "save_every_steps", "save_every_epochs", "keep_last", "keep_best", "async_save", "on_save_error",
    "save_frozen", "shard_gb", "log_dir", "log_every",
}  # fmt: skip


def differences(before: Mapping[str, Any], now: Mapping[str, Any], batch_before: int | None, batch: int | None) -> str:
    """What a resumed run has otherwise than the run had, as the end of a note.

    Args:
        before, now: the configurations.
        batch_before, batch: the loaders' batch sizes; None where it is not known.

    Example:
        >>> differences({"seed": 0}, {"seed": 0}, 32, 16)
        "; changed since, so not an exact continuation: the loader's batch size (was 32, is 16)"
    """
    changed = [k for k, v in before.items() if k not in _HARMLESS and now.get(k) != v]
    if batch_before is not None and batch_before != batch:
        changed.append(f"the loader's batch size (was {batch_before}, is {batch})")
    return f"; changed since, so not an exact continuation: {', '.join(changed)}" if changed else ""


def run_notes(reasons: Mapping[str, str], loss: Objective, progress: Progress, taken: int) -> list[str]:
    """What was chosen and why, and how the run ended.

    Args:
        taken: steps taken in this call of `train`.
    """
    notes = [f"{name}: {reason}" for name, reason in reasons.items()]
    if loss.name:
        notes.append(f"loss: {loss.name}" + (f", chosen for {loss.reason}" if loss.reason else ", as given"))
    if loss.split_note:
        notes.append(loss.split_note)
    if not taken:
        notes.append(f"no step was taken: the run has its {progress.epoch} epoch(s) already; ask for more to go on")
    if progress.stopped:
        notes.append(f"stopped early: {progress.stopped}")
    return notes


def best_entry(history: Sequence[dict[str, Any]], metric: str, mode: str) -> dict[str, Any] | None:
    """The entry with the best value of a metric, the earliest of equals; None if no entry has it.

    Example:
        >>> best_entry([{"a": 2}, {"a": 1}, {"a": 1}], "a", "min")
        {'a': 1}
    """
    having = [entry for entry in history if metric in entry]
    if not having:
        return None
    return (min if mode == "min" else max)(having, key=lambda entry: entry[metric])


def summarise(
    *,
    history: Sequence[dict[str, Any]],
    losses: Sequence[tuple[int, float]],
    steps: int,
    samples: int,
    seconds: float,
    metric: str,
    mode: str,
    notes: Sequence[str],
    skipped: Sequence[tuple[str, str]],
    facts: dict[str, Any],
) -> Report:
    """The Report of one run. `history` and `losses` are those of the run alone."""
    report = Report("training")
    report.facts.update({**facts, **probe().facts()})
    report.add("epochs", len(history))
    report.add("steps", steps, how="optimizer steps")
    report.add("training time", seconds, unit="s", how="wall clock, without validation")
    if seconds > 0:
        report.add("throughput", samples / seconds, unit="samples/s", how="training samples / training time")
    if history:
        first, last = history[0], history[-1]
        for name in last:
            if name == "train_loss" or name.startswith("val_"):
                before = first.get(name) if len(history) > 1 else None
                report.add(name, last[name], before=before, how="after the first -> the last epoch")
    best = best_entry(history, metric, mode)
    if best is not None:
        report.add(f"best {metric}", best[metric], how=f"epoch {best['epoch']}, step {best['step']}")
    for note in notes:
        report.note(note)
    for what, why in skipped:
        report.skip(what, why)
    series = _curves(history, losses)
    if series:
        report.plot(
            "line", "training curve", series, x_label="optimizer step", y_label="value",
            caption="Training loss while learning, and what validation gave after each epoch.",
        )  # fmt: skip
    return report


def _curves(history: Sequence[dict[str, Any]], losses: Sequence[tuple[int, float]]) -> dict[str, list[Any]]:
    series: dict[str, list[Any]] = {}
    points = [[step, loss] for step, loss in losses]
    if len(points) < 2:
        points = [[entry["step"], entry["train_loss"]] for entry in history]
    if points:
        series["train loss"] = points
    for name in history[-1] if history else ():
        if name.startswith("val_"):
            label = "val " + name.removeprefix("val_")
            series[label] = [[entry["step"], entry[name]] for entry in history if name in entry]
    return series

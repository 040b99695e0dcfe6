"""Tables of docs/benchmarks.md from the results of training benchmarks."""

# ruff: noqa: RUF001 - tables have signs of their own
from __future__ import annotations

from typing import Any

Page = tuple[list[str], list[list[str]], list[str]]


def step(found: dict[str, Any]) -> Page:
    """Rates and peaks of whole steps, beside Hugging Face's Trainer."""
    head = ["training", "by", "samples/s", "× Hugging Face", "peak, GB", "× Hugging Face", "first steps, s"]
    body, below = [], []
    for name, row in found["rows"].items():
        base = row.get("hugging face")
        for who, run in row.items():
            rate, peak = (f"{run[k] / base[k]:.2f}" if base else "–" for k in ("samples_s", "peak_gb"))
            body.append([
                name, who, f"{run['samples_s']:,.0f}", rate, f"{run['peak_gb']:.2f}", peak, f"{run['warm_s']:.0f}",
            ])  # fmt: skip
        notes = [
            note
            for note in row.get("ours", {}).get("notes", [])
            if note.startswith(("compile", "cuda_graph", "memory"))
        ]
        if notes:
            below.append(f"- {name}: {'; '.join(notes)}.")
    return head, body, below


def gpt(found: dict[str, Any]) -> Page:
    """The Trainer against a loop by hand, on a CPU."""
    head = ["by", "tokens/s", "× the loop", "quartiles", "CPU s a step", "× the loop in CPU time", "quartiles"]
    body, summary = [], found["summary"]
    for name in ("loop", "loop again", "trainer"):
        against = summary.get(f"{name} over loop", {})
        cells = []
        for key in ("s", "cpu_s"):
            ratio = against.get(key)
            cells.append("–" if ratio is None else f"{ratio['median']:.3f}")
            cells.append("–" if ratio is None else f"{ratio['quartile_1']:.3f}–{ratio['quartile_3']:.3f}")
        cpu = summary["cpu_s"][name] / found["arguments"]["steps"]
        body.append([name, f"{summary['tokens_s'][name]:,.0f}", *cells[:2], f"{cpu:.3f}", *cells[2:]])
    losses = summary["largest_difference_of_losses"]
    below = [
        f"{len(found['rounds'])} rounds of {found['arguments']['steps']} steps of "
        f"{found['arguments']['batch'] * found['arguments']['context']:,} tokens by each; {found['parameters']:,} "
        f"parameters, {found['precision']}; mean losses of the rounds are "
        + ("equal to the bit." if losses == 0 else f"up to {losses:.2g} apart.")
    ]
    return head, body, below

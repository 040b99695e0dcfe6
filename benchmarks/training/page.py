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

"""Tables of docs/benchmarks.md from the results of training benchmarks."""

# ruff: noqa: RUF001 - tables have signs of their own
from __future__ import annotations

import statistics
from typing import Any

from deepseek_r1.train._flops import peak_flops

from .cases import LORA, cases
from .lora import BARS, BASE

Page = tuple[list[str], list[list[str]], list[str]]
NONE = "–"


def _times(run: dict[str, Any], base: dict[str, Any], key: str) -> str:
    return f"{run[key] / base[key]:.2f}" if base.get(key) and run.get(key) else NONE


def _gb(run: dict[str, Any]) -> str:
    return f"{run['peak_gb']:.2f}" if run.get("peak_gb") else NONE


def _notes(run: dict[str, Any]) -> str:
    return "; ".join(n for n in run.get("notes", []) if n.startswith(("compile", "cuda_graph", "memory")))


def step(found: dict[str, Any]) -> Page:
    """Rates and peaks of whole steps, beside the first of each row."""
    head = ["training", "by", "samples/s", "× first", "peak, GB", "× first", "first steps, s"]
    body, below = [], []
    rows = {name: row for name, row in found["rows"].items() if name != LORA}
    # In the order of the cases, whatever was measured first.
    for name in dict.fromkeys(name for name in [*cases(), *rows] if name in rows):
        row = rows[name]
        base = next(iter(row.values()))
        for who, run in row.items():
            if "samples_s" not in run:
                body.append([name, who, run["failed"], *[NONE] * 4])
                continue
            body.append([
                name, who, f"{run['samples_s']:,.0f}", _times(run, base, "samples_s"), _gb(run),
                _times(run, base, "peak_gb"), f"{run['warm_s']:.0f}",
            ])  # fmt: skip
        if notes := _notes(row.get("ours", {})):
            below.append(f"- {name}: {notes}.")
        if found.get("hardware", {}).get("gpus"):
            below += _shares_of_peak(name, row, found["hardware"]["gpus"][0]["name"])
    return head, body, below


def _shares_of_peak(name: str, row: dict[str, Any], gpu: str) -> list[str]:
    """Tokens a second and MFU of a case whose arithmetic is counted."""
    case, peak = cases().get(name), peak_flops(gpu, "bf16")
    if case is None or not case.flops or peak is None:
        return []
    runs = {who: run["samples_s"] for who, run in row.items() if "samples_s" in run}
    said = (f"{who} {rate * case.tokens:,.0f} ({rate * case.flops / peak:.0%})" for who, rate in runs.items())
    return [
        f"- {name}, tokens/s and share of the {peak / 1e12:.0f} TFLOP/s of the data sheet (six operations for each "
        f"parameter and token, and attention): {', '.join(said)}."
    ]


def lora(found: dict[str, Any]) -> Page:
    """Adapters beside Hugging Face with PEFT, with the bars."""
    head = ["by", "tokens/s", "× Hugging Face + PEFT", "peak, GB", "× Hugging Face + PEFT", "first steps, s"]
    row = found["rows"].get(LORA, {})
    tokens, base = cases()[LORA].tokens, row.get(BASE, {})
    body, below = [], []
    for who, run in row.items():
        name = f"{who} + PEFT" if who in (BASE, "by hand") else who
        if "samples_s" not in run:
            body.append([name, run["failed"], *[NONE] * 4])
            continue
        body.append([
            name, f"{run['samples_s'] * tokens:,.0f}", _times(run, base, "samples_s"), _gb(run),
            _times(run, base, "peak_gb"), f"{run['warm_s']:.0f}",
        ])  # fmt: skip
        if notes := _notes(run):
            below.append(f"- {who}: {notes}.")
    for who, other, key, bar, least in BARS:
        if row.get(who, {}).get(key) and row.get(other, {}).get(key):
            ratio = row[who][key] / row[other][key]
            what = {"samples_s": "tokens a second", "peak_gb": "peak"}[key]
            verdict = "kept" if (ratio >= bar if least else ratio <= bar) else "**missed**"
            word = "at least" if least else "at most"
            below.append(f"- {who}: {ratio:.2f} times the {what} of {other} (bar: {word} {bar}): {verdict}.")
    return head, body, below


def loss(found: dict[str, Any]) -> Page:
    """Losses of the defaults beside fp32."""
    head = ["run", "loss of the first tenth", "of the second half (the figure)", "accuracy, held out", "seconds"]
    body = []
    for name, run in sorted(found["runs"].items()):
        first = statistics.mean(run["losses"][: max(1, len(run["losses"]) // 10)])
        who, seed = name.split()
        body.append([
            f"{who}, seed {seed}", f"{first:.4f}", f"{run['figure']:.4f}", f"{run['accuracy']:.1%}",
            f"{run['seconds']:.0f}",
        ])  # fmt: skip
    below, said = [], found.get("verdict")
    if said:
        agrees = "within" if said["agrees"] else "**outside**"
        pairs = ", ".join(f"{pair:+.4f}" for pair in said["pairs"])
        below = [
            f"- Difference of the means, ours less fp32: {said['difference']:+.4f}, {agrees} the range of the fp32 "
            f"runs, {said['range_fp32']:.4f}; seed by seed {pairs}."
        ]
    return head, body, below


def memory(found: dict[str, Any]) -> Page:
    """Limits of memory: what was promised, what a step took, what it cost."""
    results = found["results"]
    knob = any("torch_budget" in row for result in results.values() for row in result["rows"])
    head = ["model", "share of the activations", "limit, GB", "predicted", "real peak", "time × keeping all",
            "best uniform checkpointing within the limit: time"]  # fmt: skip
    head += ["torch's activation_memory_budget: peak, time"] if knob else []
    body, below = [], []
    for name, result in results.items():
        for row in result["rows"]:
            start = [name, f"{row['share']:g}", f"{row['limit_gb']:.3f}"]
            if "refused" in row:
                body.append([*start, "refused: below the smallest possible", *[NONE] * (len(head) - 4)])
                continue
            best = NONE if row["best_uniform"] is None else f"{row['best_uniform']}: {row['best_uniform_time']:.2f}"
            theirs = row.get("torch_budget", {})
            last = [f"{theirs['peak_gb']:.3f}, {theirs['time']:.2f}" if "time" in theirs else NONE] if knob else []
            numbers = [f"{row[key]:.3f}" for key in ("predicted_gb", "real_gb")]
            body.append([*start, *numbers, f"{row['time']:.2f}", best, *last])
        done = [row for row in result["rows"] if "refused" not in row]
        kept, off = sum(row["kept"] for row in done), max((abs(row["error"]) for row in done), default=0.0)
        same = result["same_gradients"]
        below.append(
            f"- {name}: keeping everything takes {result['everything_gb']:.3f} GB, {result['alive_gb']:.3f} of them no "
            f"activations; the limit was kept in {kept} of {len(done)} plans, predictions were off by at most "
            f"{off:.2%}, gradients the same to the bit in {sum(same.values())} of {len(same)}."
        )
    return head, body, below


def packing(found: dict[str, Any]) -> Page:
    """Packing of lengths by Zipf's law."""
    head = ["exponent", "samples", "rows of 2,048", "fewest possible", "fill", "fill with 8 buckets", "fill padded",
            "planning, CPU s"]  # fmt: skip
    head[2] = f"rows of {found['planning'][0]['max_length']:,}"
    body = [
        [
            f"{row['exponent']:g}", f"{row['samples']:,}", f"{row['rows']:,}", f"{row['fewest_rows_possible']:,}",
            f"{row['fill']:.4%}", f"{row['fill_of_8_buckets']:.1%}", f"{row['fill_padded']:.1%}", f"{row['cpu_s']:.2f}",
        ]
        for row in found["planning"]
    ]  # fmt: skip
    stream, loader = found["stream"], found["loader"]
    below = [
        f"- A stream of {stream['samples']:,} samples, packed as it comes: {stream['fill']:.2%} full, "
        f"{stream['cpu_s']:.2f} CPU s.",
        f"- CPU time of a loader for a batch of tensors: torch's {loader['torch_us_per_batch']:.0f} µs, ours "
        f"{loader['plain_us_per_batch']:.0f} µs, with a seed of its own {loader['seeded_us_per_batch']:.0f} µs.",
    ]
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

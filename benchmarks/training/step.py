"""Samples a second and peak memory of training steps: Hugging Face's Trainer, a loop by hand, and ours.

    python benchmarks/training step [--only bert-32x128,plain-vit] [--contestants ours] [--rounds 3] [--out FILE]
    python benchmarks/training step --device cpu --small --rounds 1     # every line of it, in tiny shapes

All train with the same data through the same `torch.utils.data.DataLoader`, in bf16, with AdamW and the same rate; each
as its own documentation has it: Hugging Face's Trainer with `bf16=True`, the loop under `torch.autocast` with a fused
AdamW, ours with nothing but the model and the loader. They take turns; a row has medians over the rounds. Weights are
random and so are the data: this is about time and memory alone. Times are of the later steps of a run,
so what comes once (compiling, recording) is left out of the rate and told by itself. Peak memory is of the whole run.

`resnet-152` is compared with `torch.compile` of the whole model; all have the model and the batches in channels-last
form, and the batches ready in page-locked memory, as no loader here keeps up with them.

Each run is stored at its end, and later calls add to what is there: `--rounds` is how many there are to be in all, and
runs from before `--since` (a date) do not count. A contestant that fails has its error in the row.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from optimize_zoo import about

from deepseek_r1.core import atomic

from .cases import LORA, Case, cases
from .contestants import Clock

RESULT = Path(__file__).parents[1] / "results" / "training_step.json"


def measured(case: Case, contestant: str, device: torch.device) -> dict[str, Any]:
    """One run of one contestant."""
    gpu = device.type == "cuda"
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    clock = Clock(*case.steps, device)
    try:
        notes = case.contestants[contestant](case, clock)
    except Exception as e:  # what is not installed or does not fit is part of the result
        return {"failed": f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')[:300]}"}
    finally:
        # What was compiled holds memory, and must not serve the next one.
        torch._dynamo.reset()
    found = {"samples_s": case.batch * case.steps[1] / clock.seconds, "warm_s": clock.warm_s, "notes": notes}
    if gpu:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return found


def joined(before: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """A contestant's entry with one run more."""
    date = now()
    if "failed" in run:
        return (before if "samples_s" in before else {}) | run | {"date": date}
    every = {key: [*before.get(f"all_{key}", []), run[key]] for key in ("samples_s", "warm_s")}
    most = {key: max(before.get(key, 0.0), run[key]) for key in ("peak_gb", "reserved_gb") if key in run}
    medians = {key: statistics.median(values) for key, values in every.items()}
    lists = {f"all_{key}": values for key, values in every.items()}
    return {**medians, **most, **lists, "notes": run["notes"], "date": date}


def now() -> str:
    """The time in UTC, as results have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def stored(out: Path | None) -> dict[str, Any]:
    """The rows of a file; none if there is no file."""
    return json.loads(out.read_text())["rows"] if out is not None and out.is_file() else {}


def lacking(row: dict[str, Any], contestant: str, rounds: int, since: str = "") -> bool:
    """Whether a contestant has to run for so many rounds, counting entries from a date on.

    Example:
        >>> row = {"ours": {"all_samples_s": [9.5], "date": "2026-11-23"}, "by hand": {"failed": "no"}}
        >>> [lacking(row, "ours", 1), lacking(row, "ours", 2), lacking(row, "ours", 1, "2026-11-24")]
        [False, True, True]
        >>> lacking(row, "by hand", 2), lacking(row, "hugging face", 2)
        (False, True)
    """
    entry = current(row.get(contestant, {}), since)
    return "failed" not in entry and len(entry.get("all_samples_s", [])) < rounds


def current(entry: dict[str, Any], since: str) -> dict[str, Any]:
    """An entry, or nothing if it is from before a date."""
    return entry if entry.get("date", "") >= since else {}


def main(arguments: list[str], only: str = "") -> int:
    """The `step` verb; with `only` another verb's."""
    parser = argparse.ArgumentParser(prog="step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default=only)
    parser.add_argument("--contestants", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--since", default="")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes; nothing is stored without --out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    out: Path | None = options.out or (None if options.small else RESULT)
    device, rows, every = torch.device(options.device), stored(out), cases(options.small)
    for name in options.only.split(",") if options.only else [name for name in every if name != LORA]:
        case, row = every[name], rows.setdefault(name, {})
        chosen = options.contestants.split(",") if options.contestants else list(case.contestants)
        for turn in range(options.rounds):
            for contestant in chosen:
                if not lacking(row, contestant, turn + 1, options.since):
                    continue
                run = measured(case, contestant, device)
                print(name, contestant, json.dumps(run), flush=True)
                row[contestant] = joined(current(row.get(contestant, {}), options.since), run)
                # In the case's order, whatever was run first.
                rows[name] = row = {who: row[who] for who in (*case.contestants, *row) if row.get(who)}
                if out is not None:
                    atomic.write_json(out, about(str(device)) | {"rows": rows})
    return 0

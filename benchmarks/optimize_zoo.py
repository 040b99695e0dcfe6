"""What `optimize` makes of the zoo: the chosen engine against eager PyTorch and against every single engine.

    python benchmarks/optimize_zoo.py [--only resnet50,bert_base] [--rounds 120] [--seconds 25] [--device cpu] [--fresh]

For each architecture, in a process of its own: the race runs as a user's would (float32, batch 1, no cache); then every
engine that was right is timed again in one long race in which nobody leaves early, interleaved with eager in evaluation
and inference mode on all threads, and with eager again. From the long race come the ratios, the best single engine and
the regret: how much slower the chosen engine is than the fastest there. The first comparison is eager with itself.

Results are added to benchmarks/results/optimize_zoo_<device>.json entry by entry, so that a long run may be stopped and
continued; `--fresh` starts anew. `python benchmarks/tables.py` makes the tables in docs/benchmarks.md from it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.utils._pytree as pytree
from zoo import ENTRIES, Entry, entry

import deepseek_r1
from deepseek_r1.core import Budget, Report, atomic, probe
from deepseek_r1.engines import ENGINES, Executable, RaceConfig
from deepseek_r1.engines._eager import eager_runner
from deepseek_r1.engines._race import Task, race
from deepseek_r1.engines._starter import Starter
from deepseek_r1.graph import as_inputs, capture, float64_module, simplify, to_float64
from deepseek_r1.measure import paired_turns, ratio_interval, turn_of

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "onnx", "onnxscript", "onnxruntime", "openvino", "executorch", "nncf", "torchao", "transformers", "triton",
)  # fmt: skip


def plain_call(module: torch.nn.Module, args: tuple, kwargs: dict):
    """Eager as its documentation says: evaluation mode, inference mode."""
    on_gpu = any(p.device.type == "cuda" for p in module.parameters())

    def call() -> None:
        with torch.inference_mode():
            module(*args, **kwargs)
        if on_gpu:
            torch.cuda.synchronize()

    return call


def measure(one: Entry, config: RaceConfig, rounds: int, seconds: float, device: str) -> dict:
    """The row of one architecture."""
    module, inputs = one.make()
    module = module.to(device)
    inputs = pytree.tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, inputs)
    args, kwargs = as_inputs(inputs)
    start = time.perf_counter()
    program = capture(module, kwargs or args)
    captured_s = time.perf_counter() - start
    report = Report(one.name)
    wide_args, wide_kwargs = to_float64((args, kwargs))
    with torch.no_grad():
        reference = pytree.tree_leaves(float64_module(program)(*wide_args, **wide_kwargs))
    task = Task(
        probe=pytree.tree_leaves((args, kwargs)),
        reference=[v for v in reference if isinstance(v, torch.Tensor)],
        batches=[],
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        plain = Executable(program, "eager", eager_runner(program), report, module=module)
        starter = Starter(folder=Path(folder), inputs=(args, kwargs), report=report, config=config, judged=False)
        baseline = starter.plain(plain)
        names = [n for n in ENGINES.names() if n not in ("null", "eager")]
        rivals = [
            c for n in names for c in starter.candidates(n, simplify(program), own=program.precision, baseline=plain)
        ]
        start = time.perf_counter()
        winner, decided = race(baseline, rivals, task, Budget(), report, config)
        raced_s = time.perf_counter() - start
        long = _long_race(starter, rivals, plain_call(module, args, kwargs), rounds, seconds)
    row = _row(one, winner.name, long, report)
    return row | {"decided": decided, "capture_s": captured_s, "race_s": raced_s}


def _long_race(starter: Starter, rivals: list, plain, rounds: int, seconds: float) -> dict:
    # Whoever left only because others were faster takes part; whoever failed or was wrong does not.
    out = ("compiling failed", "wrong", "failed")
    fit = [c for c in rivals if not c.problem.startswith(out)]
    turns = {"eager": turn_of(plain), "eager again": turn_of(plain)}
    contenders = []
    try:
        for candidate in fit:
            contenders.append(starter.reopen(candidate))
            turns[candidate.name] = contenders[-1].turn
        return paired_turns(turns, rounds=rounds, max_seconds=seconds)
    finally:
        for contender in contenders:
            contender.close()


def _row(one: Entry, winner: str, long: dict, report: Report) -> dict:
    eager = long["eager"]
    speedups = {n: ratio_interval(eager, latency) for n, latency in long.items() if n != "eager"}
    noise = speedups.pop("eager again")
    medians = {n: latency.median_ms for n, latency in long.items() if n != "eager again"}
    chosen = winner if winner in speedups else "eager"
    # From paired rounds, so that what disturbs one disturbs both.
    best = max(["eager", *speedups], key=lambda n: speedups[n][1] if n in speedups else 1.0)
    regret = [r - 1 for r in ratio_interval(long[chosen], long[best])] if best != chosen else [0.0, 0.0, 0.0]
    return {
        "name": one.name, "shapes": one.shapes, "parameters": one.parameters,
        "eager_ms": eager.median_ms, "rounds": len(eager.seconds), "noise": noise,
        "engines": {n: {"speedup": s[1], "low": s[0], "high": s[2], "ms": medians[n]} for n, s in speedups.items()},
        "chosen": winner, "speedup": speedups[chosen][1] if chosen in speedups else 1.0,
        "low": speedups[chosen][0] if chosen in speedups else 1.0,
        "high": speedups[chosen][2] if chosen in speedups else 1.0, "best": best,
        "regret": regret[1], "regret_low": regret[0], "regret_high": regret[2],
        "skipped": dict(report.skipped), "notes": list(report.notes), "load": os.getloadavg()[0],
    }  # fmt: skip


def about(device: str) -> dict:
    """What was measured with."""
    versions = {"python": platform.python_version(), "deepseek-r1": deepseek_r1.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "hardware": probe().to_dict(), "versions": versions, "threads": torch.get_num_threads(), "device": device,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one architecture")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    if options.one:
        config = RaceConfig(cache=False, timeout_s=300)
        row = measure(entry(options.one), config, options.rounds, options.seconds, options.device)
        print("\n@@row " + json.dumps(row))
        return
    target = options.out or RESULTS / f"optimize_zoo_{options.device}.json"
    names = options.only.split(",") if options.only else [one.name for one in ENTRIES]
    rows = (
        {} if options.fresh or not target.is_file() else {r["name"]: r for r in json.loads(target.read_text())["rows"]}
    )
    for name in names:
        command = [sys.executable, __file__, "--one", name, "--device", options.device]
        command += ["--rounds", str(options.rounds), "--seconds", str(options.seconds)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, check=False)
            text = done.stdout.rpartition("@@row ")[2]
            row = json.loads(text) if done.returncode == 0 else {"name": name, "failed": done.stderr.strip()[-600:]}
        except subprocess.TimeoutExpired:
            row = {"name": name, "failed": f"took longer than {options.timeout:g} s"}
        rows[name] = row
        print(
            name, row.get("failed") or f"{row['chosen']} {row['speedup']:.2f}x, regret {row['regret']:.1%}", flush=True
        )
        target.parent.mkdir(exist_ok=True)
        atomic.write_json(target, about(options.device) | {"rows": list(rows.values())})


if __name__ == "__main__":
    main()

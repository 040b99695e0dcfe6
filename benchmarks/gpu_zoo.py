"""What `optimize` makes of eight networks of the zoo on one GPU, in float16 at batch 1.

    python benchmarks/gpu_zoo.py [--only resnet50,unet] [--rounds 60]

Baseline: the module in float16, evaluation and inference mode. Peers: torch.compile(mode="reduce-overhead"), as its
documentation says. All are timed in turns, wall time up to the device's end; eager runs again as the first comparison.
Peak memory is what torch's allocator held at most while each ran alone. Each network in a process of its own; writes
benchmarks/results/gpu_zoo.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.utils._pytree as pytree
from optimize_zoo import about, plain_call
from zoo import entry

from deepseek_r1.core import atomic
from deepseek_r1.engines import RaceConfig, optimize
from deepseek_r1.graph import as_inputs
from deepseek_r1.measure import paired_latency, ratio_interval

RESULT = Path(__file__).parent / "results" / "gpu_zoo.json"
NAMES = ("resnet50", "mobilenet_v2", "densenet121", "unet", "mixer_s16", "vit_b16", "bert_base", "gpt2_prefill")


def peak_mb(call) -> float:
    """Most that torch's allocator held while `call` ran, in MB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e6


def measure(name: str, rounds: int) -> dict:
    """The row of one network."""
    module, inputs = entry(name).make()
    module = module.half().cuda()
    move = lambda v: v.cuda().half() if v.is_floating_point() else v.cuda()  # noqa: E731
    inputs = pytree.tree_map(lambda v: move(v) if isinstance(v, torch.Tensor) else v, inputs)
    args, kwargs = as_inputs(inputs)
    race = RaceConfig(cache=False, rounds=30)
    fast = optimize(module, example_inputs=inputs, engines=["inductor", "cudagraph", "tensorrt"], race=race)
    compiled = torch.compile(module, mode="reduce-overhead")
    eager = plain_call(module, args, kwargs)

    def ours() -> None:
        fast(*args, **kwargs)
        torch.cuda.synchronize()

    calls = {
        "eager": eager,
        "eager again": eager,
        "optimize": ours,
        "reduce-overhead": plain_call(compiled, args, kwargs),
    }
    for call in calls.values():
        for _ in range(5):
            call()
    times = paired_latency(calls, rounds=rounds)
    ratio = lambda a, b: ratio_interval(times[a], times[b])  # noqa: E731
    return {
        "name": name, "shapes": entry(name).shapes, "chosen": f"{fast.engine} {fast.precision}",
        "ms": {n: t.median_ms for n, t in times.items()}, "noise": ratio("eager", "eager again"),
        "speedup": ratio("eager", "optimize"), "against reduce-overhead": ratio("reduce-overhead", "optimize"),
        "peak_mb": {n: peak_mb(call) for n, call in calls.items() if n != "eager again"},
        "skipped": dict(fast.report.skipped), "notes": list(fast.report.notes),
        "race": {r.metric: [r.before, r.after, r.how] for r in fast.report.rows},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.one:
        print("\n@@row " + json.dumps(measure(options.one, options.rounds)))
        return
    rows = []
    for name in options.only.split(",") if options.only else NAMES:
        command = [sys.executable, __file__, "--one", name, "--rounds", str(options.rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        text = done.stdout.rpartition("@@row ")[2]
        row = json.loads(text) if done.returncode == 0 else {"name": name, "failed": done.stderr.strip()[-1500:]}
        rows.append(row)
        print(name, row.get("failed") or {k: row[k] for k in ("chosen", "ms", "speedup")}, flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(options.out, about("cuda") | {"rows": rows})


if __name__ == "__main__":
    main()

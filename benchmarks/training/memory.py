"""Training under a limit of memory: is the promise kept, and what does it cost?

    python benchmarks/training memory [--device cuda] [--only llama] [--shares 1,0.5,0.35] [--out FILE]

For the Llama shape with 1.24 billion parameters (on a CPU one of width 512 with 6 layers, and a GPT with
dropout) and ResNet-152 (on a CPU ResNet-50), a row for each limit, given as a share of the activations of a step that
keeps everything: the limit, the predicted and the real peak, the time of a step (forward, backward, update) relative
to keeping everything, whether the gradients are the same to the bit, and the same of its rivals: the fastest of
checkpointing every block, every second, every third... whose real peak is not above ours, and torch's own
`activation_memory_budget` on the compiled model at the same share, which promises no peak. Real peaks are the
allocator's own (`torch.cuda.max_memory_allocated`; on a CPU all its allocations are recorded). Ways take turns; times
are the fastest of the rounds. Weights and data are random.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from optimize_zoo import about
from torch import Tensor, nn

from deepseek_r1.core import ConfigError, atomic
from deepseek_r1.train import MemoryPlanner, Objective, checkpoint_every
from deepseek_r1.train.memory import measured_peak

from .cases import llama
from .modules import GPT, ResNet
from .step import now

RESULTS = Path(__file__).parents[1] / "results"
WIDTHS = (6, 8, 9, 8, 6, 16, 18)
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35)


def result(device: torch.device) -> Path:
    """The file of a device's results."""
    return RESULTS / ("training_memory.json" if device.type == "cpu" else "training_memory_cuda.json")


def cases(device: torch.device) -> dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]]:
    """Name -> (model, batch, precision)."""
    if device.type == "cuda":
        return {
            "llama": (partial(llama, False, False), partial(_tokens, 128_256, 4, 4096), "bf16"),
            "resnet152": (
                lambda: ResNet((3, 8, 36, 3), 64),
                lambda: (torch.randn(128, 3, 224, 224), torch.randint(0, 1000, (128,))), "bf16",
            ),
        }  # fmt: skip
    return {
        "narrow-llama": (_narrow_llama, partial(_tokens, 2048, 2, 256), "fp32"),
        "gpt-with-dropout": (
            lambda: GPT(512, 256, 8, 4, 128),
            lambda: (torch.randint(0, 512, (8, 128)), torch.randint(0, 512, (8, 128))), "fp32",
        ),
        "resnet50": (
            lambda: ResNet((3, 4, 6, 3), 64, 10),
            lambda: (torch.randn(8, 3, 96, 96), torch.randint(0, 10, (8,))), "fp32",
        ),
    }  # fmt: skip


def _tokens(words: int, batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(0, words, (batch, length))
    return {"input_ids": ids, "labels": ids}


def _narrow_llama() -> nn.Module:
    from deepseek_r1.models import Llama, LlamaConfig

    return Llama(
        LlamaConfig(
            vocab_size=2048, hidden_size=512, intermediate_size=2048, num_hidden_layers=6,
            num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=256,
        )
    )  # fmt: skip


class Bench:
    """One model: its plain step, and what is measured of a step in any form."""

    def __init__(self, case: tuple[Callable[[], nn.Module], Callable[[], Any], str], device: torch.device) -> None:
        make, batch, self.precision = case
        torch.manual_seed(0)
        self.device = device
        self.model = make().to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.planner = MemoryPlanner(
            self.model,
            batch(),
            Objective(self.model),
            device=device,
            precision=self.precision,
            optimizer=self.optimizer,
        )
        self.work = self.planner.workload

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.work.run()
        self.optimizer.step()

    def peak(self) -> int:
        """Of two steps, the first one included."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        return measured_peak(lambda: (self.step(), self.step()), self.device, self.work.alive())

    def seconds(self) -> float:
        self._wait()
        began = time.perf_counter()
        self.step()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def gradients(self) -> list[Tensor]:
        """On deterministic kernels, from one seed."""
        torch.manual_seed(1)
        self.optimizer.zero_grad(set_to_none=True)
        self.work.run()
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


def fastest(
    bench: Bench, ways: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]], rounds: int
) -> dict[str, float]:
    """The fastest step of each way; ways take turns."""
    found = dict.fromkeys(ways, math.inf)
    for _ in range(rounds):
        for name, way in ways.items():
            with way():
                bench.seconds()
                found[name] = min(found[name], *(bench.seconds() for _ in range(3)))
    return found


def torch_knob(bench: Bench, share: float) -> dict[str, Any]:
    """torch's own knob: a share of what would be saved, on the compiled model."""
    import torch._functorch.config as functorch_config

    torch._dynamo.reset()
    work, plain = bench.work, bench.work.model
    try:
        with functorch_config.patch(activation_memory_budget=share):
            work.model = torch.compile(plain)  # type: ignore[assignment]
            bench.step()
            bench.step()
            return {"peak_gb": bench.peak() / 1e9, "seconds": min(bench.seconds() for _ in range(4))}
    except Exception as e:
        return {"failed": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}
    finally:
        work.model = plain


def measured(name: str, bench: Bench, shares: list[float], rounds: int, knob: bool) -> dict[str, Any]:
    """All rows of one model."""
    planner = bench.planner
    bench.step()
    everything = bench.peak()
    alive = planner.alive_bytes
    uniform: dict[int, int] = {}
    for interval in (1, 2, 3, 4, 6, 8, 12):
        with checkpoint_every(bench.model, interval):
            uniform[interval] = bench.peak()
    rows = []
    for share in shares:
        limit = alive + share * (everything - alive)
        began = time.perf_counter()
        try:
            plan = planner.plan(limit / 1e9)
        except ConfigError as e:
            rows.append({"share": share, "limit_gb": limit / 1e9, "refused": str(e)})
            print(name, rows[-1], flush=True)
            continue
        took = time.perf_counter() - began
        ways: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
            "keep": contextlib.nullcontext, "plan": lambda plan=plan: plan.applied(bench.model),
        }  # fmt: skip
        fit = [interval for interval, peak in uniform.items() if peak <= limit]
        ways |= {f"every {k}": lambda k=k: checkpoint_every(bench.model, k) for k in fit}
        with plan.applied(bench.model):
            real = bench.peak()
        times = fastest(bench, ways, rounds)
        rivals = {key: value for key, value in times.items() if key.startswith("every")}
        best = min(rivals, key=rivals.__getitem__, default=None)
        if everything <= limit and (best is None or times["keep"] < rivals[best]):
            best, rivals["keep"] = "keep", times["keep"]
        rows.append({
            "share": share, "limit_gb": limit / 1e9, "predicted_gb": plan.predicted_peak_bytes / 1e9,
            "real_gb": real / 1e9, "kept": real <= limit, "error": plan.predicted_peak_bytes / real - 1,
            "plan_seconds": took,
            "time": times["plan"] / times["keep"], "predicted_time": 1 + plan.extra_seconds / times["keep"],
            "best_uniform": best, "best_uniform_time": None if best is None else rivals[best] / times["keep"],
            "what": plan.report.notes[0],
        })  # fmt: skip
        if knob:
            found = torch_knob(bench, share)
            rows[-1]["torch_budget"] = (
                {**found, "time": found["seconds"] / times["keep"]} if "seconds" in found else found
            )
        print(name, json.dumps(rows[-1]), flush=True)
    return {"alive_gb": alive / 1e9, "everything_gb": everything / 1e9, "rows": rows}


def same_gradients(bench: Bench, shares: list[float]) -> dict[str, bool]:
    """Whether gradients under plans are those of the plain model, to the bit, on deterministic kernels."""
    planner, found = bench.planner, {}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        plain = bench.gradients()
        for share in shares:
            limit = planner.alive_bytes + share * (planner.unconstrained_bytes - planner.alive_bytes)
            if limit >= planner.minimum_bytes:
                with planner.plan(limit / 1e9).applied(bench.model):
                    mine = bench.gradients()
                found[f"{share:g}"] = all(torch.equal(a, b) for a, b in zip(plain, mine, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    return found


def table(results: dict[str, Any]) -> str:
    """The rows for people."""
    lines = []
    for name, result in results.items():
        most, alive = result["everything_gb"], result["alive_gb"]
        lines.append(f"\n{name}: keeping everything takes {most:.3f} GB, {alive:.3f} of them no activations")
        head = ("share", "limit", "predicted", "real", "time", "best uniform", "torch: peak, time")
        lines.append(" ".join(f"{word:>{width}}" for word, width in zip(head, WIDTHS, strict=True)))
        for row in result["rows"]:
            if "refused" in row:
                lines.append(f"{row['share']:>6} {row['limit_gb']:>8.3f} refused: below the minimum")
                continue
            best = "-" if row["best_uniform"] is None else f"{row['best_uniform']} {row['best_uniform_time']:.3f}"
            knob = row.get("torch_budget", {})
            theirs = f"{knob['peak_gb']:.3f}, {knob['time']:.3f}" if "time" in knob else "-"
            numbers = [row[key] for key in ("limit_gb", "predicted_gb", "real_gb", "time")]
            cells = (row["share"], *(f"{number:.3f}" for number in numbers), best, theirs)
            lines.append(" ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run the benchmark; gives the exit code, 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python benchmarks/training memory", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="")
    parser.add_argument("--shares", default=",".join(str(s) for s in SHARES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--torch-knob", action="store_true", help="also torch's activation_memory_budget (compiles)")
    parser.add_argument("--since", default="", help="a date: what is stored from before it is forgotten")
    parser.add_argument("--out", type=Path, help="default: a file for CPUs and one for GPUs in benchmarks/results")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    shares = [float(s) for s in options.shares.split(",")]
    out = options.out or result(device)
    results: dict[str, Any] = json.loads(out.read_text())["results"] if out.is_file() else {}
    results = {name: found for name, found in results.items() if found.get("date", "") >= options.since}
    for name, case in cases(device).items():
        if options.only and name not in options.only.split(","):
            continue
        began = time.perf_counter()
        bench = Bench(case, device)
        profiled = time.perf_counter() - began
        results[name] = measured(name, bench, shares, options.rounds, options.torch_knob)
        results[name] |= {"profile_seconds": profiled, "same_gradients": same_gradients(bench, shares), "date": now()}
        atomic.write_json(out, {"about": about(str(device)), "results": results})
        del bench
        gc.collect()
    print(table(results))
    rows = [row for result in results.values() for row in result["rows"] if "refused" not in row]
    return int(not all(row["kept"] for row in rows))

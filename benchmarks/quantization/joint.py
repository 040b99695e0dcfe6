"""Channels and bits chosen together, against bits alone and against pruning first, under the same budgets.

    python benchmarks/quantization joint [--sizes 0.14,0.1] [--latencies 0.5,0.35] [--epochs 2]

The network is the small ViT that `train vit_glyphs` leaves. Sizes are shares of its float weights, latencies of its
float latency on one picture in ONNX Runtime. For each budget:

- alone: `AutoQuantizer.quantize(budget)`;
- pruned first: `R1Pruner` to each of `SPARSITIES`, recovered for as many epochs, then `AutoQuantizer` on what is left;
  the best of those that keep the budget, by accuracy on the verification data;
- together: `Compressor.compress(budget)`, candidates recovered for as many epochs.

All are judged on letters in fonts that took no part, and timed in turns. Results go to benchmarks/results/joint.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from optimize_zoo import about
from torch import nn

from deepseek_r1 import Budget, seed_everything
from deepseek_r1.compression import CompressionConfig, Compressor
from deepseek_r1.core import CheckFailedError, atomic
from deepseek_r1.engines import ENGINES, compile_program
from deepseek_r1.graph import Program, capture, simplify
from deepseek_r1.measure import paired_latency, ratio_interval
from deepseek_r1.pruning import PruneConfig, R1Pruner
from deepseek_r1.quantization import AutoConfig, AutoQuantizer

from . import corpora, nets
from .intervals import mean_difference
from .search import ENGINE, FORMATS

NET = "vit_glyphs"
RESULT = Path(__file__).parents[1] / "results" / "joint.json"
SPARSITIES = (0.3, 0.5)
LR = 5e-4
TRAINED, BATCH = 8_000, 64


class Bench:
    """The network, its data, and what is measured of programs."""

    def __init__(self, epochs: int) -> None:
        seed_everything(0)
        self.epochs = epochs
        self.net = nets.net(NET)
        self.model: nn.Module = self.net.build().requires_grad_(True)
        x, y = corpora.glyphs(TRAINED, "train", seed=5)
        self.train = nets.batched(x, y, BATCH)
        # Letters in the fonts of training, none of which calibrated: they verify.
        u, v = corpora.glyphs(1024, "train", seed=6)
        self.data = [*self.net.calibration, *nets.batched(u, v, 64)]
        self.example = nets.leaves(self.net.one)
        self.config = AutoConfig(
            engine=ENGINE, formats=FORMATS, calibration_batches=len(self.net.calibration), cache=tempfile.mkdtemp()
        )

    def quantizer(self, model: nn.Module) -> AutoQuantizer:
        """The search for formats of a module."""
        return AutoQuantizer(model, dataset=self.data, example_inputs=self.example, config=self.config)

    def pruned_first(self, budget: Budget, cuts: Mapping[float, nn.Module]) -> Program | None:
        """The best of what pruning first and formats afterwards give."""
        found: list[tuple[float, Program]] = []
        for model in cuts.values():
            try:
                program = self.quantizer(model).quantize(budget=budget)
            except CheckFailedError:
                continue
            hits = [(program(x).argmax(1) == y).float() for x, y in self.data[len(self.net.calibration) :]]
            found.append((float(torch.cat(hits).mean()), program))
        return max(found, key=lambda f: f[0])[1] if found else None

    def cut(self, sparsity: float) -> nn.Module:
        """Pruned to a sparsity, and recovered."""
        seed_everything(0)
        pruner = R1Pruner(
            copy.deepcopy(self.model), sparsity, dataset=self.net.calibration, config=PruneConfig(timing_rounds=0)
        )
        return pruner.compress(self.train, epochs=self.epochs, lr=LR).eval()

    def judged(self, programs: Mapping[str, Program]) -> dict[str, dict[str, Any]]:
        """Accuracy, divergence, bytes and latency of programs."""
        runners = {name: compile_program(ENGINES.get(ENGINE)(), p, p.precision) for name, p in programs.items()}
        times = paired_latency({n: _call(r, self.example) for n, r in runners.items()}, rounds=30, max_seconds=15)
        rows, losses = {}, {}
        for name, program in programs.items():
            with torch.no_grad():
                found = nets.judge(NET, nets.answers(_answer(runners[name]), self.net.held_out))
            losses[name] = found["losses"]
            rows[name] = {
                "accuracy": found["metric"], "loss": found["loss"], "divergence": found["divergence"],
                "bytes": program.parameters_bytes, "ms": times[name].median_ms,
                "of float": ratio_interval(times[name], times["float"]), "formats": _formats(program),
            }  # fmt: skip
        for name in rows:
            if "together" in rows:
                rows[name]["loss of together less this"] = mean_difference(losses["together"], losses[name])
        return rows


def _call(runner: Any, leaves: Any) -> Any:
    return lambda: runner(leaves)


def _answer(runner: Any) -> Any:
    return lambda parts: runner(parts)[0]


def _formats(program: Program) -> dict[str, int]:
    sections = [program.report, *program.report.sections]
    return {
        r.metric.removeprefix("layers in "): r.after
        for s in sections for r in s.rows if r.metric.startswith("layers in ")
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """The `joint` verb."""
    parser = argparse.ArgumentParser(prog="joint", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", default="0.14,0.1")
    parser.add_argument("--latencies", default="0.5,0.35")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    bench = Bench(options.epochs)
    plain = simplify(capture(bench.model, bench.example))
    float_ms = bench.quantizer(bench.model).uniform()[0].costs["ms"]
    cuts = {sparsity: bench.cut(sparsity) for sparsity in SPARSITIES}
    compressor = Compressor(
        bench.model, dataset=bench.data, example_inputs=bench.example, config=CompressionConfig(formats=bench.config)
    )
    budgets = {f"size {s}": Budget(size_mb=float(s) * plain.parameters_bytes / 1e6) for s in options.sizes.split(",")}
    budgets |= {f"latency {s}": Budget(latency_ms=float(s) * float_ms) for s in options.latencies.split(",")}
    results: dict[str, Any] = {}
    for name, budget in budgets.items():
        start, programs, failed = time.perf_counter(), {"float": plain}, {}
        makers = {
            "alone": lambda budget=budget: bench.quantizer(bench.model).quantize(budget=budget),
            "pruned first": lambda budget=budget: bench.pruned_first(budget, cuts),
            "together": lambda budget=budget: compressor.compress(budget, bench.train, epochs=bench.epochs, lr=LR),
        }
        for rival, make in makers.items():
            try:
                made = make()
            except CheckFailedError as e:
                made, failed[rival] = None, str(e)[:200]
            if made is not None:
                programs[rival] = made
        results[name] = {"rows": bench.judged(programs), "failed": failed, "seconds": time.perf_counter() - start}
        if "together" in programs:
            results[name]["notes"] = list(programs["together"].report.notes)
        print(name, json.dumps(results[name], default=str), flush=True)
        atomic.write_json(
            options.out,
            about("cpu") | {"network": NET, "epochs": bench.epochs, "float_ms": float_ms, "results": results},
        )
    return 0

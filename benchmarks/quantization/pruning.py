"""A network with 30 % of its parameters pruned away, against the equally small dense one and against Torch-Pruning.

    python benchmarks/quantization pruning [--seeds 0,1,2] [--sparsity 0.3,0.6] [--minutes 3] [--work DIR]

The network is a residual one with 0.68 M parameters on printed characters in fonts it never saw (glyphs.py): there is
no download here, and scikit-learn's digits are so easy that a tenth of the network does as well. For each seed:

- base: trained for `EPOCHS` epochs;
- ours: `R1Pruner(sparsity).compress(train, epochs=RECOVERY)` with its defaults;
- torch-pruning: the package's own loop (global Taylor importance over groups, `iterative_steps`, channels at multiples
  of 8 as its documentation advises), until as many parameters are gone; then the same recovery as ours: distillation,
  the same epochs and learning rate, batch statistics estimated anew;
- dense: the same architecture, narrower by one factor, with as many parameters as ours is left with, trained from
  scratch for as long as base and recovery together; with --taught also with the float model's answers, as the recovery.

With --int8 the three are trained in 8 bits as well, for `QAT` epochs more: ours and the dense one by `R1Quantizer`,
Torch-Pruning's by torchao (PT2E, as its tutorial has it, the better of two learning rates).

Every stage is kept in --work, so that the run can be stopped and goes on; results go to
benchmarks/results/pruning.json. Latency is eager, in turns, batches of 1 and 64.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import importlib.metadata
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F

from deepseek_r1 import Trainer, TrainingConfig, seed_everything
from deepseek_r1.core import atomic, probe
from deepseek_r1.engines import to_onnx
from deepseek_r1.graph import Program, capture, simplify
from deepseek_r1.measure import paired_latency, ratio_interval
from deepseek_r1.pruning import PruneConfig, R1Pruner, load_pruned, save_pruned
from deepseek_r1.pruning._recover import recover_, reestimate_
from deepseek_r1.quantization import R1Quantizer

from .glyphs import CLASSES, SIDE, loaders

RESULT = Path(__file__).parents[1] / "results" / "pruning.json"
WIDTH, EPOCHS, RECOVERY, QAT = 32, 8, 4, 3
TRAIN, TEST = 8_000, 4_000
LR, RECOVERY_LR = 3e-3, 1.5e-3
#: The share of the accuracy that must be kept.
BAR = 0.987
#: Largest share of the float file that the int8 file may have.
SIZE_BAR = 0.22
#: Networks that are compared, in the order in which they are made.
RIVALS = ("ours", "torch-pruning", "dense")
COLUMNS = ("accuracy", "loss", "parameters", "file_bytes", "float_bytes")
#: Learning rates of training in int8 by torchao; ours has its default.
TORCHAO_LRS = (1e-4, 5e-4)


class Block(nn.Module):
    """Residual block after He et al. 2015."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.norm2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        same = cin == cout and stride == 1
        self.skip = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


def network(width: float = WIDTH) -> nn.Module:
    """A residual network for pictures of 16 by 16; 0.68 M parameters at a width of 32."""
    a, b, c = (round(width * k) for k in (1, 2, 4))
    return nn.Sequential(
        nn.Conv2d(1, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU(), Block(a, a, 1), Block(a, b, 2),
        Block(b, b, 1), Block(b, c, 2), Block(c, c, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(c, len(CLASSES)),
    )  # fmt: skip


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in model.parameters())


def narrower(parameters: int) -> float:
    """The width at which the dense network has at most as many parameters, and nearly as many."""
    return next(w / 100 for w in range(100 * WIDTH, 0, -1) if count(network(w / 100)) <= parameters)


def judged(model: nn.Module, test: Any) -> dict[str, float]:
    """Accuracy and cross entropy on the held-out fonts."""
    hits, loss, total = 0, 0.0, 0
    model.eval()
    with torch.no_grad():
        for x, y in test:
            out = model(x)
            hits, total = hits + int((out.argmax(1) == y).sum()), total + len(y)
            loss += float(F.cross_entropy(out, y, reduction="sum"))
    return {"accuracy": hits / total, "loss": loss / total}


def trained(model: nn.Module, train: Any, epochs: int, seed: int) -> nn.Module:
    """Trained from scratch: AdamW, a cosine schedule with a warm-up."""
    config = TrainingConfig(schedule="cosine", warmup=0.1, weight_decay=1e-2, seed=seed, clip_grad_norm=5.0)
    Trainer(model, train, lr=LR, config=config).train(epochs)
    return model


def by_torch_pruning(model: nn.Module, train: Any, limit: int) -> nn.Module:
    """What Torch-Pruning leaves, driven as its documentation has it, before recovery."""
    import torch_pruning as tp

    batches = iter(train)
    importance = tp.importance.GroupTaylorImportance()
    pruner = tp.pruner.BasePruner(
        model, torch.randn(1, 1, SIDE, SIDE), importance=importance, pruning_ratio=0.9, iterative_steps=90, round_to=8,
        global_pruning=True, ignored_layers=[model[-1]],
    )  # fmt: skip
    model.eval()
    for _ in range(90):
        if count(model) <= limit:
            break
        model.zero_grad()
        # As many samples as ours looks at.
        for _ in range(2):
            x, y = next(batches)
            F.cross_entropy(model(x), y).backward()
        pruner.step()
        if count(model) > limit:
            batches = iter(train)
    model.zero_grad()
    return model


class Bench:
    """The stages of one seed, each kept on disk."""

    def __init__(self, work: Path, seed: int) -> None:
        self.folder, self.seed = work / str(seed), seed
        self.folder.mkdir(parents=True, exist_ok=True)
        self.train, self.test = loaders(TRAIN, TEST, seed)

    def kept(self, name: str) -> dict[str, Any] | None:
        """What a stage measured, if it was done."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def done(self, name: str, model: nn.Module, seconds: float, **more: Any) -> None:
        """Keep a stage."""
        row = {**judged(model, self.test), "parameters": count(model), "seconds": seconds, **more}
        atomic.write_json(self.folder / f"{name}.json", row)
        print(f"seed {self.seed} {name}: {row}", flush=True)

    def base(self) -> nn.Module:
        """The float network, trained or from disk."""
        path = self.folder / "base.safetensors"
        model = network()
        if path.is_file():
            model.load_state_dict(load_file(path))
            return model
        seed_everything(self.seed)
        start = time.perf_counter()
        trained(model := network(), self.train, EPOCHS, self.seed)
        save_file(model.state_dict(), path)
        self.done("base", model, time.perf_counter() - start)
        return model

    def ours(self, sparsity: float) -> None:
        """Pruned and recovered by this package."""
        base, start = self.base(), time.perf_counter()
        config = PruneConfig(seed=self.seed, timing_rounds=0)
        pruner = R1Pruner(base, sparsity, config=config)
        small = pruner.compress(self.train, epochs=RECOVERY, lr=RECOVERY_LR)
        save_pruned(small, self.folder / f"ours-{sparsity:g}.safetensors")
        channels = {r.metric: [r.before, r.after] for r in small.pruning.rows if r.metric.startswith("channels")}
        self.done(f"ours-{sparsity:g}", small, time.perf_counter() - start, channels=channels)

    def torch_pruning(self, sparsity: float) -> None:
        """Pruned by Torch-Pruning, recovered as ours."""
        base, start = self.base(), time.perf_counter()
        limit = int((1 - sparsity) * count(base))
        small = by_torch_pruning(self.base(), self.train, limit)
        config = PruneConfig(seed=self.seed)
        reestimate_(small, self.train, config.batch_norm_batches)
        recover_(small, base, self.train, epochs=RECOVERY, lr=RECOVERY_LR, config=config)
        reestimate_(small, self.train, config.batch_norm_batches)
        torch.save(small, self.folder / f"torch-pruning-{sparsity:g}.pt")
        channels = {n: m.out_channels for n, m in small.named_modules() if isinstance(m, nn.Conv2d)}
        self.done(f"torch-pruning-{sparsity:g}", small, time.perf_counter() - start, channels=channels)

    def dense(self, sparsity: float, *, taught: bool) -> None:
        """As small as ours, from scratch for as long as base and recovery together."""
        ours = self.kept(f"ours-{sparsity:g}")
        assert ours is not None, "ours comes first: it says how small"
        width, start = narrower(ours["parameters"]), time.perf_counter()
        seed_everything(self.seed)
        model = network(width)
        if taught:
            settings = TrainingConfig(
                schedule="cosine", warmup=0.1, weight_decay=1e-2, seed=self.seed, clip_grad_norm=5.0
            )
            config = PruneConfig(seed=self.seed, training=settings)
            recover_(model, self.base(), self.train, epochs=EPOCHS + RECOVERY, lr=LR, config=config)
        else:
            trained(model, self.train, EPOCHS + RECOVERY, self.seed)
        name = f"dense{'-taught' if taught else ''}-{sparsity:g}"
        save_file(model.state_dict(), self.folder / f"{name}.safetensors")
        self.done(name, model, time.perf_counter() - start, width=width)

    def module(self, name: str, sparsity: float) -> nn.Module:
        """The float module that a stage left: "ours", "torch-pruning" or "dense"."""
        path = self.folder / f"{name}-{sparsity:g}.safetensors"
        if name == "ours":
            return load_pruned(network(), path)
        if name == "torch-pruning":
            # Written by this script a moment ago; the package keeps whole modules only.
            model: nn.Module = torch.load(path.with_suffix(".pt"), weights_only=False)
            return model
        kept = self.kept(f"{name}-{sparsity:g}")
        assert kept is not None, "it comes first"
        model = network(kept["width"])
        model.load_state_dict(load_file(path))
        return model

    def int8(self, name: str, sparsity: float) -> None:
        """Trained in int8: by torchao what Torch-Pruning left, by this package the others."""
        start, model = time.perf_counter(), self.module(name, sparsity)
        more: dict[str, Any]
        if name == "torch-pruning":
            trials = {lr: by_torchao(copy.deepcopy(model), self.train, lr, self.seed) for lr in TORCHAO_LRS}
            found = {lr: judged(one, self.test) for lr, one in trials.items()}
            best = max(found, key=lambda lr: found[lr]["accuracy"])
            more = {"lr": best, "file_bytes": stored_bytes(trials[best])}
            row = found[best]
        else:
            seed_everything(self.seed)
            settings = TrainingConfig(schedule="cosine", save_every_epochs=None, seed=self.seed)
            program = R1Quantizer(model, bits=8).fit(self.train, epochs=QAT, training=settings)
            row = judged(plain(program.module()), self.test)
            more = {
                "file_bytes": file_bytes(program),
                "float_bytes": file_bytes(simplify(capture(self.base(), self.one()))),
            }
        row = {**row, "parameters": count(model), "seconds": time.perf_counter() - start, **more}
        atomic.write_json(self.folder / f"{name}-int8-{sparsity:g}.json", row)
        print(f"seed {self.seed} {name} int8: {row}", flush=True)

    def one(self) -> torch.Tensor:
        """Inputs to capture with."""
        return next(iter(self.test))[0]

    def stages(self, sparsity: float) -> dict[str, Callable[[], Any]]:
        """Every stage by name, in order."""
        return {
            "base": self.base,
            f"ours-{sparsity:g}": lambda: self.ours(sparsity),
            f"torch-pruning-{sparsity:g}": lambda: self.torch_pruning(sparsity),
            f"dense-{sparsity:g}": lambda: self.dense(sparsity, taught=False),
            f"dense-taught-{sparsity:g}": lambda: self.dense(sparsity, taught=True),
            **{f"{n}-int8-{sparsity:g}": functools.partial(self.int8, n, sparsity) for n in RIVALS},
        }

    def latency(self, sparsity: float, batch: int) -> dict[str, Any]:
        """Eager, in turns: base twice, ours, Torch-Pruning's and the dense network."""
        x = torch.randn(batch, 1, SIDE, SIDE)
        models = {"base": self.base(), "base again": self.base()}
        models |= {name: self.module(name, sparsity) for name in RIVALS}
        rivals = {name: _call(m.eval(), x) for name, m in models.items()}
        with torch.no_grad():
            times = paired_latency(rivals, rounds=30, max_seconds=25)
        ratios = {name: ratio_interval(times["base"], times[name]) for name in times}
        return {name: {"ms": times[name].median_ms, "times as fast as base": ratios[name]} for name in times}


def by_torchao(model: nn.Module, train: Any, lr: float, seed: int) -> nn.Module:
    """Trained in int8 by torchao, driven as its tutorial on quantisation-aware training in PT2E has it."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import (
        disable_observer,
        move_exported_model_to_eval,
        move_exported_model_to_train,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

    seed_everything(seed)
    example, batch = next(iter(train))[0], torch.export.Dim("batch", min=2, max=1024)
    exported = torch.export.export(model.train(), (example,), dynamic_shapes=({0: batch},)).module()
    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    prepared = prepare_qat_pt2e(exported, x86.X86InductorQuantizer().set_global(config))
    optimizer = torch.optim.AdamW(prepared.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, QAT * len(train))
    move_exported_model_to_train(prepared)
    for epoch in range(QAT):
        if epoch == QAT - 1:
            prepared.apply(disable_observer)
        for x, y in train:
            optimizer.zero_grad()
            F.cross_entropy(prepared(x), y).backward()
            optimizer.step()
            schedule.step()
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    return plain(converted)


def plain(module: Any) -> nn.Module:
    """An exported graph as a module that does not refuse eval()."""
    return GraphModule(module, module.graph)


def stored_bytes(model: nn.Module) -> int:
    """All tensors of a module."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def file_bytes(program: Program) -> int:
    """Of the program's ONNX file, batch norms folded."""
    return len(to_onnx(program).SerializeToString())


def _call(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(x)


def summary(work: Path, seeds: list[int], sparsities: list[float]) -> dict[str, Any]:
    """Means over the seeds that are done, and what the bars ask."""
    found: dict[str, Any] = {}
    for sparsity in sparsities:
        rows: dict[str, list[dict[str, Any]]] = {}
        for seed in seeds:
            parts = {n: work / str(seed) / f"{n}.json" for n in _names(sparsity, taught=True, int8=True)}
            if all(parts[n].is_file() for n in _names(sparsity)):
                for name, path in parts.items():
                    if not path.is_file():
                        continue
                    rows.setdefault(name.removesuffix(f"-{sparsity:g}"), []).append(json.loads(path.read_text()))
        if not rows:
            continue
        means = {n: {k: sum(r[k] for r in rs) / len(rs) for k in COLUMNS if k in rs[0]} for n, rs in rows.items()}
        kept = means["ours"]["accuracy"] / means["base"]["accuracy"]
        errors = {
            n: _error([o["accuracy"] - r["accuracy"] for o, r in zip(rows["ours"], rs)]) for n, rs in rows.items()
        }
        found[f"{sparsity:g}"] = {
            "seeds": len(rows["ours"]), "means": means, "rows": rows, "accuracy kept": kept, "bar met": kept >= BAR,
            "ours minus others (mean, standard error)": errors,
        }  # fmt: skip
        if "ours-int8" in rows:
            mine = means["ours-int8"]
            kept, share = mine["accuracy"] / means["base"]["accuracy"], mine["file_bytes"] / mine["float_bytes"]
            found[f"{sparsity:g}"]["int8"] = {
                "accuracy kept": kept, "share of the float file": share, "bar met": kept >= BAR and share <= SIZE_BAR,
                "ours minus others (mean, standard error)": {
                    n: _error([o["accuracy"] - r["accuracy"] for o, r in zip(rows["ours-int8"], rows[n])])
                    for n in rows if n.endswith("-int8")
                },
            }  # fmt: skip
    return found


def _names(sparsity: float, *, taught: bool = False, int8: bool = False) -> list[str]:
    names = [*RIVALS, *(["dense-taught"] if taught else []), *([f"{n}-int8" for n in RIVALS] if int8 else [])]
    return ["base", *(f"{n}-{sparsity:g}" for n in names)]


def _error(differences: list[float]) -> list[float]:
    mean = sum(differences) / len(differences)
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(len(differences) - 1, 1))
    return [mean, spread / math.sqrt(len(differences))]


def main(arguments: list[str]) -> int:
    """Do the stages that are missing, in the time that was given, and write what is known."""
    parser = argparse.ArgumentParser(
        prog="pruning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sparsity", default="0.3,0.6")
    parser.add_argument("--minutes", type=float, default=math.inf, help="No stage is begun after this time.")
    parser.add_argument("--work", type=Path, default=Path("runs/pruning"))
    parser.add_argument("--taught", action="store_true", help="The dense network learns from the float model as well.")
    parser.add_argument("--int8", action="store_true", help="Train in int8 too.")
    parser.add_argument("--threads", type=int, default=0, help="Of PyTorch; 0: its own choice.")
    parser.add_argument("--latency", action="store_true", help="Measure latency of the first seed too.")
    options = parser.parse_args(arguments)
    seeds = [int(s) for s in options.seeds.split(",")]
    sparsities = [float(s) for s in options.sparsity.split(",")]
    if options.threads:
        torch.set_num_threads(options.threads)
    end = time.monotonic() + 60 * options.minutes
    missing = 0
    for sparsity in sparsities:
        for seed in seeds:
            bench = None
            for name in _names(sparsity, taught=options.taught, int8=options.int8):
                if (options.work / str(seed) / f"{name}.json").is_file():
                    continue
                if time.monotonic() > end:
                    missing += 1
                    continue
                bench = bench or Bench(options.work, seed)
                bench.stages(sparsity)[name]()
    results = summary(options.work, seeds, sparsities)
    if options.latency:
        bench = Bench(options.work, seeds[0])
        latency = {f"{s:g}": {str(b): bench.latency(s, b) for b in (1, 64)} for s in sparsities}
        atomic.write_json(options.work / "latency.json", latency)
    path = options.work / "latency.json"
    versions = {n: importlib.metadata.version(n) for n in ("torch", "torch-pruning", "torchao")}
    about = {
        "device": "cuda" if torch.cuda.is_available() else "cpu", "hardware": probe().to_dict(), "versions": versions,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "epochs": EPOCHS, "recovery": RECOVERY, "samples": TRAIN, "test": TEST, "stages missing": missing,
    }  # fmt: skip
    atomic.write_json(
        RESULT, {**about, "results": results, "latency": json.loads(path.read_text()) if path.is_file() else {}}
    )
    print(
        json.dumps({k: {"means": v["means"], "kept": v["accuracy kept"]} for k, v in results.items()}, indent=1),
        missing,
        "missing",
    )
    return 0

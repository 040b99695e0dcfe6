"""Does the default training of a GPU (bf16, compiled blocks, recorded steps) learn what plain fp32 learns?

    python benchmarks/training loss [--seeds 0,1,2] [--out FILE]
    python benchmarks/training loss --device cpu --small --seeds 0,1

BERT-base from random weights, batches of 32 texts of 128 tokens, 200 steps of AdamW, dropout on. The task can be
learned: which of two words occurs more often in a text; one label in ten is wrong, so that the loss ends above zero.
For each seed both train the same initial weights on the same batches in the same order: a loop in fp32 by hand with
nothing but torch, and `Trainer` with its defaults. Only the dropout draws differ, as they do between any two kernels.

The statistic was fixed before anything was measured: a run's figure is the mean of its losses over the second half of
the steps. The two agree if the difference of their means over the seeds is at most the range of the fp32 runs' figures
between the seeds. Runs that are in the file already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from optimize_zoo import about
from torch import Tensor, nn

from deepseek_r1 import Trainer, TrainingConfig
from deepseek_r1.core import atomic
from deepseek_r1.train import decay_groups

from .cases import bert
from .step import current, now

RESULT = Path(__file__).parents[1] / "results" / "training_loss.json"
LR, DECAY, STEPS = 5e-5, 0.01, 200
#: The two words that are counted, and how often each stands in a text in which it is the rarer one, or the other.
WORDS, RARE, OFTEN, WRONG = (5, 6), 0.1, 0.4, 0.1


def texts(batches: int, batch: int, length: int, words: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of texts with their labels: 1 where the second word occurs more often than the first."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        ids = torch.randint(10, words, (batch, length), generator=draw)
        second = torch.rand(batch, 1, generator=draw) < 0.5
        share = torch.where(second, RARE, OFTEN), torch.where(second, OFTEN, RARE)
        at = torch.rand(batch, length, generator=draw)
        ids = torch.where(at < share[0], WORDS[0], ids)
        ids = torch.where((at >= share[0]) & (at < share[0] + share[1]), WORDS[1], ids)
        # What is counted decides, not what was meant; a tie is a 0.
        labels = (ids == WORDS[1]).sum(1) > (ids == WORDS[0]).sum(1)
        labels = labels ^ (torch.rand(batch, generator=draw) < WRONG)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels.long()})
    return found


def plain(model: nn.Module, data: list[dict[str, Tensor]], device: torch.device) -> list[float]:
    """The losses of a loop in fp32 that uses nothing but torch."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(decay_groups(model, DECAY), lr=LR)
    losses = []
    for batch in data:
        optimizer.zero_grad(set_to_none=True)
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()})["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def ours(model: nn.Module, data: list[dict[str, Tensor]], device: torch.device) -> tuple[list[float], list[str]]:
    """The losses of the Trainer, on a GPU with its defaults; and what it says of them."""
    more: dict[str, Any] = {} if device.type == "cuda" else {"precision": "bf16", "compile": "blocks"}
    config = TrainingConfig(device=str(device), log_every=1, weight_decay=DECAY, **more)
    trainer = Trainer(model, data, lr=LR, config=config)
    report = trainer.train(epochs=1)
    return [loss for _, loss in trainer.losses], list(report.notes)


@torch.no_grad()
def accuracy(model: nn.Module, data: list[dict[str, Tensor]], device: torch.device) -> float:
    """Share of held-out texts whose label is found, in fp32."""
    model.to(device).eval()
    right = [
        (model(batch["input_ids"].to(device)).argmax(1).cpu() == batch["labels"]).float().mean().item()
        for batch in data
    ]
    return statistics.mean(right)


def run(who: str, seed: int, steps: int, device: torch.device, small: bool) -> dict[str, Any]:
    """One run: its losses, seconds and accuracy."""
    batch, length, words = (8, 16, 1000) if small else (32, 128, 30_000)
    data = texts(steps + 8, batch, length, words, seed)
    torch.manual_seed(seed)
    model = bert(False, small)
    # Both draw their dropout from here on.
    torch.manual_seed(1000 + seed)
    began, notes = time.perf_counter(), []
    if who == "ours":
        losses, notes = ours(model, data[:steps], device)
    else:
        losses = plain(model, data[:steps], device)
    seconds = time.perf_counter() - began
    return {
        "losses": losses, "figure": statistics.mean(losses[steps // 2 :]), "seconds": seconds,
        "accuracy": accuracy(model, data[steps:], device), "notes": notes, "date": now(),
    }  # fmt: skip


def verdict(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the runs say, for the seeds that both have.

    Example:
        >>> figures = {"fp32 0": 0.3, "fp32 1": 0.4, "ours 0": 0.32, "ours 1": 0.44}
        >>> found = verdict({name: {"figure": figure, "accuracy": 1.0} for name, figure in figures.items()})
        >>> round(found["difference"], 3), round(found["range_fp32"], 3), found["agrees"]
        (0.03, 0.1, True)
    """
    seeds = [s for s in sorted({name.split()[1] for name in runs}) if {f"fp32 {s}", f"ours {s}"} <= runs.keys()]
    if len(seeds) < 2:
        return {}
    figures = {who: [runs[f"{who} {seed}"]["figure"] for seed in seeds] for who in ("fp32", "ours")}
    difference = statistics.mean(figures["ours"]) - statistics.mean(figures["fp32"])
    spread = max(figures["fp32"]) - min(figures["fp32"])
    return {
        "seeds": [int(seed) for seed in seeds], "difference": difference, "range_fp32": spread,
        "agrees": abs(difference) <= spread,
        "pairs": [mine - plain for mine, plain in zip(figures["ours"], figures["fp32"], strict=True)],
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """The `loss` verb; gives 1 if the two do not agree."""
    parser = argparse.ArgumentParser(prog="loss", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a tiny model; nothing is stored without --out")
    parser.add_argument("--since", default="", help="forget runs from before this date")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    out: Path | None = options.out or (None if options.small else RESULT)
    device = torch.device(options.device)
    known = json.loads(out.read_text())["runs"] if out is not None and out.is_file() else {}
    runs: dict[str, dict[str, Any]] = {name: entry for name, entry in known.items() if current(entry, options.since)}
    for seed in options.seeds.split(","):
        for who in ("fp32", "ours"):
            name = f"{who} {seed}"
            if name in runs:
                continue
            runs[name] = run(who, int(seed), options.steps, device, options.small)
            print(name, {key: value for key, value in runs[name].items() if key != "losses"}, flush=True)
            if out is not None:
                settings = {"steps": options.steps, "lr": LR, "model": "small" if options.small else "BERT-base"}
                atomic.write_json(out, about(str(device)) | settings | {"runs": runs, "verdict": verdict(runs)})
    found = verdict(runs)
    print(found)
    return int(not found.get("agrees", True))

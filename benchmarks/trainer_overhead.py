"""What the Trainer adds to a bare PyTorch loop, on a step of at least 5 ms.

    python benchmarks/trainer_overhead.py [--rounds 40] [--steps 50] [--device cpu]

Rounds of both loops alternate, in changing order, on the same model, data and optimizer (AdamW, fused). On a CPU the
time is CPU time of the process with one thread, so that other work on the machine disturbs little; on a GPU it is wall
time up to the device's end. The first comparison is the bare loop with itself: its spread is what the method can tell.
Both loops record the loss of every step. Writes benchmarks/results/trainer_overhead.json.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from deepseek_r1.core import atomic, probe
from deepseek_r1.train import Trainer, TrainingConfig, decay_groups

RESULT = Path(__file__).parent / "results" / "trainer_overhead.json"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


def network(width: int, blocks: int) -> nn.Module:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), *[Block(width) for _ in range(blocks)], *head)


def bare_loop(model: nn.Module, data: list, device: torch.device, precision: str) -> Callable[[], list[float]]:
    """The loop a PyTorch user would write."""
    optimizer = torch.optim.AdamW(decay_groups(model, 0.01), lr=1e-4, fused=True)

    def run() -> list[float]:
        model.train()
        losses = []
        for x, y in data:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    return run


def trainer_loop(model: nn.Module, data: list, device: torch.device, precision: str) -> Callable[[], list[float]]:
    """The same through the Trainer, set-up of the run and its Report included."""
    config = TrainingConfig(device=device.type, precision=precision, log_every=1)
    trainer = Trainer(model, data, lr=1e-4, config=config)

    def run() -> list[float]:
        before = len(trainer.losses)
        trainer.train(epochs=1)
        return [loss for _, loss in trainer.losses[before:]]

    return run


def timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    a: Callable[[], object], b: Callable[[], object], rounds: int, steps: int, device: torch.device
) -> dict[str, float]:
    """Paired rounds of two loops: median times and the median and quartiles of b / a."""
    for run in (a, b, a, b):
        run()
    pairs = []
    for i in range(rounds):
        if i % 2:
            second, first = timed(b, device), timed(a, device)
        else:
            first, second = timed(a, device), timed(b, device)
        pairs.append((first, second))
    low, middle, high = statistics.quantiles([y / x for x, y in pairs], n=4)
    first_ms, second_ms = (statistics.median(column) / steps * 1e3 for column in zip(*pairs))
    return {
        "first_ms_per_step": first_ms, "second_ms_per_step": second_ms, "ratio_median": middle,
        "ratio_quartile_1": low, "ratio_quartile_3": high,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch, 1, args.size, args.size)
    data = [
        (torch.randn(shape, generator=generator), torch.randint(0, 10, (args.batch,), generator=generator))
        for _ in range(args.steps)
    ]
    if device.type == "cuda":
        data = [(x.pin_memory(), y.pin_memory()) for x, y in data]
    bare, other, ours = (
        make(network(args.width, args.blocks).to(device), data, device, args.precision)
        for make in (bare_loop, bare_loop, trainer_loop)
    )
    same = bare() == ours()
    a_a = compare(bare, other, args.rounds, args.steps, device)
    result = compare(bare, ours, args.rounds, args.steps, device)
    document = {
        "schema_version": 1,
        "what": "time of the Trainer's loop / time of a bare PyTorch loop, paired rounds",
        "clock": "process CPU time, one thread" if device.type == "cpu" else "wall time, device synchronised",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "hardware": probe().to_dict(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "same_losses_in_the_first_round": same,
        "bare_against_itself": a_a,
        "trainer_against_bare": result,
        "overhead_percent": (result["ratio_median"] - 1) * 100,
    }
    atomic.write_json(args.out, document)
    for name in ("bare_against_itself", "trainer_against_bare"):
        entry = document[name]
        print(
            f"{name}: {entry['first_ms_per_step']:.3f} -> {entry['second_ms_per_step']:.3f} ms/step, ratio "
            f"{entry['ratio_median']:.4f} (quartiles {entry['ratio_quartile_1']:.4f}-{entry['ratio_quartile_3']:.4f})"
        )


if __name__ == "__main__":
    main()

"""Train the networks that no package ships, in pieces: each call goes on from the last checkpoint.

    python benchmarks/quantization train [gpt_shakespeare|vit_glyphs|mobilenet_photos|digits ...] [--minutes 8]

A batch depends on the seed and its step alone, and a checkpoint has the state of everything that draws, so that a
training that was stopped ends as one that was not. Finished weights lie in `cache.folder(NAME)` as safetensors, with
`about.json`: validation numbers, steps, seconds, and what it ran on.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deepseek_r1 as dr1
from deepseek_r1.core import atomic
from deepseek_r1.recipes.digits import shifted

from . import corpora
from .architectures import CONTEXT, SmallGPT, SmallViT, photo_mobilenet
from .cache import folder

#: Every how many seconds a checkpoint is written.
_KEEP_S = 40.0
#: Share of a photograph, from the left, that is trained on; the rest is held out.
TRAINED_SHARE = 0.7


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one network is trained.

    Attributes:
        batch: inputs and targets of a step.
        check: numbers on data that are not trained on, by name.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    check: Callable[[nn.Module], dict[str, float]]
    steps: int
    lr: float
    weight_decay: float = 0.05
    warmup: int = 100
    smoothing: float = 0.0


@functools.cache
def _tokens(part: str) -> Tensor:
    return corpora.tokens(part)


def text_batch(step: int, rows: int = 8, length: int = CONTEXT) -> tuple[Tensor, Tensor]:
    """Token numbers of the training plays and those that follow them, int64 [rows, length]."""
    source = _tokens("train")
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(source) - length - 1, (rows,), generator=draw)
    cut = source[starts[:, None] + torch.arange(length + 1)]
    return cut[:, :-1].contiguous(), cut[:, 1:].contiguous()


def _check_text(model: nn.Module) -> dict[str, float]:
    rows = _tokens("validation")
    rows = rows[: (len(rows) - 1) // CONTEXT * CONTEXT + 1]
    x, y = rows[:-1].view(-1, CONTEXT), rows[1:].view(-1, CONTEXT)
    losses = [F.cross_entropy(model(a).flatten(0, 1), b.flatten()) for a, b in zip(x.split(16), y.split(16))]
    sizes = [len(a) for a in x.split(16)]
    loss = sum(float(v) * n for v, n in zip(losses, sizes, strict=True)) / sum(sizes)
    return {"validation loss": loss, "validation perplexity": math.exp(loss)}


def photo_side(name: str, trained: bool) -> Tensor:
    """The trained or the held-out part of a photograph, [3, H, W]."""
    image = corpora.photograph(name)
    cut = int(image.shape[2] * TRAINED_SHARE)
    return image[:, :, :cut] if trained else image[:, :, cut:]


def photo_batch(count: int, trained: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Squares of photographs, float32 [count, 3, 48, 48] in [-1, 1], often without colour; and which they are."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.randint(0, len(corpora.PHOTOGRAPHS), (count,), generator=draw)
    images = [photo_side(corpora.PHOTOGRAPHS[i], trained) for i in label.tolist()]
    x = corpora.crops(images, 48, 128, 48, draw)
    grey = (torch.rand(count, 1, 1, 1, generator=draw) < 0.7).float()
    x = grey * x.mean(1, keepdim=True) + (1 - grey) * x
    return (2 * x - 1 + 0.1 * torch.randn(x.shape, generator=draw)).contiguous(), label


def _check_classes(batches: Callable[[int], tuple[Tensor, Tensor]], model: nn.Module) -> dict[str, float]:
    found = [batches(seed) for seed in range(10**6, 10**6 + 8)]
    outputs = [model(x) for x, _ in found]
    hits = torch.cat([(o.argmax(1) == y).float() for o, (_, y) in zip(outputs, found, strict=True)])
    loss = sum(float(F.cross_entropy(o, y)) for o, (_, y) in zip(outputs, found, strict=True)) / len(found)
    return {"validation accuracy": float(hits.mean()), "validation loss": loss, "validation samples": len(hits)}


def _held_out_photos(seed: int) -> tuple[Tensor, Tensor]:
    return photo_batch(128, False, seed)


def _held_out_glyphs(seed: int) -> tuple[Tensor, Tensor]:
    return corpora.glyphs(256, "held-out", seed)


def _train_glyphs(step: int) -> tuple[Tensor, Tensor]:
    return corpora.glyphs(128, "train", step)


def _train_photos(step: int) -> tuple[Tensor, Tensor]:
    return photo_batch(32, True, step)


TRAININGS = {
    "gpt_shakespeare": Training(
        build=SmallGPT, batch=text_batch, check=_check_text, steps=2400, lr=2e-3, weight_decay=0.1, warmup=200
    ),
    "vit_glyphs": Training(
        build=SmallViT, batch=_train_glyphs, check=functools.partial(_check_classes, _held_out_glyphs),
        steps=2400, lr=1.5e-3, smoothing=0.05,
    ),
    "mobilenet_photos": Training(
        build=photo_mobilenet, batch=_train_photos, check=functools.partial(_check_classes, _held_out_photos),
        steps=900, lr=2e-3, smoothing=0.05,
    ),
}  # fmt: skip


def weights_path(name: str) -> Path:
    """Where the finished weights of a network lie."""
    return folder(name) / "weights.safetensors"


def trained(name: str) -> nn.Module:
    """A network with its finished weights, in evaluation mode and without gradients.

    Raises:
        RuntimeError: it is not trained yet; the message has the command.
    """
    if not weights_path(name).is_file():
        raise RuntimeError(f"{name} is not trained yet: run python benchmarks/quantization train {name}")
    model = dr1.models.DigitsNet() if name == "digits" else TRAININGS[name].build()
    model.load_state_dict(load_file(weights_path(name)))
    return model.eval().requires_grad_(False)


def _optimizer(model: nn.Module, plan: Training) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95))


def _rate(step: int, plan: Training) -> float:
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train(name: str, minutes: float) -> bool:
    """Train for some minutes; whether the network is finished."""
    plan, kept = TRAININGS[name], folder(name) / "checkpoint.pt"
    # One thread gives the same sums on every machine, and is as fast for networks of this size.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = plan.build()
    optimizer = _optimizer(model, plan)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0}
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
    start = last = time.perf_counter()
    step, before, running = state["step"], state["seconds"], []
    model.train()

    def keep() -> None:
        seconds = before + time.perf_counter() - start
        told = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
        torch.save(told | {"step": step, "seconds": seconds}, kept.with_suffix(".new"))
        kept.with_suffix(".new").replace(kept)
        loss = sum(running) / len(running)
        print(f"{name}: step {step} of {plan.steps}, {seconds:.0f} s, loss {loss:.4f}", flush=True)
        running.clear()

    while step < plan.steps and time.perf_counter() - start < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, plan)
        inputs, targets = plan.batch(step)
        outputs = model(inputs)
        loss = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), label_smoothing=plan.smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running.append(float(loss.detach()))
        step += 1
        if time.perf_counter() - last > _KEEP_S:
            keep()
            last = time.perf_counter()
    if running:
        keep()
    if step < plan.steps:
        return False
    _finish(name, model, plan, {"steps": step, "seconds": before + time.perf_counter() - start})
    return True


@torch.no_grad()
def _finish(name: str, model: nn.Module, plan: Training, facts: dict[str, Any]) -> None:
    model.eval()
    numbers = plan.check(model)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights_path(name))
    parameters = sum(p.numel() for p in model.parameters())
    about = facts | numbers | {"parameters": parameters, "torch": torch.__version__}
    atomic.write_json(folder(name) / "about.json", about)
    print(name, about, flush=True)


def train_digits() -> None:
    """The digits network just as the default recipe trains it."""
    dr1.seed_everything(0)
    data = dr1.data.digits(seed=0)
    model = dr1.models.DigitsNet()
    config = dr1.TrainingConfig(schedule="cosine", warmup=0.2, weight_decay=0.05, threads=1)
    start = time.perf_counter()
    dr1.Trainer(model, shifted(data.train), data.val, lr=3e-3, config=config).train(epochs=30)
    with torch.no_grad():
        x, y = (torch.as_tensor(v) for v in data.tensors("val"))
        accuracy = float((model.eval()(x).argmax(1) == y).float().mean())
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights_path("digits"))
    about = {"validation accuracy": accuracy, "seconds": time.perf_counter() - start, "torch": torch.__version__}
    atomic.write_json(folder("digits") / "about.json", about)
    print("digits", about, flush=True)


def main(arguments: list[str]) -> int:
    """The `train` verb; 1 if something is not finished yet."""
    parser = argparse.ArgumentParser(prog="train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="by default all")
    parser.add_argument("--minutes", type=float, default=8, help="then stop, and go on at the next call")
    options = parser.parse_args(arguments)
    end = time.perf_counter() + 60 * options.minutes
    for name in options.names or ["digits", *TRAININGS]:
        if weights_path(name).is_file():
            continue
        left = (end - time.perf_counter()) / 60
        if left <= 0:
            return 1
        if name == "digits":
            train_digits()
        elif not train(name, left):
            return 1
    return 0

"""The networks of the comparisons: real trained weights, data to calibrate with, other data to be judged on.

    python benchmarks/quantization nets [--only minilm,gpt_shakespeare]

prints each network's task metric in float32. Weights come from packages (EfficientNet-Lite0, MiniLM-L6, Silero VAD) or
from `train`. What calibrates and what judges never share a photograph, a play, a recording or a font.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_r1.data import unpack_batch

from . import sources
from .train import trained

#: Takes a batch's inputs as a flat list of tensors, gives the network's answer.
Answer = Callable[[list[Tensor]], Tensor]
Losses = Callable[[Tensor, Tensor, Tensor], Tensor]
Batches = list[tuple[Any, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Net:
    """A trained network and how it is judged.

    Attributes:
        build: the float module, in evaluation mode.
        calibration: batches of (inputs, labels); inputs are a tensor, or a mapping of them.
        held_out: the same, of other material.
        losses: (answers, labels, float answers) -> one number for each sample, lower is better.
        metric: name of the task metric.
        score: (all answers, all labels, all float answers) -> the metric.
        higher_is_better: of the metric.
        clusters: for each held-out sample the number of the photograph, play or recording it is from.
        gradient_loss: what those differentiate who weigh layers by gradients; `losses` that are measured from the
            float answer have none there. None takes `losses`.
        task: what AutoQuantizer is told of the output.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    calibration: Batches
    held_out: Batches
    losses: Losses
    metric: str
    score: Callable[[Tensor, Tensor, Tensor], float]
    higher_is_better: bool = True
    clusters: list[int] = field(default_factory=list)
    gradient_loss: Losses | None = None
    task: str = "auto"

    @property
    def one(self) -> Any:
        """The inputs of one held-out sample, whose latency is measured."""
        inputs = self.held_out[0][0]
        return {k: v[:1] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[:1]

    @property
    def is_transformer(self) -> bool:
        return self.kind == "transformer"


def leaves(inputs: Any) -> list[Tensor]:
    """The tensors of a batch's inputs, in the order in which the module takes them."""
    args, kwargs, _ = unpack_batch((inputs,))
    return [*args, *kwargs.values()]


def samples(batches: Batches) -> list[list[Tensor]]:
    """Every sample as a batch of one, flat: what peers with fixed sizes calibrate on."""
    found = []
    for inputs, labels in batches:
        parts = leaves(inputs)
        found += [[p[i : i + 1].contiguous() for p in parts] for i in range(len(labels))]
    return found


def answers(answer: Answer, batches: Batches, batch_size: int | None = None) -> Tensor:
    """All answers, one row a sample.

    Args:
        batch_size: 1 for those who were built for one sample; None takes the batches as they are.
    """
    with torch.inference_mode():
        parts = [leaves(inputs) for inputs, _ in batches] if batch_size is None else samples(batches)
        return torch.cat([answer(part).float().clone() for part in parts])


def labels_of(batches: Batches) -> Tensor:
    """All labels, one row a sample."""
    return torch.cat([labels for _, labels in batches])


def module_answer(module: nn.Module, inputs: Any) -> Answer:
    """A module as an `Answer`; `inputs` shows whether it takes keywords."""
    if isinstance(inputs, dict):
        return lambda parts: module(**dict(zip(inputs, parts, strict=True)))
    return lambda parts: module(*parts)


def cross_entropy(found: Tensor, labels: Tensor, plain: Tensor) -> Tensor:
    """For each sample; of sequences the mean over their tokens."""
    loss = F.cross_entropy(found.flatten(0, -2), labels.flatten(), reduction="none")
    return loss.view(len(labels), -1).mean(1)


def divergence(found: Tensor, labels: Tensor, plain: Tensor) -> Tensor:
    """KL divergence of the answer's distribution from that in float32."""
    return F.kl_div(found.log_softmax(-1), plain.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def _distance(found: Tensor, labels: Tensor, plain: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(found, plain)


def _binary_divergence(found: Tensor, labels: Tensor, plain: Tensor) -> Tensor:
    p, q = (v.double().clamp(1e-6, 1 - 1e-6) for v in (plain, found))
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(1).float()


def _projection(found: Tensor, labels: Tensor, plain: Tensor) -> Tensor:
    """Random directions of the embedding: the mean square of their gradients is what a squared error weighs."""
    directions = torch.randn(found.shape, generator=torch.Generator().manual_seed(len(found)))
    return (found * directions).sum(1)


def _binary_cross_entropy(found: Tensor, labels: Tensor, plain: Tensor) -> Tensor:
    wanted = (found.detach() > 0.5).float()
    return F.binary_cross_entropy(found.clamp(1e-6, 1 - 1e-6), wanted, reduction="none").mean(1)


def _accuracy(found: Tensor, labels: Tensor, plain: Tensor) -> float:
    return float((found.argmax(-1) == labels).float().mean())


def _agreement(found: Tensor, labels: Tensor, plain: Tensor) -> float:
    return float((found.argmax(-1) == plain.argmax(-1)).float().mean())


def _perplexity(found: Tensor, labels: Tensor, plain: Tensor) -> float:
    return math.exp(float(cross_entropy(found, labels, plain).mean()))


def neighbours(rows: Tensor, count: int = 10) -> Tensor:
    """For each embedding the numbers of the `count` nearest others, by the cosine."""
    unit = F.normalize(rows, dim=-1)
    return (unit @ unit.T).fill_diagonal_(-2).topk(count).indices


def retrieval_hits(found: Tensor, plain: Tensor) -> Tensor:
    """For each query the share of float32's ten nearest that are among its own ten nearest."""
    a, b = neighbours(found), neighbours(plain)
    return (a[:, :, None] == b[:, None, :]).any(1).float().mean(1)


def _retrieval(found: Tensor, labels: Tensor, plain: Tensor) -> float:
    return float(retrieval_hits(found, plain).mean())


def _decisions(found: Tensor, labels: Tensor, plain: Tensor) -> float:
    return float(((found > 0.5) == (plain > 0.5)).float().mean())


def batched(inputs: Any, labels: Tensor, size: int) -> Batches:
    """Cut into batches; `inputs` is a tensor or a mapping of tensors."""
    rows = range(0, len(labels), size)
    if isinstance(inputs, dict):
        return [({k: v[i : i + size] for k, v in inputs.items()}, labels[i : i + size]) for i in rows]
    return [(inputs[i : i + size], labels[i : i + size]) for i in rows]


def _efficientnet() -> Net:
    build = functools.cache(sources.efficientnet_lite0)
    calibrating, _ = sources.photograph_crops(sources.CALIBRATION_PHOTOGRAPHS, 12, seed=1)
    judged, clusters = sources.photograph_crops(sources.HELD_OUT_PHOTOGRAPHS, 12, seed=2)
    model = build()
    with torch.no_grad():
        # There are no labels for these; what float32 says stands in for them.
        labels = [torch.cat([model(part).argmax(1) for part in x.split(8)]) for x in (calibrating, judged)]
    return Net(
        name="efficientnet_lite0", kind="cnn", build=build, calibration=batched(calibrating, labels[0], 8),
        held_out=batched(judged, labels[1], 8), losses=divergence, metric="top-1 agreement with float32",
        score=_agreement, clusters=clusters, gradient_loss=cross_entropy,
    )  # fmt: skip


def _digits() -> Net:
    (x, y), (u, v) = sources.digits_parts()
    return Net(
        name="digits", kind="cnn", build=functools.partial(trained, "digits"), calibration=batched(x, y, 16),
        held_out=batched(u, v, 16), losses=cross_entropy, metric="accuracy", score=_accuracy,
    )  # fmt: skip


def _mobilenet() -> Net:
    (x, y), (u, v) = sources.photo_squares(128, trained=True), sources.photo_squares(768, trained=False)
    return Net(
        name="mobilenet_photos", kind="cnn", build=functools.partial(trained, "mobilenet_photos"),
        calibration=batched(x, y, 8), held_out=batched(u, v, 32), losses=cross_entropy, metric="accuracy",
        score=_accuracy,
    )  # fmt: skip


def _vit() -> Net:
    (x, y), (u, v) = sources.letter_pictures(128, "train"), sources.letter_pictures(1024, "held-out")
    return Net(
        name="vit_glyphs", kind="transformer", build=functools.partial(trained, "vit_glyphs"),
        calibration=batched(x, y, 8), held_out=batched(u, v, 32), losses=cross_entropy, metric="accuracy",
        score=_accuracy,
    )  # fmt: skip


def _gpt() -> Net:
    (x, y), (u, v) = sources.text_rows("train", 64), sources.text_rows("held-out", 256)
    return Net(
        name="gpt_shakespeare", kind="transformer", build=functools.partial(trained, "gpt_shakespeare"),
        calibration=batched(x, y, 4), held_out=batched(u, v, 8), losses=cross_entropy, metric="perplexity",
        score=_perplexity, higher_is_better=False,
    )  # fmt: skip


def _minilm() -> Net:
    calibrating, judged = sources.sentences(128, held_out=False), sources.sentences(384, held_out=True)
    none = [torch.zeros(len(v["input_ids"]), dtype=torch.long) for v in (calibrating, judged)]
    return Net(
        name="minilm", kind="transformer", build=functools.cache(sources.minilm_l6),
        calibration=batched(calibrating, none[0], 8), held_out=batched(judged, none[1], 16), losses=_distance,
        metric="ten nearest shared with float32", score=_retrieval, gradient_loss=_projection,
        task="values",
    )  # fmt: skip


def _silero() -> Net:
    calibrating, _ = sources.speech(sources.CALIBRATION_RECORDINGS)
    judged, clusters = sources.speech(sources.HELD_OUT_RECORDINGS)
    none = [torch.zeros(len(v), dtype=torch.long) for v in (calibrating, judged)]
    return Net(
        name="silero_vad", kind="cnn", build=functools.cache(sources.silero_vad),
        calibration=batched(calibrating, none[0], 4), held_out=batched(judged, none[1], 8),
        losses=_binary_divergence, metric="speech decisions shared with float32", score=_decisions, clusters=clusters,
        gradient_loss=_binary_cross_entropy, task="values",
    )  # fmt: skip


NETS: dict[str, Callable[[], Net]] = {
    "efficientnet_lite0": _efficientnet,
    "mobilenet_photos": _mobilenet,
    "digits": _digits,
    "silero_vad": _silero,
    "minilm": _minilm,
    "gpt_shakespeare": _gpt,
    "vit_glyphs": _vit,
}


@functools.cache
def net(name: str) -> Net:
    """A network by its name, with its data; made once.

    Raises:
        KeyError: there is no such network; RuntimeError: its weights are not trained yet.
    """
    if name not in NETS:
        raise KeyError(f"there is no network {name!r}; there are {', '.join(NETS)}")
    return NETS[name]()


@functools.cache
def float_answers(name: str) -> Tensor:
    """What the float module says of the held-out samples."""
    one = net(name)
    return answers(module_answer(one.build(), one.held_out[0][0]), one.held_out)


def judge(name: str, found: Tensor) -> dict[str, Any]:
    """The task metric, the loss of each held-out sample, and how far from float32, of somebody's answers.

    "divergence" is the KL divergence where the loss is a cross-entropy, which may fall by chance; else the loss.
    """
    one, plain, labels = net(name), float_answers(name), labels_of(net(name).held_out)
    found = found.reshape(plain.shape)
    losses = one.losses(found, labels, plain)
    apart = divergence(found, labels, plain) if one.losses is cross_entropy else losses
    return {
        "metric": one.score(found, labels, plain), "loss": float(losses.mean()), "divergence": float(apart.mean()),
        "losses": losses.tolist(), "divergences": apart.tolist(),
    }  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """The `nets` verb."""
    parser = argparse.ArgumentParser(prog="nets", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="names, separated by commas")
    options = parser.parse_args(arguments)
    for name in options.only.split(",") if options.only else NETS:
        one = net(name)
        found = judge(name, float_answers(name))
        parameters = sum(p.numel() for p in one.build().parameters())
        held_out = len(labels_of(one.held_out))
        print(f"{name}: {parameters / 1e6:.2f} M parameters, {held_out} samples, {one.metric} {found['metric']:.4f}, "
              f"loss {found['loss']:.4f}", flush=True)  # fmt: skip
    return 0

"""How much each layer in each format costs the model: estimated for all from gradients, measured for some.

The estimate is the Fisher form at a layer's output: the squared gradient of a draw from the model's own likelihood
times the squared change that the format makes there. Measured are a few layers alone and all layers together in each
format; they fix what the estimate leaves out.

Sources: Kim et al., SqueezeLLM, 2023 (squared gradients as weights of errors); Kunstner et al., Limitations of the
empirical Fisher approximation, 2019 (why labels are drawn from the model instead of taken from the data).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch.fx import Interpreter, Node

from ..core import LayerFormat, progress
from ._layers import Layer
from ._static import output_of
from ._task import Outputs, Task
from ._trial import Formats, Trial, rounded

Pair = tuple[Layer, LayerFormat]
Inputs = tuple[Any, ...]


@dataclass
class Sensitivity:
    """The trials of one model on one set of inputs.

    Attributes:
        trial: computes the model with other formats.
        batches: flat inputs.
        task: how answers are compared.
    """

    trial: Trial
    batches: Sequence[Inputs]
    task: Task

    def __post_init__(self) -> None:
        self._floats = [self.trial.run({}, leaves) for leaves in self.batches]

    @property
    def floats(self) -> list[Outputs]:
        """What the float model answers, batch by batch."""
        return self._floats

    def estimate(self, pairs: Iterable[Pair], *, seed: int = 0) -> dict[Pair, float]:
        """The divergence that each layer in each format would cause alone, from one backward pass a batch."""
        wanted: dict[Layer, list[LayerFormat]] = {}
        for layer, fmt in pairs:
            wanted.setdefault(layer, []).append(fmt)
        total = {(layer, fmt): 0.0 for layer, formats in wanted.items() for fmt in formats}
        generator = torch.Generator().manual_seed(seed)
        samples = 0
        for leaves, floats in zip(progress.track(self.batches, "sensitivity", len(self.batches)), self._floats):
            samples += len(floats[0])
            for pair, score in _Scores(self.trial, wanted).of(leaves, self.task, generator).items():
                total[pair] += score
        return {pair: score / max(1, samples) for pair, score in total.items()}

    def measure(self, formats: Formats) -> float:
        """The mean divergence of the model with some layers in other formats, all of them at once."""
        parts = [
            self.task.divergence(self.trial.run(formats, leaves), floats)
            for leaves, floats in zip(self.batches, self._floats)
        ]
        return float(torch.cat(parts).mean())


class _Scores(Interpreter):
    """Runs the graph with gradients, keeping what each layer was given and gave."""

    def __init__(self, trial: Trial, wanted: Mapping[Layer, list[LayerFormat]]) -> None:
        super().__init__(trial.module)
        self._trial, self._wanted = trial, wanted
        self._layers = {node: layer for layer in wanted for node in layer.nodes}
        self._kept: dict[Node, tuple[tuple[Any, ...], torch.Tensor]] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n not in self._layers:
            return value
        args, _ = self.fetch_args_kwargs_from_env(n)
        kept = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        self._kept[n] = (kept, value)
        # What follows may write into it.
        return value.clone()

    def of(self, leaves: Inputs, task: Task, generator: torch.Generator) -> dict[Pair, float]:
        """Sum over the samples of a batch."""
        with torch.enable_grad():
            outputs = [v for v in pytree.tree_leaves(self.run(*leaves)) if isinstance(v, torch.Tensor)]
            nodes = list(self._kept)
            gradients = torch.autograd.grad(
                task.probe(outputs, generator), [self._kept[n][1] for n in nodes], allow_unused=True
            )
        found: dict[Pair, float] = {}
        with torch.no_grad():
            for node, gradient in zip(nodes, gradients):
                if gradient is not None:
                    for pair, score in self._layer(node, gradient):
                        found[pair] = found.get(pair, 0.0) + score
        return found

    def _layer(self, node: Node, gradient: torch.Tensor) -> Iterable[tuple[Pair, float]]:
        layer = self._layers[node]
        args, exact = self._kept[node]
        squared = gradient**2
        for fmt in self._wanted[layer]:
            given = args
            if fmt.activation == "static" and isinstance(node.args[0], Node) and node.args[0] in self._trial.ranges:
                given = (rounded(args[0], *self._trial.ranges[node.args[0]]), *args[1:])
            now = self._trial.layer_output(layer, fmt, node, given)
            behind = output_of(node)
            if fmt.activation == "static" and behind in self._trial.ranges:
                # Where an activation function cuts off what the range leaves out, the gradient is zero.
                now = rounded(now, *self._trial.ranges[behind])
            yield (layer, fmt), float((squared * (now - exact) ** 2).sum())


def spread(pairs: Sequence[Pair], scores: Mapping[Pair, float], count: int) -> list[Pair]:
    """At most `count` pairs that stand for all: from the smallest score to the largest, in equal steps, each format."""
    chosen: list[Pair] = []
    formats = list(dict.fromkeys(fmt for _, fmt in pairs))
    for number, fmt in enumerate(formats):
        of_format = sorted((p for p in pairs if p[1] == fmt), key=lambda p: scores[p])
        share = min(len(of_format), count // len(formats) + (number < count % len(formats)))
        places = np.linspace(0, len(of_format) - 1, share).round().astype(int).tolist()
        chosen += [of_format[i] for i in dict.fromkeys(places)]
    return chosen


def calibrated(
    scores: Mapping[Pair, float], alone: Mapping[Pair, float], together: Mapping[LayerFormat, float]
) -> dict[Pair, float]:
    """Scores in which what was measured has its say.

    Args:
        scores: the estimates.
        alone: measured for single layers.
        together: by format what was measured with all layers in it that can be.

    Each format's estimates are multiplied by the middle ratio of what was measured alone to what was estimated, and
    what was measured replaces its estimate. Then each format is scaled so that its layers add up to what they cost
    together.
    """
    found = dict(scores)
    for fmt in dict.fromkeys(fmt for _, fmt in scores):
        ratios = [alone[p] / scores[p] for p in alone if p[1] == fmt and scores[p] > 0 and alone[p] > 0]
        factor = float(np.exp(np.median(np.log(ratios)))) if ratios else 1.0
        mine = [p for p in scores if p[1] == fmt]
        for pair in mine:
            found[pair] = alone.get(pair, scores[pair] * factor)
        total = sum(found[p] for p in mine)
        if fmt in together and total > 0:
            for pair in mine:
                found[pair] *= max(together[fmt], 0.0) / total
    return found

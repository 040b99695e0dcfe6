"""What a channel is worth: by how much the loss is expected to rise without it. Removes nothing.

A unit is gone when nothing reads it any more. To first order the loss changes by t = sum(w * dL/dw) over the weights
that read it (Molchanov et al., CVPR 2019, arXiv 1906.10771), and half the mean of t squared over samples is the rise
that the Fisher information predicts: the currency in which a change of a layer's output by quantisation is scored too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..core import ConfigError, InputError, NonFiniteLossError, progress
from ..data import batch_size, slice_batch, to_device, unpack_batch
from ..graph import evaluation
from ..train import Objective
from ._config import PruneConfig
from ._structure import Group, Structure

LossFunction = Callable[[Any, Any], Tensor]
#: Units of the largest group whose pairs are kept.
_LARGEST_TABLE = 2048


@dataclass(eq=False)
class Importance:
    """What units are worth, alone and with others of their group.

    Attributes:
        scores: for each unit of the structure the predicted rise of the loss without it.
        together: name of a group -> half the mean product of the changes of each two of its units, whose sum over a
            set is the rise predicted for the set; only with data, and for groups that are not too large.
    """

    scores: Any
    together: dict[str, Any] = field(default_factory=dict)

    def leaving(self, group: Group) -> tuple[Any, Any]:
        """A group's units in the order in which they leave, and the predicted loss behind each."""
        table = self.together.get(group.name)
        if table is None:
            order = np.argsort(self.scores[group.units], kind="stable")
            return group.units[order], np.cumsum(self.scores[group.units][order])
        # One at a time, the one that adds least to those that are gone: errors of equal sign add up.
        adds, gone = table.diagonal().copy(), np.zeros(group.size, dtype=bool)
        order, losses = np.zeros(group.size, dtype=np.int64), np.zeros(group.size)
        total = 0.0
        for i in range(group.size):
            chosen = int(np.argmin(np.where(gone, np.inf, adds)))
            order[i], gone[chosen] = chosen, True
            total += float(adds[chosen])
            losses[i] = total
            adds += 2 * table[chosen]
        return group.units[order], np.maximum.accumulate(np.maximum(losses, 0.0))


def magnitude_scores(model: nn.Module, structure: Structure) -> Importance:
    """A score for each unit without data: its squared norm in all that leaves with it, relative to its group's mean.

    Scores count as much as the numbers that leave, so that groups compete by relative norms.
    """
    squares = np.zeros(structure.number)
    sizes = np.zeros(structure.number)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, dims in structure.ledger.tensors.items():
        if name not in parameters:
            continue
        weight = parameters[name].detach().double()
        for dim, atoms in enumerate(dims):
            if atoms is not None:
                rest = [d for d in range(weight.ndim) if d != dim]
                square = weight.square().sum(rest) if rest else weight.square()
                np.add.at(squares, structure.unit_of[atoms], square.cpu().numpy())
                np.add.at(sizes, structure.unit_of[atoms], weight.numel() / max(weight.shape[dim], 1))
    scores = np.zeros(structure.number)
    for group in structure.groups:
        mine = squares[group.units]
        scores[group.units] = mine / max(float(mine.mean()), 1e-30) * sizes[group.units]
    return Importance(scores=scores)


def taylor_scores(
    model: nn.Module,
    structure: Structure,
    dataset: Iterable[Any],
    config: PruneConfig,
    loss: LossFunction | None = None,
) -> tuple[Importance, str]:
    """The predicted rise of the loss without units, and what the loss was.

    Raises:
        InputError: the dataset is empty, has values that are not finite, or does not fit the model.
        NonFiniteLossError: the loss is not a finite number.
    """
    sources = _readers(structure)
    names = sorted({name for name, _, _ in sources})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = [parameters[n] for n in names]
    wanted = [p.requires_grad for p in tensors]
    judge = _Judge(model, config, loss)
    total, samples = np.zeros(structure.number), 0
    together = {g.name: np.zeros((g.size, g.size)) for g in structure.groups if g.size <= _LARGEST_TABLE}
    device = tensors[0].device if tensors else torch.device("cpu")
    with evaluation(model), torch.enable_grad(), progress.bar("importance", config.samples) as advance:
        try:
            for p in tensors:
                p.requires_grad_(True)
            for args, kwargs, labels, size in micro_batches(dataset, config, device):
                value = judge(args, kwargs, labels)
                grads = dict(zip(names, torch.autograd.grad(value, tensors, allow_unused=True), strict=True))
                changes = size * _changes(structure, sources, parameters, grads)
                total += np.square(changes)
                for group in structure.groups:
                    if group.name in together:
                        together[group.name] += np.outer(changes[group.units], changes[group.units])
                samples += size
                advance(size, "")
        finally:
            for p, was in zip(tensors, wanted, strict=True):
                p.requires_grad_(was)
    twice = 2 * max(samples, 1)
    found = Importance(scores=total / twice, together={name: table / twice for name, table in together.items()})
    return found, judge.name


def _readers(structure: Structure) -> list[tuple[str, int, Any]]:
    """(weight, dimension, unit of each index) that see the units; for one that nothing reads, what makes it."""
    every = [
        (name, dim, structure.unit_of[atoms])
        for name, dims in structure.ledger.tensors.items()
        for dim, atoms in enumerate(dims)
        if atoms is not None and name in structure.trainable
    ]
    read = [s for s in every if s[:2] in structure.ledger.readers]
    seen = np.zeros(structure.number, dtype=bool)
    for _, _, units in read:
        seen[units] = True
    rest = [s for s in every if s[:2] not in structure.ledger.readers and not seen[s[2]].any()]
    return read + rest


def _changes(structure: Structure, sources: list[tuple[str, int, Any]], weights: Any, grads: Any) -> Any:
    """For each unit the change of the loss to first order, summed over what reads it."""
    found = np.zeros(structure.number)
    for name, dim, units in sources:
        grad = grads[name]
        if grad is None:
            continue
        product = weights[name].detach() * grad
        rest = [d for d in range(product.ndim) if d != dim]
        along = product.sum(rest) if rest else product
        np.add.at(found, units, along.double().cpu().numpy())
    return found


def micro_batches(
    dataset: Iterable[Any], config: PruneConfig, device: torch.device
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any, int]]:
    """(positional inputs, keyword inputs, labels, samples) of up to `config.samples` samples.

    Raises:
        InputError: there are none, or inputs are not finite.
    """
    left = config.samples
    for batch in dataset:
        part = unpack_batch(batch)
        size = min(batch_size(part), left)
        check_finite(part[:2])
        for start in range(0, size, config.micro_batch):
            stop = min(start + config.micro_batch, size)
            args, kwargs, labels = to_device(slice_batch(part, start, stop), device)
            yield args, kwargs, labels, stop - start
        left -= size
        if left <= 0:
            return
    if left == config.samples:
        raise InputError("the dataset is empty; give batches like those of the task.")


def check_finite(inputs: Any) -> None:
    """Raise InputError if a floating-point input has values that are not finite."""
    for value in pytree.tree_leaves(inputs):
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError("the dataset has inputs with values that are not finite; mend or drop those samples.")


class _Judge:
    """The loss of a micro-batch: the task's, or what stands for it without labels."""

    def __init__(self, model: nn.Module, config: PruneConfig, loss: LossFunction | None) -> None:
        self.model, self.config = model, config
        self.objective = Objective(model, loss)
        self.name = ""
        self.generator = torch.Generator().manual_seed(config.seed)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Any) -> Tensor:
        try:
            if labels is not None:
                value, _ = self.objective(self.model, args, kwargs, labels)
                self.name = self.objective.name
            else:
                value = self._without_labels(self.model(*args, **kwargs))
        except (RuntimeError, TypeError, IndexError) as e:
            shapes = [tuple(v.shape) for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
            raise InputError(f"the model fails on the dataset's inputs of shapes {shapes}: {e}") from e
        if not torch.isfinite(value):
            raise NonFiniteLossError(
                f"the loss ({self.name}) on the dataset is {float(value)}; importance needs a number."
            )
        return value

    def _without_labels(self, output: Any) -> Tensor:
        """A random draw whose squared gradient is, on average, what the answers change by.

        With classes drawn from the model's own distribution that is the Fisher information, the curvature of the
        divergence from the model; with normal numbers against the outputs, the squared change of these.
        """
        tensors = [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]
        if not tensors:
            raise InputError("the model gives no floating-point outputs, so channels cannot be judged without labels.")
        if self.config.distance == "kl":
            self.name = "divergence from the float model"
            return self._drawn_class(tensors[0])
        self.name = "distance from the float model's outputs"
        parts = []
        for value in tensors:
            noise = torch.randn(value.shape, generator=self.generator).to(value)
            spread = value.detach().std().clamp(min=1e-12) if value.numel() > 1 else value.new_ones(())
            parts.append((value * noise).sum() / (spread * max(value[0].numel(), 1) ** 0.5 * len(value)))
        return torch.stack(parts).sum()

    def _drawn_class(self, logits: Tensor) -> Tensor:
        if logits.ndim < 2:
            raise ConfigError(f"PruneConfig(distance='kl') needs classes, but the outputs are {tuple(logits.shape)}.")
        # Classes lie in dimension 1 of pictures, and in the last one of everything else.
        rows = logits.movedim(1, -1) if logits.ndim > 3 else logits
        scores = rows.reshape(-1, rows.shape[-1]).log_softmax(-1)
        drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=self.generator).to(scores.device)
        return -scores.gather(1, drawn).sum() / len(logits)

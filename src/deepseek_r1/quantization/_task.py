"""What an output is for, and so how far two answers are apart and how good one is. Knows tensors and labels only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core import InputError
from ..data import class_dim, class_hits

Outputs = list[torch.Tensor]


@dataclass(frozen=True)
class Task:
    """How the outputs of a model are compared.

    Attributes:
        classes: the dimension of the first output that holds the scores of classes; None if there are none, and then
            all float outputs count as they are.
        labels: whether the labels are class indices for it.
    """

    classes: int | None
    labels: bool = False

    @classmethod
    def of(cls, outputs: Outputs, labels: Any, kind: str = "auto") -> Task:
        """The task that outputs and labels of a batch look like.

        Class indices as labels make it a classifier. So does, without labels, an output [rows, at least 2]: the same
        rule by which `optimize` judges.

        Args:
            kind: "classes" or "values" says which of the two it is; the scores of classes are then in the last
                dimension, unless the labels tell another.
        """
        dim = None if kind == "values" else class_dim(outputs[0], labels)
        if dim is not None:
            return cls(dim, labels=True)
        if kind == "classes":
            return cls(outputs[0].ndim - 1)
        fits = labels is None and outputs[0].ndim == 2 and outputs[0].shape[1] > 1
        return cls(1 if fits and kind == "auto" else None)

    @property
    def loss_name(self) -> str:
        """What `divergence` is, for people."""
        return "KL divergence from float" if self.classes is not None else "relative squared error"

    @property
    def quality_name(self) -> str:
        """What `quality` is, for people."""
        if self.classes is None:
            return "explained share of the float output"
        return "accuracy" if self.labels else "agreement with float"

    def divergence(self, outputs: Outputs, floats: Outputs) -> torch.Tensor:
        """How far answers are from the float model's, one number for each sample [rows], 0 if they are the same."""
        if self.classes is None:
            pairs = [(a.double(), b.double()) for a, b in zip(outputs, floats) if b.is_floating_point()]
            errors = [_rows((a - b) ** 2).sum(1) / _rows(b**2).sum(1).mean().clamp_min(1e-30) for a, b in pairs]
            return torch.stack(errors).mean(0)
        new, old = (torch.log_softmax(values[0].double(), self.classes) for values in (outputs, floats))
        return _rows((old.exp() * (old - new)).sum(self.classes)).mean(1)

    def quality(self, outputs: Outputs, floats: Outputs, labels: Any) -> torch.Tensor:
        """How good answers are, one number for each sample [rows], at most 1; see `quality_name`."""
        if self.classes is None:
            return 1 - self.divergence(outputs, floats)
        rows = len(outputs[0])
        if self.labels:
            hits = class_hits(outputs[0], labels)
            if hits is None:
                raise InputError("some batches have labels that are class indices, and some have not.")
        else:
            hits = outputs[0].argmax(self.classes) == floats[0].argmax(self.classes)
        return hits.double().reshape(rows, -1).mean(1)

    def probe(self, outputs: Sequence[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        """A number whose gradient g at any value between gives the divergence of a change d there as E[(g . d)^2].

        The sum over all rows of half a draw from the Fisher information: for classes the log-likelihood of labels
        drawn from the model itself, else the outputs along a random direction.
        """
        if self.classes is None:
            parts = []
            for out in outputs:
                if out.is_floating_point():
                    size = _rows(out.detach() ** 2).sum(1).mean().clamp_min(1e-30).sqrt()
                    draw = torch.randn(out.shape, generator=generator).to(out)
                    parts.append((draw * out).sum() / size)
            total: torch.Tensor = torch.stack(parts).sum() / max(1, len(parts)) ** 0.5
            return total
        logits = outputs[0].movedim(self.classes, -1).flatten(0, -2)
        chances = torch.softmax(logits.detach().double(), -1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator).to(logits.device)
        likelihood = torch.log_softmax(logits, -1).gather(-1, drawn)
        each = max(1, len(logits) // max(1, len(outputs[0])))
        # KL is half the Fisher form, and each sample's the mean over its positions.
        likely: torch.Tensor = likelihood.sum() * (0.5 / each) ** 0.5
        return likely


def _rows(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(len(value), -1) if value.ndim > 1 else value.reshape(-1, 1)

"""What a loss is a mean over: the samples, or the labels that count. Micro-batches are weighted by it.

Knows labels, losses and what models say of themselves. Reads nothing back from a device. Knows no steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED_CLASS = -100

#: Labels that count, for labels and the model's keyword inputs: a scalar on the labels' device.
Counter = Callable[[Tensor, Mapping[str, Any]], Tensor]
#: What transformers calls the losses of its models, by whether a label is compared with the output one place before.
_SHIFTED = ("ForCausalLM", "ForConditionalGeneration")
_IN_PLACE = re.compile(r"ForMaskedLM|For(Token|Sequence|Image|Video|Audio)Classification")


def whole_labels(labels: Any) -> bool:
    """Whether labels are a tensor of integers, with a dimension for samples at least."""
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        return False
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def own_counter(model: nn.Module) -> Counter | None:
    """How many labels a model's own loss is a mean over; None where nothing says so.

    The outermost module with a method `counted_labels(labels, **inputs)` is asked, as that of our language models.
    Models of transformers are known by the name of their loss.
    """
    for module in model.modules():
        own = getattr(module, "counted_labels", None)
        if callable(own):
            return partial(_asked, own)
        if hasattr(module, "loss_type") and hasattr(module, "config"):
            shifts = shifts_labels(module)
            return None if shifts is None else _counter_of(shifts)
    return None


def _asked(own: Callable[..., Tensor], labels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    return own(labels, **inputs)


def shifts_labels(module: nn.Module) -> bool | None:
    """Whether a model of transformers compares a label with the output one place before it; None: not known."""
    kind = getattr(module, "loss_type", None) or type(module).__name__
    if getattr(module.config, "is_encoder_decoder", False):
        # The decoder's inputs are what is shifted there.
        return False if any(name in kind for name in _SHIFTED) else None
    if any(name in kind for name in _SHIFTED) or "LMHead" in kind:
        return True
    return False if _IN_PLACE.search(kind) else None


def _counter_of(shifts: bool) -> Counter:
    return lambda labels, _: counted(labels[:, 1:] if shifts and labels.ndim > 1 else labels)


def loss_counter(loss: Any) -> Counter | None:
    """How many labels a loss function (outputs, labels) is a mean over; None where nothing says so.

    Known are torch's cross entropy and negative log likelihood, and functions that have an attribute
    `counted_labels`, itself a function of the labels.
    """
    own = getattr(loss, "counted_labels", None)
    if callable(own):
        return lambda labels, _: own(labels)
    if loss is F.cross_entropy or loss is F.nll_loss:
        return lambda labels, _: counted(labels)
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and loss.reduction == "mean":
        return lambda labels, _: counted(labels, loss.ignore_index, loss.weight)
    return None


def counted(labels: Tensor, ignore_index: int = IGNORED_CLASS, class_weights: Tensor | None = None) -> Tensor:
    """Labels that are not `ignore_index`, or the sum of their classes' weights.

    Example:
        >>> counted(torch.tensor([[3, -100], [0, 1]])).item()
        3
    """
    counts = labels != ignore_index
    if class_weights is None:
        return counts.sum()
    weights = class_weights.to(labels.device)[labels.long() * counts]
    return (weights * counts).sum()

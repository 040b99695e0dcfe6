"""Weights of samples and tokens that come with a batch: entries `loss_weight` and `token_weights` of its dict.

With `loss_weight` the loss is the mean over samples of weight times the sample's own mean; with `token_weights` alone
it is the weighted mean over labels. Reads nothing back from a device. Knows no steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import InputError
from ..data import batch_size, slice_batch
from ._counted import IGNORED_CLASS, shifts_labels

ENTRIES = ("loss_weight", "token_weights")


class Weights(NamedTuple):
    """What a batch says of its weights, with the texts packed into its rows; None where it says nothing."""

    samples: Tensor | None
    tokens: Tensor | None
    sequence_ids: Tensor | None


def weight_entries(model: nn.Module) -> frozenset[str]:
    """Entries of a batch that are no inputs of this model but weights of its loss.

    A model whose `forward` names `loss_weight` uses it itself; `token_weights` go with the labels.
    """
    named = inspect.signature(model.forward).parameters
    return frozenset(name for name in ENTRIES if name not in named or (name == ENTRIES[1] and "labels" in named))


def take_weights(kwargs: Mapping[str, Any], entries: frozenset[str]) -> tuple[dict[str, Any], Weights | None]:
    """Keyword inputs without the weights, and those; None where there are none.

    Raises:
        InputError: weights that are no floating tensors.
    """
    found = {name: kwargs[name] for name in ENTRIES if name in entries and kwargs.get(name) is not None}
    inputs = {name: value for name, value in kwargs.items() if name not in entries}
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or not value.is_floating_point():
            given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{name} in a batch is {given}; a floating tensor, a number for each, is needed.")
    if not found:
        return inputs, None
    return inputs, Weights(found.get(ENTRIES[0]), found.get(ENTRIES[1]), inputs.get("sequence_ids"))


def spread(counts: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """Weights of each label's loss, and what their sum of products is divided by: the loss is (w * l).sum() / size.

    Args:
        counts: booleans [B, ...], which labels count.

    Returns:
        Weights of the shape of `counts`, and a scalar: samples with a label that counts, or the sum of tokens' weights.

    Raises:
        InputError: the weights have another shape.

    Example:
        >>> spread(torch.tensor([[True, True], [True, False]]), Weights(torch.tensor([1.0, 3.0]), None, None))
        (tensor([[0.5000, 0.5000],
                [3.0000, 0.0000]]), tensor(2))
    """
    each = counts.float()
    if weights.tokens is not None:
        if weights.tokens.shape != counts.shape:
            raise _misfit("token_weights", weights.tokens, counts)
        each = torch.where(counts, weights.tokens.to(torch.promote_types(weights.tokens.dtype, torch.float32)), 0)
    if weights.samples is None:
        return each, each.sum()
    rows = each.reshape(len(each), -1)
    ids, given = _owners(rows, weights, counts)
    sums = rows.new_zeros(len(rows), given.shape[1]).scatter_add(1, ids, rows)
    present = sums != 0
    per_token = torch.where(present, given.to(rows.dtype) / torch.where(present, sums, 1), 0).gather(1, ids) * rows
    return per_token.view_as(each), present.sum()


def _owners(rows: Tensor, weights: Weights, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Which sample of its row each label is of, and the samples' weights [B, samples]."""
    samples, ids = weights.samples, weights.sequence_ids
    assert samples is not None, "asked with weights of samples only"
    if len(samples) != len(rows) or samples.ndim > (1 if ids is None else 2):
        raise _misfit("loss_weight", samples, counts)
    if ids is None or ids.shape != rows.shape:
        return torch.zeros_like(rows, dtype=torch.long), samples.reshape(-1, 1)
    # Sample 0 is padding. A row has at most as many samples as tokens.
    width = rows.shape[1] + 1
    if samples.ndim == 1:
        return ids.long(), samples.unsqueeze(1).expand(-1, width)
    return ids.long(), F.pad(samples, (1, width - 1 - samples.shape[1]))


def _misfit(name: str, given: Tensor, counts: Tensor) -> InputError:
    return InputError(f"{name} of shape {tuple(given.shape)} with labels of shape {tuple(counts.shape)}: one a "
                      f"{'token' if name == ENTRIES[1] else 'sample'} is needed.")  # fmt: skip


def counting(labels: Tensor, shifts: bool, sequence_ids: Tensor | None) -> Tensor:
    """Which labels count, each at its own place; of a model that shifts not the first of a text."""
    counts = labels != IGNORED_CLASS
    if not shifts or labels.ndim < 2:
        return counts
    counts = torch.cat([torch.zeros_like(counts[:, :1]), counts[:, 1:]], 1)
    if sequence_ids is None or sequence_ids.shape != labels.shape:
        return counts
    before = F.pad(sequence_ids[:, :-1], (1, 0))
    return counts & (sequence_ids == before) & (sequence_ids != 0)


def mean_of(losses: Tensor, each: Tensor, size: Tensor) -> Tensor:
    """The weighted mean of losses, of which those without a weight may be no number."""
    return torch.where(each == 0, 0, losses * each.to(losses.device)).sum() / torch.where(size == 0, 1, size)


def from_logits(logits: Any, labels: Any, shifts: bool, weights: Weights) -> Tensor:
    """The weighted loss of a model of transformers over tokens or classes, from its logits [B, ..., K].

    Raises:
        InputError: logits and labels do not fit.
    """
    if not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape or logits.shape[-1] < 2:
        raise unknown("the model's own loss")
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED_CLASS) if shifts and labels.ndim > 1 else labels
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(wide.flatten(0, -2), following.flatten().long(), reduction="none").view_as(labels)
    if following is not labels:
        losses = F.pad(losses[:, :-1], (1, 0))
    return mean_of(losses, *spread(counting(labels, shifts, weights.sequence_ids), weights))


def of_each_sample(loss: Callable[[Any, Any], Any], output: Any, labels: Any, weights: Weights) -> Tensor:
    """The weighted mean over samples of a loss function, called once for each.

    Raises:
        InputError: there are weights of tokens, or of several samples a row.
    """
    given = weights.samples
    if weights.tokens is not None or given is None or given.ndim > 1:
        raise unknown("the given loss")
    size = batch_size(labels) if labels is not None else batch_size(output)
    if len(given) != size:
        raise InputError(f"loss_weight of shape {tuple(given.shape)} with {size} samples: one each is needed.")
    parts = [loss(slice_batch(output, i, i + 1), slice_batch(labels, i, i + 1)).reshape(()) for i in range(size)]
    losses = torch.stack(parts)
    return (losses * given.to(losses)).mean()


def shifts_of(model: nn.Module) -> bool | None:
    """Whether a model compares a label with the output one place before it; None: nothing says so."""
    for module in model.modules():
        own = getattr(module, "shifts_labels", None)
        if isinstance(own, bool):
            return own
        if hasattr(module, "loss_type") and hasattr(module, "config"):
            return shifts_labels(module)
    return None


def unknown(what: str) -> InputError:
    """The error where weights came and the loss is no sum over samples or tokens that could take them."""
    return InputError(
        f"the batch has weights (loss_weight or token_weights), and {what} takes none. Weights of samples go with "
        "every loss= of (outputs, labels); weights of tokens with Llama, GPT2, the language models of transformers, "
        "and the default cross entropy. A model may take them itself: name them in its forward."
    )

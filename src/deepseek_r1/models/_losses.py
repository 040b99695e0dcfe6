"""The losses that models compute when they are given labels. Knows no architecture."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core import InputError
from ..ops import known_labels, linear_cross_entropy

IGNORED = -100
#: Tokens whose logits exist at once where the output layer has to be called.
CHUNK_ROWS = 512


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None = None, present: Tensor | None = None
) -> Tensor:
    """The loss of a classifier, in fp32 or wider.

    Without a `problem_type` it is told from shapes and types: one output a sample is a regression (mean squared
    error), integer labels are classes (cross entropy, -100 does not count), boolean or floating labels of the logits'
    shape are a yes or no for each class (binary cross entropy). Where nothing counts the loss is 0.

    Args:
        logits: [..., K].
        labels: integers [...]; or numbers or booleans of the logits' shape ([...] too where K is 1).
        present: booleans [...], False for samples that are not there; None: all are.

    Raises:
        InputError: the labels fit none of these.

    Example:
        >>> classification_loss(torch.zeros(2, 4), torch.tensor([0, 3])).item() == torch.tensor(4.0).log().item()
        True
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    kind = problem_type or _kind(logits, labels)
    if kind == "single_label_classification":
        if labels.shape != logits.shape[:-1] or labels.is_floating_point():
            raise _misfit(logits, labels)
        classes = labels.long() if present is None else torch.where(present, labels.long(), IGNORED)
        total = F.cross_entropy(logits.flatten(0, -2), classes.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (classes != IGNORED).sum().clamp(min=1)
    if labels.shape != logits.shape and not (logits.shape[-1] == 1 and labels.shape == logits.shape[:-1]):
        raise _misfit(logits, labels)
    targets = labels.reshape(logits.shape).to(logits.dtype)
    function = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    if present is None:
        return function(logits, targets)
    counts = present.unsqueeze(-1).expand_as(logits)
    # Zeros first: what stands in place of absent samples may be no number.
    losses = function(torch.where(counts, logits, 0), torch.where(counts, targets, 0), reduction="none")
    return torch.where(counts, losses, 0).sum() / counts.sum().clamp(min=1)


def _kind(logits: Tensor, labels: Tensor) -> str:
    if logits.shape[-1] == 1:
        return "regression"
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return "multi_label_classification"
    return "single_label_classification"


def _misfit(logits: Tensor, labels: Tensor) -> InputError:
    return InputError(
        f"labels {tuple(labels.shape)} of {labels.dtype} with logits {tuple(logits.shape)}: give class numbers "
        f"{tuple(logits.shape[:-1])}, or numbers or booleans {tuple(logits.shape)}."
    )


def next_tokens(labels: Tensor, sequence_ids: Tensor | None) -> Tensor:
    """For each position the label of the next one, -100 at a text's last token: [B, L] -> [B, L].

    With `sequence_ids` a packed sequence does not predict the one behind it, and padding (id 0) predicts nothing.

    Example:
        >>> next_tokens(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 1, 2, 2]])).tolist()
        [[6, -100, 8, -100]]
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if sequence_ids is None:
        return following
    same = (F.pad(sequence_ids[:, 1:], (0, 1)) == sequence_ids) & (sequence_ids != 0)
    return torch.where(same, following, IGNORED)


def output_logits(hidden: Tensor, output: nn.Module | Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., D] by an output layer, or by a matrix [V, D]."""
    return F.linear(hidden, output) if isinstance(output, Tensor) else output(hidden)


def next_token_loss(
    hidden_BLD: Tensor,
    output: nn.Module | Tensor,
    labels: Tensor,
    sequence_ids: Tensor | None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """The loss of a language model from its last hidden states; labels are the tokens themselves, not shifted.

    Args:
        output: the output layer, or the matrix [V, D]. A plain `nn.Linear` is not called but read, which makes logits
            and gradients in one pass; any other module (with an adapter, with few bits) is called.
        token_weights: [B, L], what it counts for to predict a token; the loss is then their weighted mean.
    """
    following = next_tokens(labels, sequence_ids)
    rows = None if token_weights is None else F.pad(token_weights[:, 1:], (0, 1)).detach()
    if isinstance(output, Tensor):
        return linear_cross_entropy(hidden_BLD, output, following, ignore_index=IGNORED, row_weights=rows)
    if type(output).forward is nn.Linear.forward:
        weight, bias = cast(nn.Linear, output).weight, cast(nn.Linear, output).bias
        return linear_cross_entropy(hidden_BLD, weight, following, bias, ignore_index=IGNORED, row_weights=rows)
    counts = following != IGNORED
    shares = counts if rows is None else torch.where(counts, rows, 0)
    parts = (part.split(CHUNK_ROWS) for part in (hidden_BLD.flatten(0, 1), following.flatten(), shares.flatten()))
    total = torch.zeros((), device=hidden_BLD.device)
    for hidden_CD, labels_C, shares_C in zip(*parts, strict=True):
        # Logits of all tokens would be the largest tensor of a step: each chunk's are made anew in the backward pass.
        total = total + checkpoint(_summed_loss, output, hidden_CD, labels_C, shares_C, use_reentrant=False)
    whole = shares.sum()
    return total / torch.where(whole == 0, 1, whole)


def _summed_loss(output: nn.Module, hidden_CD: Tensor, labels_C: Tensor, shares_C: Tensor) -> Tensor:
    logits_CV = output(hidden_CD)
    logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
    labels_C, wrong = known_labels(labels_C, logits_CV.shape[1], IGNORED)
    losses_C = F.cross_entropy(logits_CV, labels_C, ignore_index=IGNORED, reduction="none")
    return (losses_C * shares_C).sum() * torch.where(wrong, torch.nan, 1.0)


def counted_next_tokens(labels: Tensor, sequence_ids: Tensor | None, token_weights: Tensor | None = None) -> Tensor:
    """What `next_token_loss` is a mean over: the number of labels that count, or the sum of their weights.

    Example:
        >>> counted_next_tokens(torch.tensor([[5, 6, -100, 8]]), None).item()
        2
    """
    counts = next_tokens(labels, sequence_ids) != IGNORED
    if token_weights is None:
        return counts.sum()
    return torch.where(counts, F.pad(token_weights[:, 1:], (0, 1)), 0).sum()

"""Packed rows as a model and a loss need them: who may attend to whom, and what each token's loss counts for.

`sequence_ids` [B, L] says which sample of its row a token belongs to: 1, 2, ...; 0 is padding. Knows no models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import ConfigError, InputError


def block_mask(sequence_ids: Tensor, *, causal: bool = True) -> Tensor:
    """The mask with which a token attends to its own sample only.

    Padding attends to itself, so that no row of the softmax is empty; nothing else attends to it.

    Args:
        sequence_ids: [B, L], integers, 0 for padding.
        causal: a token attends to itself and what is before it; otherwise to all of its sample.

    Returns:
        Boolean [B, 1, L, L], True where attention is allowed, as
        `torch.nn.functional.scaled_dot_product_attention(attn_mask=)` takes it.

    Raises:
        InputError: `sequence_ids` has another form.

    Example:
        >>> block_mask(torch.tensor([[1, 1, 2, 0]])).int()[0, 0].tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    """
    _check(sequence_ids)
    length = sequence_ids.shape[1]
    same = sequence_ids[:, None, :, None] == sequence_ids[:, None, None, :]
    allowed = same & (sequence_ids > 0)[:, None, None, :]
    everyone = torch.ones(length, length, dtype=torch.bool, device=sequence_ids.device)
    if causal:
        allowed = allowed & everyone.tril()
    return allowed | torch.eye(length, dtype=torch.bool, device=sequence_ids.device)


def per_sample_loss(token_losses: Tensor, sequence_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each sample's mean loss over its tokens, as if it had been alone in its row.

    Its mean is the mean over samples; `sample_weights` gives the same with shapes that never change.

    Args:
        token_losses: [B, L], one loss a token (`cross_entropy(..., reduction="none")`).
        sequence_ids: [B, L], integers, 0 for padding.
        mask: [B, L], True (or 1) for tokens that count, as `labels != -100`; None: all but padding.

    Returns:
        [samples]: row by row, in a row in the order of its samples. A sample without a token that counts is left out.

    Raises:
        InputError: shapes that differ.

    Example:
        >>> losses = torch.tensor([[1.0, 3.0, 5.0, 9.0]])
        >>> per_sample_loss(losses, torch.tensor([[1, 1, 2, 0]]))
        tensor([2., 5.])
    """
    counted = _counted(token_losses, sequence_ids, mask)
    zeros = token_losses.new_zeros(sequence_ids.shape[0], sequence_ids.shape[1] + 1)
    ids = sequence_ids.long()
    # A loss that does not count may be infinite or no number; 0 times it would not be 0.
    sums = zeros.scatter_add(1, ids, token_losses.masked_fill(~counted, 0))
    counts = zeros.scatter_add(1, ids, counted.to(token_losses.dtype))
    present = counts > 0
    return sums[present] / counts[present]


def sample_weights(sequence_ids: Tensor, mask: Tensor | None = None, *, per: str = "sample") -> Tensor:
    """Weights [B, L] for token losses, adding up to 1: `(token_losses * weights).sum()` is the batch's loss.

    Args:
        sequence_ids: [B, L], integers, 0 for padding.
        mask: [B, L], True (or 1) for tokens that count; None: all but padding.
        per: "sample": the mean over samples of each one's mean over tokens; "token": the mean over all tokens.

    Raises:
        ConfigError: another `per`.
        InputError: shapes that differ.

    Example:
        >>> sample_weights(torch.tensor([[1, 1, 2, 0]]))
        tensor([[0.2500, 0.2500, 0.5000, 0.0000]])
    """
    if per not in ("sample", "token"):
        raise ConfigError(f'sample_weights(per={per!r}): "sample" or "token" is needed.')
    counted = _counted(sequence_ids, sequence_ids, mask).to(torch.get_default_dtype())
    if per == "token":
        return counted / counted.sum().clamp(min=1)
    zeros = counted.new_zeros(sequence_ids.shape[0], sequence_ids.shape[1] + 1)
    counts = zeros.scatter_add(1, sequence_ids.long(), counted)
    samples = (counts > 0).sum().clamp(min=1)
    return counted / (counts.gather(1, sequence_ids.long()).clamp(min=1) * samples)


def _counted(values: Tensor, sequence_ids: Tensor, mask: Tensor | None) -> Tensor:
    _check(sequence_ids)
    for name, tensor in (("the losses", values), ("the mask", mask)):
        if tensor is not None and tensor.shape != sequence_ids.shape:
            raise InputError(
                f"{name} have shape {tuple(tensor.shape)} and sequence_ids {tuple(sequence_ids.shape)}; both need "
                "one entry a token. (Shifted losses are one shorter: shift sequence_ids too, or pad the losses.)"
            )
    real = sequence_ids > 0
    return real if mask is None else real & mask.bool()


def _check(sequence_ids: Tensor) -> None:
    if sequence_ids.ndim != 2 or sequence_ids.is_floating_point() or sequence_ids.is_complex():
        raise InputError(
            f"sequence_ids of shape {tuple(sequence_ids.shape)} and {sequence_ids.dtype} were given; integers [B, L] "
            "are needed, as a DSDataLoader with batching='packed' gives them."
        )

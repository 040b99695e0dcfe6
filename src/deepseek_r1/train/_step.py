"""One optimizer step as a plain function: forward, backward, check, update. Knows nothing about epochs or files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data import batch_size, slice_batch, to_device, unpack_batch
from ._clip import clip_grad_norm_, same_kind, total_norm
from ._objective import Objective

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: mean loss over the samples, a scalar on the training device, detached.
        samples: samples in all batches of the step.
        bad: whether the loss or a gradient was not finite: a bool where that is known, on a GPU a scalar tensor
            (1 or 0) that may still be in the making. The parameters were not changed if it is true.
        grad_norm: norm of all gradients together before clipping, a scalar; None without `clip_grad_norm`.
    """

    loss: Tensor
    samples: int
    bad: bool | Tensor
    grad_norm: Tensor | None = None


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which a forward pass runs at "fp32", "bf16" or "fp16"."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


def accumulate(
    forward: Callable[..., Any],
    objective: Objective,
    batches: Sequence[Any],
    *,
    device: torch.device,
    precision: str = "fp32",
    micro_batch_size: int | None = None,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, int]:
    """Forward and backward over all batches; adds the gradients of the mean loss over all their samples.

    Each piece's loss is weighted with its share of what the loss is a mean over, so that the sum is the gradient of
    one big batch, whatever the pieces' sizes: of the samples, or of the labels that count where it averages over those
    (see `Objective.counted`). That holds for models that treat samples independently; batch norm does not.

    Returns:
        The mean loss with the objective's penalties (detached scalar) and the number of samples.
    """
    parts = [unpack_batch(batch) for batch in batches]
    sizes = [batch_size(part) for part in parts]
    pieces = [p for part, size in zip(parts, sizes, strict=True) for p in _pieces(part, size, micro_batch_size or size)]
    shares: list[float | Tensor] = []
    sum_loss: Tensor | None = None
    for number, piece in enumerate(pieces):
        args, kwargs, labels = to_device(piece, device)
        with autocast(device, precision):
            loss, output = objective(forward, args, kwargs, labels)
        # Which loss it is may be known from the first output on.
        shares = shares or _shares(objective, pieces)
        weighted = _weighted(loss, shares[number])
        (weighted if scale is None else scale(weighted)).backward()
        sum_loss = weighted.detach() if sum_loss is None else sum_loss + weighted.detach()
        # Nothing of this piece may be alive while the next one runs.
        del piece, args, kwargs, labels, loss, output, weighted
    assert sum_loss is not None, "a step needs at least one batch"
    penalty = objective.penalty()
    if penalty is not None:
        # Frozen parameters may leave nothing to differentiate.
        if penalty.requires_grad:
            (penalty if scale is None else scale(penalty)).backward()
        sum_loss = sum_loss + penalty.detach().to(sum_loss.device)
    return sum_loss, sum(sizes)


def _pieces(part: Any, size: int, most: int) -> list[Any]:
    """A batch in views of at most `most` samples."""
    if most >= size:
        return [part]
    return [slice_batch(part, start, min(start + most, size)) for start in range(0, size, most)]


def _shares(objective: Objective, pieces: Sequence[Any]) -> list[float | Tensor]:
    """What part of the whole each piece's loss is. Counts of labels stay where the labels are."""
    if len(pieces) == 1:
        return [1.0]
    counts = [objective.counted(kwargs, labels) for _, kwargs, labels in pieces]
    known = [count for count in counts if count is not None]
    if len(known) < len(pieces):
        sizes = [batch_size(piece) for piece in pieces]
        return [size / sum(sizes) for size in sizes]
    each = torch.stack(known).double()
    total = each.sum()
    # A step without a label that counts has no gradient.
    return list((each / torch.where(total == 0, 1.0, total)).unbind())


def _weighted(loss: Tensor, share: float | Tensor) -> Tensor:
    if not isinstance(share, Tensor):
        return loss if share == 1.0 else loss * share
    share = share.to(loss.device, torch.promote_types(loss.dtype, torch.float32), non_blocking=True)
    # The mean over no labels is not a number; such a piece is no part of the whole.
    return torch.where(share == 0, 0.0, loss * share)


def train_step(
    model: Callable[..., Any],
    batches: Sequence[Any],
    optimizer: Optimizer,
    objective: Objective,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    micro_batch_size: int | None = None,
    clip_grad_norm: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> StepResult:
    """One optimizer step on `batches`: clears gradients, runs forward and backward, updates if all is finite.

    Args:
        model: the module, or what `torch.compile` made of it.
        batches: loader batches (see `deepseek_r1.data.unpack_batch`) that make up the step.
        micro_batch_size: samples per forward pass; larger batches are split.
        clip_grad_norm: largest allowed norm of all gradients together.
        scaler: for precision "fp16": an overflowing gradient then skips the update and lowers the scale.

    Raises:
        InputError: a batch that is ragged or empty, or no loss fits.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batch = (torch.ones(3, 4), torch.tensor([0, 1, 1]))
        >>> result = train_step(model, [batch], optimizer, Objective(model))
        >>> result.samples, result.bad
        (3, False)
    """
    place = torch.device(device)
    optimizer.zero_grad(set_to_none=True)
    loss, samples = accumulate(
        model, objective, batches, device=place, precision=precision, micro_batch_size=micro_batch_size,
        scale=None if scaler is None else scaler.scale,
    )  # fmt: skip
    if scaler is not None:
        norm = _scaled_update(optimizer, scaler, clip_grad_norm)
        # With a non-finite loss every gradient is, and the scaler has skipped the update.
        bad: bool | Tensor = (~torch.isfinite(loss)).float()
        return StepResult(loss, samples, bool(bad) if place.type == "cpu" else bad, norm)
    parameters = _parameters(optimizer)
    norm = None if clip_grad_norm is None else clip_grad_norm_(parameters, clip_grad_norm)
    bad = _not_finite(loss, parameters, norm)
    return StepResult(loss, samples, guarded_update(optimizer, bad), norm)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _scaled_update(optimizer: Optimizer, scaler: torch.amp.GradScaler, clip: float | None) -> Tensor | None:
    norm = None
    if clip is not None:
        scaler.unscale_(optimizer)
        norm = clip_grad_norm_(_parameters(optimizer), clip)
    scaler.step(optimizer)
    scaler.update()
    return norm


def _not_finite(loss: Tensor, parameters: list[nn.Parameter], norm: Tensor | None) -> bool | Tensor:
    """Whether the loss or any gradient is not finite, by their norm if it is known. Reads the device only if it is
    the CPU."""
    if norm is not None:
        found = (~torch.isfinite(loss.float() + norm.to(loss.device))).float()
    else:
        found = _found_inf([loss, *(p.grad for p in parameters if p.grad is not None)])
    return bool(found) if loss.device.type == "cpu" else found


def found_on_device(loss: Tensor, optimizer: Optimizer, clip: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """1.0 if the loss or a gradient is not finite, else 0.0; the gradients' norm; what clipping divides them by.

    Gradients are read once and not written: a fused optimizer divides them as it goes.
    """
    gradients = [p.grad for p in _parameters(optimizer)]
    total = total_norm([g for g in gradients if g is not None])
    bad = (~torch.isfinite(loss.float() + total)).float()
    return bad, total, None if clip is None else ((total + 1e-6) / clip).clamp(min=1.0)


def _found_inf(values: list[Tensor]) -> Tensor:
    """1.0 if any value is not finite, else 0.0, on the device of the first."""
    found = torch.zeros((), device=values[0].device)
    dense = [v if v.layout == torch.strided else v.coalesce().values() for v in values]
    for (device, _), group in same_kind(dense).items():
        # What torch's GradScaler calls, with a scale of one: a single kernel where norms or sums take many.
        there = found if device == found.device else torch.zeros((), device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(group, there, _one(device))
        if there is not found:
            found += there.to(found.device)
    return found


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def guarded_update(optimizer: Optimizer, bad: bool | Tensor) -> bool | Tensor:
    """`optimizer.step()` unless `bad`; gives `bad` back.

    Fused CUDA optimizers and those of `train.optimizers` take the verdict on the device (the door that torch's
    GradScaler uses), so that the host need not wait for it. Others cost one wait per step.
    """
    if isinstance(bad, Tensor) and skips_on_device(optimizer):
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
        return bad
    if not bool(bad):
        optimizer.step()
        return False
    return True


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether an optimizer leaves out an update by a number on the device, as torch's fused ones do."""
    if getattr(optimizer, "skips_on_device", False):
        return True
    fused: Iterable[Any] = (group.get("fused") for group in optimizer.param_groups)
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(fused)


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler | None:
    """The gradient scaler that "fp16" needs; None otherwise."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None

"""Where a loss or gradient first stopped being finite: the batches are run once more under hooks.

Knows modules and batches. Knows nothing about loops or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import batch_size, slice_batch, tensors, to_device, unpack_batch
from ._objective import Objective
from ._rng import preserved_rng
from ._step import autocast


def first_non_finite(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Any],
    *,
    device: torch.device,
    precision: str,
    micro_batch_size: int | None,
    first_batch: int = 1,
) -> str:
    """Say where the step on `batches` first goes non-finite; the model must have the step's own weights.

    Where there are several, the batch is named too, the first of them by the number `first_batch`. The run costs one
    step, draws from a copy of the generators' state, and leaves no gradients behind.
    """
    model.zero_grad(set_to_none=True)
    with preserved_rng(device):
        for number, batch in enumerate(batches, first_batch):
            part = unpack_batch(batch)
            size = batch_size(part)
            for start in range(0, size, micro_batch_size or size):
                stop = min(start + (micro_batch_size or size), size)
                piece = part if stop - start == size else slice_batch(part, start, stop)
                found = _look(model, objective, to_device(piece, device), device, precision)
                model.zero_grad(set_to_none=True)
                if found:
                    return found if len(batches) == 1 else f"in batch {number}, {found}"
    return (
        "it did not show again when the batch was run once more (random layers drew other numbers, or only the sum of "
        "the gradients overflows)"
    )


def _look(model: nn.Module, objective: Objective, piece: Any, device: torch.device, precision: str) -> str:
    args, kwargs, labels = piece
    for name, part in (("inputs", (args, kwargs)), ("labels", labels)):
        if not all(_finite(t) for t in tensors(part)):
            return f"the batch's {name} hold non-finite numbers: the data are at fault, no layer"
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"the parameter {name!r} holds non-finite numbers before the step"
    found: list[str] = []
    handles = [m.register_forward_hook(_forward_hook(n, found)) for n, m in model.named_modules()]
    handles += [p.register_post_accumulate_grad_hook(_grad_hook(n, found)) for n, p in _trainable(model)]
    try:
        with autocast(device, precision):
            loss, _ = objective(model, args, kwargs, labels)
        if not found and not _finite(loss):
            return f"every layer's output is finite, the loss itself ({objective.name}) is not"
        if not found:
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _forward_hook(name: str, found: list[str]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        # A child's hook runs before its parent's, so the first one names the innermost layer.
        if not found and not all(_finite(t) for t in _outputs(output)):
            where = f"layer {name!r}" if name else "the model itself"
            found.append(
                f"the output of {where} ({type(module).__name__}) is the first that is not finite in the forward pass"
            )

    return hook


def _grad_hook(name: str, found: list[str]) -> Any:
    def hook(parameter: Tensor) -> None:
        if not found and parameter.grad is not None and not _finite(parameter.grad):
            found.append(
                f"the forward pass is finite; the gradient of parameter {name!r} is the first that is not finite in "
                "the backward pass"
            )

    return hook


def _outputs(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Mapping | tuple | list | Tensor):
        return tensors(output)
    return tensors(list(getattr(output, "__dict__", {}).values()))


def _finite(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex()) or bool(torch.isfinite(value).all())

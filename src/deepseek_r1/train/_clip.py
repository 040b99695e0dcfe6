"""The norm of all gradients together, and clipping by it. Reads nothing from the device; knows nothing about loops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def same_kind(values: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """Tensors by device and type: what one kernel can take."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for value in values:
        kinds.setdefault((value.device, value.dtype), []).append(value)
    return kinds


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place so that their norm together is at most `max_norm`; gives the norm before.

    Squares are summed in fp32 (fp64 for fp64 gradients): in fp16 the norm of finite gradients overflows at 65,504, in
    bf16 it has two or three digits. Gradients may be on several devices, of several types, and sparse.

    Returns:
        The norm, a scalar on the first gradient's device.

    Example:
        >>> p = nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> float(clip_grad_norm_([p], 1.0)), [round(x, 4) for x in p.grad.tolist()]
        (5.0, [0.6, 0.8])
    """
    grads = []
    for p in parameters:
        if p.grad is not None:
            if p.grad.layout == torch.sparse_coo:
                # Numbers for one place are added up before they are squared.
                p.grad = p.grad.coalesce()
            grads.append(p.grad if p.grad.layout == torch.strided else p.grad.values())
    total = total_norm(grads)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for (device, dtype), group in same_kind(grads).items():
        torch._foreach_mul_(group, factor.to(device, dtype.to_real()))
    return total


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm of dense tensors together, a scalar on the first one's device; zero if there are none."""
    if not grads:
        return torch.zeros(())
    home = grads[0].device
    norms = []
    for (_, dtype), group in same_kind(grads).items():
        wide = torch.promote_types(dtype.to_real(), torch.float32)
        each = torch._foreach_norm(group, 2, dtype=None if dtype.is_complex else wide)
        norms.append(torch.linalg.vector_norm(torch.stack(list(each))).to(home, wide))
    if len(norms) == 1:
        return norms[0]
    widest = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    return torch.linalg.vector_norm(torch.stack([norm.to(widest) for norm in norms]))

"""One moment of an optimizer on the device: the count, the rate, and whether the step is to leave no trace.

Everything is a scalar tensor where it must be one, so that no step waits for the device and a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: The integer of the same width, by which a gradient's bits are kept or cleared.
_BITS = {
    torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16,
}  # fmt: skip
#: Elements worked on at once: bounds what temporaries take (128 MiB each in fp32).
CHUNK = 1 << 25


@dataclass(frozen=True)
class Tick:
    """What all parameters that step together share.

    Attributes:
        count: updates taken, this one included; a scalar on the device, of which nothing is read.
        bad: true if the step is to change nothing (a scalar on the device); None if that is ruled out.
        scale: what the gradients were multiplied with, or None.
        lr: the learning rate.
    """

    count: Tensor
    bad: Tensor | None
    scale: Tensor | None
    lr: float | Tensor

    def scalar(self, value: float | Tensor, idle: float, dtype: torch.dtype) -> float | Tensor:
        """`value` as a factor for tensors of `dtype`; on a bad step `idle`, the factor that changes nothing."""
        if isinstance(value, Tensor):
            value = value.double()
        elif self.bad is None:
            return value
        else:
            value = torch.full((), value, dtype=torch.float64, device=self.count.device)
        if self.bad is not None:
            # A tensor on the device: of a number torch makes one that is copied there, for which it would wait.
            value = torch.where(self.bad, torch.full_like(value, idle), value)
        return value.to(dtype)

    def correction(self, beta: float) -> Tensor:
        """The bias correction 1 - beta ** count (Kingma and Ba 2015), in fp64: in fp32 it loses four digits."""
        return 1.0 - torch.pow(beta, self.count.double().clamp(min=1.0))

    def gradients(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients in the precision of the update: without the scale, and zero on a bad step.

        Changes `grads` on bad and on scaled steps, as torch's fused optimizers do.
        """
        if self.bad is not None:
            # A product with zero would leave NaN; on the bits it is exact, and one kernel serves many tensors.
            bits = _BITS[grads[0].dtype]
            torch._foreach_mul_([g.view(bits) for g in grads], (~self.bad).to(bits))
        usable = promoted(grads)
        if self.scale is not None:
            # The scale of a bad step may be no number either.
            torch._foreach_mul_(usable, self.scalar(1.0 / self.scale.double(), 1.0, usable[0].dtype))
        return usable


def promoted(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors themselves if they are fp32 or fp64, else copies in fp32."""
    if tensors[0].dtype in (torch.float32, torch.float64):
        return list(tensors)
    copies = [torch.empty_like(t, dtype=torch.float32) for t in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies


def write_back_(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give `params` the `values` that `promoted` made of them."""
    if values[0] is not params[0]:
        torch._foreach_copy_(list(params), list(values))


def chunks(params: Sequence[Tensor], limit: int = CHUNK) -> Iterator[list[Tensor]]:
    """Lists of tensors with at most `limit` elements together, or of one larger tensor.

    Example:
        >>> [len(part) for part in chunks([torch.zeros(3)] * 5, 6)]
        [2, 2, 1]
    """
    part: list[Tensor] = []
    size = 0
    for p in params:
        if part and size + p.numel() > limit:
            yield part
            part, size = [], 0
        part.append(p)
        size += p.numel()
    if part:
        yield part

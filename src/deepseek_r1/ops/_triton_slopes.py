"""A Triton kernel for cross entropy: losses of rows of logits, and the logits replaced by the losses' derivatives.

Called only for tensors on a CUDA device: Triton comes with torch's CUDA builds alone. Knows no linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

#: Logits that one program reads at a time; a row is one program's.
_BLOCK = 8192


if triton is not None:

    @triton.jit
    def _slopes_kernel(logits, labels, losses, width, ignored, WRITE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(labels + row)
        counts = label != ignored
        safe = tl.where(counts, label, 0)
        logits += row * width
        # The largest so far, and the sum of exponentials less it (Milakov and Gimelshein, 2018).
        top = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for start in range(0, width, BLOCK):
            places = start + tl.arange(0, BLOCK)
            x = tl.load(logits + places, mask=places < width, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
        lse = top + tl.log(total)
        picked = tl.load(logits + safe).to(tl.float32)
        tl.store(losses + row, tl.where(counts, lse - picked, 0.0))
        if WRITE:
            for start in range(0, width, BLOCK):
                places = start + tl.arange(0, BLOCK)
                x = tl.load(logits + places, mask=places < width, other=float("-inf")).to(tl.float32)
                slopes = tl.exp(x - lse) - (places == safe).to(tl.float32)
                slopes = tl.where(counts, slopes, 0.0)
                tl.store(logits + places, slopes.to(logits.dtype.element_ty), mask=places < width)


def slopes_(logits: Tensor, labels: Tensor, ignore_index: int, *, write: bool) -> Tensor:
    """Cross entropy of each row; with `write`, `logits` become the derivatives of these by them, in place.

    Args:
        logits: [rows, width], contiguous, on a CUDA device, of a floating type up to float32.
        labels: integers [rows] from 0 to width - 1, `ignore_index` where a row does not count. Nothing here looks
            whether they are; `known_labels` does.

    Returns:
        float32 [rows], 0 where a row does not count.
    """
    assert logits.is_contiguous(), "rows lie one behind the other"
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        block = min(_BLOCK, triton.next_power_of_2(logits.shape[1]))
        _slopes_kernel[(logits.shape[0],)](
            logits, labels, losses, logits.shape[1], ignore_index, WRITE=write, BLOCK=block, num_warps=16
        )  # fmt: skip
    return losses

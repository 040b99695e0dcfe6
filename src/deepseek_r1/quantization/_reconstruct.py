"""Rounding that is improved weight by weight until the layer's output changes no less.

The squared error of a layer's output is a quadratic form of its weights' errors and the covariance of its inputs, so
that no data have to run through it again: the form tells, for each weight in turn, which integer is best while the
others stay.

Sources: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020 (the objective; minimised by
gradients as there, it fell below that of compensated rounding nowhere but in depthwise layers: docs/log.md); Behdin et
al., QuantEase, 2023 (one weight after the other).
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

#: Passes over all weights; fewer if nothing changes any more.
_PASSES = 12
_BLOCK = 128
#: Seconds after which no further pass begins.
_SECONDS = 10.0


def improve_rounding(
    work: Tensor, steps: Tensor, scale: Tensor, low: Tensor, high: Tensor, covariance: Tensor
) -> Tensor:
    """Integers that make the error of the layer's output no larger than the given ones do.

    Args:
        work: exact weights, float32 [groups, inputs, out].
        steps: integers (as float32) to begin with, less the zero point, of the same shape.
        scale: of the grid, of the same shape; `low` and `high` are the limits of `steps`.
        covariance: of the inputs, float32 [groups, inputs, inputs].
    """
    steps = steps.clone()
    curvature = covariance.diagonal(dim1=1, dim2=2).unsqueeze(2).clamp_min(1e-30)
    deadline = time.monotonic() + _SECONDS
    for _ in range(_PASSES):
        moved = 0
        for start in range(0, work.shape[1], _BLOCK):
            moved += _improve_block(work, steps, scale, low, high, covariance, curvature, start)
        if not moved or time.monotonic() > deadline:
            break
    return steps


def _improve_block(
    work: Tensor, steps: Tensor, scale: Tensor, low: Tensor, high: Tensor, covariance: Tensor, curvature: Tensor,
    start: int,
) -> int:  # fmt: skip
    stop = min(start + _BLOCK, work.shape[1])
    # Half the slope of the form along each weight of the block; what changes in the block is added as it happens.
    slope = covariance[:, start:stop] @ torch.addcmul(work, steps, scale, value=-1)
    own = covariance[:, start:stop, start:stop]
    changes = torch.zeros_like(slope)
    moved = 0
    for i in range(start, stop):
        at, row = i - start, slice(i, i + 1)
        now = slope[:, at : at + 1]
        if at:
            now = torch.baddbmm(now, own[:, at : at + 1, :at], changes[:, :at], alpha=-1)
        best = steps[:, row] + now / (curvature[:, row] * scale[:, row])
        best = best.round_().clamp_(low[:, row], high[:, row])
        change = best - steps[:, row]
        moved += int(torch.count_nonzero(change))
        changes[:, at : at + 1] = change * scale[:, row]
        steps[:, row] = best
    return moved

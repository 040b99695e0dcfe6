"""Rounding that gradients pass: weights and activations on a grid whose steps are learned. Knows no graph.

Source: Bhalgat et al., LSQ+, 2020 (learned steps and offsets, and their gradients). Steps are learned as logarithms
here, so that they stay positive and the optimizer moves them by shares; an offset is the grid's zero point, which is
rounded as engines want it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import INT8_ACTIVATION, INT8_WEIGHT, UINT4

#: Zero points are learned in this unit (steps of the grid), so that one learning rate suits them and logarithms.
_ZERO_UNIT = 256.0


class _OnGrid(torch.autograd.Function):
    """Numbers rounded to a grid. Gradients: straight through inside its range, LSQ+'s for step and zero point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        # In the same order as the neutral form's operators, so that both round alike.
        exact = x * (1.0 / scale)
        steps = torch.round(exact).clamp_(low - zero, high - zero)
        ctx.save_for_backward(exact, steps, scale, zero)
        return steps * scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        exact, steps, scale, zero = ctx.saved_tensors
        inside = torch.round(exact) == steps
        of_x = grad * inside if ctx.needs_input_grad[0] else None
        of_scale = of_zero = None
        if ctx.needs_input_grad[1]:
            of_scale = (grad * torch.where(inside, steps - exact, steps)).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            of_zero = (grad.masked_fill(inside, 0.0) * -scale).sum_to_size(zero.shape)
        return of_x, of_scale, of_zero, None, None


class _Rounded(torch.autograd.Function):
    """The nearest integer; its gradient is the number's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class FakeActivation(nn.Module):
    """int8 activations with one learned range.

    Args:
        scale: step of the grid to begin with.
        zero: zero point to begin with, -128 to 127.
    """

    def __init__(self, scale: float, zero: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(float(scale)).log())
        self.zero = nn.Parameter(torch.tensor(zero / _ZERO_UNIT))

    def grid(self) -> list[nn.Parameter]:
        """What is learned of the grid."""
        return [self.log_scale, self.zero]

    def affine(self) -> tuple[float, int]:
        """Scale and zero point as the neutral form has them."""
        low, high = INT8_ACTIVATION.range
        with torch.no_grad():
            return float(self.log_scale.exp()), int((self.zero * _ZERO_UNIT).round().clamp(low, high))

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...]."""
        low, high = INT8_ACTIVATION.range
        zero = _Rounded.apply(self.zero * _ZERO_UNIT).clamp(low, high)
        found: Tensor = _OnGrid.apply(x, self.log_scale.exp(), zero, low, high)
        return found


class FakeRows(nn.Module):
    """int8 activations with a range for each row, found at each call; gradients pass as if nothing was rounded."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., in]."""
        low, high = INT8_ACTIVATION.range
        ops = torch.ops.quantized_decomposed
        with torch.no_grad():
            scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
            stored = ops.quantize_per_token(x, scale, zero, low, high, torch.int8)
            change = ops.dequantize_per_token(stored, scale, zero, low, high, torch.int8, torch.float32) - x
        found: Tensor = x + change
        return found


class FakeWeight(nn.Module):
    """A weight in 8 bits with a learned step for each output, or in 4 bits with one for each group of inputs.

    Args:
        exact: the float weight [out, ...].
        stored: integers to begin with, of its shape. Weights begin as near to `exact` as these integers allow, so that
            the first answers are those of the stored weight.
        scales: [out], or [out, in / group_size].
        zeros: of the groups, 0 to 15; None in 8 bits.
    """

    zeros: Tensor

    def __init__(self, exact: Tensor, stored: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
        super().__init__()
        self.shape = exact.shape
        self.range = INT8_WEIGHT.range if zeros is None else UINT4
        view = (*scales.shape, -1)
        step = scales.float().unsqueeze(-1)
        self.register_buffer("zeros", torch.zeros_like(step) if zeros is None else zeros.float().unsqueeze(-1))
        middle = stored.reshape(view).float() - self.zeros
        # Just inside the cell, because its border rounds to either side.
        offset = (exact.detach().float().reshape(view) / step - middle).clamp_(-0.499, 0.499)
        self.weight = nn.Parameter(((middle + offset) * step).reshape(self.shape))
        self.log_scale = nn.Parameter(step.log())

    def grid(self) -> list[nn.Parameter]:
        """What is learned of the grid."""
        return [self.log_scale]

    def stored(self) -> tuple[Tensor, Tensor]:
        """Integers of the weight's shape and the scales, as the neutral form has them."""
        low, high = self.range
        with torch.no_grad():
            scale = self.log_scale.exp()
            steps = torch.round(self.weight.reshape(*scale.shape[:-1], -1) * (1.0 / scale))
            values = (steps + self.zeros).clamp(low, high).reshape(self.shape)
            return values.to(torch.int8 if self.range == INT8_WEIGHT.range else torch.uint8), scale.squeeze(-1)

    def forward(self) -> Tensor:
        """The weight on its grid."""
        scale = self.log_scale.exp()
        rows = self.weight.reshape(*scale.shape[:-1], -1)
        found: Tensor = _OnGrid.apply(rows, scale, self.zeros, *self.range)
        return found.reshape(self.shape)

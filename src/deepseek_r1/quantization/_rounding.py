"""Rounding of weights that looks at what the layer does with them, instead of at each weight alone.

Weights are rounded one input at a time; the error of each is passed on to the inputs that are still to come, in the
proportion in which they appear together in the calibration data. The mean error that remains goes into the bias.

Sources: Frantar et al., GPTQ, 2022 (Cholesky form, damping); Nagel et al., Data-Free Quantization Through Weight
Equalization and Bias Correction, 2019 (bias correction, here with measured means).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..core import UINT4, IntFormat
from ..graph.editing import argument
from ._groups import Grouped
from ._observe import watch

aten = torch.ops.aten
#: Inputs of one output beyond which the second moments are not worth their cost (a 3 x 3 convolution of 455 channels).
_LARGEST = 4096
#: Positions of a feature map that are looked at in one batch.
_POSITIONS = 8192
_DAMPING = 0.01
_BLOCK = 64


@dataclass
class Moments:
    """Second moments [groups, inputs, inputs] and means [groups, inputs] of what one layer multiplies by weights."""

    second: torch.Tensor
    mean: torch.Tensor
    count: int


def observe_moments(
    module: GraphModule, layers: dict[Node, torch.Tensor], batches: list[tuple[Any, ...]]
) -> dict[Node, Moments]:
    """Moments of each layer's inputs over the batches; layers with too many inputs are left out.

    Args:
        layers: layer node -> weight [out, in / groups, ...].
    """
    found: dict[Node, Moments] = {}
    by_input: dict[Node, list[Node]] = {}
    for layer, weight in layers.items():
        if weight[0].numel() <= _LARGEST and isinstance(layer.args[0], Node):
            by_input.setdefault(layer.args[0], []).append(layer)

    def see(node: Node, value: torch.Tensor) -> None:
        for layer in by_input[node]:
            x = _columns(layer, layers[layer], value.detach()).double()
            second, total = x @ x.transpose(1, 2), x.sum(2)
            old = found.get(layer)
            if old is None:
                found[layer] = Moments(second, total, x.shape[2])
            else:
                found[layer] = Moments(old.second + second, old.mean + total, old.count + x.shape[2])

    watch(module, by_input, batches, see)
    return {k: Moments(m.second / m.count, m.mean / m.count, m.count) for k, m in found.items() if m.count}


def _columns(layer: Node, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What each output position multiplies by the weights: [groups, inputs, positions]."""
    if layer.target is aten.linear.default:
        flat = x.reshape(-1, x.shape[-1])
        return flat[:: max(1, len(flat) // _POSITIONS)].T.unsqueeze(0)
    dims = weight.ndim - 2
    stride, dilation = _each(argument(layer, 3, 1), dims), _each(argument(layer, 5, 1), dims)
    groups = argument(layer, 6, 1)
    x = x if x.ndim == weight.ndim else x.unsqueeze(0)
    padding = argument(layer, 4, 0)
    if padding in ("same", "valid"):
        full = [d * (k - 1) * (padding == "same") for d, k in zip(dilation, weight.shape[2:])]
        sides = [(size // 2, size - size // 2) for size in full]
    else:
        sides = [(size, size) for size in _each(padding, dims)]
    x = torch.nn.functional.pad(x, [p for side in reversed(sides) for p in side])
    for axis in range(dims):
        reach = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        x = x.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    # [batch, channels, *positions, *kernel] -> [groups, channels / groups * kernel, batch * positions]
    batch, channels = x.shape[:2]
    kernel = weight[0, 0].numel()
    x = x.reshape(batch, channels, -1, kernel)
    x = x[:, :, :: max(1, batch * x.shape[2] // _POSITIONS)]
    x = x.reshape(batch, groups, channels // groups, -1, kernel).permute(1, 2, 4, 0, 3)
    return x.reshape(groups, channels // groups * kernel, -1)


def _each(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value) * (count if len(value) == 1 else 1)


@dataclass
class _Grid:
    """What integers stand for: real = (stored - zero) * scale. Both [groups, out, inputs], or 1 in their last place."""

    scale: torch.Tensor
    zero: torch.Tensor
    low: int
    high: int

    def nearest(self, real: torch.Tensor, columns: slice | int = slice(None)) -> torch.Tensor:
        """Integers for some columns of real numbers."""
        stored = torch.round(real / self._of(self.scale, columns) + self._of(self.zero, columns))
        return torch.clamp(stored, self.low, self.high)

    def real(self, stored: torch.Tensor, columns: slice | int = slice(None)) -> torch.Tensor:
        """What some columns of integers stand for."""
        return (stored - self._of(self.zero, columns)) * self._of(self.scale, columns)

    @staticmethod
    def _of(values: torch.Tensor, columns: slice | int) -> torch.Tensor:
        if values.shape[2] == 1:
            return values[:, :, 0] if isinstance(columns, int) else values
        return values[:, :, columns]

    def ordered(self, order: torch.Tensor) -> _Grid:
        """The grid with its inputs in another order."""
        scale, zero = (v if v.shape[2] == 1 else v[:, :, order] for v in (self.scale, self.zero))
        return _Grid(scale, zero, self.low, self.high)


def round_weight(
    weight: torch.Tensor, scales: torch.Tensor, moments: Moments, fmt: IntFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored integers for one fixed scale an output, and the mean error they leave in each output.

    Args:
        weight: [out, in / groups, ...] float.
        scales: [out].
        moments: of the layer's inputs.

    Returns:
        int8 tensor of the weight's shape; float64 [out], to be added to the bias.
    """
    groups, inputs = moments.mean.shape
    exact = weight.detach().double().reshape(groups, -1, inputs)
    scale = scales.double().reshape(groups, -1, 1)
    stored, missing = _compensated(exact, _Grid(scale, torch.zeros_like(scale), *fmt.range), moments)
    return stored.to(torch.int8).reshape(weight.shape), missing.reshape(-1)


def round_groups(weight: torch.Tensor, grouped: Grouped, moments: Moments) -> tuple[Grouped, torch.Tensor]:
    """Other integers for the scales and zero points of a weight in 4 bits, and the mean error they leave.

    The inputs that move most come first, while there are others left to take up their error.

    Args:
        weight: [out, in] float.
        moments: of the layer's inputs.

    Returns:
        The weight in 4 bits; float64 [out], to be added to the bias.
    """
    size = grouped.group_size
    scale, zero = (v.double().repeat_interleave(size, 1).unsqueeze(0) for v in (grouped.scales, grouped.zeros))
    exact = weight.detach().double().unsqueeze(0)
    order = moments.second[0].diagonal().argsort(descending=True, stable=True)
    stored, missing = _compensated(exact, _Grid(scale, zero, *UINT4), moments, order)
    return replace(grouped, values=stored[0].to(torch.uint8)), missing.reshape(-1)


def _compensated(
    exact: torch.Tensor, grid: _Grid, moments: Moments, order: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [groups, out, inputs] of a grid, and the mean error [groups, out] they leave.

    Args:
        order: in which the inputs are rounded; by default as they stand.
    """
    second = moments.second.clone()
    diagonal = second.diagonal(dim1=1, dim2=2)
    # An input that is always zero says nothing; 1 keeps the matrix invertible and leaves its weight to plain rounding.
    diagonal += _DAMPING * diagonal.mean(1, keepdim=True) + (diagonal.mean(1, keepdim=True) == 0)
    if order is None:
        stored = _passed_on(exact, grid, second)
    else:
        back = order.argsort()
        stored = _passed_on(exact[:, :, order], grid.ordered(order), second[:, order][:, :, order])[:, :, back]
    nearest = grid.nearest(exact)
    # Compensation is greedy and the matrix damped, so that in a rare row plain rounding does less harm.
    worse = _error(exact - grid.real(stored), moments) > _error(exact - grid.real(nearest), moments)
    stored = torch.where(worse[:, :, None], nearest, stored)
    return stored, torch.einsum("goi,gi->go", exact - grid.real(stored), moments.mean)


def _passed_on(exact: torch.Tensor, grid: _Grid, second: torch.Tensor) -> torch.Tensor:
    """Round one input after the other; those behind it take up its error."""
    inputs = exact.shape[2]
    upper = torch.linalg.cholesky(torch.linalg.inv(second), upper=True)
    work, stored = exact.clone(), torch.zeros_like(exact)
    for start in range(0, inputs, _BLOCK):
        # Errors reach the rest of their block at once, and the inputs behind it in one product per block.
        stop = min(start + _BLOCK, inputs)
        errors = torch.zeros_like(work[:, :, start:stop])
        for i in range(start, stop):
            stored[:, :, i] = grid.nearest(work[:, :, i], i)
            error = (work[:, :, i] - grid.real(stored[:, :, i], i)) / upper[:, i, i][:, None]
            work[:, :, i:stop] -= error[:, :, None] * upper[:, i, i:stop][:, None, :]
            errors[:, :, i - start] = error
        work[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return stored


def _error(change: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Mean squared error [groups, out] of each output once its mean error is taken out."""
    mean = torch.einsum("goi,gi->go", change, moments.mean)
    return torch.einsum("goi,gij,goj->go", change, moments.second, change) - mean**2

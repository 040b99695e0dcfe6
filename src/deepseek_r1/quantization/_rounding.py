"""Rounding of weights that looks at what the layer does with them, instead of at each weight alone.

Weights are rounded one input at a time; the error of each is passed on to the inputs that are still to come, in the
proportion in which they appear together in the calibration data. The mean error that remains goes into the bias.

Sources: Frantar et al., GPTQ, 2022 (Cholesky form, damping); Nagel et al., Data-Free Quantization Through Weight
Equalization and Bias Correction, 2019 (bias correction, here with measured means).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..core import UINT4, IntFormat
from ..graph.editing import argument
from ._groups import Grouped
from ._observe import not_finite, watch
from ._reconstruct import improve_rounding

aten = torch.ops.aten
#: Inputs of one output beyond which the second moments are not worth their cost (a 3 x 3 convolution of 455 channels).
_LARGEST = 4096
#: Positions of a feature map that are looked at in one batch, and in all of them.
_POSITIONS, _ENOUGH = 8192, 65536
_DAMPING = 0.01
_BLOCK = 128


@dataclass
class Moments:
    """Second moments and means of what one layer multiplies by weights; layers that read the same share one.

    Attributes:
        second: float64 [groups, inputs, inputs].
        mean: float64 [groups, inputs].
        count: positions that were looked at.
        improved: whether rounding is improved after compensation, see `_reconstruct`.
        shared: whether several layers have these moments, so that keeping what follows from them is worth its memory.
    """

    second: torch.Tensor
    mean: torch.Tensor
    count: int
    shared: bool = False
    improved: bool = False
    _factors: dict[bool, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    def factor(self, *, ordered: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The order in which inputs are rounded, last first, and how far an error reaches in it.

        Args:
            ordered: the inputs that move most are rounded first, while there are others left to take up their error
                (one group only); else as they stand.

        Returns:
            float32 [groups, inputs, inputs], the inverse of the lower Cholesky factor of the damped second moments
            in that order; int64 [inputs], the order.
        """
        if ordered not in self._factors:
            size = self.mean.shape[1]
            order = self.second[0].diagonal().argsort(stable=True) if ordered else torch.arange(size).flip(0)
            found = _inverse_factor(self.second, order.to(self.second.device)), order
            if not self.shared:
                return found
            self._factors[ordered] = found
        return self._factors[ordered]


def _inverse_factor(second: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """What spreads errors: the inverse of the lower Cholesky factor of the damped moments with inputs in an order.

    In the order from the last input to the first, it is the upper factor of the inverse from the first to the last, so
    no full inverse has to be made. Damping bounds the ratio of the largest to the smallest eigenvalue by a hundred
    times the size, which float32 bears; float64 is there for what it does not.
    """
    matrix = second.to(torch.float32, copy=True)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    # An input that is always zero says nothing; 1 keeps the matrix invertible and leaves its weight to plain rounding.
    diagonal += _DAMPING * diagonal.mean(1, keepdim=True) + (diagonal.mean(1, keepdim=True) == 0)
    # A symmetric matrix: whole rows are copied, twice, because single elements take longer than the factor itself.
    matrix = _rows(_turned(_rows(matrix, order)), order)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any() or not torch.isfinite(lower).all():
        lower = torch.linalg.cholesky(matrix.double())
    eye = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse: torch.Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.float().contiguous()


def _turned(values: torch.Tensor) -> torch.Tensor:
    """[groups, a, b] as [groups, b, a], copied. Two dimensions alone are copied many times faster."""
    return values[0].T.contiguous().unsqueeze(0) if len(values) == 1 else values.transpose(1, 2).contiguous()


def _rows(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[groups, a, b] with `a` in an order, for the same reason in two dimensions where there is one group."""
    return values[0].index_select(0, order).unsqueeze(0) if len(values) == 1 else values.index_select(1, order)


def observe_moments(
    module: GraphModule, layers: dict[Node, torch.Tensor], batches: list[tuple[Any, ...]]
) -> dict[Node, Moments]:
    """Moments of each layer's inputs over the batches; layers with too many inputs are left out.

    Args:
        layers: layer node -> weight [out, in / groups, ...].

    Raises:
        InputError: a batch gives a value that is not finite.
    """
    alike: dict[Node, dict[Any, list[Node]]] = {}
    for layer, weight in layers.items():
        source = layer.args[0]
        if weight[0].numel() <= _LARGEST and isinstance(source, Node):
            alike.setdefault(source, {}).setdefault(_geometry(layer, weight), []).append(layer)
    limit = max(1, min(_POSITIONS, _ENOUGH // max(1, len(batches))))
    found: dict[tuple[Node, Any], Moments] = {}

    def see(node: Node, value: torch.Tensor) -> None:
        for geometry, (layer, *others) in alike[node].items():
            x = _columns(layer, layers[layer], value.detach().float(), limit)
            # Products in float32, their sum over the batches in float64.
            second, total = (x @ x.transpose(1, 2)).double(), x.sum(2, dtype=torch.float64)
            if not torch.isfinite(total).all():
                raise not_finite(node)
            old = found.get((node, geometry))
            if old is None:
                found[node, geometry] = Moments(second, total, x.shape[2], bool(others))
            else:
                old.second += second
                old.mean += total
                old.count += x.shape[2]

    watch(module, alike, batches, see)
    for moments in found.values():
        moments.second /= max(1, moments.count)
        moments.mean /= max(1, moments.count)
    return {layer: m for (node, geometry), m in found.items() if m.count for layer in alike[node][geometry]}


def _geometry(layer: Node, weight: torch.Tensor) -> Any:
    """What makes two layers that read the same value multiply the same columns."""
    if layer.target is aten.linear.default:
        return ()
    return (tuple(weight.shape[1:]), *(str(argument(layer, i)) for i in range(3, 7)))


def _columns(layer: Node, weight: torch.Tensor, x: torch.Tensor, limit: int = _POSITIONS) -> torch.Tensor:
    """What each output position multiplies by the weights: [groups, inputs, positions], `limit` to twice as many."""
    if layer.target is aten.linear.default:
        flat = x.reshape(-1, x.shape[-1])
        return flat[:: max(1, len(flat) // limit)].T.unsqueeze(0)
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
    x = x[:, :, :: max(1, batch * x.shape[2] // limit)]
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

    def nearest(self, real: torch.Tensor) -> torch.Tensor:
        """Integers for real numbers."""
        return torch.clamp(torch.round(real / self.scale + self.zero), self.low, self.high)

    def real(self, stored: torch.Tensor) -> torch.Tensor:
        """What integers stand for."""
        return (stored - self.zero) * self.scale


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
    exact = weight.detach().float().reshape(groups, -1, inputs)
    scale = scales.reshape(groups, -1, 1)
    stored, missing = _compensated(exact, _Grid(scale, torch.zeros_like(scale), *fmt.range), moments)
    return stored.to(torch.int8).reshape(weight.shape), missing.reshape(-1)


def round_groups(weight: torch.Tensor, grouped: Grouped, moments: Moments) -> tuple[Grouped, torch.Tensor]:
    """Other integers for the scales and zero points of a weight in 4 bits, and the mean error they leave.

    Args:
        weight: [out, in] float.
        moments: of the layer's inputs.

    Returns:
        The weight in 4 bits; float64 [out], to be added to the bias.
    """
    size = grouped.group_size
    scale, zero = (v.float().repeat_interleave(size, 1).unsqueeze(0) for v in (grouped.scales, grouped.zeros))
    exact = weight.detach().float().unsqueeze(0)
    stored, missing = _compensated(exact, _Grid(scale, zero, *UINT4), moments, ordered=True)
    return replace(grouped, values=stored[0].to(torch.uint8)), missing.reshape(-1)


def _compensated(
    exact: torch.Tensor, grid: _Grid, moments: Moments, *, ordered: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [groups, out, inputs] of a grid, and the mean error [groups, out] they leave.

    Args:
        exact: float32.
        ordered: as in `Moments.factor`.
    """
    stored = _passed_on(exact, grid, *moments.factor(ordered=ordered))
    nearest = grid.nearest(exact)
    # Compensation is greedy and the matrix damped, so that in a rare row plain rounding does less harm. Float64: a
    # difference of two squares.
    left, plain = (exact.double() - grid.real(v).double() for v in (stored, nearest))
    candidates = [(nearest, plain)]
    if moments.improved:
        other = _improved(exact, grid, moments, stored)
        candidates.append((other, exact.double() - grid.real(other).double()))
    least = _error(left, moments)
    for other, change in candidates:
        error = _error(change, moments)
        better = error < least
        least = torch.where(better, error, least)
        stored = torch.where(better[:, :, None], other, stored)
        left = torch.where(better[:, :, None], change, left)
    return stored, torch.einsum("goi,gi->go", left, moments.mean)


def _improved(exact: torch.Tensor, grid: _Grid, moments: Moments, stored: torch.Tensor) -> torch.Tensor:
    """Integers that leave no larger error than `stored`, once its mean is taken out."""
    mean = moments.mean
    covariance = (moments.second - mean[:, :, None] * mean[:, None, :]).float()
    scale, zero, work, begin = (_turned(v.expand_as(exact)) for v in (grid.scale, grid.zero, exact, stored))
    steps = improve_rounding(work, begin - zero, scale, grid.low - zero, grid.high - zero, covariance)
    return _turned(steps + zero)


def _passed_on(exact: torch.Tensor, grid: _Grid, reach: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Round one input after the other, from the last of an order to its first; those still to come take up its error.

    Inputs lie in rows here, [groups, inputs, out], so that what one step reads is contiguous; and the grid has its zero
    points at 0, which saves half of the few operations that each input costs.
    """
    work, scale, zero = (_rows(_turned(v.expand_as(exact)), order) for v in (exact, grid.scale, grid.zero))
    low, high, inverse = grid.low - zero, grid.high - zero, 1 / scale
    steps = torch.empty_like(work)
    for stop in range(work.shape[1], 0, -_BLOCK):
        # Errors reach an input of their own block when its turn comes, and those before it in one product per block.
        start = max(stop - _BLOCK, 0)
        errors = torch.zeros_like(work[:, start:stop])
        own = reach[:, start:stop, start:stop].transpose(1, 2).contiguous()
        share = 1 / own.diagonal(dim1=1, dim2=2).unsqueeze(2)
        for i in range(stop - 1, start - 1, -1):
            at, row = i - start, slice(i, i + 1)
            value = work[:, row]
            if i + 1 < stop:
                value = torch.baddbmm(value, own[:, at : at + 1, at + 1 :], errors[:, at + 1 :], alpha=-1)
            found = (value * inverse[:, row]).round_().clamp_(low[:, row], high[:, row])
            steps[:, row] = found
            error = torch.addcmul(value, found, scale[:, row], value=-1)
            torch.mul(error, share[:, at : at + 1], out=errors[:, at : at + 1])
        if start:
            work[:, :start] -= reach[:, start:stop, :start].transpose(1, 2) @ errors
    return _turned(_rows(steps.add_(zero), order.argsort()))


def _error(change: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Mean squared error [groups, out] of each output once its mean error is taken out."""
    mean = torch.einsum("goi,gi->go", change, moments.mean)
    return torch.einsum("goi,gij,goj->go", change, moments.second, change) - mean**2

"""Weights in 4 bits, a scale and a zero point for each group along the inputs, chosen without data.

Sources: Banner et al., Post-training 4-bit quantization, 2019 (clipping by squared error, here by grid); Badri and
Shaji, Half-Quadratic Quantization, 2023 (a norm below 1, in which few large errors weigh less than many small
ones).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core import UINT4, ConfigError
from ._observe import in_16_bits

METHODS = ("minmax", "mse", "hqq")
_LOW, _HIGH = UINT4
_MIDDLE = (_LOW + _HIGH + 1) // 2
#: Weights that are fitted at once: as many as lie in a core's own cache together with what is made of them.
_AT_ONCE = 1 << 17
#: Shares of the full range that "mse" tries.
_SHRINK = tuple(1.0 - 0.03 * i for i in range(14))
#: The norm, the first penalty and its growth, and the most steps of half-quadratic splitting, as its authors set them.
_NORM, _PENALTY, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20


@dataclass(frozen=True)
class Grouped:
    """A weight in 4 bits: real = (stored - zero) * scale.

    Attributes:
        values: uint8 [out, in], 0 to 15.
        scales: float32 [out, in / group_size].
        zeros: int8 [out, in / group_size], 0 to 15.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @property
    def group_size(self) -> int:
        """Weights that share a scale."""
        return self.values.shape[1] // self.scales.shape[1]

    def weight(self) -> torch.Tensor:
        """The weight that is meant, float32 [out, in]."""
        out, groups = self.scales.shape
        real = (self.values.reshape(out, groups, -1) - self.zeros[:, :, None]) * self.scales[:, :, None]
        return real.reshape(out, -1)


def method_for(chosen: str, *, compensated: bool) -> str:
    """The method that "auto" stands for: the full range where the rounding makes up for it, else "hqq"."""
    if chosen != "auto":
        return chosen
    return "minmax" if compensated else "hqq"


def quantize_groups(weight: torch.Tensor, group_size: int, *, symmetric: bool, method: str) -> Grouped:
    """The 4-bit form of a weight.

    Args:
        weight: [out, in], `in` a multiple of `group_size`.
        symmetric: all zero points in the middle (8).
        method: "minmax" (the whole range of each group), "mse" (the part of it with the smallest squared error), or
            "hqq" (scale and zero point moved to the smallest error in a norm below 1).

    Example:
        >>> weight = torch.linspace(-1, 1, 64).reshape(2, 32)
        >>> found = quantize_groups(weight, 32, symmetric=False, method="hqq")
        >>> bool((found.weight() - weight).abs().max() < 0.08)
        True
    """
    if method not in METHODS:
        raise ConfigError(f"quantize_groups(method={method!r}): one of {', '.join(METHODS)} is needed.")
    out, inputs = weight.shape
    assert inputs % group_size == 0, f"{inputs} inputs do not divide into groups of {group_size}"
    rows = weight.detach().float().reshape(-1, group_size)
    # A group lies in a column: what is the same for all its weights is then contiguous over the groups.
    parts = [part.T.contiguous() for part in rows.split(max(1, _AT_ONCE // group_size))]
    found = [_fitted(part, symmetric, method) for part in parts]
    values, scale, zero = (torch.cat(pieces, 1) for pieces in zip(*found))
    shape = (out, inputs // group_size)
    return Grouped(values.T.reshape(out, inputs), scale.reshape(shape), zero.reshape(shape))


def _fitted(columns: torch.Tensor, symmetric: bool, method: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = (v.unsqueeze(0) for v in torch.aminmax(columns, dim=0))
    limits = low.clamp_max(0), high.clamp_min(0)
    scale, zero = _whole_range(*limits, symmetric)
    if method != "minmax":
        scale, zero = _smallest_squared_error(columns, *limits, symmetric)
    if method == "hqq":
        scale, zero = _half_quadratic(columns, scale, zero, symmetric)
    scale = in_16_bits(scale)
    return _stored(columns, scale, zero).to(torch.uint8), scale, zero.to(torch.int8)


def _stored(columns: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return torch.clamp(torch.round(columns / scale + zero), _LOW, _HIGH)


def _whole_range(low: torch.Tensor, high: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [1, groups] that cover ranges from `low` <= 0 to `high` >= 0, with 0.0 exact."""
    if symmetric:
        scale = torch.maximum(high / (_HIGH - _MIDDLE), -low / (_MIDDLE - _LOW)).clamp_min(1e-12)
        return scale, torch.full_like(scale, float(_MIDDLE))
    scale = ((high - low) / (_HIGH - _LOW)).clamp_min(1e-12)
    return scale, torch.clamp(torch.round(_LOW - low / scale), _LOW, _HIGH)


def _smallest_squared_error(
    columns: torch.Tensor, low: torch.Tensor, high: torch.Tensor, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    scale, zero = _whole_range(low, high, symmetric)
    best = torch.full_like(scale, float("inf"))
    for share in _SHRINK:
        tried_scale, tried_zero = _whole_range(low * share, high * share, symmetric)
        error = _change(columns, tried_scale, tried_zero)[0].square_().sum(0, keepdim=True).mul_(tried_scale.square())
        wins = error < best
        best, scale, zero = (
            torch.where(wins, new, old) for new, old in ((error, best), (tried_scale, scale), (tried_zero, zero))
        )
    return scale, zero


def _change(columns: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of a grid, and what is stored less the zero point; both in steps of the grid."""
    exact = columns * (1 / scale)
    steps = torch.round(exact).clamp_(_LOW - zero, _HIGH - zero)
    return exact.sub_(steps), steps


def _half_quadratic(
    columns: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the error into a sparse part and a rest, and fit the grid to the weights without the sparse part.

    The authors move the zero point and keep it a real number. Engines store it as an integer, so each step rounds it
    and fits the scale to the integers by least squares instead; a group keeps what was best so far.
    """
    best = torch.full_like(scale, float("inf"))
    now_scale, now_zero, penalty = scale, zero, _PENALTY
    for _ in range(_STEPS + 1):
        # Errors in steps of the grid, because the penalty is a number without a unit.
        change, steps = _change(columns, now_scale, now_zero)
        size = change.abs()
        # Two functions, because one power takes three times as long.
        slope = size.clamp_min(1e-8).log2_().mul_(_NORM - 1).exp2_()
        error = (size * slope).sum(0, keepdim=True) * now_scale.pow(_NORM)
        wins = error < best
        if not wins.any():
            break
        best, scale, zero = (
            torch.where(wins, new, old) for new, old in ((error, best), (now_scale, scale), (now_zero, zero))
        )
        sparse = (size - slope / penalty).clamp_min_(0).copysign(change)
        dense = change.sub_(sparse)
        target = steps + dense
        if not symmetric:
            moved = (now_zero - dense.mean(0, keepdim=True)).round_().clamp_(_LOW, _HIGH)
            steps += now_zero - moved
            now_zero = moved
        fitted = (
            now_scale * (steps * target).sum(0, keepdim=True) / steps.square().sum(0, keepdim=True).clamp_min(1e-12)
        )
        now_scale = torch.where(fitted > 0, fitted, now_scale)
        penalty *= _GROWTH
    return scale, zero

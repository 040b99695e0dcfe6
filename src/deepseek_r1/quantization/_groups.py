"""Weights in 4 bits, a scale and a zero point for each group along the inputs, chosen without data.

Sources: Banner et al., Post-training 4-bit quantization, 2019 (clipping by squared error, here by grid); Badri and
Shaji, Half-Quadratic Quantization, 2023 (a norm below 1, in which few large errors weigh less than many small
ones).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core import UINT4, ConfigError

METHODS = ("minmax", "mse", "hqq")
_LOW, _HIGH = UINT4
_MIDDLE = (_LOW + _HIGH + 1) // 2
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
    scale, zero = _whole_range(rows, 1.0, symmetric)
    if method != "minmax":
        scale, zero = _smallest_squared_error(rows, scale, zero, symmetric)
    if method == "hqq":
        scale, zero = _half_quadratic(rows, scale, zero, symmetric)
    values = _stored(rows, scale, zero)
    shape = (out, inputs // group_size)
    return Grouped(
        values.to(torch.uint8).reshape(out, inputs), scale.reshape(shape), zero.to(torch.int8).reshape(shape)
    )


def _stored(rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return torch.clamp(torch.round(rows / scale + zero), _LOW, _HIGH)


def _whole_range(rows: torch.Tensor, share: float, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [groups, 1] that cover a share of each group's range, with 0.0 exact."""
    low, high = (v.unsqueeze(1) * share for v in torch.aminmax(rows, dim=1))
    low, high = low.clamp_max(0), high.clamp_min(0)
    if symmetric:
        scale = torch.maximum(high / (_HIGH - _MIDDLE), -low / (_MIDDLE - _LOW)).clamp_min(1e-12)
        return scale, torch.full_like(scale, float(_MIDDLE))
    scale = ((high - low) / (_HIGH - _LOW)).clamp_min(1e-12)
    return scale, torch.clamp(torch.round(_LOW - low / scale), _LOW, _HIGH)


def _smallest_squared_error(
    rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    best = torch.full_like(scale, float("inf"))
    for share in _SHRINK:
        tried = _whole_range(rows, share, symmetric)
        best, scale, zero = _better(rows, best, scale, zero, *tried, norm=2.0)
    return scale, zero


def _better(
    rows: torch.Tensor, best: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor,
    other_scale: torch.Tensor, other_zero: torch.Tensor, *, norm: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The smaller error of each group, with its scale and zero point."""
    error = _error(rows, other_scale, other_zero, norm)
    wins = error < best
    return torch.where(wins, error, best), torch.where(wins, other_scale, scale), torch.where(wins, other_zero, zero)


def _error(rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, norm: float) -> torch.Tensor:
    change = (rows - (_stored(rows, scale, zero) - zero) * scale).abs()
    return (change.square() if norm == 2.0 else change.pow(norm)).sum(1, keepdim=True)


def _half_quadratic(
    rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the error into a sparse part and a rest, and fit the grid to the weights without the sparse part.

    The authors move the zero point and keep it a real number. Engines store it as an integer, so each step rounds it
    and fits the scale to the integers by least squares instead; a group keeps what was best so far.
    """
    best = _error(rows, scale, zero, _NORM)
    now_scale, now_zero, penalty = scale, zero, _PENALTY
    for _ in range(_STEPS):
        stored = _stored(rows, now_scale, now_zero)
        # Errors in steps of the grid, because the penalty is a number without a unit.
        change = rows / now_scale - (stored - now_zero)
        size = change.abs()
        sparse = change.sign() * (size - size.clamp_min(1e-8).pow(_NORM - 1) / penalty).clamp_min(0)
        target = rows - sparse * now_scale
        if not symmetric:
            real = (stored - target / now_scale).mean(1, keepdim=True)
            now_zero = torch.clamp(torch.round(real), _LOW, _HIGH)
        steps = stored - now_zero
        fitted = (steps * target).sum(1, keepdim=True) / steps.square().sum(1, keepdim=True).clamp_min(1e-12)
        now_scale = torch.where(fitted > 0, fitted, now_scale)
        before = best
        best, scale, zero = _better(rows, best, scale, zero, now_scale, now_zero, norm=_NORM)
        penalty *= _GROWTH
        if not (best < before).any():
            break
    return scale, zero

"""A layer's weight as a format stores it. Knows no graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core import INT8_WEIGHT, Int4Format, LayerFormat
from ._groups import Grouped, method_for, quantize_groups
from ._observe import quantize_weight
from ._rounding import Moments, round_groups, round_weight


@dataclass(frozen=True)
class StoredWeight:
    """A weight in the numbers of its format.

    Attributes:
        fmt: the format.
        values: the weight's own shape: bfloat16, int8, or uint8 of 4 bits.
        scales: float32 [out], or [out, groups] in 4 bits; None in bfloat16.
        zeros: int8 [out, groups] in 4 bits; else None.
        missing: float64 [out], the mean error that rounding left in each output, to be added to the bias; None where
            it is not known.
    """

    fmt: LayerFormat
    values: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    missing: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """The float32 weight that is meant, of the same shape."""
        if self.scales is None:
            return self.values.float()
        if self.zeros is not None:
            return Grouped(self.values, self.scales, self.zeros).weight()
        return self.values * self.scales.reshape(-1, *[1] * (self.values.ndim - 1))


def stored_weight(
    weight: torch.Tensor, fmt: LayerFormat, moments: Moments | None, *, clip: str, group_clip: str
) -> StoredWeight:
    """A weight in a format, float32 excepted.

    Args:
        weight: [out, in / groups, ...].
        moments: of what the layer reads, for compensated rounding; None rounds to the nearest.
        clip: how the range of 8-bit weights is found; `group_clip` that of 4-bit weights.
    """
    if not fmt.is_quantised:
        assert fmt.weight_bits == 16, f"{fmt} stores no other weight"
        return StoredWeight(fmt, weight.detach().to(torch.bfloat16))
    missing = None
    if isinstance(fmt, Int4Format):
        grouped = quantize_groups(
            weight,
            fmt.group_size,
            symmetric=fmt.symmetric,
            method=method_for(group_clip, compensated=moments is not None),
        )
        if moments is not None:
            grouped, missing = round_groups(weight, grouped, moments)
        return StoredWeight(fmt, grouped.values, grouped.scales, grouped.zeros, missing)
    values, scales = quantize_weight(weight, INT8_WEIGHT, clip)
    if moments is not None:
        values, missing = round_weight(weight, scales, moments, INT8_WEIGHT)
    return StoredWeight(fmt, values, scales, None, missing)

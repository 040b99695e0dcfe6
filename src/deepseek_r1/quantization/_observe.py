"""Ranges of activations, observed while calibration data run through a graph. Knows nothing about what is quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from ..core import InputError, IntFormat

_BINS = 2048
#: Weights that are looked at once: as many as lie in a core's own cache together with what is made of them.
_AT_ONCE = 1 << 16
#: Shares of the observed range that are tried as clipping limits.
_SHRINK = tuple(1.0 - 0.02 * i for i in range(31))


class _Watch(Interpreter):
    """Runs a graph and hands the value of each watched node to `see`."""

    def __init__(self, module: GraphModule, watched: Iterable[Node], see: Any) -> None:
        super().__init__(module)
        self._watched = set(watched)
        self._see = see

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self._watched:
            self._see(n, value)
        return value


def watch(
    module: GraphModule, nodes: Iterable[Node], batches: list[tuple[Any, ...]], see: Callable[[Node, Any], None]
) -> None:
    """Run flat positional inputs through the graph and call `see(node, value)` for each of `nodes`."""
    watcher = _Watch(module, nodes, see)
    for inputs in batches:
        with torch.no_grad():
            watcher.run(*inputs)


def not_finite(node: Node) -> InputError:
    """The error for a value of a calibration run that is not finite."""
    return InputError(f"calibration: the value {node.name!r} is not finite (NaN or infinity in data or model).")


class Ranges:
    """Smallest and largest value of each watched node, then a histogram between them."""

    def __init__(self, module: GraphModule, nodes: Iterable[Node]) -> None:
        self._module = module
        self.nodes = list(nodes)
        self.low: dict[Node, float] = {}
        self.high: dict[Node, float] = {}
        self._histogram: dict[Node, torch.Tensor] = {}

    def observe(self, batches: list[tuple[Any, ...]], *, histogram: bool) -> None:
        """Run flat positional inputs through the graph, twice if a histogram is wanted.

        Raises:
            InputError: a batch gives a value that is not finite.
        """
        for see in (self._see_range, self._see_histogram)[: 2 if histogram else 1]:
            watch(self._module, self.nodes, batches, see)

    def _see_range(self, node: Node, value: torch.Tensor) -> None:
        if not value.numel():
            return
        low, high = (float(v) for v in torch.aminmax(value.detach().float()))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise not_finite(node)
        self.low[node] = min(self.low.get(node, low), low)
        self.high[node] = max(self.high.get(node, high), high)

    def _see_histogram(self, node: Node, value: torch.Tensor) -> None:
        if not value.numel():
            return
        counts = torch.histc(value.detach().float(), bins=_BINS, min=self.low[node], max=self.high[node])
        self._histogram[node] = self._histogram.get(node, torch.zeros(_BINS)) + counts.cpu()

    def limits(self, node: Node, fmt: IntFormat, clip: str) -> tuple[float, float]:
        """The range to quantise: all of it ("minmax"), or the part with the smallest squared error ("mse").

        Source of the squared-error search: Banner et al., Post-training 4-bit quantization, 2019; here by grid.

        Raises:
            InputError: the batches held no values.
        """
        if node not in self.low:
            raise InputError("calibration saw no values; the batches are empty.")
        low, high = min(self.low[node], 0.0), max(self.high[node], 0.0)
        if clip == "minmax" or low == high:
            return low, high
        counts = self._histogram[node].double()
        width = (self.high[node] - self.low[node]) / _BINS
        centres = self.low[node] + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width
        best = (float("inf"), low, high)
        for share in _SHRINK:
            error = _error(centres, counts, low * share, high * share, fmt)
            best = min(best, (error, low * share, high * share))
        return best[1], best[2]


def _error(centres: torch.Tensor, counts: torch.Tensor, low: float, high: float, fmt: IntFormat) -> float:
    scale, zero = affine(low, high, fmt)
    q_low, q_high = fmt.range
    stored = torch.clamp(torch.round(centres / scale) + zero, q_low, q_high)
    return float(torch.sum(counts * (centres - (stored - zero) * scale) ** 2))


def affine(low: float, high: float, fmt: IntFormat) -> tuple[float, int]:
    """Scale and zero point that map [low, high] to the format's range, with 0.0 exact.

    Example:
        >>> scale, zero = affine(0.0, 2.55, IntFormat(symmetric=False))
        >>> round(scale, 4), zero
        (0.01, -128)
    """
    q_low, q_high = fmt.range
    if fmt.symmetric:
        return max(abs(low), abs(high), 1e-12) / q_high, 0
    scale = max(high - low, 1e-12) / (q_high - q_low)
    zero = round(q_low - low / scale)
    return scale, max(q_low, min(q_high, zero))


def quantize_weight(weight: torch.Tensor, fmt: IntFormat, clip: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 values and one scale for each slice along dimension 0.

    Args:
        weight: [out, ...].
        clip: "minmax", or "mse" for the clipping limit with the smallest squared error in each slice.

    Returns:
        int8 tensor of the weight's shape, float32 scales [out].
    """
    rows = weight.detach().reshape(weight.shape[0], -1)
    shares = _SHRINK[:16] if clip == "mse" else (1.0,)
    parts = rows.split(max(1, _AT_ONCE // max(1, rows.shape[1])))
    found = [_clipped(part.double(), fmt, shares) for part in parts]
    values, scales = (torch.cat(pieces) for pieces in zip(*found))
    return values.reshape(weight.shape), scales


def _clipped(rows: torch.Tensor, fmt: IntFormat, shares: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers of some rows and their scales: the share of each row's range with the smallest squared error."""
    largest = rows.abs().amax(dim=1).clamp_min(1e-12)
    q_low, q_high = fmt.range
    best_error = torch.full_like(largest, float("inf"))
    best_scale = largest / q_high
    for share in shares:
        scale = largest * share / q_high
        stored = torch.round(rows / scale[:, None]).clamp_(q_low, q_high)
        error = rows.addcmul(stored, scale[:, None], value=-1).square_().sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    scales = in_16_bits(best_scale.float())
    values = torch.clamp(torch.round(rows / scales.double()[:, None]), q_low, q_high)
    return values.to(torch.int8), scales


def in_16_bits(scales: torch.Tensor) -> torch.Tensor:
    """Scales [any shape] as float16 has them, where it is no coarser than elsewhere (from 2^-14 to 65504): 1/2048 off.

    They stay float32; a file may store them in two bytes.
    """
    half = scales.half()
    return torch.where((scales >= 2.0**-14) & half.isfinite(), half.float(), scales)

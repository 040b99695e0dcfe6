"""What a way of fine-tuning needs: bytes of a step and seconds of a run, from sizes of layers. Trains nothing.

A model's numbers are all of it that is known here, so that one that does not fit anywhere can be judged too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core import Hardware
from ._put import outline
from ._quantize import weight_count
from ._targets import is_conv1d, is_linear, output_layer

METHODS = ("full", "lora", "qlora")
#: Rank of the adapters that are assumed, on all linear layers.
RANK = 16
#: Bytes for each trained number: float32 weight, gradient, AdamW's two moments, and autocast's 16-bit copy.
_WEIGHT, _GRADIENT, _MOMENTS, _COPY = 4, 4, 8, 2
_HALF, _NF4 = 2.0, (4 + 8 / 64 + 32 / (64 * 256)) / 8
#: Dense 16-bit peak of GPUs in TFLOP/s, as their makers state it; the first name that is in the GPU's is taken.
_PEAKS = (
    ("GH200", 989), ("H200", 989), ("H100 PCIe", 756), ("H100", 989), ("H20", 148), ("B200", 2250), ("A100", 312),
    ("A10G", 70), ("A10", 125), ("L40S", 362), ("L40", 181), ("L4", 121), ("A6000", 155), ("V100", 125), ("T4", 65),
    ("4090", 165), ("3090", 71), ("MI300", 1307), ("MI250", 362), ("MI210", 181),
)  # fmt: skip
#: Share of the peak that training reaches, in our and others' reports 0.3 to 0.5.
_REACHED = 0.4
#: How much longer a step takes that makes 4-bit weights dense twice.
_DENSE_AGAIN = 1.3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model in numbers.

    Attributes:
        parameters: of the whole model.
        linear: of its linear layers but the output layer.
        ends: inputs and outputs of these layers, added up.
        widest: parameters of the largest of them.
        outputs: of the output layer (a vocabulary), 0 if it is unknown.
    """

    parameters: int
    linear: int
    ends: int
    widest: int
    outputs: int = 0

    @property
    def adapters(self) -> int:
        """Numbers in adapters on all these layers."""
        return RANK * self.ends


def sizes_of(model: nn.Module) -> Sizes:
    """The numbers of a model.

    Example:
        >>> sizes_of(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
        Sizes(parameters=212, linear=192, ends=44, widest=128, outputs=0)
    """
    last = output_layer(model)
    shapes = [_shape(m) for m in outline(model).values() if is_linear(m) and m is not last]
    return Sizes(
        parameters=weight_count(model),
        linear=sum(a * b for a, b in shapes),
        ends=sum(a + b for a, b in shapes),
        widest=max((a * b for a, b in shapes), default=0),
        outputs=_outputs(last),
    )


def _outputs(last: nn.Module | None) -> int:
    """Outputs of the output layer, which is the embedding where both are one."""
    if isinstance(last, nn.Embedding):
        return last.num_embeddings
    return _shape(last)[1] if last is not None and is_linear(last) else 0


def _shape(layer: Any) -> tuple[int, int]:
    """Inputs and outputs."""
    if is_conv1d(layer):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    return int(layer.in_features), int(layer.out_features)


def sizes_from_count(parameters: int) -> Sizes:
    """The numbers of a transformer of usual proportions: 12 h^2 weights a layer, and layers by width as 1 to 128.

    Example:
        >>> sizes_from_count(7_000_000_000).ends // 10**4
        249
    """
    width = (parameters * 128 / 12) ** (1 / 3)
    layers = max(1.0, parameters / (12 * width**2))
    ends = round(18 * width * layers)
    return Sizes(parameters=parameters, linear=parameters, ends=ends, widest=round(4 * width**2), outputs=32_000)


@dataclass(frozen=True, kw_only=True)
class FinetuneEstimate:
    """What one way of fine-tuning needs on one device; formulas, no measurement.

    Attributes:
        method: "full", "lora" or "qlora".
        trained: numbers that are trained.
        weights_bytes: weights and what is kept for computing with them.
        gradients_bytes: gradients.
        optimizer_bytes: AdamW's moments.
        activations_bytes: what is kept between the passes of one micro-batch.
        micro_batch_size: samples in one pass, the largest power of two that fits, or 1.
        fits: whether all that is within the usable memory.
        hours: of the whole run; None on a device whose speed is unknown.
    """

    method: str
    trained: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    micro_batch_size: int
    fits: bool
    hours: float | None

    @property
    def memory_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes


def estimate(
    method: str, sizes: Sizes, *, memory_bytes: float, batch_size: int, sequence_length: int, samples: int,
    flops: float | None,
) -> FinetuneEstimate:  # fmt: skip
    """What a method needs, with the largest micro-batch that fits.

    Args:
        samples: in the whole run.
        flops: operations that the device does in a second.
    """
    trained = sizes.parameters if method == "full" else sizes.adapters
    rest = sizes.parameters - sizes.linear
    if method == "full":
        weights: float = (_WEIGHT + _COPY) * sizes.parameters
    else:
        stored = _HALF * sizes.linear if method == "lora" else _NF4 * sizes.linear + _HALF * sizes.widest
        weights = stored + _WEIGHT * rest + (_WEIGHT + _COPY) * trained
    fixed = weights + (_GRADIENT + _MOMENTS) * trained
    # Each layer's input or output is kept in 16 bits, for whoever reads it; logits stand in float32, with their
    # probabilities and gradients.
    each = sequence_length * (2 * sizes.ends + 12 * sizes.outputs)
    size = _largest_power(batch_size)
    while size > 1 and fixed + size * each > memory_bytes:
        size //= 2
    # Two operations a weight forward, two for the input's gradient, two for the weight's own.
    per_token = sizes.parameters * (6 if method == "full" else 4 * (_DENSE_AGAIN if method == "qlora" else 1))
    return FinetuneEstimate(
        method=method,
        trained=trained,
        weights_bytes=round(weights),
        gradients_bytes=_GRADIENT * trained,
        optimizer_bytes=_MOMENTS * trained,
        activations_bytes=size * each,
        micro_batch_size=size,
        fits=fixed + size * each <= memory_bytes,
        hours=None if flops is None else samples * sequence_length * per_token / flops / 3600,
    )


def _largest_power(count: int) -> int:
    return 1 << (count.bit_length() - 1)


def usable(hardware: Hardware) -> tuple[float, str]:
    """Bytes that one device leaves for training, and where they are."""
    if hardware.gpus:
        gpu = max(hardware.gpus, key=lambda g: g.memory_bytes)
        return 0.9 * gpu.memory_bytes, f"one {gpu.name} of {gpu.memory_bytes / 1e9:.0f} GB, 90 % of it usable"
    return 0.8 * hardware.memory_bytes, f"a CPU with {hardware.memory_bytes / 1e9:.0f} GB, 80 % of it usable"


def speed(hardware: Hardware) -> tuple[float | None, str]:
    """Operations that one device does in a second of training, and what was assumed."""
    if hardware.gpus:
        name = max(hardware.gpus, key=lambda g: g.memory_bytes).name
        peak = next((tflops for part, tflops in _PEAKS if part in name), None)
        if peak is None:
            return None, f"the speed of a {name} is not in the table, so there is no time"
        return _REACHED * peak * 1e12, f"{_REACHED:.0%} of the {peak} TFLOP/s that the maker states"
    wide = any(name.startswith("avx512") for name in hardware.isa)
    gflops = 40 if wide else 20
    return hardware.cores * gflops * 1e9, f"{gflops} GFLOP/s for each of {hardware.cores} cores, a guess"


def by_method(estimates: Sequence[FinetuneEstimate]) -> dict[str, FinetuneEstimate]:
    """The estimates by their methods."""
    return {found.method: found for found in estimates}

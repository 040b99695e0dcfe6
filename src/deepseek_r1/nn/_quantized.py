"""A linear layer whose weight is stored as integers. Knows nothing about how they were chosen."""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed
from torch import nn

from ..core import INT8_ACTIVATION, INT8_WEIGHT, UINT4, ConfigError, InputError, Int4Format, LayerFormat
from ..ops import pack_uint4, unpack_uint4

_q = torch.ops.quantized_decomposed


class QuantizedLinear(nn.Module):
    """`torch.nn.Linear` with a weight of 8 or 4 bits. Captured, it is the neutral form of its format.

    PyTorch computes it in float32 from the weight that the integers stand for, made anew at each call: it saves memory
    and no time. Speed comes from an engine that has kernels for it. Gradients reach the input and the bias, so that
    adapters train around it.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is one.
        format: a quantised layer format with float or dynamic activations.

    Raises:
        ConfigError: a format that a linear layer alone cannot have.
        InputError: inputs that do not divide into the format's groups.

    Example:
        >>> from deepseek_r1.core import Int4Weight
        >>> layer = QuantizedLinear(64, 8, format=Int4Weight(group_size=32))
        >>> layer(torch.randn(2, 64)).shape, layer.values.shape
        (torch.Size([2, 8]), torch.Size([8, 32]))
    """

    #: Buffers that no training changes, so that checkpoints may leave them out.
    frozen_buffers = ("values", "scales", "zeros")
    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, format: LayerFormat) -> None:
        super().__init__()
        if not format.is_quantised or format.activation == "static":
            raise ConfigError(
                f"QuantizedLinear(format={format}): a format with integer weights and without fixed ranges of "
                "activations is needed; those belong to a whole graph: use quantize with a dataset."
            )
        self.in_features, self.out_features, self.format = in_features, out_features, format
        size = format.group_size if isinstance(format, Int4Format) else 0
        if size and in_features % size:
            raise InputError(f"QuantizedLinear: {in_features} inputs do not divide into groups of {size}.")
        shape = (out_features, in_features // size) if size else (out_features,)
        columns = in_features // 2 if size else in_features
        self.register_buffer("values", torch.zeros(out_features, columns, dtype=torch.uint8 if size else torch.int8))
        self.register_buffer("scales", torch.zeros(shape))
        self.register_buffer("zeros", torch.zeros(shape, dtype=torch.int8))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def store_(self, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> None:
        """Changes this layer: takes new integers.

        Args:
            values: [out, in], int8, or uint8 from 0 to 15 in a format of 4 bits.
            scales: [out], or [out, in / group_size] in a format of 4 bits.
            zeros: as `scales`; 0 if None.
        """
        self.values.copy_(pack_uint4(values) if self.format.weight_bits == 4 else values)
        self.scales.copy_(scales)
        self.zeros.zero_() if zeros is None else self.zeros.copy_(zeros)

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the integers stand for, float32 [out, in], made anew."""
        found: torch.Tensor
        if self.format.weight_bits == 4:
            values = unpack_uint4(self.values)
            limits = (*UINT4, torch.uint8, self.in_features // self.scales.shape[1], torch.float32)
            found = _q.dequantize_per_channel_group(values, self.scales, self.zeros, *limits)
        else:
            found = _q.dequantize_per_channel(self.values, self.scales, self.zeros, 0, *INT8_WEIGHT.range, torch.int8)
        return found

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if self.format.activation == "dynamic":
            input = _rounded(input)
        return nn.functional.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


def _rounded(value: torch.Tensor) -> torch.Tensor:
    """Each row in int8 with its own range, and back."""
    low, high = INT8_ACTIVATION.range
    scale, zero = _q.choose_qparams_per_token_asymmetric(value, torch.int8)
    stored = _q.quantize_per_token(value, scale, zero, low, high, torch.int8)
    found: torch.Tensor = _q.dequantize_per_token(stored, scale, zero, low, high, torch.int8, torch.float32)
    return found

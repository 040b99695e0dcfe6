"""Linear layers whose weight is not trained and is stored in fewer bits. Know nothing about adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core import ConfigError, InputError
from ..ops import NF4, Dense, cast_weight, dequantize_nf4, frozen_linear, nf4_shapes, nf4_table, quantize_nf4

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class CastLinear(nn.Module):
    """`torch.nn.Linear` with a frozen weight that is stored in another float type and cast in each call.

    It computes in autocast's type where autocast is on, else in that of its input. No copy of the weight is kept for
    the backward pass, which `torch.nn.Linear` does under autocast: gradients reach the input and the bias.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is one.
        dtype: of the stored weight: float32, bfloat16 or float16.

    Raises:
        ConfigError: another type.

    Example:
        >>> layer = CastLinear.from_linear(nn.Linear(8, 4), torch.bfloat16)
        >>> layer.weight.dtype, layer(torch.randn(2, 8)).dtype
        (torch.bfloat16, torch.float32)
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        if dtype not in _FLOATS:
            raise ConfigError(f"CastLinear(dtype={dtype}): float32, bfloat16 or float16 is needed.")
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, dtype: torch.dtype = torch.bfloat16) -> CastLinear:
        """The layer with the weight and bias of a linear layer."""
        layer = _empty(cls, linear, dtype=dtype)
        layer.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        layer.bias = _frozen(linear.bias)
        return layer

    def parts(self) -> tuple[Dense, tuple[Tensor, ...]]:
        """How the dense weight is made, and from what; for `ops.frozen_linear`."""
        return cast_weight, (self.weight,)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return frozen_linear(input, cast_weight, (self.weight,), self.bias)

    def extra_repr(self) -> str:
        """Sizes and type."""
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.weight.dtype}"


class NF4Linear(nn.Module):
    """`torch.nn.Linear` with a frozen weight of 4 bits, 16 quantiles of a normal distribution (QLoRA, 2023).

    It computes in autocast's type where autocast is on, else in that of its input, from a dense weight that is made
    anew in the forward and in the backward pass: only the 4 bits live between them. Gradients reach the input and
    the bias. Loaded from a file its tensors are taken as they are.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is one.

    Example:
        >>> linear = nn.Linear(64, 32)
        >>> layer = NF4Linear.from_linear(linear)
        >>> bool((layer.weight - linear.weight).abs().max() < 0.16 * linear.weight.abs().max())
        True
        >>> layer.packed.shape, layer(torch.randn(2, 64)).shape
        (torch.Size([32, 32]), torch.Size([2, 32]))
    """

    #: Buffers that no training changes, so that checkpoints may leave them out.
    frozen_buffers = NF4._fields
    packed: Tensor
    steps: Tensor
    scales: Tensor
    mean: Tensor
    table: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        types = (torch.uint8, torch.int8, torch.float32, torch.float32)
        shapes = nf4_shapes(in_features * out_features)
        for name, shape, dtype in zip(NF4._fields, shapes, types, strict=True):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        self.register_buffer("table", nf4_table(), persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> NF4Linear:
        """The layer with the rounded weight and the bias of a linear layer.

        Raises:
            InputError: the weight has values that are not finite.
        """
        layer = _empty(cls, linear)
        for name, tensor in quantize_nf4(linear.weight)._asdict().items():
            setattr(layer, name, tensor)
        layer.table = nf4_table(linear.weight.device)
        layer.bias = _frozen(linear.bias)
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `model.bfloat16()` is meant for weights; the scales stay what they are.
        exact = {name: getattr(self, name) for name in ("scales", "mean", "table")}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def parts(self) -> tuple[Dense, tuple[Tensor, ...]]:
        """How the dense weight is made, and from what; for `ops.frozen_linear`."""
        return self._dense, (self.packed, self.steps, self.scales, self.mean, self.table)

    def _dense(self, dtype: torch.dtype, *stored: Tensor) -> Tensor:
        return dequantize_nf4(NF4(*stored[:4]), (self.out_features, self.in_features), dtype, stored[4])

    @property
    def weight(self) -> Tensor:
        """The weight that the 4 bits stand for, float32 [out, in], made anew."""
        return self._dense(torch.float32, *self.parts()[1])

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return frozen_linear(input, *self.parts(), self.bias)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _empty(kind: Any, linear: nn.Linear, **options: Any) -> Any:
    """A layer of this kind and of a linear layer's sizes, without memory of its own."""
    if not isinstance(linear, nn.Linear):
        raise InputError(f"{kind.__name__}.from_linear: a torch.nn.Linear is needed, given {type(linear).__name__}.")
    with torch.device("meta"):
        layer = kind(linear.in_features, linear.out_features, linear.bias is not None, **options)
    return layer.train(linear.training)


def _frozen(bias: Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

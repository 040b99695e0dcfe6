"""Adapters on linear layers, of whatever storage. Knows one layer at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn import CastLinear, NF4Linear, QuantizedLinear
from ..ops import Dense, LowRank, cast_weight, compute_dtype, frozen_linear
from ._layer import LoraLayer
from ._targets import is_conv1d


def _transposed(dtype: torch.dtype, weight: Tensor) -> Tensor:
    return weight.to(dtype).t()


def parts(layer: nn.Module) -> tuple[Dense, tuple[Tensor, ...]] | None:
    """How a linear layer's dense weight [out, in] is made, and from what; None if its own forward must run."""
    if isinstance(layer, CastLinear | NF4Linear):
        return layer.parts()
    if is_conv1d(layer):
        return _transposed, (layer.weight,)  # type: ignore[return-value]
    if isinstance(layer, QuantizedLinear) and layer.format.activation == "float":
        return lambda dtype, *_: layer.weight.to(dtype), (layer.values, layer.scales, layer.zeros)
    if type(layer).forward is nn.Linear.forward:
        return cast_weight, (layer.weight,)  # type: ignore[return-value]
    return None


class LoraLinear(LoraLayer):
    """A linear layer with adapters: y = W x + b + s B A x, or with magnitudes m: y = m (W + s B A) x / |W + s B A| + b.

    One active adapter on a frozen weight is computed together with it (`ops.frozen_linear`): nothing of the weight's
    or of the output's size is kept for the backward pass. Magnitudes keep one tensor of the output's size.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.turned = is_conv1d(base_layer)

    def _make_pair(self, adapter: str, r: int, place: dict[str, Any]) -> None:
        out, inputs = self._sizes()
        self.lora_A[adapter] = nn.Linear(inputs, r, bias=False, **place)
        self.lora_B[adapter] = nn.Linear(r, out, bias=False, **place)

    def _sizes(self) -> tuple[int, int]:
        if self.turned:
            inputs, out = self.base_layer.weight.shape  # type: ignore[union-attr, misc]
            return int(out), int(inputs)
        return int(self.base_layer.out_features), int(self.base_layer.in_features)  # type: ignore[arg-type]

    def delta(self, adapter: str) -> Tensor:
        """[out, in], or [in, out] where the base weight is stored so."""
        a, b = self.matrices(adapter)
        return a.t() @ b.t() if self.turned else b @ a

    def norm(self, weight: Tensor) -> Tensor:
        """[out]."""
        return torch.linalg.vector_norm(weight, dim=0 if self.turned else 1)

    def _spread(self, factor: Tensor) -> Tensor:
        return factor.reshape(1, -1) if self.turned else factor.reshape(-1, 1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        used = self.used()
        base = self.base_layer
        found = None if args or kwargs or base._forward_hooks or base._forward_pre_hooks else parts(base)
        if found is None or any(t.requires_grad for t in found[1]):
            return self._beside(x, base(x, *args, **kwargs), used)
        bias: Tensor | None = base.bias  # type: ignore[assignment]
        if len(used) != 1:
            return self._beside(x, frozen_linear(x, *found, bias), used)
        magnitude = self.magnitude(used[0])
        if magnitude is None:
            return frozen_linear(x, *found, bias, self._pair(used[0]))
        product = frozen_linear(x, *found, None, self._pair(used[0]))
        return _scaled(product, magnitude / self._row_lengths(used[0], product.dtype), bias)

    def _pair(self, adapter: str) -> LowRank:
        a, b = self.matrices(adapter)
        return LowRank(a, b, self.scaling[adapter], self.dropout[adapter] if self.training else 0.0)

    def _beside(self, x: Tensor, y: Tensor, used: tuple[str, ...]) -> Tensor:
        """The base layer's output with each adapter's share, in torch's own operators."""
        bias, base = self.base_layer.bias, y
        for adapter in used:
            pair = self._pair(adapter)
            dtype = compute_dtype(x)
            kept = torch.nn.functional.dropout(x.to(dtype), pair.dropout) if pair.dropout else x.to(dtype)
            low = torch.nn.functional.linear(kept, pair.a.to(dtype))
            share = pair.scale * torch.nn.functional.linear(low, pair.b.to(dtype)).to(base.dtype)
            if (magnitude := self.magnitude(adapter)) is not None:
                # Each adapter turns and stretches the base weight by itself, whatever others add.
                plain = base if bias is None else base - bias.to(base.dtype)  # type: ignore[operator]
                share = _scaled(plain + share, magnitude / self._row_lengths(adapter, base.dtype), None) - plain
            y = y + share
        return y

    @torch.no_grad()
    def _row_lengths(self, adapter: str, dtype: torch.dtype) -> Tensor:
        """[out], the lengths of the rows of W + s B A, without a matrix of that size beside W, and without a gradient.

        |w + s u|^2 = |w|^2 + 2 s w.u + s^2 |u|^2 with u = b A, so that products with the thin A suffice.
        """
        exact = torch.promote_types(dtype, torch.float32)
        a, b = (m.detach().to(exact) for m in self.matrices(adapter))
        scale, found = self.scaling[adapter], parts(self.base_layer)
        with torch.autocast(a.device.type, enabled=False):
            weight = found[0](dtype, *found[1]) if found else self.base_weight().detach()
            own = torch.linalg.vector_norm(weight, dim=1, dtype=exact).square()
            cross = ((weight @ a.t().to(weight.dtype)).to(exact) * b).sum(1)
            square = own + 2 * scale * cross + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
            return square.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


def _scaled(product: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
    ratio = ratio.to(product.dtype)
    return product * ratio if bias is None else torch.addcmul(bias.to(product.dtype), product, ratio)

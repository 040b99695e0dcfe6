"""Adapters on embeddings and convolutions. Knows one layer at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import InputError
from ._layer import LoraLayer


class LoraEmbedding(LoraLayer):
    """An embedding with adapters: rows of W + s (B A)^T, or with magnitudes of its columns.

    A is [r, rows] and zero at first, B is [columns, r], as in the LoRA paper's own code.
    """

    def _make_pair(self, adapter: str, r: int, place: dict[str, Any]) -> None:
        rows, columns = self.base_layer.num_embeddings, self.base_layer.embedding_dim
        if self.base_layer.max_norm is not None:
            raise InputError("an embedding with max_norm changes its weight in each call; it cannot have adapters.")
        self.lora_embedding_A[adapter] = nn.Parameter(torch.empty(r, rows, **place))  # type: ignore[call-overload]
        self.lora_embedding_B[adapter] = nn.Parameter(torch.empty(columns, r, **place))  # type: ignore[call-overload]

    def _initialise(self, adapter: str, how: bool | str, r: int) -> None:
        a, b = self.matrices(adapter)
        nn.init.normal_(b)
        if how is False:
            nn.init.normal_(a, std=1 / r)
        else:
            nn.init.zeros_(a)

    def matrices(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """[r, rows] and [columns, r]."""
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def delta(self, adapter: str) -> Tensor:
        """[rows, columns]."""
        a, b = self.matrices(adapter)
        return a.t() @ b.t()

    def norm(self, weight: Tensor) -> Tensor:
        """[columns]."""
        return torch.linalg.vector_norm(weight, dim=0)

    def _spread(self, factor: Tensor) -> Tensor:
        return factor.reshape(1, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Indices [...] -> [..., columns]."""
        base: Any = self.base_layer
        plain = found = base(x)
        for adapter in self.used():
            a, b = self.matrices(adapter)
            low = nn.functional.embedding(x, a.t(), base.padding_idx, None, 2.0, base.scale_grad_by_freq, base.sparse)
            share = self.scaling[adapter] * (low @ b.t())
            if (magnitude := self.magnitude(adapter)) is not None:
                share = (plain + share) * (magnitude / self._lengths(adapter)) - plain
            found = found + share.to(plain.dtype)
        return found


class LoraConv(LoraLayer):
    """A convolution over one, two or three dimensions with adapters: A has its kernel, B is 1 x 1.

    Only one group of channels: with several, B A is no sum of a kernel for each.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        if base_layer.groups != 1:
            raise InputError(
                f"a convolution with groups={base_layer.groups} cannot have adapters; leave it out of target_modules, "
                "or use exclude_modules."
            )

    def _make_pair(self, adapter: str, r: int, place: dict[str, Any]) -> None:
        base: Any = self.base_layer
        kind = next(k for k in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(base, k))
        more = {"dilation": base.dilation, "padding_mode": base.padding_mode, "bias": False, **place}
        self.lora_A[adapter] = kind(base.in_channels, r, base.kernel_size, base.stride, base.padding, **more)
        self.lora_B[adapter] = kind(r, base.out_channels, 1, bias=False, **place)

    def delta(self, adapter: str) -> Tensor:
        """[out, in, kernel...]."""
        a, b = self.matrices(adapter)
        return (b.flatten(1) @ a.flatten(1)).reshape(self.base_layer.weight.shape)  # type: ignore[arg-type]

    def norm(self, weight: Tensor) -> Tensor:
        """[1, out, 1...], as PEFT stores it."""
        return torch.linalg.vector_norm(weight.flatten(1), dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))

    def _spread(self, factor: Tensor) -> Tensor:
        return factor.transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, ...] -> [N, out, ...]."""
        base: Any = self.base_layer
        found = y = base(x)
        plain = None
        for adapter in self.used():
            first, second = self.lora_A[adapter], self.lora_B[adapter]
            dtype = self.matrices(adapter)[0].dtype
            p = self.dropout[adapter]
            kept = nn.functional.dropout(x, p, self.training) if p else x
            if not torch.is_autocast_enabled(x.device.type):
                kept = kept.to(dtype)
            share = self.scaling[adapter] * second(first(kept)).to(y.dtype)
            if (magnitude := self.magnitude(adapter)) is not None:
                if plain is None:
                    plain = y if base.bias is None else y - base.bias.reshape(-1, *[1] * (x.ndim - 2))
                share = (plain + share) * (magnitude / self._lengths(adapter)).to(y.dtype) - plain
            found = found + share
        return found

"""A layer with adapters: the base layer, frozen, and named pairs of low-rank matrices beside it.

What all kinds of layers have in common: the adapters' places, which are active, merging, magnitudes. The parameters
have PEFT's names (`base_layer`, `lora_A.<adapter>.weight`, ...). Knows one layer at a time, and no files.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..core import InputError
from ._config import LoraConfig


class Magnitude(nn.Module):
    """The trained magnitudes of a layer's outputs (DoRA)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class LoraLayer(nn.Module):
    """Base of the layers with adapters; see `LoraLinear`, `LoraEmbedding` and `LoraConv`.

    Attributes:
        base_layer: the layer as it was.
        scaling: what each adapter's product is multiplied with.
        dropout: share of each adapter's inputs that is set to zero in training.
        active: the adapters that count, in this order.
        merged: the adapters that the base weight holds at present.
        disabled: whether adapters count at all.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.disabled = False
        self.train(base_layer.training)

    # What each kind of layer says for itself.

    def _make_pair(self, adapter: str, r: int, place: dict[str, Any]) -> None:
        """Put matrices without values under the adapter's name."""
        raise NotImplementedError

    def matrices(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The adapter's two parameters, A and B."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight  # type: ignore[return-value]

    def delta(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, in the base weight's shape and the adapter's type."""
        raise NotImplementedError

    def base_weight(self) -> Tensor:
        """The base weight as floats; a new tensor if it is stored in another form."""
        return self.base_layer.weight  # type: ignore[return-value]

    def norm(self, weight: Tensor) -> Tensor:
        """Lengths of the parts of a weight that have a magnitude each, in the shape of the magnitudes."""
        raise NotImplementedError

    # What they share.

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters."""
        return tuple(self.scaling)

    @property
    def weight(self) -> Any:
        """The base layer's weight: some models read its type."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's bias."""
        return self.base_layer.bias

    def add(self, adapter: str, config: LoraConfig, path: str, dtype: torch.dtype) -> None:
        """Make an adapter with its initial values; it does not count yet.

        Args:
            path: of this layer in the model, for patterns.
            dtype: of the adapter's parameters.
        """
        weight = next(chain(self.base_layer.parameters(), self.base_layer.buffers()))
        self._make_pair(adapter, config.rank(path), {"dtype": dtype, "device": weight.device})
        self.scaling[adapter], self.dropout[adapter] = config.scaling(path), float(config.lora_dropout)
        self._initialise(adapter, config.init_lora_weights, config.rank(path))
        if config.use_dora:
            with torch.no_grad():
                whole = self.base_weight().to(dtype) + self.scaling[adapter] * self.delta(adapter)
                self.lora_magnitude_vector[adapter] = Magnitude(self.norm(whole).to(dtype))

    def _initialise(self, adapter: str, how: bool | str, r: int) -> None:
        a, b = self.matrices(adapter)
        if how == "gaussian":
            nn.init.normal_(a, std=1 / r)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if how is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        else:
            nn.init.zeros_(b)

    def remove(self, adapter: str) -> None:
        """Forget an adapter."""
        for held in (
            self.lora_A,
            self.lora_B,
            self.lora_embedding_A,
            self.lora_embedding_B,
            self.lora_magnitude_vector,
        ):
            if adapter in held:
                del held[adapter]
        del self.scaling[adapter], self.dropout[adapter]
        self.active = tuple(name for name in self.active if name != adapter)

    def own_parameters(self, adapter: str) -> list[nn.Parameter]:
        """The adapter's trained parameters."""
        found = list(self.matrices(adapter))
        magnitude = self.magnitude(adapter)
        return found if magnitude is None else [*found, magnitude]

    def magnitude(self, adapter: str) -> nn.Parameter | None:
        """The magnitudes of an adapter that has them (DoRA)."""
        held = self.lora_magnitude_vector
        return held[adapter].weight if adapter in held else None  # type: ignore[return-value]

    def activate(self, adapters: tuple[str, ...]) -> None:
        """Let these count; adapters that this layer does not have are left out."""
        self.active = tuple(name for name in adapters if name in self.scaling)

    def used(self) -> tuple[str, ...]:
        """The adapters that have to be computed in a call."""
        return () if self.disabled or self.merged else self.active

    # Merging.

    def merged_weight(self, adapters: tuple[str, ...]) -> Tensor:
        """The base weight with adapters in it, in its own type.

        Raises:
            InputError: the result has values that are not finite.
        """
        base = self.base_weight()
        found = base.detach().to(torch.promote_types(base.dtype, torch.float32))
        plain = found
        for adapter in adapters:
            share = (self.scaling[adapter] * self.delta(adapter)).to(plain)
            if (magnitude := self.magnitude(adapter)) is not None:
                whole = plain + share
                share = whole * self._spread(magnitude.to(plain) / self.norm(whole)) - plain
            found = found + share
        if not bool(torch.isfinite(found).all()):
            raise InputError(f"the merged weight has values that are not finite; the adapters {adapters} are damaged.")
        return found.to(base.dtype)

    @torch.no_grad()
    def _lengths(self, adapter: str) -> Tensor:
        """`norm` of the base weight with the adapter's product; without a gradient (section 4.3 of the DoRA paper)."""
        return self.norm(self.base_weight() + self.scaling[adapter] * self.delta(adapter))

    def _spread(self, factor: Tensor) -> Tensor:
        """Factors of the magnitudes' shape in a shape that multiplies a weight."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Put the active adapters into the base weight; what it was is kept aside for `unmerge`."""
        if self.merged or not self.active:
            return
        whole = self.merged_weight(self.active)
        self._unmerged = self.base_weight().detach().clone()
        self._write(whole)
        self.merged = self.active

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the base weight as it was before `merge`, to the bit."""
        if self.merged:
            self._write(self._unmerged)
            del self._unmerged
            self.merged = ()

    def _write(self, weight: Tensor) -> None:
        self.base_layer.weight.copy_(weight)  # type: ignore[operator]

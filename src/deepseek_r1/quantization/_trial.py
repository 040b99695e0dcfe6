"""Answers of a graph with its layers in other formats, without rewriting it: what a choice of formats would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Interpreter, Node

from ..core import INT8_ACTIVATION, Float32, LayerFormat
from ._layers import Layer
from ._static import StaticPlan, static_plan
from ._weights import StoredWeight

Formats = Mapping[Layer, LayerFormat]
#: Scale and zero point.
Affine = tuple[float, int]


def rounded(value: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """Activations as int8 with a fixed range would have them."""
    return torch.fake_quantize_per_tensor_affine(value, scale, zero, *INT8_ACTIVATION.range)


def rounded_rows(value: torch.Tensor) -> torch.Tensor:
    """Activations as int8 with a range for each row would have them."""
    low, high = INT8_ACTIVATION.range
    bottom, top = value.amin(-1, keepdim=True).clamp_max(0), value.amax(-1, keepdim=True).clamp_min(0)
    scale = ((top - bottom) / (high - low)).clamp_min(torch.finfo(torch.float32).eps)
    zero = torch.clamp(torch.round(low - bottom / scale), low, high)
    return (torch.clamp(torch.round(value / scale) + zero, low, high) - zero) * scale


@dataclass
class Trial:
    """A float graph, and what its layers would be in each format.

    Attributes:
        module: the graph.
        store: gives a layer's weight in a format.
        ranges: of every value that a static layer may read or give.
        additions: see `static_plan`.
    """

    module: GraphModule
    store: Callable[[Layer, LayerFormat], StoredWeight]
    ranges: Mapping[Node, Affine]
    additions: bool = False
    _plans: dict[Any, StaticPlan] = field(default_factory=dict)

    def run(self, formats: Formats, leaves: tuple[Any, ...]) -> list[torch.Tensor]:
        """Flat outputs for flat inputs; layers that are not named stay float."""
        chosen = {layer: fmt for layer, fmt in formats.items() if not isinstance(fmt, Float32)}
        key = frozenset(layer for layer, fmt in chosen.items() if fmt.activation == "static")
        if key not in self._plans:
            self._plans = {key: static_plan(self.module, chosen, additions=self.additions)}
        with torch.no_grad():
            outputs = _Mixed(self, chosen, self._plans[key]).run(*leaves)
        return [v for v in pytree.tree_leaves(outputs) if isinstance(v, torch.Tensor)]

    def layer_output(self, layer: Layer, fmt: LayerFormat, node: Node, args: tuple[Any, ...]) -> torch.Tensor:
        """What a layer's node gives in a format for the arguments that it has in float."""
        stored = self.store(layer, fmt)
        x, bias = args[0], args[2] if len(args) > 2 else None
        if fmt.weight_bits == 16:
            low = None if bias is None else bias.to(torch.bfloat16)
            half: torch.Tensor = node.target(x.to(torch.bfloat16), stored.values, low, *args[3:])  # type: ignore[operator]
            return half.float()
        if fmt.activation == "dynamic":
            x = rounded_rows(x)
        result: torch.Tensor = node.target(x, stored.weight().to(x.device), bias, *args[3:])  # type: ignore[operator]
        if stored.missing is not None and len(layer.nodes) == 1:
            shape = (-1,) if layer.is_linear else (-1, *[1] * (layer.weight.ndim - 2))
            result = result + stored.missing.to(result).reshape(shape)
        return result


class _Mixed(Interpreter):
    def __init__(self, trial: Trial, formats: Formats, plan: StaticPlan) -> None:
        super().__init__(trial.module)
        self._trial, self._plan = trial, plan
        self._layers = {node: (layer, fmt) for layer, fmt in formats.items() for node in layer.nodes}

    def map_nodes_to_values(self, args: Any, n: Node) -> Any:
        def load(source: Node) -> Any:
            value = self.env[source]
            if n in (self._plan.values.get(source) or ()):
                return rounded(value, *self._trial.ranges[source])
            return value

        return torch.fx.node.map_arg(args, load)

    def run_node(self, n: Node) -> Any:
        if n not in self._layers:
            value = super().run_node(n)
        else:
            args, _ = self.fetch_args_kwargs_from_env(n)
            value = self._trial.layer_output(*self._layers[n], n, args)
        if n in self._plan.values and self._plan.values[n] is None:
            value = rounded(value, *self._trial.ranges[n])
        return value

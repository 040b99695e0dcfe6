"""One float program with everything that its layers can become: weights in each format, ranges, trials.

What is made here is made once, whatever is chosen afterwards. Knows no budget and no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from ..core import INT8_ACTIVATION, ConfigError, Float32, Int8Static, LayerFormat, Report, progress
from ..graph import Program, rewrite
from ..graph.editing import graph_of
from ._insert import apply_formats
from ._layers import Layer, find_layers
from ._observe import Ranges, affine
from ._ptq import PTQConfig, improved, moments_of, precision_of_layers, simplified
from ._static import range_of, static_plan
from ._trial import Trial
from ._weights import StoredWeight, stored_weight

#: Formats by name of a layer.
Choice = Mapping[str, LayerFormat]


class Workshop:
    """A program's layers and what they are in each format.

    Args:
        program: float32, as it was captured.
        batches: flat inputs for calibration.
        config: how ranges and weights are found; its formats are not looked at.

    Attributes:
        parent: the simplified program that formats are put into; a snapshot of the weights.
        module: its graph, which trials run.
        layers: those that a format can be chosen for.
        skipped: what stays float whatever is chosen, and why.
        rewrites: a report of what was done to the program before, and of what was tried.
    """

    def __init__(self, program: Program, batches: Sequence[tuple[Any, ...]], config: PTQConfig) -> None:
        self.rewrites = Report("rewrites")
        self.parent, self._config = improved(simplified(program), list(batches), config, self.rewrites)
        self.module = graph_of(self.parent)
        report, config = Report("layers"), self._config
        self.layers = find_layers(self.module, config.skip, report)
        self.skipped = report.skipped
        self._by_name = {layer.name: layer for layer in self.layers}
        everything = {layer: Int8Static() for layer in self.layers}
        plan = static_plan(self.module, everything, additions=True)
        ranges = Ranges(self.module, dict.fromkeys(range_of(value) for value in plan.values))
        ranges.observe(list(batches), histogram=config.activation_clip == "mse")
        found = {node: ranges.limits(node, INT8_ACTIVATION, config.activation_clip) for node in ranges.nodes}
        self._limits = {value: found[range_of(value)] for value in plan.values}
        self._moments = moments_of(self.module, self.layers, list(batches), config)
        self._stored: dict[tuple[Layer, int, int, bool], StoredWeight] = {}
        self.trial = Trial(self.module, self.store, {n: affine(*v, INT8_ACTIVATION) for n, v in self._limits.items()})

    def store(self, layer: Layer, fmt: LayerFormat) -> StoredWeight:
        """A layer's weight in a format; formats that differ in their activations alone share it."""
        group, symmetric = getattr(fmt, "group_size", 0), getattr(fmt, "symmetric", True)
        key = (layer, fmt.weight_bits, group, symmetric)
        if key not in self._stored:
            self._stored[key] = stored_weight(
                layer.weight, fmt, self._moments.get(layer.nodes[0]),
                clip=self._config.weight_clip, group_clip=self._config.group_clip,
            )  # fmt: skip
        return self._stored[key]

    def store_all(self, formats: Iterable[LayerFormat]) -> None:
        """Find the weights of all layers in all formats now, and forget what they were found with."""
        wanted = [(layer, fmt) for layer in self.layers for fmt in formats if not layer.misfit(fmt)]
        for layer, fmt in progress.track(wanted, "weights", len(wanted)):
            if not isinstance(fmt, Float32):
                self.store(layer, fmt)
        self._moments = {}

    def layer(self, name: str) -> Layer:
        """The layer of a name."""
        return self._by_name[name]

    def formats(self, choice: Choice) -> dict[Layer, LayerFormat]:
        """A choice by layers instead of names, those that stay float32 left out."""
        return {self._by_name[n]: fmt for n, fmt in choice.items() if not isinstance(fmt, Float32)}

    def given(self, layers: Choice) -> dict[str, LayerFormat]:
        """Formats by name of each layer, from formats by name of layers or of what they lie in.

        Raises:
            ConfigError: a name that is no layer's, or a format that a layer cannot have.
        """
        found: dict[str, LayerFormat] = {}
        for given, fmt in sorted(layers.items(), key=lambda item: len(item[0])):
            inside = [la for la in self.layers if la.name == given or la.name.startswith(f"{given}.")]
            if not inside:
                known = [la.name for la in self.layers]
                raise ConfigError(f"layers={{{given!r}: ...}}: {given!r} is no layer of the model; there are {known}.")
            for layer in inside:
                if reason := layer.misfit(fmt):
                    raise ConfigError(f"layers={{{given!r}: {fmt}}}: {layer.name!r}: {reason}.")
                found[layer.name] = fmt
        return found

    def uniform(self, fmt: LayerFormat, fixed: Choice) -> dict[str, LayerFormat]:
        """Every layer in a format, those excepted that cannot have it or that `fixed` names."""
        free = {layer.name: Float32() if layer.misfit(fmt) else fmt for layer in self.layers}
        return {**free, **fixed}

    def bytes_of(self, layer: Layer, fmt: LayerFormat) -> int:
        """Bytes of a layer's weight in a format, with scales and zero points; a weight in groups pays for each."""
        return fmt.weight_bytes(layer.weight.shape[0], layer.weight[0].numel())

    def build(self, choice: Choice, report: Report | None = None) -> Program:
        """The program with a choice of formats in it; the parent itself if all stays float32."""
        chosen = self.formats(choice)
        if not chosen:
            return self.parent

        def change(module: GraphModule) -> None:
            same = {node.name: node for node in self.module.graph.nodes}
            layers = find_layers(module, self._config.skip, Report("layers"))
            formats = {layer: choice[layer.name] for layer in layers if not isinstance(choice[layer.name], Float32)}
            plan = static_plan(module, formats, additions=False)
            apply_formats(
                module, formats, plan,
                lambda layer, fmt: self.store(self._by_name[layer.name], fmt),
                lambda node: self._limits[same[node.name]],
            )  # fmt: skip

        result = rewrite(
            self.parent, change, parent=self.parent, report=report or Report(f"quantise {self.parent.name}")
        )
        return precision_of_layers(result, (fmt for layer, fmt in chosen.items() for _ in layer.nodes))

"""`DSQuantizer`: weights in 4 or 8 bits, and activations in 8 bits, found at each call, where a layer bears it.

Decides from how each linear layer alone answers; what happens to the chosen formats is `quantize`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Node

from ..core import (
    INT8_WEIGHT,
    ConfigError,
    InputError,
    Int4Dynamic,
    Int4Format,
    Int4Weight,
    Int8Dynamic,
    Int8Weight,
    LayerFormat,
    Report,
)
from ..graph import PASSES, Program, simplify
from ..nn import QuantizedLinear
from ._groups import quantize_groups
from ._layers import find_layers
from ._modules import quantize_module
from ._observe import not_finite, quantize_weight, watch
from ._ptq import PTQConfig, calibration_inputs, quantize_program
from ._quantize import captured

#: Rows of a batch that each layer is tried on, and made-up rows where there are no data.
_ROWS = 256
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class DSQuantizer:
    """Quantise a model's linear layers, each with float activations or with int8 activations found at each call.

    A layer's weights are stored in `bit_width` bits. That alone leaves its output at some signal-to-noise ratio; int8
    activations on top leave less of it. They are used where at least the share `activation_threshold` of that ratio
    (in decibels) remains. With 0.8, a layer at 20 dB has to keep 16. So 0 quantises all activations, and 1 none.

    Attributes:
        method: "dynamic", the only one.
        bit_width: of the weights, 4 or 8. Layers whose inputs do not divide into groups get 8.
        activation_threshold: from 0 to 1, see above.
        group_size: weights that share a scale in 4 bits: 32, 64 or 128.
        skip: parts of names of layers that stay float.

    Raises:
        ConfigError: another method, width, threshold or group size.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 64))
        >>> small = DSQuantizer(method="dynamic", bit_width=4, activation_threshold=0.8).fit(net)
        >>> small[0].format, small[2].format
        (Int4Dynamic(version=1, group_size=64, symmetric=False), Int8Dynamic(version=1))
        >>> DSQuantizer(activation_threshold=1.0).fit(net)[0].format.activation
        'float'
    """

    method: str = "dynamic"
    bit_width: int = 4
    activation_threshold: float = 0.8
    group_size: int = 64
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method != "dynamic":
            raise ConfigError(
                f'DSQuantizer(method={self.method!r}): "dynamic" is needed. Ranges fixed by calibration are '
                "quantize(model, dataset=...)."
            )
        if isinstance(self.bit_width, bool) or self.bit_width not in (4, 8):
            raise ConfigError(f"DSQuantizer(bit_width={self.bit_width!r}): 4 or 8 is needed.")
        share = self.activation_threshold
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ConfigError(f"DSQuantizer(activation_threshold={share!r}): a number from 0 to 1 is needed.")
        if isinstance(self.skip, str):
            raise ConfigError(f"DSQuantizer(skip={self.skip!r}): a tuple of names is needed: ({self.skip!r},).")
        Int4Weight(group_size=self.group_size)

    def fit(
        self, model: torch.nn.Module | Program, dataset: Iterable[Any] | None = None, *, example_inputs: Any = None
    ) -> Program | torch.nn.Module:
        """The quantised model; which layer got what, and from which numbers, is in its report.

        Args:
            model: a module or a captured Program.
            dataset: batches on which the layers are tried and the weights rounded: `(inputs, labels)`, a mapping, or
                inputs alone. Without it layers are tried on the example inputs of a Program, or on standard normal
                numbers.
            example_inputs: inputs to capture a module with; by default the first batch.

        Returns:
            A Program, as `quantize` gives it; of a module without data and example inputs, a module with
            `nn.QuantizedLinear` layers and the Report as its `quantization`.

        Raises:
            InputError: nothing can be quantised, or the data do not fit, are empty, or are not finite.
        """
        if dataset is None and example_inputs is None and not isinstance(model, Program):
            return self._module(model)
        program, batches = captured(model, dataset, example_inputs)
        program = simplify(program, [name for name in PASSES if name != "merge_linears"], strict=False)
        config = PTQConfig()
        held = None if batches is None else _head(batches, config.calibration_batches)
        report = Report("activations")
        formats = self._formats(_answers_in_graph(program, held, self.skip), report)
        result = quantize_program(program, held, self._config(formats))
        _tell(report, result.report, "the data" if held is not None else "the example inputs", self)
        return result

    def _module(self, model: torch.nn.Module) -> torch.nn.Module:
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"DSQuantizer.fit needs a torch.nn.Module or a Program, given {type(model).__name__}.")
        report = Report("activations")
        formats = self._formats(_answers_to_noise(model, self.skip), report)
        result = quantize_module(model, self._config(formats))
        _tell(report, result.quantization, "standard normal numbers, for want of data", self)  # type: ignore[arg-type]
        return result

    def _config(self, formats: dict[str, LayerFormat]) -> PTQConfig:
        # Where scales were moved, other activations would have to stay float than those that were looked at.
        fmt = self._format(self.group_size, dynamic=True)
        return PTQConfig(format=fmt, layers=formats, scaling="off", skip=self.skip)

    def _format(self, inputs: int, *, dynamic: bool) -> LayerFormat:
        if self.bit_width == 4 and inputs % self.group_size == 0:
            return (Int4Dynamic if dynamic else Int4Weight)(group_size=self.group_size)
        return Int8Dynamic() if dynamic else Int8Weight()

    def _formats(
        self, answers: Iterator[tuple[str, torch.Tensor, list[torch.Tensor]]], report: Report
    ) -> dict[str, Any]:
        chosen: dict[str, LayerFormat] = {}
        for name, weight, inputs in answers:
            alone, both = _ratios(weight, self._format(weight.shape[1], dynamic=True), inputs)
            dynamic = self.activation_threshold < 1 and both >= self.activation_threshold * alone
            chosen[name] = self._format(weight.shape[1], dynamic=dynamic)
            kept = f"{both:.1f} of {alone:.1f} dB kept"
            report.add(f"activations of {name or 'the module'}", "int8" if dynamic else "float32", how=kept)
        return chosen


def _head(batches: Iterable[Any], count: int) -> list[Any]:
    """The first batches, held because they are read twice."""
    found = [batch for batch, _ in zip(batches, range(count))]
    if not found:
        raise InputError("DSQuantizer.fit(dataset=...): the dataset is empty.")
    return found


def _tell(report: Report, whole: Report, what: str, quantizer: DSQuantizer) -> None:
    whole.sections.append(report)
    report.note(
        f"int8 where at least {quantizer.activation_threshold:g} of the signal-to-noise ratio (dB) that the "
        f"{quantizer.bit_width}-bit weights leave is kept; measured layer by layer on {what}"
    )


def _answers_in_graph(
    program: Program, batches: list[Any] | None, skip: tuple[str, ...]
) -> Iterator[tuple[str, torch.Tensor, list[torch.Tensor]]]:
    """Name, weight and inputs of each linear layer that is called once or more with a constant weight."""
    module = program.module()
    layers = [layer for layer in find_layers(module, skip, Report("")) if layer.is_linear]
    seen: dict[Node, list[torch.Tensor]] = {}

    def see(node: Node, value: torch.Tensor) -> None:
        if not torch.isfinite(value).all():
            raise not_finite(node)
        flat = value.detach().reshape(-1, value.shape[-1])
        seen.setdefault(node, []).append(flat[:: max(1, len(flat) // _ROWS)].clone())

    if batches is None:
        found = [tuple(pytree.tree_leaves(program.example_inputs))]
    else:
        found = calibration_inputs(program, batches, len(batches))
    # A few batches tell: each row is a sample of its own.
    watch(module, {n.args[0] for layer in layers for n in layer.nodes if isinstance(n.args[0], Node)}, found[:4], see)
    for layer in layers:
        inputs = [r for node in layer.nodes if isinstance(node.args[0], Node) for r in seen.get(node.args[0], [])]
        if not any(rows.numel() for rows in inputs):
            raise InputError("calibration saw no values; the batches are empty.")
        yield layer.name, layer.weight.detach(), inputs


def _answers_to_noise(
    model: torch.nn.Module, skip: tuple[str, ...]
) -> Iterator[tuple[str, torch.Tensor, list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(_SEED)
    for name, layer in model.named_modules():
        if type(layer) is torch.nn.Linear and not any(part in name for part in skip):
            rows = torch.randn(_ROWS, layer.in_features, generator=generator).to(layer.weight.device)
            yield name, layer.weight.detach(), [rows]


def _ratios(weight: torch.Tensor, fmt: LayerFormat, inputs: list[torch.Tensor]) -> tuple[float, float]:
    """Signal-to-noise ratios (dB) of a layer's output with stored weights alone, and with int8 activations too."""
    layer = QuantizedLinear(weight.shape[1], weight.shape[0], bias=False, format=fmt).to(weight.device)
    if isinstance(fmt, Int4Format):
        grouped = quantize_groups(weight, fmt.group_size, symmetric=fmt.symmetric, method="mse")
        layer.store_(grouped.values, grouped.scales, grouped.zeros)
    else:
        layer.store_(*quantize_weight(weight, INT8_WEIGHT, "mse"))
    signal = alone = both = 0.0
    with torch.no_grad():
        stored = layer.weight
        for rows in inputs:
            if not rows.numel():
                continue
            exact = rows @ weight.T
            signal += float(exact.double().square().sum())
            alone += float((rows @ stored.T - exact).double().square().sum())
            both += float((layer(rows) - exact).double().square().sum())
    return _decibel(signal, alone), _decibel(signal, both)


def _decibel(signal: float, noise: float) -> float:
    """At most 120, what float32 can show; so the ratio of two is defined where nothing is lost."""
    return min(120.0, max(0.0, 10 * math.log10(signal / noise))) if noise and signal else 120.0

"""Quantising a module without data: its linear layers become `nn.QuantizedLinear`. Knows no graph."""

from __future__ import annotations

import copy

import torch

from ..core import INT8_WEIGHT, InputError, Int4Format, LayerFormat, Report
from ..nn import QuantizedLinear
from ._groups import method_for, quantize_groups
from ._layers import check_finite, undivided, unusable
from ._observe import quantize_weight
from ._ptq import PTQConfig


def quantize_module(module: torch.nn.Module, config: PTQConfig) -> torch.nn.Module:
    """A copy of a module with its linear layers quantised; `quantization` of the copy is the Report.

    Parameters of everything else are copied too, so that training the copy leaves the module alone. A weight that is
    tied to an embedding, say, stays float, because it would be stored twice.

    Raises:
        InputError: nothing in it can be quantised.
    """
    result = copy.deepcopy(module)
    report = Report(f"quantise {type(module).__name__}")
    before = _bytes(result)
    owners: dict[int, int] = {}
    for part in result.modules():
        for weight in part.parameters(recurse=False):
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    made: dict[torch.nn.Module, QuantizedLinear] = {}
    for name, layer in list(result.named_modules(remove_duplicate=False)):
        if type(layer) is not torch.nn.Linear:
            if any(True for _ in layer.parameters(recurse=False)):
                report.skip(name or type(layer).__name__, f"no quantised form for the module {type(layer).__name__}")
            continue
        fmt = config.format_of(name)
        if reason := _why_not(name, layer, fmt, config.skip, owners):
            report.skip(name or "the module", reason)
            continue
        if layer not in made:
            made[layer] = _quantised(layer, fmt, config)
            report.add(f"{name or 'the module'}", str(fmt), before="float32")
        if not name:
            result = made[layer]
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(result.get_submodule(parent), leaf, made[layer])
    if not made:
        raise InputError(f"nothing in {type(module).__name__} can be quantised: {dict(report.skipped)}")
    report.add("weights", _bytes(result), before=before, unit="bytes", how="all parameters and buffers")
    report.note("no data were given: weights were rounded to the nearest instead of in the way that suits the data")
    result.quantization = report  # type: ignore[assignment]
    return result


def _why_not(name: str, layer: torch.nn.Linear, fmt: LayerFormat, skip: tuple[str, ...], owners: dict[int, int]) -> str:
    reason = unusable(name, layer.weight, skip)
    if not reason and not fmt.is_quantised:
        reason = f"{fmt} was chosen for it"
    if not reason and fmt.activation == "static":
        reason = f"{fmt} needs data"
    if not reason and owners.get(id(layer.weight), 1) > 1:
        reason = "its weight is tied to another layer's"
    reason = reason or undivided(fmt, layer.in_features)
    if not reason:
        check_finite(name, layer.weight)
    return reason


def _quantised(layer: torch.nn.Linear, fmt: LayerFormat, config: PTQConfig) -> QuantizedLinear:
    made = QuantizedLinear(layer.in_features, layer.out_features, layer.bias is not None, format=fmt)
    made.to(layer.weight.device)
    if isinstance(fmt, Int4Format):
        grouped = quantize_groups(
            layer.weight,
            fmt.group_size,
            symmetric=fmt.symmetric,
            method=method_for(config.group_clip, compensated=False),
        )
        made.store_(grouped.values, grouped.scales, grouped.zeros)
    else:
        made.store_(*quantize_weight(layer.weight, INT8_WEIGHT, config.weight_clip))
    made.bias = layer.bias
    return made.train(layer.training)


def _bytes(module: torch.nn.Module) -> int:
    seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.state_dict().values()}
    return sum(seen.values())

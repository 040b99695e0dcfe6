"""Scales that move difficulty between a value and the weights that read it; the float answers stay the same.

A value with a few large channels is hard to keep in 8 bits, and a weight is hard to keep in 4 where its inputs are
large. Each channel of the value is divided by a number, and the weights that read it are multiplied with it. The
division is folded into what makes the value (a norm's or a linear layer's own weights); where that is impossible it
becomes one multiplication, if the gain is worth it.

Sources: Xiao et al., SmoothQuant, 2022 (largest values, a fixed exponent); Lin et al., AWQ, 2023 (mean values, the
exponent searched by the layers' own error).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..core import INT8_ACTIVATION, INT8_WEIGHT, Int4Format, LayerFormat
from ..graph.editing import add_call, add_constant, argument, constant_of
from ._groups import quantize_groups
from ._layers import Layer
from ._observe import affine, not_finite, quantize_weight, watch

aten = torch.ops.aten
_q = torch.ops.quantized_decomposed
METHODS = ("smoothquant", "awq")
#: Exponents that AWQ tries; 0 leaves a value as it is.
_EXPONENTS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75)
_SMOOTH = 0.5
#: Rows of a value on which exponents are tried.
_ROWS = 256
#: A multiplication that is not folded must leave less than this share of the error.
_WORTH = 0.8


@dataclass
class _Value:
    """What several linear layers read, with what was seen of it."""

    node: Node
    layers: dict[Layer, LayerFormat]
    rows: list[Tensor] = field(default_factory=list)
    ends: tuple[Tensor, Tensor] | None = None
    total: Tensor | float = 0.0
    seen: int = 0

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest number of each channel."""
        assert self.ends is not None, "asked once something was seen"
        return self.ends

    @property
    def largest(self) -> Tensor:
        """Absolute number of each channel."""
        low, high = self.range
        return torch.maximum(low.abs(), high.abs())

    @property
    def mean(self) -> Tensor:
        """Absolute number of each channel, in the mean."""
        return torch.as_tensor(self.total) / self.seen

    def see(self, value: Tensor, wanted: int) -> None:
        """Remember a batch, and as many of its rows as are wanted, drawn at random but always alike."""
        flat = value.detach().reshape(-1, value.shape[-1]).float()
        if not torch.isfinite(flat).all():
            raise not_finite(self.node)
        if not len(flat):
            return
        low, high = flat.amin(0), flat.amax(0)
        self.ends = (
            (low, high) if self.ends is None else (torch.minimum(self.ends[0], low), torch.maximum(self.ends[1], high))
        )
        self.total = self.total + flat.abs().sum(0)
        self.seen += len(flat)
        draw = torch.Generator().manual_seed(len(self.rows))
        self.rows.append(flat[torch.randperm(len(flat), generator=draw)[:wanted].to(flat.device)])


def fold_scales(
    module: GraphModule, formats: Mapping[Layer, LayerFormat], batches: list[tuple[Any, ...]], method: str
) -> list[tuple[str, str]]:
    """Changes the graph: scales values and the weights of the linear layers that read them.

    Args:
        formats: the formats that layers will have; "smoothquant" is for those with int8 activations.
        method: "smoothquant" or "awq".

    Returns:
        Names of the layers whose inputs were scaled, and how.

    Raises:
        InputError: a batch gives a value that is not finite.
    """
    values = [v for v in _values(formats) if method == "awq" or _activation(v) != "float"]
    watched = {v.node: v for v in values}
    # From every batch alike: a few samples do not tell how the channels of others are.
    wanted = max(1, -(-_ROWS // len(batches)))
    watch(module, watched, batches, lambda node, value: watched[node].see(value, wanted))
    done: list[tuple[str, str]] = []
    for number, value in enumerate(values):
        if not value.seen or not float(value.largest.max()):
            continue
        scale, share = _search(value, method)
        place = _fold_into(module, value, share)
        if scale is None or place is None:
            continue
        for layer in value.layers:
            _multiply(module, layer.source, scale)
        if place == "":
            _insert_multiplication(module, value, 1 / scale, number)
        else:
            _divide_producer(module, value.node, scale)
        names = ", ".join(layer.name for layer in value.layers)
        done.append((names, f"{share:.2f} of the error left, {place or 'one multiplication more'}"))
    return done


def _values(formats: Mapping[Layer, LayerFormat]) -> list[_Value]:
    """Values that only need their linear readers scaled; each with one weight that is read once."""
    found: dict[Node, _Value] = {}
    for layer, fmt in formats.items():
        source = layer.nodes[0].args[0]
        alone = len(layer.nodes) == len(layer.source.users) == 1
        if layer.is_linear and fmt.is_quantised and alone and isinstance(source, Node):
            found.setdefault(source, _Value(source, {})).layers[layer] = fmt
    return list(found.values())


def _activation(value: _Value) -> str:
    kinds = {fmt.activation for fmt in value.layers.values()}
    return "static" if "static" in kinds else "dynamic" if "dynamic" in kinds else "float"


def _search(value: _Value, method: str) -> tuple[Tensor | None, float]:
    """The scales of channels with the smallest error of the layers' outputs, and the share of the error they leave."""
    rows = torch.cat(value.rows)
    kept = _error(value, rows, None)
    if kept == 0:
        return None, 1.0
    weights = torch.stack([layer.weight.detach().abs().amax(0) for layer in value.layers]).amax(0).clamp_min(1e-5)
    best: tuple[float, Tensor | None] = (kept, None)
    exponents = (_SMOOTH,) if method == "smoothquant" else _EXPONENTS[1:]
    for exponent in exponents:
        candidates = [_scale(value.largest, exponent) / _scale(weights, 1 - exponent)]
        if method == "awq":
            candidates.append(_scale(value.mean, exponent))
        for raw in candidates:
            scale = (raw / (raw.max() * raw.min()).sqrt()).clamp(1e-3, 1e3)
            error = _error(value, rows, scale)
            if error < best[0]:
                best = error, scale
    return best[1], best[0] / kept


def _scale(size: Tensor, exponent: float) -> Tensor:
    return size.clamp_min(float(size.max()) * 1e-4 + 1e-12).pow(exponent)


def _error(value: _Value, rows: Tensor, scale: Tensor | None) -> float:
    total = 0.0
    scaled = rows if scale is None else rows / scale
    one = torch.ones(()) if scale is None else scale
    ends = float((value.range[0] / one).min()), float((value.range[1] / one).max())
    kinds = {kind: _stored_activation(scaled, kind, ends) for kind in {f.activation for f in value.layers.values()}}
    for layer, fmt in value.layers.items():
        weight = layer.weight.detach()
        wide = weight if scale is None else weight * scale
        if isinstance(fmt, Int4Format):
            low = quantize_groups(wide, fmt.group_size, symmetric=fmt.symmetric, method="mse").weight()
        else:
            stored, steps = quantize_weight(wide, INT8_WEIGHT, "minmax")
            low = stored * steps[:, None]
        total += float((kinds[fmt.activation] @ low.T - rows @ weight.T).double().square().mean())
    return total


def _stored_activation(rows: Tensor, kind: str, ends: tuple[float, float]) -> Tensor:
    if kind == "float":
        return rows
    low, high = INT8_ACTIVATION.range
    if kind == "dynamic":
        scale, zero = _q.choose_qparams_per_token_asymmetric(rows, torch.int8)
        stored = _q.quantize_per_token(rows, scale, zero, low, high, torch.int8)
        found: Tensor = _q.dequantize_per_token(stored, scale, zero, low, high, torch.int8, torch.float32)
        return found
    # All that calibration saw, which a few rows do not hold: a rare large value is what scales are for.
    step, offset = affine(min(ends[0], 0.0), max(ends[1], 0.0), INT8_ACTIVATION)
    return (torch.clamp(torch.round(rows / step) + offset, low, high) - offset) * step


def _fold_into(module: GraphModule, value: _Value, share: float) -> str | None:
    """Where the division goes; empty for a multiplication of its own, None if that is not worth it."""
    readers = {node for layer in value.layers for node in layer.nodes}
    producer = _producer(module, value.node)
    if producer is not None and set(value.node.users) == readers:
        return "folded into what comes before"
    return "" if share < _WORTH else None


def _producer(module: GraphModule, node: Node) -> tuple[Node, ...] | None:
    """The constants whose first (or only) dimension is the value's last and which it is proportional to."""
    if node.target is aten.layer_norm.default:
        given: list[Any] = [argument(node, 2), argument(node, 3)]
        shape = argument(node, 1)
    elif node.target is aten.rms_norm.default:
        given, shape = [argument(node, 2)], argument(node, 1)
    elif node.target is aten.linear.default:
        given, shape = [argument(node, 1), argument(node, 2)], [0]
    elif node.target is aten.mul.Tensor:
        return _factor(module, node)
    else:
        return None
    constants = [c for c in given if c is not None]
    if given[0] is None or len(shape) != 1 or not all(is_own(module, c) for c in constants):
        return None
    return tuple(constants)


def _factor(module: GraphModule, node: Node) -> tuple[Node, ...] | None:
    """Of a product: a constant vector, or a linear layer that is read by nothing else (an up-projection)."""
    channels = node.meta["val"].shape[-1]
    for part in node.args[:2]:
        if not isinstance(part, Node):
            continue
        constant = constant_of(module, part)
        if constant is not None and tuple(constant.shape) == (channels,) and is_own(module, part):
            return (part,)
        if part.target is aten.linear.default and len(part.users) == 1 and part.meta["val"].shape[-1] == channels:
            return _producer(module, part)
    return None


def is_own(module: GraphModule, node: Any) -> bool:
    """Whether a constant float tensor is read by one node only."""
    tensor = constant_of(module, node)
    return tensor is not None and tensor.dtype == torch.float32 and len(node.users) == 1 and _names(module, node) == 1


def _names(module: GraphModule, node: Node) -> int:
    """Nodes that read the tensor: a tied weight has several names."""
    mine = constant_of(module, node)
    others = (constant_of(module, other) for other in module.graph.nodes if other.op == "get_attr")
    return sum(other is mine for other in others)


def _divide_producer(module: GraphModule, node: Node, scale: Tensor) -> None:
    constants = _producer(module, node)
    assert constants is not None, "it was looked at before"
    for constant in constants:
        tensor = constant_of(module, constant)
        assert tensor is not None
        shape = (-1,) + (1,) * (tensor.ndim - 1)
        replace_constant(module, constant, tensor / scale.reshape(shape))


def _multiply(module: GraphModule, source: Node, scale: Tensor) -> None:
    weight = constant_of(module, source)
    assert weight is not None
    replace_constant(module, source, weight * scale)


def replace_constant(module: GraphModule, node: Node, tensor: Tensor) -> None:
    """Changes the graph: all that read a constant read another tensor."""
    first = next(n for n in module.graph.nodes if n.op == "call_function")
    new = add_constant(module, first, tensor.detach(), "scaled")
    node.replace_all_uses_with(new)


def _insert_multiplication(module: GraphModule, value: _Value, inverse: Tensor, number: int) -> None:
    readers = [node for layer in value.layers for node in layer.nodes]
    first = next(n for n in module.graph.nodes if n.op == "call_function")
    constant = add_constant(module, first, inverse.detach(), f"inverse_{number}")
    place = next(n for n in module.graph.nodes if n in readers)
    product = add_call(place, aten.mul.Tensor, (value.node, constant))
    for reader in readers:
        reader.replace_input_with(value.node, product)

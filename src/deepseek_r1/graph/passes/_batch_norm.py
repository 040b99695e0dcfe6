"""Batch normalisation folded into the convolution or linear layer before or behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..editing import add_constant, argument, constant_of
from ._effects import Aliases

aten = torch.ops.aten
_CONV = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_LINEAR = aten.linear.default
_WEIGHTED = (*_CONV, *_TRANSPOSED, _LINEAR)


@dataclass(frozen=True, kw_only=True)
class _Affine:
    """What a batch normalisation does to each channel, in float64: x * scale + shift."""

    scale: torch.Tensor
    shift: torch.Tensor


def fold_batch_norm(module: GraphModule) -> int:
    """Fold batch normalisation into the convolution, transposed convolution or linear layer before or behind it."""
    # Source: Jacob et al., Quantization and Training of Neural Networks, 2018, section 3.2.
    count = 0
    for norm in list(module.graph.nodes):
        if norm.target is not aten.batch_norm.default or argument(norm, 5) is not False:
            continue
        aliases = Aliases(module)
        affine = _affine(module, norm, aliases)
        if affine is not None and (_into_layer_before(module, norm, affine, aliases, count)
                                   or _into_layer_behind(module, norm, affine, aliases, count)):  # fmt: skip
            count += 1
    return count


def _affine(module: GraphModule, norm: Node, aliases: Aliases) -> _Affine | None:
    gain, shift, mean, variance = (constant_of(module, a) for a in norm.args[1:5])
    if mean is None or variance is None or not aliases.stable(*norm.args[1:5]):
        return None
    # In float64, so that folding costs no more than one rounding of each weight.
    scale = torch.rsqrt(variance.detach().double() + float(norm.args[7]))  # type: ignore[arg-type]
    if gain is not None:
        scale = scale * gain.detach().double()
    offset = -mean.detach().double() * scale
    return _Affine(scale=scale, shift=offset if shift is None else offset + shift.detach().double())


def _layer(module: GraphModule, node: Any, aliases: Aliases) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias of a layer with one sample in each row of a batch, if they are constants."""
    if not isinstance(node, Node) or node.target not in _WEIGHTED:
        return None
    weight, bias = constant_of(module, argument(node, 1)), constant_of(module, argument(node, 2))
    if weight is None or (bias is None) != (argument(node, 2) is None) or not aliases.stable(*node.args[1:3]):
        return None
    # Without a batch, or with a sequence before a linear layer's features, dimension 1 is not the channel.
    return (weight.detach(), None if bias is None else bias.detach()) if node.meta["val"].ndim == weight.ndim else None


def _into_layer_before(module: GraphModule, norm: Node, affine: _Affine, aliases: Aliases, number: int) -> bool:
    layer: Any = norm.args[0]
    found = _layer(module, layer, aliases)
    if found is None or len(layer.users) != 1:
        return False
    weight, bias = found
    scale = affine.scale
    if layer.target in _TRANSPOSED:
        groups = int(argument(layer, 6, 1))
        # [in, out / groups, ...]: the inputs of one group lie together.
        grouped = weight.double().unflatten(0, (groups, -1)) * scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
        folded = grouped.flatten(0, 1)
    else:
        folded = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    offset = affine.shift if bias is None else affine.shift + bias.double() * scale
    _store(module, layer, folded.to(weight.dtype), offset.to(weight.dtype), number)
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)
    return True


def _into_layer_behind(module: GraphModule, norm: Node, affine: _Affine, aliases: Aliases, number: int) -> bool:
    layer = next(iter(norm.users), None)
    found = _layer(module, layer, aliases)
    if found is None or layer is None or len(norm.users) != 1 or layer.args[0] is not norm or not _is_unpadded(layer):
        return False
    if not aliases.stable(norm.args[0]):  # the layer reads it later than the normalisation did
        return False
    weight, bias = found
    groups = int(argument(layer, 6, 1)) if layer.target in _CONV else 1
    shape = (groups, 1, -1, *[1] * (weight.ndim - 2))
    grouped = weight.double().unflatten(0, (groups, -1))
    folded = (grouped * affine.scale.reshape(shape)).flatten(0, 1)
    moved = (grouped * affine.shift.reshape(shape)).flatten(0, 1).flatten(1).sum(1)
    offset = moved if bias is None else moved + bias.double()
    _store(module, layer, folded.to(weight.dtype), offset.to(weight.dtype), number)
    layer.replace_input_with(norm, norm.args[0])  # type: ignore[arg-type]
    module.graph.erase_node(norm)
    return True


def _is_unpadded(layer: Node) -> bool:
    # A zero that is padded behind the normalisation would have to be another number before it.
    if layer.target in _TRANSPOSED:
        return False
    padding = argument(layer, 4, 0)
    return layer.target is _LINEAR or padding in (0, "valid") or (isinstance(padding, list) and not any(padding))


def _store(module: GraphModule, layer: Node, weight: torch.Tensor, bias: torch.Tensor, number: int) -> None:
    new_weight = add_constant(module, layer, weight, f"folded_{number}_weight")
    new_bias = add_constant(module, layer, bias, f"folded_{number}_bias")
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])

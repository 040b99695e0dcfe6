"""The layers of a graph that a format can be chosen for, under the names they have in the module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from ..core import InputError, Int4Format, LayerFormat, Report
from ..graph.editing import argument, constant_of

aten = torch.ops.aten
CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip
#: Operators with weights that stay float, and are said to.
_FLOAT = (
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.embedding.default,
    aten.bilinear.default, aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input,
)  # fmt: skip


@dataclass(eq=False)
class Layer:
    """A weight, and the nodes that multiply with it: several, if a module is called more than once.

    Attributes:
        name: as in `named_modules` of the captured module.
        weight: [out, in / groups, ...], float32.
        source: the node that gives it.
    """

    name: str
    weight: torch.Tensor
    source: Node
    nodes: list[Node] = field(default_factory=list)

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer, and no convolution."""
        return self.nodes[0].target is aten.linear.default

    def misfit(self, fmt: LayerFormat) -> str:
        """Why the layer cannot have a format; empty if it can."""
        if not self.is_linear and (isinstance(fmt, Int4Format) or fmt.activation == "dynamic"):
            return f"{fmt} is for linear layers"
        return undivided(fmt, self.weight[0].numel())


def undivided(fmt: LayerFormat, inputs: int) -> str:
    """Why so many inputs do not divide into a format's groups; empty if they do, or it has none."""
    if isinstance(fmt, Int4Format) and inputs % fmt.group_size:
        return f"its {inputs} inputs do not divide into groups of {fmt.group_size}"
    return ""


def find_layers(module: GraphModule, skip: Sequence[str], report: Report) -> list[Layer]:
    """Convolutions and linear layers with a constant float32 weight; the report names the others, and why.

    Args:
        skip: parts of names of layers that are left out.

    Raises:
        InputError: a weight has values that are not finite.
    """
    found: dict[object, Layer] = {}
    names: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.target in _FLOAT:
            report.skip(layer_name(node), f"no quantised form for {node.target}")
        if node.target not in (*CONVOLUTIONS, aten.linear.default):
            continue
        name = layer_name(node)
        weight = constant_of(module, argument(node, 1))
        reason = unusable(name, weight, skip)
        if weight is None or reason:
            report.skip(name, reason)
            continue
        check_finite(name, weight)
        source = node.args[1]
        if source.target not in found:
            names[name] = names.get(name, 0) + 1
            # Parts of a torch.nn.MultiheadAttention, say, all lie in one module.
            unique = name if names[name] == 1 else f"{name}#{names[name]}"
            found[source.target] = Layer(unique, weight, source)
        found[source.target].nodes.append(node)
    return list(found.values())


def unusable(name: str, weight: torch.Tensor | None, skip: Sequence[str]) -> str:
    """Why a layer stays float whatever its format; empty if it need not. No weight is none that is constant."""
    if any(part in name for part in skip):
        return "in the skip list"
    if weight is None:
        return "its weight is not a constant"
    return "" if weight.dtype == torch.float32 else f"its weight is {weight.dtype}"


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Raise InputError if a weight has values that are not finite."""
    if not torch.isfinite(weight).all():
        raise InputError(f"the weight of {name!r} has values that are not finite.")


def layer_name(node: Node) -> str:
    """The name of the module whose call a node stands in."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())))[0] if stack else ""
    return str(path).removeprefix("L['self'].") or node.name

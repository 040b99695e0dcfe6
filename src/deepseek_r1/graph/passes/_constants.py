"""What depends on constants only is computed once, here, instead of at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..editing import add_constant, constant_of
from ..program import as_double
from ._effects import Aliases, is_pure

aten = torch.ops.aten
#: A folded constant may be this large, or as large as the constants it was made from.
LIMIT_BYTES = 1 << 20


def fold_constants(module: GraphModule) -> int:
    """Compute what depends on constants only, unless the result is over 1 MiB and larger than what it came from."""
    folder = _Folder(module)
    folds = [node for node in module.graph.nodes if folder.visit(node)]
    for number, node in enumerate(folds):
        new = add_constant(module, node, folder.result(node), f"constant_{number}")
        node.replace_all_uses_with(new)
    for node in reversed(folds):
        module.graph.erase_node(node)
    return len(folds)


class _Folder:
    """Values of constant nodes, in float64 while they are worked out, so that a chain is rounded once."""

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self._aliases = Aliases(module)
        self._values: dict[Node, torch.Tensor] = {}
        self._work: dict[Node, bool] = {}

    def visit(self, node: Node) -> bool:
        """Work out a node if it is constant; whether it should be replaced by its value."""
        if node.op == "get_attr":
            if constant_of(self._module, node) is not None and self._aliases.stable(node):
                self._work[node] = False
            return False
        if not self._is_constant(node):
            return False
        sources = node.all_input_nodes
        # A view of a constant costs nothing, and a copy of it would.
        self._work[node] = not node.target.is_view or any(self._work[s] for s in sources)  # type: ignore[union-attr]
        values = map_arg((node.args, node.kwargs), self._value)
        with torch.no_grad():
            self._values[node] = node.target(*as_double(values[0]), **as_double(values[1]))  # type: ignore[operator]
        return self._work[node] and self._is_last(node)

    def _is_constant(self, node: Node) -> bool:
        target: Any = node.target
        if not isinstance(target, OpOverload) or target.namespace != "aten" or not is_pure(node):
            return False
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not all(isinstance(size, int) for size in value.shape):
            return False
        if target in (aten.as_strided.default, aten.scaled_dot_product_attention.default):
            return False
        sources = node.all_input_nodes
        if not all(source in self._work for source in sources) or not self._aliases.stable(node):
            return False
        came_from = sum(_bytes(source.meta["val"]) for source in sources if "val" in source.meta)
        # To expand costs nothing where it stands.
        return _bytes(value) <= (came_from if target.is_view else max(LIMIT_BYTES, came_from))

    def _is_last(self, node: Node) -> bool:
        """Whether something that is not constant uses a node, and none of that looks at how it lies in memory."""
        if any(user.target is aten.as_strided.default for user in node.users):
            return False
        return not all(self._is_constant(user) for user in node.users)

    def _value(self, node: Node) -> Any:
        if node in self._values:
            return self._values[node]
        return constant_of(self._module, node)

    def result(self, node: Node) -> torch.Tensor:
        """The value in its own dtype."""
        return self._values[node].detach().to(node.meta["val"].dtype).clone(memory_format=torch.contiguous_format)


def _bytes(value: Any) -> int:
    return int(value.numel()) * value.element_size() if isinstance(value, torch.Tensor) else 0

"""What a node may do beside giving its result: write to memory, share it, draw random numbers, check something.

The rules err on the safe side: what is not known to be harmless is taken for harmful.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from ..editing import argument, constant_of

aten = torch.ops.aten

#: Operators that draw random numbers or write to running statistics, unless an argument has a certain value.
_HARMLESS: dict[Any, tuple[int, Any]] = {
    aten.dropout.default: (2, False), aten.feature_dropout.default: (2, False), aten.alpha_dropout.default: (2, False),
    aten.batch_norm.default: (5, False), aten.scaled_dot_product_attention.default: (4, 0.0),
    aten.lstm.input: (6, False), aten.gru.input: (6, False),
    aten.rnn_tanh.input: (6, False), aten.rnn_relu.input: (6, False),
}  # fmt: skip
#: Composite operators that always give new memory although their schema cannot promise it.
_FRESH = frozenset({
    aten.linear.default, aten.matmul.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, aten.conv_transpose1d.default,
    aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.batch_norm.default, aten.layer_norm.default,
    aten.group_norm.default, aten.rms_norm.default, aten.softmax.int, aten.log_softmax.int,
    aten.scaled_dot_product_attention.default, aten.max_pool1d.default, aten.max_pool2d.default,
    aten.max_pool3d.default, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default, aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input,
    aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar, aten.square.default,
})  # fmt: skip


def is_pure(node: Node) -> bool:
    """Whether a node only computes its result from its inputs, the same each time.

    Operators of other libraries count as impure, except for removing what nobody uses (see `sweep`).
    """
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    target: Any = node.target
    if not isinstance(target, OpOverload):
        name = getattr(target, "__name__", "")
        return getattr(target, "__module__", "") in ("_operator", "math") or name.startswith("sym_")
    if target.namespace not in ("aten", "quantized_decomposed") or not target._schema.returns:
        return False
    return not target._schema.is_mutable and (_is_harmless(node) or not _has_doubtful_tag(target))


def _is_harmless(node: Node) -> bool:
    if node.target not in _HARMLESS:
        return False
    index, value = _HARMLESS[node.target]
    return bool(argument(node, index, value) == value)


def _has_doubtful_tag(target: OpOverload) -> bool:
    return bool({torch.Tag.nondeterministic_seeded, torch.Tag.maybe_aliasing_or_mutating} & set(target.tags))


def sweep(graph: Graph) -> int:
    """Remove what nobody uses and what does nothing else; returns how many calls went."""
    gone = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and (is_pure(node) or not node.is_impure()):
            gone += node.op == "call_function"
            graph.erase_node(node)
    return gone


class Aliases:
    """Which values of a graph may share memory, and which of those are written to or seen from outside."""

    def __init__(self, module: GraphModule) -> None:
        self._parent: dict[Node, Node] = {}
        self._members: dict[Node, list[Node]] = {}
        self._written: set[Node] = set()
        self._outside: set[Node] = set()
        storages: dict[int, Node] = {}
        written: list[Node] = []
        outside: list[Node] = []
        for node in module.graph.nodes:
            if node.op == "call_function":
                changed = _written(node)
                written += changed
                if len(changed) == 1 and self._consumes(node, changed[0]):
                    continue
                for source in _shared(node) if _has_tensor(node) else ():
                    self.join(source, node)
            elif node.op == "output":
                outside += node.all_input_nodes
            else:
                outside.append(node)
            if (tensor := constant_of(module, node)) is not None and tensor.numel():
                self.join(node, storages.setdefault(tensor.untyped_storage().data_ptr(), node))
        self._written = {self._root(node) for node in written}
        self._outside = {self._root(node) for node in outside}

    def _root(self, node: Node) -> Node:
        while (above := self._parent.get(node, node)) is not node:
            self._parent[node] = self._parent.get(above, above)
            node = above
        return node

    def join(self, one: Node, other: Node) -> None:
        """From now on these two share memory."""
        first, second = self._root(one), self._root(other)
        if first is not second:
            self._parent[first] = second
            self._members[second] = [*self._group(second), *self._group(first)]
            for group in (self._written, self._outside):
                if first in group:
                    group.add(second)

    def stable(self, *nodes: Any) -> bool:
        """Whether nothing in the graph writes to the memory of these values; what is no node is stable."""
        return all(self._root(node) not in self._written for node in nodes if isinstance(node, Node))

    def _group(self, root: Node) -> list[Node]:
        return self._members.get(root, [root])

    def _consumes(self, node: Node, value: Node) -> bool:
        """Whether a node writes to memory that is its own from then on, so that its result counts as new."""
        if getattr(node.target, "_schema", None) is None or node.args[0] is not value:
            return False
        group = set(self._group(self._root(value)))
        return all(m.op == "call_function" and set(m.users) <= {*group, node} for m in group)

    def is_outside(self, node: Node) -> bool:
        """Whether a value shares memory with an input, a weight or an output."""
        return self._root(node) in self._outside

    def may_join(self, one: Node, other: Node) -> bool:
        """Whether nobody can tell if two equal values become one.

        Inside the graph that takes memory that nobody writes to. Outside, a caller may write to an output, an input
        or a weight later, so at most one of the two may be seen there.
        """
        first, second = self._root(one), self._root(other)
        if not self.stable(one, other):
            return False
        return first is second or not (first in self._outside and second in self._outside)


def _has_tensor(node: Node) -> bool:
    if "val" not in node.meta:
        return True
    return any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(node.meta["val"]))


def _shared(node: Node) -> Iterator[Node]:
    target: Any = node.target
    if target is operator.getitem:
        yield from node.all_input_nodes[:1]
    elif not isinstance(target, OpOverload):
        yield from node.all_input_nodes
    elif target in _FRESH:
        return
    elif _has_doubtful_tag(target) or _is_composite(target):
        yield from node.all_input_nodes
    else:
        for info, value in _arguments(node):
            if info is not None:
                yield from (v for v in pytree.tree_leaves(value) if isinstance(v, Node))


def _written(node: Node) -> list[Node]:
    target: Any = node.target
    if target is operator.getitem or is_pure(node):
        return []
    if not isinstance(target, OpOverload) or torch.Tag.maybe_aliasing_or_mutating in target.tags:
        return node.all_input_nodes
    pairs = [value for info, value in _arguments(node) if info is not None and info.is_write]
    return [v for value in pairs for v in pytree.tree_leaves(value) if isinstance(v, Node)]


def _arguments(node: Node) -> Iterator[tuple[Any, Any]]:
    schema = node.target._schema  # type: ignore[union-attr]
    for number, spec in enumerate(schema.arguments):
        value = node.args[number] if number < len(node.args) else node.kwargs.get(spec.name)
        yield spec.alias_info, value


def _is_composite(target: OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")

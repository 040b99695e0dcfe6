"""What goes into a captured graph and comes out, without the graph: enough to check a call and to nest its answer."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from ..core import InputError

_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One flat input: a tensor of a dtype and a shape (a dynamic size is its symbol's name), or a fixed value."""

    name: str
    dtype: torch.dtype | None = None
    shape: tuple[int | str, ...] = ()
    fixed: Any = None


class Limit(NamedTuple):
    """A dynamic size that is bounded or shared with another input."""

    leaf: int
    dim: int
    symbol: str
    least: int
    most: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Signature:
    """The inputs and outputs of a program.

    Attributes:
        leaves: the flat inputs.
        in_tree: the nest of `(args, kwargs)`.
        limits: what the sizes must keep to.
        out_tree: the nest of the answer.
        constants: values in the answer that are no tensors, by their place among its leaves.
    """

    program: str
    leaves: tuple[Leaf, ...]
    in_tree: pytree.TreeSpec
    limits: tuple[Limit, ...]
    out_tree: pytree.TreeSpec
    constants: dict[int, Any]

    @property
    def positional(self) -> int:
        """How many inputs there are if all are tensors given by position, else -1."""
        plain = pytree.tree_structure(((0,) * len(self.leaves), {}))
        return len(self.leaves) if self.in_tree == plain and all(leaf.dtype for leaf in self.leaves) else -1

    @property
    def single(self) -> bool:
        """Whether the answer is one tensor."""
        return self.out_tree.is_leaf() and not self.constants

    def nest(self, outputs: Sequence[torch.Tensor]) -> Any:
        """The answer as the module gives it, from its tensors in order."""
        if self.single:
            return outputs[0]
        values: Iterator[torch.Tensor] = iter(outputs)
        places = range(self.out_tree.num_leaves)
        filled = [self.constants[i] if i in self.constants else next(values) for i in places]
        return pytree.tree_unflatten(filled, self.out_tree)

    def misfit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why these inputs do not fit, or None if they do."""
        given, tree = pytree.tree_flatten((args, kwargs))
        if tree != self.in_tree:
            return f"the program {self.program!r} was captured with inputs {self.in_tree}; given {tree}."
        for number, (value, leaf) in enumerate(zip(given, self.leaves, strict=True)):
            if leaf.dtype is None:
                if type(value) is not type(leaf.fixed) or value != leaf.fixed:
                    what = f"input {leaf.name!r} of {self.program!r}"
                    return f"{what} was captured as {leaf.fixed!r}, which is fixed; given {value!r}."
                continue
            what = f"input {number} of {self.program!r}"
            if not isinstance(value, torch.Tensor):
                return f"{what} must be a tensor, given {type(value).__name__}."
            if value.dtype != leaf.dtype:
                return f"{what} has dtype {leaf.dtype}; given {value.dtype}."
            fits = len(value.shape) == len(leaf.shape) and all(
                isinstance(s, str) or s == n for s, n in zip(leaf.shape, value.shape)
            )
            if not fits:
                return f"{what} has shape {leaf.shape}; given {tuple(value.shape)}."
        return self.outside(given) or None

    def outside(self, leaves: Sequence[Any]) -> str:
        """Why the sizes of flat inputs are not among those that the graph holds for; empty if they are.

        The module may have taken another branch for them, so that the graph would answer wrongly without an error.
        """
        sizes: dict[str, int] = {}
        for number, dim, symbol, low, high in self.limits:
            shape = getattr(leaves[number], "shape", ()) if number < len(leaves) else ()
            what = f"input {number} of {self.program!r}"
            if dim >= len(shape):
                return f"{what} needs at least {dim + 1} dimensions; given {tuple(shape)}."
            size = shape[dim]
            if not low <= size <= high:
                span = f"at least {low}" if high == math.inf else f"{low} to {high}"
                return f"dimension {dim} of {what} must be {span}; given {size}."
            if sizes.setdefault(symbol, size) != size:
                seen = f"{sizes[symbol]} against {size}"
                return f"the inputs of {self.program!r} must agree in the size {symbol}: {seen}."
        return ""

    def to_json(self) -> str:
        """As text. Raises InputError if a fixed input or a constant of the answer is no plain value, or a nest is of an
        unregistered class."""
        try:
            return json.dumps({
                "program": self.program,
                "leaves": [[v.name, v.dtype and str(v.dtype), list(v.shape), v.fixed] for v in self.leaves],
                "in_tree": pytree.treespec_dumps(self.in_tree),
                "limits": [[*limit[:4], None if limit.most == math.inf else limit.most] for limit in self.limits],
                "out_tree": pytree.treespec_dumps(self.out_tree),
                "constants": sorted(self.constants.items()),
            })  # fmt: skip
        except (TypeError, NotImplementedError) as e:
            raise InputError(f"the signature of {self.program!r} cannot be written: {e}") from e

    @classmethod
    def from_json(cls, text: str) -> Signature:
        """Read what `to_json` wrote; only text that this program wrote itself may be given."""
        data = json.loads(text)
        return cls(
            program=data["program"],
            leaves=tuple(
                Leaf(name=name, dtype=_DTYPES[dtype] if dtype else None, shape=tuple(shape), fixed=fixed)
                for name, dtype, shape, fixed in data["leaves"]
            ),
            in_tree=pytree.treespec_loads(data["in_tree"]),
            limits=tuple(
                Limit(i, dim, symbol, low, math.inf if high is None else high)
                for i, dim, symbol, low, high in data["limits"]
            ),
            out_tree=pytree.treespec_loads(data["out_tree"]),
            constants={int(place): value for place, value in data["constants"]},
        )


def signature_of(exported: ExportedProgram, example_inputs: Any, name: str) -> Signature:
    """The signature of an exported graph that was captured with these examples."""
    examples, in_tree = pytree.tree_flatten(example_inputs)
    leaves = tuple(_leaf(node, value) for node, value in zip(user_inputs(exported), examples))
    spec = exported.call_spec.out_spec
    assert spec is not None, "a captured graph always knows the nest of its outputs"
    output = next(n for n in exported.graph.nodes if n.op == "output")
    skip = len(exported.graph_signature.output_specs) - len(exported.graph_signature.user_outputs)
    slots = list(pytree.tree_leaves(output.args[0]))[skip:]
    return Signature(
        program=name,
        leaves=leaves,
        in_tree=in_tree,
        limits=tuple(_limits(exported, leaves)),
        out_tree=spec,
        constants={i: slot for i, slot in enumerate(slots) if not isinstance(slot, Node)},
    )


def user_inputs(exported: ExportedProgram) -> list[Node]:
    """Placeholders of the graph's inputs, those of weights left out."""
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder"]
    specs = exported.graph_signature.input_specs
    return [n for n, spec in zip(nodes, specs, strict=True) if spec.kind is InputKind.USER_INPUT]


def _leaf(node: Node, example: Any) -> Leaf:
    if not isinstance(example, torch.Tensor):
        return Leaf(name=node.name, fixed=example)
    value = node.meta.get("val")
    dims = value.shape if isinstance(value, torch.Tensor) else ()
    shape = tuple(int(str(d)) if str(d).isdigit() else str(d) for d in dims)
    return Leaf(name=node.name, dtype=example.dtype, shape=shape)


def _limits(exported: ExportedProgram, leaves: tuple[Leaf, ...]) -> Iterator[Limit]:
    every = [(i, dim, d) for i, leaf in enumerate(leaves) for dim, d in enumerate(leaf.shape) if isinstance(d, str)]
    count = Counter(symbol for _, _, symbol in every)
    ranges = {str(symbol): span for symbol, span in exported.range_constraints.items()}
    for number, dim, symbol in every:
        span = ranges.get(symbol)
        # torch takes every size for at least 2 while it captures; only a larger bound comes from the model.
        low = int(span.lower) if span is not None and span.lower > 2 else 0
        high = int(span.upper) if span is not None and span.upper < sys.maxsize - 1 else math.inf
        if low or high < math.inf or count[symbol] > 1:
            yield Limit(number, dim, symbol, low, high)

"""`Signature`: what goes into a Program and how its answer nests, told without the graph. Runs nothing."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from ..core import InputError
from ._conditions import evaluate, holds
from ._nest import reader_of

Shape = tuple[int | str, ...]
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One flat input: a tensor of a shape, dtype and kind of device, or a value that is fixed."""

    name: str
    shape: Shape = ()
    dtype: torch.dtype | None = None
    device: str = ""
    fixed: Any = None

    @property
    def is_tensor(self) -> bool:
        """Whether a tensor is expected; otherwise exactly `fixed`."""
        return self.dtype is not None

    def __str__(self) -> str:
        if not self.is_tensor:
            return f"{self.name} = {self.fixed!r}"
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {kind}[{', '.join(map(str, self.shape))}] on {self.device}"


class Limit(NamedTuple):
    """A dynamic size that is bounded or shared with another input."""

    slot: int
    dim: int
    symbol: str
    least: int
    most: float


class Signature:
    """The inputs that one graph holds for, and how its answer nests; prints as `x: float32[s0, 4] on cpu`.

    Args:
        title: the program's name, for messages.
        slots: the flat inputs.
        in_tree: the nest of `(args, kwargs)`.
        keywords: names of the keyword inputs, in the captured order.
        limits: what the sizes must keep to.
        conditions: what the module's lines asked of the sizes, over `size_<input>_<axis>`.
        out_tree: the nest of the answer.
        constants: values in the answer that are no tensors, by their place among its leaves.
    """

    def __init__(
        self, *, title: str, slots: Sequence[Slot], in_tree: pytree.TreeSpec, keywords: Sequence[str],
        limits: Sequence[Limit], conditions: Iterable[str], out_tree: pytree.TreeSpec, constants: Mapping[int, Any],
    ) -> None:  # fmt: skip
        self.title = title
        self.slots = list(slots)
        self.in_tree = in_tree
        self.limits = list(limits)
        self.out_tree = out_tree
        self.constants = dict(constants)
        self._keywords = tuple(keywords)
        self._conditions = tuple(conditions)
        self._derived = [
            (i, axis, d) for i, axis, d in _dynamic(self.slots) if not d.isidentifier()
        ]  # sizes such as s27 + 1
        self._fixed = [(i, len(s.shape), s.dtype, *_sizes(s.shape)) for i, s in enumerate(self.slots) if s.is_tensor]
        self._read = reader_of(in_tree)
        self._asks_sizes = bool(self.limits or self._derived or self._conditions)

    def __str__(self) -> str:
        return ", ".join(map(str, self.slots))

    @property
    def positional(self) -> int:
        """How many inputs there are if all are tensors given by position, else -1."""
        plain = pytree.tree_structure(((0,) * len(self.slots), {}))
        return len(self.slots) if self.in_tree == plain and all(slot.is_tensor for slot in self.slots) else -1

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

    def flat(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
        """Inputs as leaves and their nest; keyword inputs in the captured order, as their order says nothing."""
        return pytree.tree_flatten((args, self._in_order(kwargs)))

    def leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """Inputs as leaves; None if they nest otherwise than the captured ones. Faster than `flat`."""
        if self._read is None:
            found, tree = self.flat(args, kwargs)
            return found if tree == self.in_tree else None
        found = []
        return found if self._read((args, self._in_order(kwargs)), found) else None

    def _in_order(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if len(kwargs) > 1 and set(kwargs) == set(self._keywords):
            return {name: kwargs[name] for name in self._keywords}
        return dict(kwargs)

    def misfit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Why inputs do not fit, their nest, fixed values and devices included; None if they do."""
        leaves, tree = self.flat(args, kwargs)
        if tree != self.in_tree:
            return self._told(f"the program {self.title!r} was captured with inputs {self.in_tree}; given {tree}.")
        for number, (slot, given) in enumerate(zip(self.slots, leaves, strict=True)):
            if not slot.is_tensor and (type(given) is not type(slot.fixed) or given != slot.fixed):
                text = f"input {slot.name!r} of {self.title!r} was captured as {slot.fixed!r}, which is fixed"
                return self._told(f"{text}; given {given!r}.")
            if slot.is_tensor and isinstance(given, torch.Tensor) and given.device.type != slot.device:
                return self._told(f"{self._called(number)} is on {slot.device}; given on {given.device}.")
        return self.outside(leaves) or None

    def outside(self, leaves: Sequence[Any]) -> str:
        """Why flat inputs (dtype, rank, sizes) are not among those that the graph holds for; empty if they are.

        The module may have taken another branch for them, so that the graph would answer wrongly without an error.
        """
        if len(leaves) != len(self.slots):
            return self._told(f"{self.title!r} takes {len(self.slots)} inputs; given {len(leaves)}.")
        for number, rank, dtype, pick, wanted in self._fixed:
            given = leaves[number]
            if not isinstance(given, torch.Tensor):
                return self._told(f"{self._called(number)} must be a tensor, given {type(given).__name__}.")
            if given.dtype != dtype:
                return self._told(f"{self._called(number)} has dtype {dtype}; given {given.dtype}.")
            shape = given.shape
            if len(shape) != rank or (pick is not None and pick(shape) != wanted):
                return self._told(f"{self._called(number)} has shape {self.slots[number].shape}; given {tuple(shape)}.")
        return self._outside_sizes(leaves) if self._asks_sizes else ""

    def _outside_sizes(self, leaves: Sequence[Any]) -> str:
        sizes: dict[str, int] = {}
        for number, axis, symbol, low, high in self.limits:
            size = leaves[number].shape[axis]
            if not low <= size <= high:
                span = f"at least {low}" if high == math.inf else f"{low} to {high}"
                return self._told(f"dimension {axis} of {self._called(number)} must be {span}; given {size}.")
            if sizes.setdefault(symbol, size) != size:
                return self._told(
                    f"the inputs of {self.title!r} must agree in the size {symbol}: {sizes[symbol]} against {size}."
                )
        if self._derived:
            symbols = {d: leaves[i].shape[axis] for i, axis, d in _dynamic(self.slots) if d.isidentifier()}
            for number, axis, text in self._derived:
                if (size := leaves[number].shape[axis]) != (wanted := evaluate(text, symbols)):
                    return self._told(
                        f"dimension {axis} of {self._called(number)} must be {text}, here {wanted}; given {size}."
                    )
        if self._conditions:
            every = {f"size_{i}_{a}": n for i, rank, *_ in self._fixed for a, n in zip(range(rank), leaves[i].shape)}
            for text in self._conditions:
                if not holds(text, every):
                    given = [tuple(v.shape) for v in leaves if isinstance(v, torch.Tensor)]
                    return self._told(
                        f"the graph of {self.title!r} holds only where {self._readable(text)}: the model takes another "
                        f"branch for the sizes given, {given}."
                    )
        return ""

    def _called(self, number: int) -> str:
        return f"input {number} ({self.slots[number].name}) of {self.title!r}"

    def _readable(self, condition: str) -> str:
        for i, axis, _ in sorted(_dynamic(self.slots), reverse=True):
            condition = condition.replace(f"size_{i}_{axis}", f"{self.slots[i].name}.shape[{axis}]")
        return condition

    def _told(self, problem: str) -> str:
        return f"{problem}\nExpected: {self}"

    def to_json(self) -> str:
        """As text.

        Raises:
            InputError: a fixed input or a constant of the answer is no plain value, or a nest is of a class that is not
                registered by name.
        """
        try:
            return json.dumps({
                "title": self.title,
                "slots": [[v.name, list(v.shape), v.dtype and str(v.dtype), v.device, v.fixed] for v in self.slots],
                "in_tree": pytree.treespec_dumps(self.in_tree),
                "keywords": self._keywords,
                "limits": [[*limit[:4], None if limit.most == math.inf else limit.most] for limit in self.limits],
                "conditions": self._conditions,
                "out_tree": pytree.treespec_dumps(self.out_tree),
                "constants": sorted(self.constants.items()),
            })  # fmt: skip
        except (TypeError, NotImplementedError) as e:
            raise InputError(f"the signature of {self.title!r} cannot be written: {e}") from e

    @classmethod
    def from_json(cls, text: str) -> Signature:
        """Read what `to_json` wrote; only text that this program wrote itself may be given."""
        data = json.loads(text)
        return cls(
            title=data["title"],
            slots=[
                Slot(name=name, shape=tuple(shape), dtype=_DTYPES[dtype] if dtype else None, device=device, fixed=fixed)
                for name, shape, dtype, device, fixed in data["slots"]
            ],
            in_tree=pytree.treespec_loads(data["in_tree"]),
            keywords=data["keywords"],
            limits=[
                Limit(slot, dim, symbol, least, math.inf if most is None else most)
                for slot, dim, symbol, least, most in data["limits"]
            ],
            conditions=data["conditions"],
            out_tree=pytree.treespec_loads(data["out_tree"]),
            constants={int(place): value for place, value in data["constants"]},
        )


def signature_of(
    exported: ExportedProgram, example_inputs: tuple[tuple[Any, ...], dict[str, Any]], title: str,
    conditions: Sequence[str],
) -> Signature:  # fmt: skip
    """The signature of an exported graph that was captured with these examples."""
    examples, in_tree = pytree.tree_flatten(example_inputs)
    slots = [_slot(node, value) for node, value in zip(_user_inputs(exported), examples)]
    out_tree = exported.call_spec.out_spec
    assert out_tree is not None, "a captured graph always knows the nest of its outputs"
    output = next(n for n in exported.graph.nodes if n.op == "output")
    skip = len(exported.graph_signature.output_specs) - len(exported.graph_signature.user_outputs)
    answers = list(pytree.tree_leaves(output.args[0]))[skip:]
    return Signature(
        title=title,
        slots=slots,
        in_tree=in_tree,
        keywords=tuple(example_inputs[1]),
        limits=_limits(slots, {str(symbol): span for symbol, span in exported.range_constraints.items()}),
        conditions=conditions,
        out_tree=out_tree,
        constants={i: answer for i, answer in enumerate(answers) if not isinstance(answer, Node)},
    )


def _user_inputs(exported: ExportedProgram) -> list[Node]:
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder"]
    specs = exported.graph_signature.input_specs
    return [n for n, spec in zip(nodes, specs, strict=True) if spec.kind is InputKind.USER_INPUT]


def _slot(node: Node, example: Any) -> Slot:
    if not isinstance(example, torch.Tensor):
        return Slot(name=node.name, fixed=example)
    value = node.meta.get("val")
    dims = value.shape if isinstance(value, torch.Tensor) else ()
    shape = tuple(int(str(d)) if str(d).isdigit() else str(d) for d in dims)
    return Slot(name=node.name, shape=shape, dtype=example.dtype, device=example.device.type)


def _sizes(shape: Shape) -> tuple[Callable[[Any], Any] | None, Any]:
    """What takes the fixed sizes out of a shape, and what it must find."""
    axes = [axis for axis, size in enumerate(shape) if isinstance(size, int)]
    pick = itemgetter(*axes) if axes else None
    return pick, pick and pick(shape)


def _dynamic(slots: Sequence[Slot]) -> list[tuple[int, int, str]]:
    return [(i, axis, d) for i, slot in enumerate(slots) for axis, d in enumerate(slot.shape) if isinstance(d, str)]


def _limits(slots: Sequence[Slot], ranges: Mapping[str, Any]) -> list[Limit]:
    """(input, axis, symbol, least, most) of each dynamic size that is bounded or shared with another input."""
    every = _dynamic(slots)
    count = Counter(symbol for _, _, symbol in every)
    found = []
    for number, axis, symbol in every:
        # The bounds of sizes such as s27 + 1 follow from those of s27.
        span = ranges.get(symbol) if symbol.isidentifier() else None
        # torch takes every size for at least 2 while it captures; only a larger bound comes from the model.
        low = int(span.lower) if span is not None and span.lower > 2 else 0
        high = int(span.upper) if span is not None and span.upper < sys.maxsize - 1 else math.inf
        if low or high < math.inf or count[symbol] > 1:
            found.append(Limit(number, axis, symbol, low, high))
    return found

"""The structure of a module: which channels there are, and what has to leave with each. Removes nothing itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from ..core import InputError
from ..graph import Program, capture
from ._ledger import Count, Dims, Ledger
from ._rules import COMPUTING, Outcome, Place, blank, pointwise, unknown
from ._rules_shape import MOVING, item
from ._splits import shape_of

RULES = {**COMPUTING, **MOVING}


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Channels of one kind: whatever has to leave with one of them lies in the same tensors for all.

    Attributes:
        name: the layer that makes them.
        units: the channels, in their order in that layer.
        members: (tensor, dimension, indices a unit) that shrink with the group.
        width: indices of the first member a unit: 1 for a plain channel, the width of a head for a head.
    """

    name: str
    units: Any
    members: tuple[tuple[str, int, int], ...]
    width: int = 1

    @property
    def size(self) -> int:
        """How many units there are."""
        return int(self.units.size)


@dataclass(eq=False)
class Structure:
    """What is known of a module's channels.

    Attributes:
        program: the captured graph, with fixed sizes.
        values: the dimensions of each value of the graph.
        unit_of: the unit of each atom.
        groups: those that can lose channels.
        pinned: name of a group -> why it cannot.
        shapes: sizes of every tensor that the graph reads, by name.
        aliases: name -> the name under which the same tensor is known here.
        counts: integers in the module that follow a dimension.
        trainable: the tensors that are parameters, not buffers.
        element_sizes: bytes of a number of each tensor.
    """

    program: Program
    ledger: Ledger
    values: dict[Node, Outcome]
    unit_of: Any
    number: int
    groups: list[Group]
    pinned: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    counts: list[Count]
    trainable: frozenset[str] = frozenset()
    element_sizes: Mapping[str, int] = field(default_factory=dict)

    def group(self, name: str) -> Group:
        """The group of this name."""
        return next(g for g in self.groups if g.name == name)

    def without(self, reasons: Mapping[str, str]) -> Structure:
        """The same with some groups pinned."""
        kept = [g for g in self.groups if g.name not in reasons]
        return replace(self, groups=kept, pinned={**self.pinned, **reasons})

    def units_at(self, name: str, dim: int) -> Any:
        """The unit of each index of a tensor's dimension; None where it has no channels."""
        atoms = self.ledger.tensors[name][dim]
        return None if atoms is None else self.unit_of[atoms]

    def kept_at(self, removed: Any) -> Iterator[tuple[str, int, Any]]:
        """(tensor, dimension, indices that stay) for all that shrink when these units (a mask) leave."""
        for name, dims in self.ledger.tensors.items():
            for dim, atoms in enumerate(dims):
                if atoms is not None and (gone := removed[self.unit_of[atoms]]).any():
                    yield name, dim, np.flatnonzero(~gone)

    def mask(self, units: Any) -> Any:
        """A mask over all units, true for these."""
        found = np.zeros(self.number, dtype=bool)
        found[np.asarray(units, dtype=np.int64)] = True
        return found


def structure_of(model: torch.nn.Module, example_inputs: Any, skip: Sequence[str] = ()) -> Structure:
    """Capture a module and find its groups of channels.

    Args:
        skip: parts of names of parameters whose output channels must stay.

    Raises:
        CaptureError: the module cannot be captured.
        InputError: a weight is not finite.
    """
    aliases = _aliases(model)
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(
                f"the weight {name!r} has values that are not finite; what matters cannot be judged by it."
            )
    program = capture(model, example_inputs, dynamic_shapes={})
    ledger = Ledger()
    values = _walk(program, ledger, aliases)
    _pin_skipped(ledger, skip)
    number, unit_of = ledger.units()
    shapes = {n: tuple(t.shape) for n, t in _tensors(model) if n in ledger.tensors}
    groups, pinned = _groups(ledger, number, unit_of)
    return Structure(
        program=program, ledger=ledger, values=values, unit_of=unit_of, number=number, groups=groups, pinned=pinned,
        shapes=shapes, aliases=aliases, counts=list(ledger.counts), trainable=frozenset(dict(model.named_parameters())),
        element_sizes={n: t.element_size() for n, t in _tensors(model) if n in ledger.tensors},
    )  # fmt: skip


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _aliases(model: torch.nn.Module) -> dict[str, str]:
    """Every name of a tensor -> the first name of it."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in _tensors(model)}


def _walk(program: Program, ledger: Ledger, aliases: Mapping[str, str]) -> dict[Node, Outcome]:
    values: dict[Node, Outcome] = {}
    for node in program.module().graph.nodes:
        if node.op == "get_attr":
            values[node] = _tensor(ledger, node, aliases)
        elif node.op == "placeholder":
            values[node] = blank(node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                known = values.get(source, ())
                for dims in known if isinstance(known, list) else [known]:
                    ledger.pin_all(dims, "it is an output of the model")
        elif node.op == "call_function":
            values[node] = _call(Place(ledger, node, values))
    return values


def _tensor(ledger: Ledger, node: Node, aliases: Mapping[str, str]) -> Dims:
    """The dimensions of a parameter or buffer: all of length 2 and more, for floating point."""
    name = aliases.get(str(node.target))
    value = node.meta.get("val")
    if name is None or not isinstance(value, torch.Tensor) or not value.is_floating_point() or not node.users:
        return blank(node)  # type: ignore[return-value]
    # The rules see nodes, so weights known under two names are told by the first.
    node.target = name
    if name not in ledger.tensors:
        ledger.tensors[name] = tuple(ledger.fresh(n) if n > 1 else None for n in shape_of(node))
    return ledger.tensors[name]


def _call(at: Place) -> Outcome:
    target = at.node.target
    if getattr(target, "__name__", "") == "getitem":
        return item(at)
    if not _has_channels(at):
        return blank(at.node)
    if target in RULES:
        return RULES[target](at)
    return pointwise(at) if torch.Tag.pointwise in getattr(target, "tags", ()) else unknown(at)


def _has_channels(at: Place) -> bool:
    for node in at.node.all_input_nodes:
        known = at.values.get(node, ())
        for dims in known if isinstance(known, list) else [known]:
            if any(atoms is not None for atoms in dims):
                return True
    return False


def _pin_skipped(ledger: Ledger, skip: Sequence[str]) -> None:
    for name, dims in ledger.tensors.items():
        for part in skip:
            if part in name and dims:
                reader = [d for d in range(len(dims)) if (name, d) not in ledger.readers]
                ledger.pin_all([dims[d] for d in reader], f"{part!r} is in the skip list")


def _groups(ledger: Ledger, number: int, unit_of: Any) -> tuple[list[Group], dict[str, str]]:
    """Units that lie in the same tensors, together; and why the others stay, by the layer that makes them."""
    reasons = ledger.reasons(number, unit_of)
    held = np.zeros(number, dtype=bool)
    held[list(reasons)] = True
    signatures: dict[int, list[tuple[str, int, int]]] = {}
    pinned: dict[str, str] = {}
    for name, dims in ledger.tensors.items():
        for dim, atoms in enumerate(dims):
            if atoms is None:
                continue
            units, first, counts = np.unique(unit_of[atoms], return_index=True, return_counts=True)
            for i in np.argsort(first):
                unit = int(units[i])
                if not held[unit]:
                    signatures.setdefault(unit, []).append((name, dim, int(counts[i])))
            stays = units[held[units]]
            if stays.size and (name, dim) not in ledger.readers and dim == _maker_dim(name, dims, ledger):
                pinned.setdefault(layer_of(name), reasons[int(stays[0])])
    together: dict[tuple[tuple[str, int, int], ...], list[int]] = {}
    for unit, members in signatures.items():
        together.setdefault(tuple(members), []).append(unit)
    groups: list[Group] = []
    for places, alike in together.items():
        group = _group(places, alike, ledger, {g.name for g in groups})
        if len(alike) > 1:
            groups.append(group)
        else:
            pinned[group.name] = "all of it is one unit, which leaves as a whole or not at all"
    names = {g.name for g in groups}
    return groups, {name: why for name, why in pinned.items() if name not in names}


def _maker_dim(name: str, dims: Dims, ledger: Ledger) -> int:
    """The dimension of a weight whose indices are its outputs."""
    return next((d for d in range(len(dims)) if (name, d) not in ledger.readers | ledger.tables), 0)


def _group(members: tuple[tuple[str, int, int], ...], units: Sequence[int], ledger: Ledger, taken: set[str]) -> Group:
    makers = [m for m in members if m[:2] not in ledger.readers and len(ledger.tensors[m[0]]) > 1] or list(members)
    name = base = layer_of(makers[0][0])
    number = 1
    while name in taken:
        number += 1
        name = f"{base}#{number}"
    return Group(name=name, units=np.asarray(units), members=members, width=makers[0][2])


def layer_of(tensor: str) -> str:
    """The layer a tensor belongs to.

    Example:
        >>> layer_of("blocks.0.conv1.weight"), layer_of("position")
        ('blocks.0.conv1', 'position')
    """
    owner, _, _ = tensor.rpartition(".")
    return owner or tensor

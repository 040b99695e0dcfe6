"""The plain values a drawing is made of: nodes, the scopes they lie in, and the tree of groups over them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

#: A size, or the name of one that may vary.
Shape = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """What a node gives: its shape with dynamic dimensions by name, its shape in the measured run, and its dtype."""

    shape: Shape
    dtype: str
    measured: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Scope:
    """One module call (or branch of control flow) that a node lies in; `key` tells two calls of one module apart."""

    key: str
    path: str
    type: str
    kind: str = "module"


@dataclass(frozen=True, kw_only=True)
class Node:
    """An input, an operator or an output of the graph.

    Attributes:
        id: unique in the drawing; operators of a branch have the branch in front ("true_graph_0/add").
        kind: "input", "operator" or "output".
        operator: full name of the operator, as "aten.linear.default".
        label: what is written on the node.
        module: path of the module that computes it, "" for the model itself.
        inputs: ids of the nodes whose results it takes.
        outputs: the tensors it gives.
        attributes: its other arguments, as text.
        weights: parameters and buffers that it takes, as text.
        source: "file:line" of the user's code, `code` the line itself.
        calls: how often it ran in one run of the graph; 0 where control flow went another way.
        flops, read_bytes, written_bytes: of all those calls; None where unknown.
        time_ms: median over the rounds, of all those calls.
    """

    id: str
    kind: str
    label: str
    operator: str = ""
    module: str = ""
    scopes: tuple[Scope, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    attributes: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    source: str = ""
    code: str = ""
    calls: int = 0
    flops: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    time_ms: float | None = None

    @property
    def bytes(self) -> int | None:
        """Bytes read and written."""
        if self.read_bytes is None or self.written_bytes is None:
            return None
        return self.read_bytes + self.written_bytes


@dataclass(kw_only=True)
class Group:
    """Nodes that are drawn as one box until it is opened: a module's call, a branch, or a run of loose operators."""

    id: str
    label: str
    type: str
    path: str
    kind: str
    children: list[Group | Node] = field(default_factory=list)

    def nodes(self) -> Iterator[Node]:
        """All nodes inside, in program order."""
        for child in self.children:
            if isinstance(child, Group):
                yield from child.nodes()
            else:
                yield child

    def groups(self) -> Iterator[Group]:
        """All groups inside, outer ones first."""
        for child in self.children:
            if isinstance(child, Group):
                yield child
                yield from child.groups()


#: What colour and size of a node can stand for: name -> (title, attribute of a node).
COSTS = {"time": ("time", "time_ms"), "flops": ("FLOPs", "flops"), "bytes": ("bytes", "bytes")}


def total(nodes: Iterator[Node] | tuple[Node, ...], cost: str) -> float:
    """Sum of a cost over nodes; unknown ones count nothing."""
    values = (getattr(n, COSTS[cost][1]) for n in nodes)
    return float(sum(v for v in values if v is not None and math.isfinite(v)))


def quantity(value: float | None, cost: str) -> str:
    """A cost as people read it.

    Example:
        >>> quantity(0.0421, "time"), quantity(3_500_000, "flops"), quantity(2048, "bytes"), quantity(None, "flops")
        ('42.1 µs', '3.5 MFLOP', '2.05 kB', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    unit = {"time": "s", "flops": "FLOP", "bytes": "B"}[cost]
    steps = ["µ", "m", ""] if cost == "time" else ["", "k", "M", "G", "T", "P"]
    value = value * 1e3 if cost == "time" else value
    step = 0
    while abs(value) >= 999.5 and step < len(steps) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {steps[step]}{unit}"

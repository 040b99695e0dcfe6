"""`Drawing`: a graph as an object that draws itself as text, JSON, SVG and one HTML page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...core import ConfigError, Report, atomic
from ._layers import Plan, plans
from ._model import COSTS, Group, Node, total
from ._tree import grow

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A captured graph with what each node costs.

    Attributes:
        name: of the model; `type` is its class.
        nodes: inputs, operators and outputs in program order.
        sizes: what each dynamic dimension stands for, by name: "dimension 0 of input_ids, 1 in this run".
        facts: how it was measured.
        notes: what was left out, and why.

    Example:
        >>> import torch
        >>> from deepseek_r1.graph import trace
        >>> drawing = trace(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()), torch.ones(1, 4))
        >>> [(n.label, n.outputs[0].shape, n.flops) for n in drawing.nodes if n.kind == "operator"]
        [('linear', ('batch', 8), 64), ('relu', ('batch', 8), 8)]
    """

    name: str
    type: str
    nodes: tuple[Node, ...]
    sizes: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def _root(self) -> Group:
        return grow(self.nodes, self.name, self.type)

    @cached_property
    def _plans(self) -> dict[str, Plan]:
        return plans(self._root)

    def total(self, cost: str = "time") -> float:
        """Sum over all nodes: "time" in milliseconds, "flops", or "bytes".

        Raises:
            ConfigError: another cost.
        """
        return total(self.nodes, known_cost(cost))

    def report(self) -> Report:
        """The sums, how they were measured, and what was left out, as a Report."""
        from ._text import report

        return report(self)

    def text(self, depth: int | None = None) -> str:
        """The graph as a table, indented by module; `depth` levels of it, or all."""
        from ._text import text

        return text(self, self._root, depth)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON; numbers that are not finite are None."""
        from ._tree import open_at_first

        plain: dict[str, Any] = _finite(
            {
                "schema_version": SCHEMA_VERSION,
                "name": self.name,
                "type": self.type,
                "sizes": dict(self.sizes),
                "facts": dict(self.facts),
                "notes": list(self.notes),
                "totals": {cost: self.total(cost) for cost in COSTS},
                "nodes": [asdict(n) | {"bytes": n.bytes} for n in self.nodes],
                "tree": _branch(self._root),
                "open": sorted(open_at_first(self._root)),
            }
        )
        return plain

    def json(self) -> str:
        """The graph as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def svg(self, *, cost: str = "time", expand: str | int | None = None) -> str:
        """The graph as a picture that stands alone.

        Args:
            cost: what the colours stand for: "time", "flops" or "bytes".
            expand: "all", a number of levels, or None for as much as can be read.

        Raises:
            ConfigError: another cost or wish.
        """
        from ._svg import svg

        if not (expand is None or expand == "all" or (isinstance(expand, int) and expand >= 0)):
            raise ConfigError(f'svg(expand={expand!r}): None, "all" or a number of levels from 0 on is needed.')
        return svg(self, self._root, self._plans, known_cost(cost), expand)

    def html(self) -> str:
        """The graph as one page: pan, zoom, open and close modules, search, details; loads nothing from outside."""
        from ._page import page

        return page(self.to_dict(), self._root, self._plans)

    def _repr_html_(self) -> str:
        from ._page import framed

        return framed(self.html(), f"graph of {self.name}")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the drawing, whole or not at all; the ending says as what: .html, .svg, .json or .txt.

        Raises:
            ConfigError: another ending.
        """
        target = Path(path)
        ways = {".html": self.html, ".svg": self.svg, ".json": self.json, ".txt": self.text}
        if target.suffix not in ways:
            raise ConfigError(f"Drawing.save({str(target)!r}): the name must end in {', '.join(ways)}.")
        atomic.write_bytes(target, ways[target.suffix]().encode(errors="replace"))
        return target

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        count = sum(n.kind == "operator" for n in self.nodes)
        return f"Drawing({self.name!r}, {count} operators; .save('x.html') draws it)"


def known_cost(cost: str) -> str:
    """The cost's name, if there is such a cost."""
    if cost not in COSTS:
        raise ConfigError(f"cost={cost!r}: one of {', '.join(COSTS)} is needed.")
    return cost


def _branch(item: Group | Node) -> Any:
    if isinstance(item, Node):
        return item.id
    plain = {"id": item.id, "label": item.label, "type": item.type, "path": item.path, "kind": item.kind}
    return plain | {"children": [_branch(c) for c in item.children]}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

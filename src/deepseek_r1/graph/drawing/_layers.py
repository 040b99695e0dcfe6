"""Layers and orders: for each group, who stands in which row, in which order, and which rows a line passes.

This part depends on the graph alone, not on which groups are open, so it is worked out once, here; the page only
places it. Source: Sugiyama, Tagawa and Toda, Methods for Visual Understanding of Hierarchical System Structures,
IEEE Trans. SMC, 1981; the lines of one value share their way, so that a mask for twelve layers is one line.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

from ._model import Group

_SWEEPS = 4


@dataclass
class Vertex:
    """Something that has a place in a row.

    Attributes:
        child: index among the group's children; -1 for a bend of a line or a port in the group's border.
        kind: "child", "bend", "in" or "out".
        value: id of the node whose result passes here (bends and ports).
        ins, outs: values that come in at the top and go out at the bottom, from left to right.
        main: place among `ins` of what comes straight from the row above; that one is drawn to the middle.
    """

    kind: str
    row: int
    child: int = -1
    value: str = ""
    ins: list[str] = field(default_factory=list)
    outs: list[str] = field(default_factory=list)
    main: float = 0.0


@dataclass
class Plan:
    """Vertices of one group, their rows from left to right, and the segments (upper, lower, value) between rows."""

    vertices: list[Vertex]
    rows: list[list[int]]
    segments: list[tuple[int, int, str]]

    def columns(self) -> dict[str, list[int]]:
        """The bends of each line that has any, from top to bottom."""
        found: dict[str, list[int]] = {}
        for index, vertex in enumerate(self.vertices):
            if vertex.kind == "bend":
                found.setdefault(vertex.value, []).append(index)
        return found


def plans(root: Group) -> dict[str, Plan]:
    """The plan of each group, by its id."""
    consumers: dict[str, list[str]] = defaultdict(list)
    for node in root.nodes():
        for source in node.inputs:
            consumers[source].append(node.id)
    return {g.id: _plan(g, consumers) for g in (root, *root.groups())}


def _plan(group: Group, consumers: dict[str, list[str]]) -> Plan:
    where = {
        node.id: index
        for index, child in enumerate(group.children)
        for node in (child.nodes() if isinstance(child, Group) else (child,))
    }
    # value -> who gives it (a child, or -1: from outside) and who takes it (children, or -2: to the outside)
    lines: dict[str, tuple[int, list[int]]] = {}
    for node in (n for c in group.children for n in (c.nodes() if isinstance(c, Group) else (c,))):
        for source in node.inputs:
            giver = where.get(source, -1)
            if giver != where[node.id]:
                takers = lines.setdefault(source, (giver, []))[1]
                if where[node.id] not in takers:
                    takers.append(where[node.id])
    for ident, index in where.items():
        if any(taker not in where for taker in consumers[ident]):
            lines.setdefault(ident, (index, []))[1].append(-2)
    vertices = [Vertex(kind="child", row=0, child=i) for i in range(len(group.children))]
    _assign_rows(vertices, lines)
    segments = _route(vertices, lines)
    rows = _ordered(vertices, segments)
    _order_ends(vertices, rows, segments)
    return Plan(vertices, rows, segments)


def _assign_rows(vertices: list[Vertex], lines: dict[str, tuple[int, list[int]]]) -> None:
    """Longest path from the top; what has no inputs stands right above its first taker instead."""
    above: dict[int, set[int]] = defaultdict(set)
    below: dict[int, set[int]] = defaultdict(set)
    for giver, takers in lines.values():
        for taker in takers:
            if giver >= 0 and taker >= 0:
                above[taker].add(giver)
                below[giver].add(taker)
    fed = {taker for giver, takers in lines.values() if giver == -1 for taker in takers}
    # Children are in program order, so everything above has its row already.
    for index, vertex in enumerate(vertices):
        vertex.row = 1 + max((vertices[a].row for a in above[index]), default=0)
    for index in reversed(range(len(vertices))):
        if not above[index] and index not in fed and below[index]:
            vertices[index].row = min(vertices[b].row for b in below[index]) - 1


def _route(vertices: list[Vertex], lines: dict[str, tuple[int, list[int]]]) -> list[tuple[int, int, str]]:
    """Ports and bends; every segment then goes from one row to the next."""
    last = max((v.row for v in vertices), default=0) + 1
    segments: list[tuple[int, int, str]] = []
    for value, (giver, takers) in lines.items():
        if giver == -1:
            vertices.append(Vertex(kind="in", row=0, value=value))
            giver = len(vertices) - 1
        chain = giver
        ends = sorted(((vertices[t].row if t >= 0 else last), t) for t in takers)
        for row, taker in ends:
            while vertices[chain].row < row - 1:
                vertices.append(Vertex(kind="bend", row=vertices[chain].row + 1, value=value))
                segments.append((chain, len(vertices) - 1, value))
                chain = len(vertices) - 1
            if taker == -2:
                vertices.append(Vertex(kind="out", row=last, value=value))
                taker = len(vertices) - 1
            segments.append((chain, taker, value))
    return segments


def _ordered(vertices: list[Vertex], segments: list[tuple[int, int, str]]) -> list[list[int]]:
    """Rows with few crossings: barycentre sweeps, the best order of all is kept."""
    rows: list[list[int]] = [[] for _ in range(max((v.row for v in vertices), default=0) + 1)]
    for index in _first_order(vertices, segments):
        rows[vertices[index].row].append(index)
    up: dict[int, list[int]] = defaultdict(list)
    down: dict[int, list[int]] = defaultdict(list)
    for a, b, _ in segments:
        up[b].append(a)
        down[a].append(b)
    best, fewest = [list(r) for r in rows], _crossings(rows, down)
    for sweep in range(_SWEEPS * 2):
        if not fewest:
            break
        order = range(1, len(rows)) if sweep % 2 == 0 else range(len(rows) - 2, -1, -1)
        near = up if sweep % 2 == 0 else down
        for number in order:
            beside = rows[number - 1] if sweep % 2 == 0 else rows[number + 1]
            place = {v: i for i, v in enumerate(beside)}
            keys = {v: _mean([place[n] for n in near[v]], i) for i, v in enumerate(rows[number])}
            rows[number].sort(key=keys.__getitem__)
        count = _crossings(rows, down)
        if count < fewest:
            best, fewest = [list(r) for r in rows], count
    return best


def _first_order(vertices: list[Vertex], segments: list[tuple[int, int, str]]) -> list[int]:
    """Children in program order, each line's bends right after the vertex that it starts from."""
    bends: dict[int, list[int]] = defaultdict(list)
    for a, b, _ in segments:
        if vertices[b].kind != "child":
            bends[a].append(b)
    order: list[int] = []
    stack = [i for i, v in enumerate(vertices) if v.kind in ("in", "child")][::-1]
    while stack:
        index = stack.pop()
        order.append(index)
        stack += reversed(bends[index])
    return order


def _mean(places: list[int], otherwise: float) -> float:
    return sum(places) / len(places) if places else otherwise


def _crossings(rows: list[list[int]], down: dict[int, list[int]]) -> int:
    count = 0
    for upper, lower in pairwise(rows):
        place = {v: i for i, v in enumerate(lower)}
        ends: list[int] = []
        for vertex in upper:
            here = sorted(place[b] for b in down[vertex])
            count += sum(1 for e in here for earlier in ends if earlier > e)
            ends += here
    return count


def _order_ends(vertices: list[Vertex], rows: list[list[int]], segments: list[tuple[int, int, str]]) -> None:
    place = {v: i for row in rows for i, v in enumerate(row)}
    for _, b, value in sorted(segments, key=lambda s: (place[s[0]], place[s[1]])):
        if vertices[b].kind == "child" and value not in vertices[b].ins:
            vertices[b].ins.append(value)
    for a, _, value in sorted(segments, key=lambda s: (place[s[1]], place[s[0]])):
        if vertices[a].kind == "child" and value not in vertices[a].outs:
            vertices[a].outs.append(value)
    straight: dict[int, list[int]] = defaultdict(list)
    for a, b, value in segments:
        if vertices[a].kind != "bend" and vertices[b].kind == "child":
            straight[b].append(vertices[b].ins.index(value))
    for index, vertex in enumerate(vertices):
        vertex.main = _mean(straight[index], (len(vertex.ins) - 1) / 2)

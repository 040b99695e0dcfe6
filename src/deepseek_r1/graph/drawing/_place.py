"""Coordinates: from plans and the set of open groups to boxes and lines. `page.place.js` does the same in the browser.

Both must give the same numbers; a test compares them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import zip_longest

from ._layers import Plan, Vertex
from ._model import Group, Node

GAP_X, GAP_Y, PORT_GAP, PAD, HEAD = 22.0, 30.0, 20.0, 14.0, 30.0
OP_HEIGHT, END_HEIGHT, BEND_WIDTH, HEAD_WIDTH = 46.0, 40.0, 6.0, 110.0
_SWEEPS = 7  # odd: the last one goes down, along the order of the computation


@dataclass
class Box:
    """A placed child: its corner and size, and, if it is open, what is inside (relative to the same origin)."""

    item: Group | Node
    x: float
    y: float
    width: float
    height: float
    inside: Inside | None = None


@dataclass
class Inside:
    """The placed content of an open group: boxes, lines (points from top to bottom), and where its ports are."""

    width: float
    height: float
    boxes: list[Box] = field(default_factory=list)
    lines: list[tuple[str, list[tuple[float, float]]]] = field(default_factory=list)
    ports: dict[tuple[str, str], float] = field(default_factory=dict)


def words(item: Group | Node, parent: Group) -> tuple[str, str, str]:
    """What is written on a closed box: its name, a hint beside it, and the line below."""
    if isinstance(item, Group):
        count = sum(n.kind == "operator" for n in item.nodes())
        below = item.type if item.kind == "run" else f"{item.type} · {count} operator{'s' * (count != 1)}"
        return _cut(item.label, 26), "", _cut(below, 44)
    inner = item.module.removeprefix(f"{parent.path}.") if item.module != parent.path else ""
    shapes = ", ".join(f"[{', '.join(map(str, t.shape))}]" for t in item.outputs[:2])
    more = " …" if len(item.outputs) > 2 else ""
    return _cut(item.label, 26), _cut(inner, 22), _cut(shapes + more, 44)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def size(item: Group | Node, parent: Group) -> tuple[float, float]:
    """Width and height of a closed box."""
    name, hint, below = words(item, parent)
    end = isinstance(item, Node) and item.kind != "operator"
    # Average widths of a character in the page's fonts; room for the cost at the right of the first line.
    sign = 20 if isinstance(item, Group) else 0
    # Average widths of a character in the page's fonts; room for the cost at the right of the first line.
    first = len(name) * 7.2 + len(hint) * 6.2 + (6 if hint else 0) + sign + (0 if end else 62)
    width = max(84.0, round(max(first, len(below) * 6.1 + sign)) + 22.0)
    return width, END_HEIGHT if end else OP_HEIGHT


def head_words(group: Group) -> tuple[str, str]:
    """What is written over an open group."""
    return _cut(group.label, 26), "" if group.kind == "run" else _cut(group.type, 30)


def head_width(group: Group) -> float:
    """The least width of an open group."""
    name, hint = head_words(group)
    return round(len(name) * 7.2 + len(hint) * 6.2) + HEAD_WIDTH


def place(group: Group, plans: dict[str, Plan], opened: set[str]) -> Inside:
    """Place the content of an open group, its open groups included."""
    plan = plans[group.id]
    inner = {
        i: place(child, plans, opened)
        for i, child in enumerate(group.children)
        if isinstance(child, Group) and child.id in opened
    }
    sizes = [_vertex_size(v, group, inner) for v in plan.vertices]
    offsets = [_offsets(plan, s, group, inner, sizes) for s in plan.segments]
    x = _columns(plan, sizes, offsets)
    return _assemble(group, plan, inner, sizes, offsets, x)


def _vertex_size(vertex: Vertex, group: Group, inner: dict[int, Inside]) -> tuple[float, float]:
    if vertex.kind != "child":
        return BEND_WIDTH, 0.0
    if vertex.child in inner:
        return inner[vertex.child].width, inner[vertex.child].height
    return size(group.children[vertex.child], group)


def _offsets(
    plan: Plan, segment: tuple[int, int, str], group: Group, inner: dict[int, Inside], sizes: list[tuple[float, float]]
) -> tuple[float, float]:
    """How far from the centres of its two ends a segment starts and ends."""
    a, b, value = segment
    upper, lower = plan.vertices[a], plan.vertices[b]
    return (
        _end(upper, "out", value, upper.outs, inner, sizes[a][0]),
        _end(lower, "in", value, lower.ins, inner, sizes[b][0]),
    )


def _end(vertex: Vertex, side: str, value: str, order: list[str], inner: dict[int, Inside], width: float) -> float:
    if vertex.kind != "child":
        return 0.0
    if vertex.child in inner:
        return inner[vertex.child].ports[side, value] - width / 2
    main = vertex.main if side == "in" else (len(order) - 1) / 2
    step = min(16.0, (width / 2 - 12) / max(main, len(order) - 1 - main, 1.0))
    return (order.index(value) - main) * step


def _columns(plan: Plan, sizes: list[tuple[float, float]], offsets: list[tuple[float, float]]) -> list[float]:
    """Centres of all vertices: as near to their neighbours as order and gaps allow."""
    x = [0.0] * len(sizes)
    for row in plan.rows:
        edge = 0.0
        for vertex in row:
            x[vertex] = edge + sizes[vertex][0] / 2
            edge += sizes[vertex][0] + GAP_X
    up: list[list[int]] = [[] for _ in sizes]
    down: list[list[int]] = [[] for _ in sizes]
    for number, (a, b, _) in enumerate(plan.segments):
        down[a].append(number)
        up[b].append(number)
    # Boxes stay in their column, and lines give way to them.
    firm = [4.0 if v.kind == "child" else 1.0 for v in plan.vertices]
    for sweep in range(_SWEEPS):
        near, far = (up, down) if sweep % 2 == 0 else (down, up)
        for row in plan.rows if sweep % 2 == 0 else plan.rows[::-1]:
            pulls = [_pull(plan, v, near[v], far[v], offsets, x) for v in row]
            wanted = [x[v] if pull is None else pull for v, pull in zip(row, pulls)]
            weights = [0.1 if pull is None else firm[v] for v, pull in zip(row, pulls)]
            for vertex, centre in zip(row, _spread(wanted, weights, [sizes[v][0] for v in row])):
                x[vertex] = centre
        if sweep % 2:
            _tighten(plan, sizes, offsets, x)
    return x


def _tighten(plan: Plan, sizes: list[tuple[float, float]], offsets: list[tuple[float, float]], x: list[float]) -> None:
    """Move the bends of each line, as one straight column, towards its ends as far as there is room."""
    bent = [v.kind == "bend" for v in plan.vertices]
    ends: dict[str, list[float]] = {}
    for (a, b, line), (start, end) in zip(plan.segments, offsets):
        if bent[a] != bent[b]:
            ends.setdefault(line, []).append(x[b] + end if bent[a] else x[a] + start)
    beside = {v: (row[i - 1] if i else None, after) for row in plan.rows for i, (v, after) in enumerate(_pairs(row))}
    for line, bends in plan.columns().items():
        low, high = -math.inf, math.inf
        for vertex in bends:
            left, right = beside[vertex]
            if left is not None:
                low = max(low, x[left] + sizes[left][0] / 2 + GAP_X + BEND_WIDTH / 2)
            if right is not None:
                high = min(high, x[right] - sizes[right][0] / 2 - GAP_X - BEND_WIDTH / 2)
        if low <= high:
            column = min(max(sum(ends[line]) / len(ends[line]), low), high)
            for vertex in bends:
                x[vertex] = column


def _pairs(row: list[int]) -> list[tuple[int, int | None]]:
    """Each vertex of a row with the one after it."""
    return list(zip_longest(row, row[1:]))


def _pull(
    plan: Plan, vertex: int, near: list[int], far: list[int], offsets: list[tuple[float, float]], x: list[float]
) -> float | None:
    """Where the neighbours would have a vertex: boxes go with the boxes before them, bends of a line with its bends."""
    bend = plan.vertices[vertex].kind == "bend"

    def places(segments: list[int], alike: bool) -> list[float]:
        found = []
        for number in segments:
            a, b, _ = plan.segments[number]
            other, shift = (a, 1) if b == vertex else (b, -1)
            if not alike or (plan.vertices[other].kind == "bend") == bend:
                found.append(x[other] + shift * (offsets[number][0] - offsets[number][1]))
        return found

    found = places(near, True) or (places(far, True) if bend else []) or places(near, False)
    return sum(found) / len(found) if found else None


def _spread(wanted: list[float], weights: list[float], widths: list[float]) -> list[float]:
    """The centres nearest to `wanted` (least squares) that keep the order and a gap: pool adjacent violators."""
    shifts, edge = [], 0.0
    for width in widths:
        shifts.append(edge + width / 2)
        edge += width + GAP_X
    blocks: list[list[float]] = []  # weighted mean, weight, members
    for want, weight, shift in zip(wanted, weights, shifts):
        blocks.append([want - shift, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, weight_, members = blocks.pop()
            last = blocks[-1]
            last[0] = (last[0] * last[1] + mean * weight_) / (last[1] + weight_)
            last[1] += weight_
            last[2] += members
    means = [mean for mean, _, members in blocks for _ in range(int(members))]
    return [mean + shift for mean, shift in zip(means, shifts)]


def _assemble(
    group: Group,
    plan: Plan,
    inner: dict[int, Inside],
    sizes: list[tuple[float, float]],
    offsets: list[tuple[float, float]],
    x: list[float],
) -> Inside:
    left = min((x[v] - s[0] / 2 for v, s in enumerate(sizes)), default=0.0)
    right = max((x[v] + s[0] / 2 for v, s in enumerate(sizes)), default=0.0)
    width = max(right - left + 2 * PAD, 0.0 if group.kind == "root" else head_width(group))
    shift = (width - (right - left)) / 2 - left
    x = [value + shift for value in x]
    head = 0.0 if group.kind == "root" else HEAD
    tops, heights, y = [], [], head
    for number, row in enumerate(plan.rows):
        height = max((sizes[v][1] for v in row), default=0.0)
        tops.append(y)
        heights.append(height)
        # The first row and the last may be ports in the border.
        last = number == len(plan.rows) - 1
        y += height + ((PAD if height else 0.0) if last else GAP_Y if number else PORT_GAP if row else PAD)
    placed = Inside(width=width, height=y)
    y_of = [tops[v.row] + (heights[v.row] - sizes[i][1]) / 2 for i, v in enumerate(plan.vertices)]
    for index, vertex in enumerate(plan.vertices):
        if vertex.kind == "child":
            corner = (x[index] - sizes[index][0] / 2, y_of[index])
            item = group.children[vertex.child]
            placed.boxes.append(Box(item, *corner, *sizes[index], inner.get(vertex.child)))
        elif vertex.kind != "bend":
            placed.ports[vertex.kind, vertex.value] = x[index]
    for (a, b, value), (start, end) in zip(plan.segments, offsets):
        upper, lower = plan.vertices[a], plan.vertices[b]
        under = tops[upper.row] + heights[upper.row]
        # A line goes straight down past the row that it starts in; then it bends between the rows.
        points = [(x[a] + start, y_of[a] + sizes[a][1] if upper.kind == "child" else under), (x[a] + start, under)]
        points.append((x[b] + end, tops[lower.row]))
        points.append((x[b] + end, y if lower.kind == "out" else y_of[b]))
        if lower.kind == "bend":
            points.append((x[b], tops[lower.row] + heights[lower.row]))
        placed.lines.append((value, points))
    return placed

"""A drawing as one SVG picture that stands alone: no script, no style from outside, light background."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from ._layers import Plan
from ._model import COSTS, Group, Node, quantity, total
from ._place import Box, Inside, head_words, place, words
from ._text import summary
from ._tree import open_by

if TYPE_CHECKING:
    from ._drawing import Drawing

_MARGIN, _TOP = 20, 64
_COLD, _HOT = (255, 255, 255), (240, 140, 74)
_STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#1b1f24}"
    ".n{font-weight:600}.s{font-size:11px;fill:#32383f}.t{font-size:16px;font-weight:600}.r{text-anchor:end}"
    ".b{stroke:#8c959f}.o{stroke:#b6bec7}.l{fill:none;stroke:#8c959f;stroke-width:1.2}"
)


def svg(drawing: Drawing, root: Group, plans: dict[str, Plan], cost: str, expand: str | int | None) -> str:
    """The picture as text."""
    inside = place(root, plans, open_by(root, expand))
    most = max((total(_nodes(b.item), cost) for b in _leaves(inside)), default=0.0)
    width, height = max(inside.width, 560) + 2 * _MARGIN, inside.height + _TOP + 2 * _MARGIN
    parts: list[str] = []
    _draw(parts, inside, root, (_MARGIN + (width - 2 * _MARGIN - inside.width) / 2, _TOP), cost, most, 0)
    head = escaped(summary(drawing))
    scale = f"{COSTS[cost][0]}: 0 to {quantity(most, cost)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{head}"><title>{head}</title><style>{_STYLE}</style>'
        f'<defs><linearGradient id="heat"><stop stop-color="{_colour(0)}"/><stop offset="1" '
        f'stop-color="{_colour(1)}"/></linearGradient></defs><rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="t" x="{_MARGIN}" y="28">{escaped(drawing.name)}</text>'
        f'<text class="s" x="{_MARGIN}" y="46">{escaped(head_line(drawing))}</text>'
        f'<rect class="o" x="{width - _MARGIN - 120:.0f}" y="16" width="120" height="10" rx="2" fill="url(#heat)"/>'
        f'<text class="s r" x="{width - _MARGIN:.0f}" y="40">{scale}</text>{"".join(parts)}</svg>\n'
    )


def head_line(drawing: Drawing) -> str:
    """The costs of the whole, shorter than `summary`."""
    count = sum(n.kind == "operator" for n in drawing.nodes)
    return ", ".join([f"{count} operators", *(quantity(drawing.total(c), c) for c in COSTS)])


def escaped(text: str) -> str:
    """Text for SVG: markup escaped, characters that XML forbids replaced."""
    return html.escape("".join(c if c.isprintable() else "\ufffd" for c in text))


def _nodes(item: Group | Node) -> tuple[Node, ...]:
    return tuple(item.nodes()) if isinstance(item, Group) else (item,)


def _leaves(inside: Inside) -> list[Box]:
    """The boxes that are not open."""
    return [leaf for b in inside.boxes for leaf in ([b] if b.inside is None else _leaves(b.inside))]


def _colour(share: float) -> str:
    return "#" + "".join(f"{round(c + (h - c) * share):02x}" for c, h in zip(_COLD, _HOT))


def _draw(
    parts: list[str], inside: Inside, parent: Group, origin: tuple[float, float], cost: str, most: float, level: int
) -> None:
    ox, oy = origin
    for _, points in inside.lines:
        parts.append(f'<path class="l" d="{path([(x + ox, y + oy) for x, y in points])}"/>')
    for box in inside.boxes:
        x, y = ox + box.x, oy + box.y
        if isinstance(box.item, Group) and box.inside is not None:
            fill = ("#f6f8fa", "#eef1f4")[level % 2]
            parts.append(_rect(x, y, box.width, box.height, "o", fill))
            _draw(parts, box.inside, box.item, (x, y), cost, most, level + 1)
            name, hint = (escaped(w) for w in head_words(box.item))
            words_ = f'<tspan class="n">{name}</tspan> <tspan class="s">{hint}</tspan>'
            parts.append(f'<text x="{x + 10:.1f}" y="{y + 19:.1f}">{words_}</text>')
            parts.append(_cost(box, x, y + 19, cost))
        else:
            _closed(parts, box, parent, (x, y), cost, most)


def _closed(parts: list[str], box: Box, parent: Group, corner: tuple[float, float], cost: str, most: float) -> None:
    x, y = corner
    name, hint, below = (escaped(w) for w in words(box.item, parent))
    share = (total(_nodes(box.item), cost) / most) ** 0.5 if most else 0.0
    end = isinstance(box.item, Node) and box.item.kind != "operator"
    parts.append(_rect(x, y, box.width, box.height, "b", "#f6f8fa" if end else _colour(share), 16 if end else 5))
    mark = "+ " if isinstance(box.item, Group) else ""
    hint = f' <tspan class="s">{hint}</tspan>' if hint else ""
    first, second = (16, 30) if end else (19, 36)
    parts.append(f'<text x="{x + 10:.1f}" y="{y + first:.1f}"><tspan class="n">{mark}{name}</tspan>{hint}</text>')
    parts.append(f'<text class="s" x="{x + 10:.1f}" y="{y + second:.1f}">{below}</text>')
    if not end:
        parts.append(_cost(box, x, y + 19, cost))


def _cost(box: Box, x: float, y: float, cost: str) -> str:
    nodes = _nodes(box.item)
    known = [n for n in nodes if getattr(n, COSTS[cost][1]) is not None]
    value = quantity(total(nodes, cost), cost) if known else "-"
    return f'<text class="s r" x="{x + box.width - 10:.1f}" y="{y:.1f}">{value}</text>'


def _rect(x: float, y: float, width: float, height: float, kind: str, fill: str, radius: int = 5) -> str:
    size = f'width="{width:.1f}" height="{height:.1f}" rx="{radius}"'
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size} fill="{fill}"/>'


def path(points: list[tuple[float, float]]) -> str:
    """A line that leaves and arrives straight down and bends once, between the second and the third point."""
    (x0, y0), (x1, y1), (x2, y2), *rest = points
    bend = f"V{y2:.1f}" if abs(x1 - x2) < 0.05 else _curve(x1, y1, x2, y2)
    return f"M{x0:.1f} {y0:.1f}V{y1:.1f}{bend}" + "".join(f"L{x:.1f} {y:.1f}" for x, y in rest)


def _curve(x1: float, y1: float, x2: float, y2: float) -> str:
    middle = (y1 + y2) / 2
    return f"C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {y2:.1f}"

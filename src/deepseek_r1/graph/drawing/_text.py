"""A drawing as a table of plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core import Report
from ._model import COSTS, Group, Node, quantity, total

if TYPE_CHECKING:
    from ._drawing import Drawing

_HEAD = ("module, operator", "output", "time", "FLOPs", "bytes", "source")


def text(drawing: Drawing, root: Group, depth: int | None) -> str:
    """The table; groups have the sums of what is inside."""
    rows: list[tuple[str, ...]] = [_HEAD]
    _add(rows, root, 0, depth)
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    lines = [summary(drawing), ""]
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [row[i].rjust(widths[i]) for i in (2, 3, 4)]
        lines.append("  ".join([*cells, row[5]]).rstrip())
    sizes = [f"{name}: {meaning}" for name, meaning in drawing.sizes.items()]
    tail = [*sizes, *drawing.notes]
    return "\n".join([*lines, *([""] if tail else []), *tail]) + "\n"


def summary(drawing: Drawing) -> str:
    """One line on the whole."""
    count = sum(n.kind == "operator" for n in drawing.nodes)
    costs = ", ".join(quantity(drawing.total(c), c) for c in COSTS)
    how = drawing.facts.get("how", "")
    return f"{_line(drawing.name)}: {count} operators, {costs}{f' ({how})' if how else ''}"


def report(drawing: Drawing) -> Report:
    """The sums as a Report."""
    found = Report(f"trace {_line(drawing.name)}", facts=dict(drawing.facts))
    how = "sum over the operators"
    found.add("operators", sum(n.kind == "operator" for n in drawing.nodes), how="nodes of the drawing")
    found.add("time", drawing.total("time"), unit="ms", how=f"{how}, {drawing.facts.get('how', '')}")
    found.add("compute", drawing.total("flops") / 1e6, unit="MFLOP", how=how)
    found.add("memory traffic", drawing.total("bytes") / 1e6, unit="MB", how=f"{how}, read and written")
    for note in [*(f"{name}: {meaning}" for name, meaning in drawing.sizes.items()), *drawing.notes]:
        found.note(_line(note))
    return found


def _add(rows: list[tuple[str, ...]], group: Group, level: int, depth: int | None) -> None:
    for child in group.children:
        if isinstance(child, Node):
            inner = child.module.removeprefix(f"{group.path}.") if child.module != group.path else ""
            shapes = ", ".join(f"[{', '.join(map(str, t.shape))}] {t.dtype}" for t in child.outputs)
            costs = [quantity(getattr(child, COSTS[c][1]), c) if child.kind == "operator" else "" for c in COSTS]
            name = f"{child.label} ({inner})" if inner else child.label
            rows.append((_line("  " * level + name), _line(shapes), *costs, _line(short(child.source))))
        else:
            ran = any(n.calls for n in child.nodes())
            costs = [quantity(total(child.nodes(), c) if ran else None, c) for c in COSTS]
            rows.append((_line(f"{'  ' * level}{child.label}: {child.type}"), "", *costs, ""))
            if depth is None or level + 1 < depth:
                _add(rows, child, level + 1, depth)


def short(source: str) -> str:
    """The last two parts of a path."""
    return "/".join(source.replace("\\", "/").split("/")[-2:])


def _line(value: str) -> str:
    """Names of user code may hold anything, line breaks too."""
    return "".join(c if c.isprintable() else "?" for c in value)

"""A drawing as one HTML page that loads nothing: data, style and scripts are put inside.

What the page shows comes from user code, so all of it travels as JSON and is set as text, never as markup.
"""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

from ._layers import Plan
from ._model import COSTS, Group
from ._place import GAP_X, GAP_Y, HEAD, PAD, PORT_GAP, head_width, head_words, size, words

#: Nothing may be fetched or sent, whatever a name in the data says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(data: dict[str, Any], root: Group, plans: dict[str, Plan]) -> str:
    """The whole page as text.

    Args:
        data: what `Drawing.to_dict` gives.
    """
    data = data | {"layout": _layout(root, plans), "costs": {name: title for name, (title, _) in COSTS.items()}}
    title = html.escape(f"{data['name']}: graph")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" '
        f'content="{_POLICY}"><style>{_file("page.css")}</style></head>\n<body>{_file("page.html")}'
        f'<script type="application/json" id="data">{embedded(data)}</script>\n'
        f"<script>{_file('page.place.js')}{_file('page.js')}</script></body></html>\n"
    )


def embedded(data: Any) -> str:
    """JSON that can stand inside a script element: no tag can begin in it, no line can end in it.

    Example:
        >>> embedded("</script>")
        '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def framed(page: str, title: str) -> str:
    """A page as a frame for notebooks; its script reaches nothing outside of the frame."""
    return (
        f'<iframe title="{html.escape(title)}" sandbox="allow-scripts" srcdoc="{html.escape(page)}" '
        'style="width:100%;height:640px;border:1px solid #d0d7de;border-radius:6px"></iframe>'
    )


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _layout(root: Group, plans: dict[str, Plan]) -> dict[str, Any]:
    """What `page.place.js` needs in order to place any set of open groups."""
    groups = {}
    for group in (root, *root.groups()):
        plan = plans[group.id]
        groups[group.id] = {
            "vertices": [[v.kind, v.row, v.child, v.value, v.ins, v.outs, v.main] for v in plan.vertices],
            "rows": plan.rows,
            "segments": plan.segments,
            "boxes": [[*size(c, group), *words(c, group)] for c in group.children],
            "head": [head_width(group), *head_words(group)],
        }
    return {"gaps": [GAP_X, GAP_Y, PORT_GAP, PAD, HEAD], "groups": groups}

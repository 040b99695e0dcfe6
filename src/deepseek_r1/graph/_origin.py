"""Which lines asked something of a size while a graph was made: the shape environment of torch, read in one place.

Dies when torch's exported programs tell their conditions and where they came from.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from ._conditions import names_of
from ._explain import is_users


def conditions_of(exported: torch.export.ExportedProgram) -> list[str]:
    """The conditions that the user's own lines put on sizes, over `size_<flat input>_<axis>`.

    torch asks many more on its own account (how to lay a tensor out), which do not change what the graph computes.
    """
    where = {
        str(size): f"size_{number}_{axis}"
        for number, value in reversed(list(enumerate(_inputs(exported))))
        for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ())
        if str(size).isidentifier()
    }
    found = []
    for guard in _guards(exported):
        text = str(guard.expr)
        if _users_frame(guard) is None:
            continue
        try:
            names = names_of(text)
        except ValueError:
            continue
        if names and names <= set(where):
            found.append(_renamed(text, where))
    return list(dict.fromkeys(found))


def fixing_lines(exported: torch.export.ExportedProgram, sizes: set[int]) -> str:
    """The first of the user's lines that fixed one of these sizes, as " (file, line: code)"; empty if none is known."""
    wanted = {f", {size})" for size in sizes}
    for guard in _guards(exported):
        text, frame = str(guard.expr), _users_frame(guard)
        if frame is not None and text.startswith("Eq(") and any(text.endswith(w) for w in wanted):
            return f" ({frame.filename}, line {frame.lineno}: {(frame.line or '').strip()})"
    return ""


def _inputs(exported: torch.export.ExportedProgram) -> list[Any]:
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder"]
    kinds = [spec.kind for spec in exported.graph_signature.input_specs]
    user = torch.export.graph_signature.InputKind.USER_INPUT
    return [n.meta.get("val") for n, kind in zip(nodes, kinds, strict=True) if kind is user]


def _guards(exported: torch.export.ExportedProgram) -> list[Any]:
    values = [n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"]
    modes = [mode for v in values if (mode := getattr(v, "fake_mode", None)) is not None]
    environment = getattr(modes[0], "shape_env", None) if modes else None
    return list(getattr(environment, "guards", ()))


def _users_frame(guard: Any) -> Any:
    frame = getattr(getattr(guard, "sloc", None), "framework_loc", None)
    return frame if frame is not None and is_users(getattr(frame, "filename", "<")) else None


def _renamed(text: str, names: dict[str, str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), text)

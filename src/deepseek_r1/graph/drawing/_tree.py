"""The tree of groups over the nodes of a graph, and which of its groups are open at first.

A group is a stretch of the program, never a scattered set. So no path leaves a group and comes back, and the graph
of closed groups has no cycles.
"""

from __future__ import annotations

from ._model import Group, Node, Scope

#: Loose operators beside modules are put into one box from this number on.
_LONG_RUN = 8
#: As many boxes are shown at first, at most.
AT_FIRST = 40


def grow(nodes: tuple[Node, ...], name: str, type_: str) -> Group:
    """The root of the tree of module calls.

    Example:
        >>> fc = (Scope(key="fc", path="fc", type="Linear"),)
        >>> root = grow((Node(id="a", kind="operator", label="add", scopes=fc),
        ...              Node(id="b", kind="operator", label="mul", scopes=fc)), "net", "Net")
        >>> [(c.label, len(c.children)) for c in root.children]
        [('fc', 2)]
    """
    root = Group(id="", label=name, type=type_, path="", kind="root")
    open_: list[tuple[Scope | None, Group]] = [(None, root)]
    used: set[str] = {""}
    for node in nodes:
        depth = 0
        while depth < len(node.scopes) and depth + 1 < len(open_):
            scope = open_[depth + 1][0]
            if scope is None or scope.key != node.scopes[depth].key:
                break
            depth += 1
        del open_[depth + 1 :]
        for scope in node.scopes[depth:]:
            parent = open_[-1][1]
            group = Group(
                id=_unused(scope.key, used),
                label=_below(scope.path, parent.path) if scope.kind == "module" else scope.path,
                type=scope.type,
                path=scope.path if scope.kind == "module" else parent.path,
                kind=scope.kind,
            )
            parent.children.append(group)
            open_.append((scope, group))
        open_[-1][1].children.append(node)
    _without_trifles(root)
    _gather_runs(root, used)
    return root


def _unused(key: str, used: set[str]) -> str:
    """A module's call that a pass has torn apart is two groups."""
    ident, number = key, 1
    while ident in used:
        number += 1
        ident = f"{key}#{number}"
    used.add(ident)
    return ident


def _below(path: str, parent: str) -> str:
    return path[len(parent) + 1 :] if parent and path.startswith(f"{parent}.") else path


def _without_trifles(group: Group) -> None:
    """A module with one operator is drawn as that operator."""
    for number, child in enumerate(group.children):
        if isinstance(child, Group):
            _without_trifles(child)
            if child.kind == "module" and len(child.children) == 1 and isinstance(child.children[0], Node):
                group.children[number] = child.children[0]


def _gather_runs(group: Group, used: set[str]) -> None:
    """Long stretches of loose operators beside modules become one box."""
    for child in group.children:
        if isinstance(child, Group):
            _gather_runs(child, used)
    if not any(isinstance(c, Group) for c in group.children):
        return
    kept: list[Group | Node] = []
    run: list[Node] = []

    def end_run() -> None:
        kept.extend([_as_group(run, group, used)] if len(run) >= _LONG_RUN else run)
        run.clear()

    for child in group.children:
        if isinstance(child, Node) and child.kind == "operator" and child.module == group.path:
            run.append(child)
        else:
            end_run()
            kept.append(child)
    end_run()
    group.children = kept


def _as_group(run: list[Node], parent: Group, used: set[str]) -> Group:
    ident = _unused(f"{parent.id}/run", used)
    title = f"{len(run)} operators"
    span = f"{run[0].label} … {run[-1].label}"
    return Group(id=ident, label=title, type=span, path=parent.path, kind="run", children=list(run))


def open_at_first(root: Group, limit: int = AT_FIRST) -> set[str]:
    """Ids of the groups that are open at first: level by level, as long as at most `limit` boxes show.

    Runs of loose operators stay closed, and so does all that is inside a closed group.
    """
    opened = {root.id}
    level, shown = [root], len(root.children)
    while level:
        inner = [c for g in level for c in g.children if isinstance(c, Group) and c.kind != "run"]
        shown += sum(len(g.children) for g in inner)
        if not inner or shown > limit:
            return opened
        opened |= {g.id for g in inner}
        level = inner
    return opened


def open_by(root: Group, expand: str | int | None) -> set[str]:
    """Ids of the open groups for a user's wish: None as at first, "all", or a number of levels."""
    if expand is None:
        return open_at_first(root)
    if expand == "all":
        return {root.id, *(g.id for g in root.groups())}
    opened, level = {root.id}, [root]
    for _ in range(int(expand)):
        level = [c for g in level for c in g.children if isinstance(c, Group)]
        opened |= {g.id for g in level}
    return opened

"""Which local names a statement reads, assigns and needs later. Knows nothing of tensors."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def in_place_name(node: ast.AST) -> str | None:
    """The local name whose value a statement changes in place (`x[i] = 1`, `x += 1`, `x.add_(1)`), if any."""
    if isinstance(node, ast.AugAssign):
        base: ast.expr = node.target
        while isinstance(base, ast.Subscript):
            base = base.value
        return base.id if isinstance(base, ast.Name) else None
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
                return target.value.id
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
        method, owner = node.value.func.attr, node.value.func.value
        if method.endswith("_") and not method.endswith("__") and isinstance(owner, ast.Name):
            return owner.id
    return None


def changed_in_place(stmts: Iterable[ast.stmt]) -> set[str]:
    """Every name that the statements change in place."""
    return {name for s in stmts for node in ast.walk(s) if (name := in_place_name(node)) is not None}


def reads(node: ast.AST | None) -> set[str]:
    """Every name that is read somewhere inside; names of comprehensions count too, which only makes more names live."""
    if node is None:
        return set()
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    found |= {n.target.id for n in ast.walk(node) if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
    return found


def assigned(stmts: Iterable[ast.AST]) -> set[str]:
    """Every local name that is assigned or changed in place."""
    names: set[str] = set()
    for stmt in stmts:
        _assigned(stmt, names)
    return names


def _assigned(node: ast.AST, names: set[str]) -> None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        names.add(node.name)
        return
    if isinstance(node, (ast.Lambda, *_COMPREHENSIONS)):
        # An assignment expression inside a comprehension belongs to the function; one in a lambda does not.
        if not isinstance(node, ast.Lambda):
            names |= {n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr)}
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        names.add(node.id)
    elif isinstance(node, ast.alias):
        names.add((node.asname or node.name).partition(".")[0])
    elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        names.add(node.name)
    if (name := in_place_name(node)) is not None:
        names.add(name)
    for child in ast.iter_child_nodes(node):
        _assigned(child, names)


def captured(stmts: Iterable[ast.AST]) -> set[str]:
    """Names that functions inside the function read: they may be called any time, so their names are always live."""
    inner = (n for s in stmts for n in ast.walk(s) if isinstance(n, _SCOPES))
    return {name for node in inner for name in reads(node)}


def live_before(stmts: Sequence[ast.stmt], after: set[str]) -> set[str]:
    """Names whose values are needed at the beginning of a block, given those needed after it.

    Each `if` and loop is annotated on the way with `live_after`, a loop also with `live_head`: names needed whenever
    its test is reached.
    """
    live = set(after)
    for stmt in reversed(stmts):
        live = _before(stmt, live)
    return live


def _before(stmt: ast.stmt, after: set[str]) -> set[str]:
    if isinstance(stmt, ast.If):
        stmt.live_after = set(after)  # type: ignore[attr-defined]
        return reads(stmt.test) | live_before(stmt.body, after) | live_before(stmt.orelse, after)
    if isinstance(stmt, ast.While | ast.For):
        return _before_loop(stmt, after)
    if isinstance(stmt, ast.With):
        targets = {n for item in stmt.items for n in assigned([item.optional_vars] if item.optional_vars else [])}
        inside = live_before(stmt.body, after) - targets
        return inside.union(*(reads(item.context_expr) for item in stmt.items))
    if isinstance(stmt, ast.Try | ast.Match):
        for block in _blocks(stmt):
            # An error may leave a block anywhere, so whatever is read in it or after it stays live.
            live_before(block, after | reads(stmt))
        return after | reads(stmt)
    if isinstance(stmt, ast.FunctionDef | ast.ClassDef):
        return (after - {stmt.name}) | reads(stmt)
    changed = in_place_name(stmt)
    killed = assigned([stmt]) - ({changed} if changed else set())
    return (after - killed) | reads(stmt) | ({changed} if changed else set())


def _before_loop(stmt: ast.While | ast.For, after: set[str]) -> set[str]:
    test = reads(stmt.test) if isinstance(stmt, ast.While) else set()
    flag = getattr(stmt, "stop_flag", None)
    head = after | test | ({flag} if flag else set())
    targets = assigned([stmt.target]) if isinstance(stmt, ast.For) else set()
    while True:
        more = head | (live_before(stmt.body, head) - targets)
        if more == head:
            break
        head = more
    stmt.live_after, stmt.live_head = set(after), head  # type: ignore[union-attr]
    return head | (reads(stmt.iter) if isinstance(stmt, ast.For) else set())


def _blocks(stmt: ast.Try | ast.Match) -> list[list[ast.stmt]]:
    if isinstance(stmt, ast.Match):
        return [case.body for case in stmt.cases]
    return [stmt.body, stmt.orelse, stmt.finalbody, *(handler.body for handler in stmt.handlers)]


def defined_after(stmts: Sequence[ast.stmt], before: set[str]) -> set[str]:
    """Names that surely have a value after a block. Each `if` and loop is annotated with `defined`: those before it."""
    known = set(before)
    for stmt in stmts:
        if isinstance(stmt, ast.If):
            stmt.defined = set(known)  # type: ignore[attr-defined]
            test = known | assigned([stmt.test])
            known = defined_after(stmt.body, test) & defined_after(stmt.orelse, test)
        elif isinstance(stmt, ast.While | ast.For):
            stmt.defined = set(known)  # type: ignore[union-attr]
            targets = assigned([stmt.target]) if isinstance(stmt, ast.For) else set()
            defined_after(stmt.body, known | targets)
        elif isinstance(stmt, ast.With):
            known = defined_after(stmt.body, known | assigned(stmt.items))
        elif isinstance(stmt, ast.Try | ast.Match):
            for block in _blocks(stmt):
                defined_after(block, known)
        else:
            known |= assigned([stmt])
    return known

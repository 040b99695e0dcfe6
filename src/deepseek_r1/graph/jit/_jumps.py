"""Early `return`, `break` and `continue` written as assignments, so that only `if` and loops are left.

What follows an `if` with a jump moves into its branches; a jump out of a loop becomes a flag that ends the loop.
Knows nothing of tensors.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

RESULT, DONE = "result_", "done_"
Refuse = Callable[[ast.AST, str], Exception]
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_LOOPS = (ast.While, ast.For, ast.AsyncFor)


@dataclass
class Jumps:
    """The lowering of one function's body.

    Attributes:
        refuse: makes the error for a node that cannot be lowered.
        returns: whether a return out of a loop or a `with` was met, so that the done flag is needed.
    """

    refuse: Refuse
    returns: bool = False
    _count: int = 0
    _flags: list[str] = field(default_factory=list)

    def lower(self, body: Sequence[ast.stmt]) -> list[ast.stmt]:
        """The body with one `return` at its end; a body that has only that comes back as it is."""
        last = body[-1]
        if not any(_returns(s) for s in body[:-1]) and not (_returns(last) and not isinstance(last, ast.Return)):
            return self._block([*body[:-1]], None) + (
                [last] if isinstance(last, ast.Return) else self._block([last], None)
            )
        tail = ast.copy_location(ast.Return(value=ast.Constant(None)), last)
        lowered = self._block([*body, tail], _Loop(None, None))
        start = [_assign(DONE, ast.Constant(False), body[0])] if self.returns else []
        return [*start, *lowered, ast.copy_location(ast.Return(value=_name(RESULT)), last)]

    def _block(self, stmts: Sequence[ast.stmt], loop: _Loop | None) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for number, stmt in enumerate(stmts):
            rest = list(stmts[number + 1 :])
            if isinstance(stmt, ast.Return | ast.Break | ast.Continue | _Finished):
                return [*out, *self._jump(stmt, loop)] or [ast.copy_location(ast.Pass(), stmt)]
            if isinstance(stmt, ast.Raise):
                return [*out, stmt]
            if isinstance(stmt, ast.If) and _jumps(stmt):
                both = [self._block([*part, *copy.deepcopy(rest)], loop) for part in (stmt.body, stmt.orelse)]
                body, orelse = (part or [ast.copy_location(ast.Pass(), stmt)] for part in both)
                return [*out, ast.copy_location(ast.If(test=stmt.test, body=body, orelse=orelse), stmt)]
            if isinstance(stmt, ast.While | ast.For):
                if stmt.orelse and not _leaves(stmt):
                    # Nothing breaks out, so the `else` always runs: it simply follows.
                    after, stmt.orelse = stmt.orelse, []
                    return [*out, *self._block([stmt, *after, *rest], loop)]
                more = self._loop(stmt)
                if isinstance(more[-1], ast.If) and _jumps(more[-1]):
                    return [*out, *more[:-1], *self._block([more[-1], *rest], loop)]
                out += more
            elif isinstance(stmt, ast.With):
                out.append(self._with(stmt, rest, loop))
                if _returns(stmt):
                    return out
            else:
                out.append(self._other(stmt, loop))
        return out

    def _other(self, stmt: ast.stmt, loop: _Loop | None) -> ast.stmt:
        if isinstance(stmt, ast.If):
            stmt.body, stmt.orelse = self._block(stmt.body, loop), self._block(stmt.orelse, loop)
        elif isinstance(stmt, ast.Try | ast.Match) and _jumps(stmt):
            kind = type(stmt).__name__.lower()
            raise self.refuse(stmt, f"a return, break or continue inside `{kind}` cannot be kept. Move it out of it.")
        return stmt

    def _jump(self, stmt: ast.stmt, loop: _Loop | None) -> list[ast.stmt]:
        if isinstance(stmt, ast.Continue):
            return []
        if isinstance(stmt, ast.Break):
            assert loop is not None, "Python itself refuses a break outside a loop"
            assert loop.flag is not None, "a loop with a break has a flag"
            return [_assign(loop.flag, ast.Constant(True), stmt)]
        out: list[ast.stmt] = []
        if isinstance(stmt, ast.Return):
            out.append(_assign(RESULT, stmt.value or ast.Constant(None), stmt))
        if loop is not None and loop.flagged:
            self.returns = True
            if isinstance(stmt, ast.Return):
                out.append(_assign(DONE, ast.Constant(True), stmt))
        if loop is not None and loop.flag is not None:
            out.append(_assign(loop.flag, ast.Constant(True), stmt))
        return out

    def _loop(self, stmt: ast.While | ast.For) -> list[ast.stmt]:
        flag = None
        if _leaves(stmt):
            self._count += 1
            flag = f"stop_{self._count}_"
        inner = self._block(stmt.body, _Loop(flag, True)) or [ast.copy_location(ast.Pass(), stmt)]
        out: list[ast.stmt] = []
        if flag is not None:
            out.append(_assign(flag, ast.Constant(False), stmt))
        if isinstance(stmt, ast.While):
            test: ast.expr = stmt.test
            if flag is not None:
                free = ast.UnaryOp(ast.Not(), _name(flag))
                always = isinstance(test, ast.Constant) and test.value in (True, 1)
                test = free if always else ast.BoolOp(ast.And(), [free, test])
            loop: ast.While | ast.For = ast.While(test=test, body=inner, orelse=[])
        else:
            loop = ast.For(target=stmt.target, iter=stmt.iter, body=inner, orelse=[])
        loop.stop_flag = flag  # type: ignore[union-attr]  # read by the converter
        out.append(ast.fix_missing_locations(ast.copy_location(loop, stmt)))
        returns = any(_returns(s) for s in stmt.body)
        if stmt.orelse:
            assert flag is not None, "an `else` that always runs was taken out"
            guard = ast.If(test=ast.UnaryOp(ast.Not(), _name(flag)), body=stmt.orelse, orelse=[])
            guard = ast.fix_missing_locations(ast.copy_location(guard, stmt))
            if _jumps(guard):
                raise self.refuse(stmt, "a jump inside the `else` of a loop cannot be kept. Move it behind the loop.")
            out.append(guard)
        return [*out, _finish_if_done(stmt)] if returns else out

    def _with(self, stmt: ast.With, rest: list[ast.stmt], loop: _Loop | None) -> ast.With:
        if any(_breaks(s, continues=True) for s in stmt.body):
            raise self.refuse(stmt, "a break or continue inside `with` cannot be kept. Move it out of it.")
        body = list(stmt.body)
        if _returns(stmt) and not _always_returns(body):
            if rest and not (isinstance(rest[0], ast.Return) and isinstance(rest[0].value, ast.Constant | None)):
                raise self.refuse(
                    stmt,
                    "a return inside a `with` that more statements follow cannot be kept. Assign inside it, and return "
                    "behind it.",
                )
            body += rest[:1]
        new = ast.With(items=stmt.items, body=self._block(body, loop))
        return ast.fix_missing_locations(ast.copy_location(new, stmt))


@dataclass(frozen=True)
class _Loop:
    flag: str | None
    flagged: bool | None


class _Finished(ast.stmt):
    """A return whose value was assigned already."""


def _finish_if_done(like: ast.stmt) -> ast.If:
    node = ast.If(test=_name(DONE), body=[ast.copy_location(_Finished(), like)], orelse=[])
    return ast.fix_missing_locations(ast.copy_location(node, like))


def _name(name: str) -> ast.Name:
    return ast.Name(id=name, ctx=ast.Load())


def _assign(name: str, value: ast.expr, like: ast.AST) -> ast.stmt:
    node = ast.Assign(targets=[ast.Name(id=name, ctx=ast.Store())], value=value)
    return ast.fix_missing_locations(ast.copy_location(node, like))


def _returns(node: ast.AST) -> bool:
    """Whether a statement returns from its own function."""
    if isinstance(node, ast.Return | _Finished):
        return True
    if isinstance(node, _SCOPES):
        return False
    return any(_returns(child) for child in ast.iter_child_nodes(node))


def _always_returns(stmts: Sequence[ast.stmt]) -> bool:
    """Whether nothing behind a block is ever reached."""
    last = stmts[-1] if stmts else None
    if isinstance(last, ast.If):
        return _always_returns(last.body) and _always_returns(last.orelse)
    return isinstance(last, ast.Return | ast.Raise) or (isinstance(last, ast.With) and _always_returns(last.body))


def _leaves(loop: ast.While | ast.For) -> bool:
    """Whether something in a loop's body ends it."""
    return any(_breaks(s) or _returns(s) for s in loop.body)


def _breaks(node: ast.AST, continues: bool = False) -> bool:
    """Whether a statement breaks out of the loop it stands in."""
    if isinstance(node, ast.Break) or (continues and isinstance(node, ast.Continue)):
        return True
    if isinstance(node, _SCOPES):
        return False
    if isinstance(node, _LOOPS):
        return any(_breaks(child, continues) for child in node.orelse)
    return any(_breaks(child, continues) for child in ast.iter_child_nodes(node))


def _jumps(node: ast.AST) -> bool:
    return _returns(node) or _breaks(node, continues=True)

"""A Python function in, the same function with its control flow as calls out. Knows syntax, not tensors.

`if`, `while`, `for`, `and`, `or`, `not`, chained comparisons and conditional expressions become calls of the runtime
`_dr`, which decides when it runs whether a condition is a tensor. Names that a branch assigns travel as arguments.
"""

from __future__ import annotations

import ast
import copy
import types
from collections.abc import Sequence
from typing import Any

from . import _names
from ._expressions import RUNTIME, Expressions, place
from ._jumps import Jumps
from ._source import FunctionNode

_OPERATORS = {
    ast.Add: "+=", ast.Sub: "-=", ast.Mult: "*=", ast.Div: "/=", ast.FloorDiv: "//=", ast.Mod: "%=", ast.Pow: "**=",
    ast.MatMult: "@=", ast.BitAnd: "&=", ast.BitOr: "|=", ast.BitXor: "^=", ast.LShift: "<<=", ast.RShift: ">>=",
}  # fmt: skip


def convert(function: types.FunctionType, node: FunctionNode) -> ast.FunctionDef:
    """The rewritten definition of a function.

    Raises:
        CaptureError: a statement that cannot be kept; the message has its line.
    """
    return _Converter(function, copy.deepcopy(node)).converted()


class _Converter(Expressions):
    def __init__(self, function: types.FunctionType, node: FunctionNode) -> None:
        super().__init__(function, node)
        self.node = node
        self.plain = 0
        self.count: dict[str, int] = {}

    def converted(self) -> ast.FunctionDef:
        node = self.node
        if isinstance(node, ast.Lambda):
            body: list[ast.stmt] = [ast.copy_location(ast.Return(value=node.body), node.body)]
            name = "lambda_"
        else:
            body, name = node.body, node.name
        self._check(body)
        body = Jumps(self.refuse).lower(body)
        self.locals |= _names.assigned(body)
        always = _names.captured(body)
        _names.live_before(body, always)
        _names.defined_after(body, set(self.arguments))
        self.undefined: list[set[str]] = []
        new = self._body(body[0], body, self.arguments)
        args = node.args
        for argument in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]:
            if argument is not None:
                argument.annotation = None
        args.defaults = [ast.Constant(None) for _ in args.defaults]
        args.kw_defaults = [None if d is None else ast.Constant(None) for d in args.kw_defaults]
        made = ast.FunctionDef(name=name, args=args, body=new, decorator_list=[], returns=None)
        made.type_params = []  # type: ignore[attr-defined]  # asked for by Python 3.12
        return ast.fix_missing_locations(ast.copy_location(made, node))

    def _check(self, body: Sequence[ast.stmt]) -> None:
        for stmt in body:
            for node in ast.walk(stmt):
                if isinstance(node, ast.Global | ast.Nonlocal):
                    kind = type(node).__name__.lower()
                    raise self.refuse(
                        node,
                        f"assigning a {kind} name is a side effect that a graph cannot keep. Return the value instead.",
                    )
                if isinstance(node, ast.AsyncFor | ast.AsyncWith | ast.Await):
                    raise self.refuse(node, "async statements cannot be kept.")

    # --- statements

    def _block(self, stmts: Sequence[ast.stmt]) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for stmt in stmts:
            new: Any = self.visit(stmt)
            out += new if isinstance(new, list) else [new]
        return out

    def _at(self, like: ast.AST, code: str) -> ast.stmt:
        node = ast.parse(code).body[0]
        for part in ast.walk(node):
            place(part, like)
        return node

    def _unique(self, kind: str) -> str:
        self.count[kind] = self.count.get(kind, 0) + 1
        return f"{kind}_{self.count[kind]}"

    def _function(self, like: ast.AST, name: str, params: list[str], body: list[ast.stmt], out: list[str]) -> ast.stmt:
        """The definition of a branch: it takes and gives names."""
        made = self._at(like, f"def {name}({', '.join(params)}):\n    pass\n    return {_tuple(out)}")
        assert isinstance(made, ast.FunctionDef)
        made.body = [*(s for s in body if not isinstance(s, ast.Pass)), made.body[-1]]
        return made

    def _body(
        self, like: ast.AST, body: Sequence[ast.stmt], params: Sequence[str], first: Sequence[ast.stmt] = ()
    ) -> list[ast.stmt]:
        """The rewritten body of a definition, after what its names need before they are used."""
        self.undefined.append(set())
        inner = [*first, *self._block(body)]
        start = [f"{name} = {RUNTIME}.undefined({name!r})" for name in sorted(self.undefined.pop() - set(params))]
        if len(self.undefined):
            changed = _names.changed_in_place(body) & set(params)
            start += [f"{name} = {RUNTIME}.own({name})" for name in sorted(changed)]
        return [*(self._at(like, code) for code in start), *inner]

    def _needs(self, node: Any, names: Sequence[str]) -> None:
        self.undefined[-1] |= {n for n in names if n not in node.defined}

    def _scope(self, body: Sequence[ast.stmt], params: Sequence[str]) -> str:
        """Where values are changed in place, the runtime must see who else holds them."""
        changed = sorted(_names.changed_in_place(body) & set(params))
        return f", (locals(), {changed})" if changed else ""

    def visit_If(self, node: ast.If) -> Any:
        test = self.test(node.test)
        if self.plain:
            node.test = self.call("plain", [test], node)
            node.body, node.orelse = self._block(node.body), self._block(node.orelse)
            return node
        changed = _names.assigned([*node.body, *node.orelse])
        after: set[str] = node.live_after  # type: ignore[attr-defined]
        out = sorted(changed & after)
        needed = _names.live_before(node.body, set(out)) | _names.live_before(node.orelse, set(out))
        params = sorted(changed & needed)
        self._needs(node, params)
        then, other = self._unique("then"), self._unique("else")
        functions = []
        for name, body in ((then, node.body), (other, node.orelse)):
            functions.append(self._function(node, name, params, self._body(node, body, params), out))
        call = f"{RUNTIME}.if_(0, {then}, {other}, {_tuple(params)}, {out!r}{self._scope([node], params)})"
        return [*functions, self._result(node, call, out, test)]

    def _result(self, like: ast.AST, call: str, out: list[str], test: ast.expr | None) -> ast.stmt:
        made = self._at(like, f"{_tuple(out)} = {call}" if out else call)
        if test is not None:
            value = made.value  # type: ignore[attr-defined]
            value.args[0] = test
        return made

    def visit_While(self, node: ast.While) -> Any:
        if any(isinstance(n, ast.NamedExpr) for n in ast.walk(node.test)) and not self.plain:
            raise self.refuse(node, "`:=` in the test of a `while` cannot be kept. Assign in the loop's body.")
        test = self.test(node.test)
        if self.plain:
            node.test = self.call("plain", [test], node)
            node.body = self._block(node.body)
            return node
        state = sorted(_names.assigned(node.body) & node.live_head)  # type: ignore[attr-defined]
        self._needs(node, state)
        tester, body = self._unique("test"), self._unique("body")
        inner = self._body(node, node.body, state)
        test_function = self._at(node, f"def {tester}({', '.join(state)}):\n    return 0")
        test_function.body[0].value = test  # type: ignore[attr-defined]
        body_function = self._function(node, body, state, inner, state)
        call = f"{RUNTIME}.while_({tester}, {body}, {_tuple(state)}, {state!r}{self._scope(node.body, state)})"
        return [test_function, body_function, self._result(node, call, state, None)]

    def visit_For(self, node: ast.For) -> Any:
        iterable = self.visit(node.iter)
        if self.plain:
            node.iter = self.call("plain_iter", [iterable], node)
            node.body = self._block(node.body)
            return node
        changed = _names.assigned([*node.body, node.target])
        state = sorted(changed & node.live_head)  # type: ignore[attr-defined]
        self._needs(node, state)
        body, value = self._unique("body"), self._unique("item")
        target = ast.Assign(targets=[node.target], value=ast.Name(id=value, ctx=ast.Load()))
        first = self.visit(ast.fix_missing_locations(ast.copy_location(target, node)))
        inner = self._body(node, node.body, state, first if isinstance(first, list) else [first])
        function = self._function(node, body, [value, *state], inner, state)
        stop = getattr(node, "stop_flag", None)
        call = f"{RUNTIME}.for_(0, {body}, {_tuple(state)}, {state!r}, {stop!r}{self._scope(node.body, state)})"
        return [function, self._result(node, call, state, iterable)]

    def _plainly(self, node: Any) -> Any:
        self.plain += 1
        try:
            return self.generic_visit(node)
        finally:
            self.plain -= 1

    visit_Try = visit_TryStar = visit_Match = _plainly

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        return node  # rewritten when it is called

    visit_ClassDef = visit_Lambda = visit_FunctionDef  # type: ignore[assignment]

    def visit_Assign(self, node: ast.Assign) -> Any:
        value = self.visit(node.value)
        if len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            node.value = value
            return node
        if len(node.targets) == 1 and not isinstance(node.targets[0], ast.Tuple | ast.List | ast.Starred):
            return self._store(node.targets[0], value, node)
        stores: list[ast.stmt] = []
        node.targets = [self._names_only(target, stores) for target in node.targets]
        node.value = value
        return [node, *stores]

    def _names_only(self, target: ast.expr, stores: list[ast.stmt]) -> ast.expr:
        """A target in which attributes and items are replaced by fresh names, which `stores` puts in place."""
        if isinstance(target, ast.Tuple | ast.List):
            target.elts = [self._names_only(t, stores) for t in target.elts]
        elif isinstance(target, ast.Attribute | ast.Subscript):
            fresh = self._unique("value")
            value = ast.copy_location(ast.Name(id=fresh, ctx=ast.Load()), target)
            stores.append(self._store(target, value, target))
            return ast.copy_location(ast.Name(id=fresh, ctx=ast.Store()), target)
        return target

    def _store(self, target: ast.expr, value: ast.expr, like: ast.AST) -> ast.stmt:
        if isinstance(target, ast.Attribute):
            name = ast.copy_location(ast.Constant(self.private(target.attr)), target)
            call = self.call("set", [self.visit(target.value), name, value], like)
        elif isinstance(target, ast.Subscript):
            owner = target.value
            call = self.call("setitem", [self._load(owner), self.key(target.slice), value], like)
            if isinstance(owner, ast.Name) and owner.id in self.locals:
                again: ast.expr = ast.Name(id=owner.id, ctx=ast.Store())
                return ast.fix_missing_locations(ast.copy_location(ast.Assign(targets=[again], value=call), like))
        else:
            stored = ast.Assign(targets=[target], value=value)
            return ast.fix_missing_locations(ast.copy_location(stored, like))
        return ast.fix_missing_locations(ast.copy_location(ast.Expr(value=call), like))

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        operator = ast.copy_location(ast.Constant(_OPERATORS[type(node.op)]), node)
        old = self._load(node.target)
        value = self.call("inplace", [operator, old, self.visit(node.value)], node)
        return self._store(node.target, value, node)

    def _load(self, target: ast.expr) -> ast.expr:
        again = copy.deepcopy(target)
        again.ctx = ast.Load()  # type: ignore[attr-defined]
        loaded: ast.expr = self.visit(again)
        return loaded

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        plain = ast.Assign(targets=[node.target], value=node.value)
        return self.visit_Assign(ast.fix_missing_locations(ast.copy_location(plain, node)))

    def visit_Delete(self, node: ast.Delete) -> Any:
        if not all(isinstance(t, ast.Name) for t in node.targets):
            raise self.refuse(node, "deleting an item or an attribute is a side effect that cannot be kept.")
        return node

    def visit_Assert(self, node: ast.Assert) -> Any:
        message = self.lazy(node.msg or ast.copy_location(ast.Constant(None), node))
        call = self.call("assert_", [self.test(node.test), message], node)
        return ast.copy_location(ast.Expr(value=call), node)

    def visit_Raise(self, node: ast.Raise) -> Any:
        if node.exc is not None:
            node.exc = self.call("raised", [self.visit(node.exc)], node)
        return node


def _tuple(names: Sequence[str]) -> str:
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"


def compiled(function: types.FunctionType, made: ast.FunctionDef) -> types.CodeType:
    """The code of a rewritten function, with the original's free names and the runtime's."""
    free = sorted({*function.__code__.co_freevars, RUNTIME})
    factory = ast.parse(f"def factory_({', '.join(free)}):\n    pass")
    outer = factory.body[0]
    assert isinstance(outer, ast.FunctionDef)
    # Under its own name it would hide the global that a function which calls itself means.
    inside = copy.copy(made)
    inside.name = "rewritten_"
    outer.body = [inside]
    code = compile(ast.fix_missing_locations(factory), function.__code__.co_filename, "exec", dont_inherit=True)
    return _inner(_inner(code, "factory_"), "rewritten_").replace(co_name=made.name)


def _inner(code: types.CodeType, name: str) -> types.CodeType:
    return next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)

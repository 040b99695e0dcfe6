"""The expressions of a function with their choices as calls: `and`, `or`, `not`, `if` else, comparisons, calls.

Knows syntax, not tensors; `_convert` does the statements.
"""

from __future__ import annotations

import ast
import types
from typing import Any

from ._source import FunctionNode, refusal

RUNTIME = "_dr"
_COMPARE = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
    ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
}  # fmt: skip
#: Expressions that can be computed although Python would not: they neither fail nor call anything.
_TOTAL = (ast.Name, ast.Constant, ast.Compare, ast.UnaryOp, ast.BinOp, ast.cmpop, ast.unaryop, ast.expr_context)
_TOTAL_OPERATORS = (ast.Add, ast.Sub, ast.Mult)


class Expressions(ast.NodeTransformer):
    """Rewrites the expressions of one function."""

    def __init__(self, function: types.FunctionType, node: FunctionNode) -> None:
        self.function = function
        parts = function.__qualname__.split(".")
        self.owner = parts[-2].lstrip("_") if len(parts) > 1 and parts[-2] != "<locals>" else ""
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        self.arguments = [a.arg for a in every if a is not None]
        self.locals: set[str] = set(self.arguments)

    def refuse(self, node: ast.AST, problem: str) -> Exception:
        """The error for something that cannot be kept."""
        code = self.function.__code__
        return refusal(code.co_filename, getattr(node, "lineno", 0), self.function.__qualname__, problem)

    def call(self, name: str, args: list[ast.expr], like: ast.AST) -> ast.Call:
        """A call of the runtime."""
        owner = place(ast.Name(id=RUNTIME, ctx=ast.Load()), like)
        function = place(ast.Attribute(value=owner, attr=name, ctx=ast.Load()), like)
        call: ast.Call = place(ast.Call(func=function, args=args, keywords=[]), like)
        return call

    def lazy(self, expression: ast.expr, test: bool = False) -> ast.expr:
        """An expression as a function that computes it."""
        if any(isinstance(n, ast.NamedExpr) for n in ast.walk(expression)):
            raise self.refuse(expression, "`:=` in an expression that may not run cannot be kept. Assign before it.")
        none = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        body = self.test(expression) if test else self.visit(expression)
        return ast.fix_missing_locations(ast.copy_location(ast.Lambda(args=none, body=body), expression))

    def test(self, node: ast.expr) -> ast.expr:
        """An expression of which only the truth is used."""
        if isinstance(node, ast.BoolOp):
            if all(_is_total(v) for v in node.values[1:]):
                name = "every" if isinstance(node.op, ast.And) else "either"
                return self.call(
                    name, [self.test(node.values[0]), *(self.lazy(v, True) for v in node.values[1:])], node
                )
            name = "all_" if isinstance(node.op, ast.And) else "any_"
            return self.call(name, [self.test(node.values[0]), *(self.lazy(v, True) for v in node.values[1:])], node)
        visited: ast.expr = self.visit(node)
        return visited

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        name = "and_" if isinstance(node.op, ast.And) else "or_"
        return self.call(name, [self.visit(node.values[0]), *(self.lazy(v) for v in node.values[1:])], node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            return self.call("not_", [self.test(node.operand)], node)
        return self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        return self.call("choose", [self.test(node.test), self.lazy(node.body), self.lazy(node.orelse)], node)

    def visit_Compare(self, node: ast.Compare) -> Any:
        if len(node.ops) == 1:
            return self.generic_visit(node)
        args: list[ast.expr] = [self.visit(node.left)]
        for operator, right in zip(node.ops, node.comparators):
            args += [ast.copy_location(ast.Constant(_COMPARE[type(operator)]), right), self.lazy(right)]
        return self.call("compare", args, node)

    def visit_Call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
            node.args = [
                ast.copy_location(ast.Name(id=n, ctx=ast.Load()), node) for n in ("__class__", self.arguments[0])
            ]
            return node
        library = self._library(node.func)
        function = node.func if library else self.visit(node.func)
        args = [self.visit(a) for a in node.args]
        for keyword in node.keywords:
            keyword.value = self.visit(keyword.value)
        if library:
            node.args = args
            return node
        call = self.call("call", [function, *args], node)
        call.keywords = node.keywords
        return call

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        if not isinstance(node.ctx, ast.Load) or self._library(node):
            return node
        name = ast.copy_location(ast.Constant(self.private(node.attr)), node)
        return self.call("get", [self.visit(node.value), name], node)

    def _library(self, node: ast.expr) -> bool:
        """Whether an expression is something of torch's, such as `torch.relu` or `F.linear`, by its global name."""
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        if root is node or not isinstance(root, ast.Name) or root.id in self.locals:
            return False
        value = self.function.__globals__.get(root.id)
        if not isinstance(value, types.ModuleType) or value.__name__.partition(".")[0] != "torch":
            return False
        return not isinstance(node, ast.Attribute) or node.attr not in ("cond", "while_loop")

    def key(self, node: ast.expr) -> ast.expr:
        """The key of an item as a value: slices become calls of `slice`."""
        if isinstance(node, ast.Slice):
            none = ast.Constant(None)
            parts = [self.visit(p) if p is not None else none for p in (node.lower, node.upper, node.step)]
            call = ast.Call(func=ast.Name(id="slice", ctx=ast.Load()), args=parts, keywords=[])
            return ast.fix_missing_locations(ast.copy_location(call, node))
        if isinstance(node, ast.Tuple):
            elements = [self.key(e) for e in node.elts]
            return ast.copy_location(ast.Tuple(elts=elements, ctx=ast.Load()), node)
        visited: ast.expr = self.visit(node)
        return visited

    def visit_List(self, node: ast.List) -> Any:
        self.generic_visit(node)
        return self.call("new", [node], node) if isinstance(node.ctx, ast.Load) else node

    def _fresh(self, node: Any) -> Any:
        inner: Any = self.generic_visit(node)
        return self.call("new", [inner], node)

    visit_Dict = visit_Set = visit_ListComp = visit_DictComp = visit_SetComp = _fresh

    def visit_comprehension(self, node: ast.comprehension) -> Any:
        node.iter = self.call("plain_iter", [self.visit(node.iter)], node.iter)
        node.ifs = [self.call("plain", [self.test(test)], test) for test in node.ifs]
        return node

    def private(self, name: str) -> str:
        """An attribute's name as the class that the function stands in has it."""
        hidden = self.owner and name.startswith("__") and not name.endswith("__")
        return f"_{self.owner}{name}" if hidden else name


def place(node: Any, like: Any) -> Any:
    """Give a new node the place where another begins: Python names a call of several lines by its last one."""
    if "lineno" in node._attributes:
        node.lineno = node.end_lineno = like.lineno
        node.col_offset = node.end_col_offset = like.col_offset
    return node


def _is_total(node: ast.expr) -> bool:
    for part in ast.walk(node):
        if isinstance(part, ast.operator):
            if not isinstance(part, _TOTAL_OPERATORS):
                return False
        elif not isinstance(part, _TOTAL):
            return False
    return True

"""Conditions on sizes: what the module's own lines asked of its inputs' sizes while it was captured.

A Python branch on a size is decided once, at capture. The graph holds only for sizes that decide it the same way, so
the condition is kept as text over `size_<input>_<axis>` and asked again at every call. Texts are read by an
interpreter of arithmetic, never by Python itself: they come out of files too. Knows nothing of tensors.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
}  # fmt: skip
_UNARY: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.Invert: operator.not_, ast.Not: operator.not_}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Eq": operator.eq, "Ne": operator.ne, "Mod": operator.mod, "PythonMod": operator.mod, "Min": min, "Max": max,
    "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv, "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv, "ToFloat": float, "TruncToInt": math.trunc, "FloorToInt": math.floor,
    "CeilToInt": math.ceil, "floor": math.floor, "ceiling": math.ceil, "Not": operator.not_,
}  # fmt: skip
#: The longest text that is read; longer ones come out of a file that nobody wrote.
_LONGEST = 500


def evaluate(text: str, sizes: Mapping[str, int]) -> Any:
    """The value of arithmetic on sizes.

    Raises:
        ValueError: anything else stands there.

    Example:
        >>> evaluate("Eq(Mod(size_0_1, 4), 0)", {"size_0_1": 8})
        True
        >>> evaluate("2*s27 + 1", {"s27": 3})
        7
    """
    return _value(_parsed(text), sizes)


@cache
def _parsed(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise ValueError(f"{text[:60]!r}... is too long for a condition on sizes")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError) as e:
        raise ValueError(f"{text[:60]!r} is no condition on sizes") from e


def _value(node: ast.expr, sizes: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name) and node.id in sizes:
        return sizes[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, sizes))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        return _COMPARE[type(node.ops[0])](_value(node.left, sizes), _value(node.comparators[0], sizes))
    name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    if isinstance(node, ast.Call) and name in _FUNCTIONS and not node.keywords:
        return _FUNCTIONS[name](*(_value(a, sizes) for a in node.args))
    raise ValueError(f"{ast.unparse(node)[:60]!r} is no arithmetic on sizes")


def holds(text: str, sizes: Mapping[str, int]) -> bool:
    """Whether a condition holds; a division by a size of 0 counts as not."""
    try:
        return bool(evaluate(text, sizes))
    except (ZeroDivisionError, TypeError, OverflowError):
        return False


def names_of(text: str) -> set[str]:
    """The sizes that a text speaks of."""
    return {n.id for n in ast.walk(_parsed(text)) if isinstance(n, ast.Name) and n.id not in _FUNCTIONS}

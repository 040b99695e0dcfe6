"""Where a Python function's source is, and whether the function is a user's."""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import sysconfig
import types
from functools import lru_cache
from pathlib import Path

import torch

from ...core import CaptureError

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

#: Where libraries live: Python's own, the installed ones, torch and this package.
_LIBRARIES = tuple(
    str(path) + os.sep
    for path in (
        *(Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
        Path(torch.__file__).parent,
        Path(__file__).resolve().parents[2],
    )
)


class Refusal(CaptureError):
    """Something in the user's source that cannot be kept; the message begins with its line."""


def place(filename: str, line: int, function: str) -> str:
    """The beginning of a message about a line of the user's: file, number, function and the line itself."""
    code = linecache.getline(filename, line).strip()
    return f"{filename}, line {line}, in {function}:\n    {code}"


def refusal(filename: str, line: int, function: str, problem: str) -> Refusal:
    """The error for something at a line that cannot be kept."""
    return Refusal(f"{place(filename, line, function)}\n  {problem}")


def is_users(function: types.FunctionType) -> bool:
    """Whether a function is to be followed: written by the user, not part of an installed library.

    Example:
        >>> is_users(ast.parse)
        False
    """
    filename = function.__code__.co_filename
    return not filename.startswith(("<frozen", *_LIBRARIES))


@lru_cache(maxsize=64)
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def function_node(function: types.FunctionType) -> FunctionNode:
    """The syntax tree of a function, from its file, a notebook cell or an interactive line.

    Raises:
        CaptureError: there is no source, or it no longer fits the function.
    """
    code = function.__code__
    linecache.checkcache(code.co_filename)
    # A module's globals let linecache find sources inside archives.
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    problem = f"{function.__qualname__} has no source that can be read ({code.co_filename!r})"
    way = "Define it in a file or a notebook cell; code from exec, or of C, cannot be rewritten."
    if not text:
        raise CaptureError(f"{problem}. {way}")
    try:
        tree = _parsed(text)
    except SyntaxError as e:
        raise CaptureError(f"{problem}: {e}. {way}") from e
    found = [n for n in ast.walk(tree) if isinstance(n, FunctionNode) and _fits(n, code)]
    if not found:
        raise CaptureError(
            f"the source of {function.__qualname__} in {code.co_filename}, line {code.co_firstlineno}, is not that of "
            "the function: the file was changed after it was imported. Import it again."
        )
    if len(found) > 1:
        found = _by_column(found, code)
    return found[0]


def _fits(node: FunctionNode, code: types.CodeType) -> bool:
    name = "<lambda>" if isinstance(node, ast.Lambda) else node.name
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    # A private name is stored with its class's name in front.
    given = [n if m == n or not n.startswith("_") else m for n, m in zip(code.co_varnames, names)]
    count = code.co_argcount + code.co_kwonlyargcount
    return name == code.co_name and first == code.co_firstlineno and len(names) == count and given == names


def _by_column(nodes: list[FunctionNode], code: types.CodeType) -> list[FunctionNode]:
    """Of several lambdas on one line, the one whose columns hold the code's."""
    columns = [(line, col) for line, _, col, _ in code.co_positions() if line is not None and col is not None]

    def holds(node: FunctionNode) -> bool:
        body = node.body if isinstance(node.body, ast.AST) else node
        begin, end = (body.lineno, body.col_offset), (body.end_lineno or 0, body.end_col_offset or 0)
        # The first instruction of a lambda may be placed at the beginning of its file.
        return all(begin <= at <= end for at in columns if at[1] or at[0] != nodes[0].lineno)

    inside = [n for n in nodes if holds(n)]
    if len(inside) != 1:
        raise CaptureError(
            f"{code.co_filename}, line {code.co_firstlineno}: several lambdas on one line cannot be told apart; "
            "give each a line of its own."
        )
    return inside


def underlying(function: object) -> types.FunctionType | None:
    """The Python function behind a bound method or a function; None for anything else."""
    while isinstance(function, types.MethodType):
        function = function.__func__
    return function if isinstance(function, types.FunctionType) else None


def refuse_generators(function: types.FunctionType) -> None:
    """Raise CaptureError for a generator or a coroutine."""
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        code = function.__code__
        raise refusal(
            code.co_filename, code.co_firstlineno, function.__qualname__,
            "a generator or coroutine cannot be kept in a graph. Return a list or a tensor instead of yielding.",
        )  # fmt: skip

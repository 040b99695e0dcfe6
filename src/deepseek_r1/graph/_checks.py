"""Checks of a graph in torch's JSON form, made before torch reads it.

torch resolves operator names by walking attributes from its own package and evaluates size expressions as Python, so
a tampered graph can run anything. Here every operator must be one that is registered with torch's dispatcher (or a
known piece of integer arithmetic), and every expression must be arithmetic on known names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

# Registers the quantize/dequantize operators, which quantised graphs name.
import torch.ao.quantization.fx._decomposed

from ..core import ArtifactError, UnsafeFileError

#: Operators that touch files although they are registered like any other.
_REFUSED_OPS = {"aten::from_file", "aten::save", "aten::load"}
_HIGHER_ORDER = {
    "cond", "while_loop", "scan", "map_impl", "associative_scan", "wrap_with_set_grad_enabled", "wrap_with_autocast",
    "flex_attention",
}  # fmt: skip
_ARITHMETIC = re.compile(
    r"(_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|pos|abs|index)"
    r"|math\.(ceil|floor|trunc|sqrt|log2)"
    r"|torch\.(sym_int|sym_float|sym_max|sym_min|sym_not|sym_sum|sym_ite|sym_sqrt))"
)
_SYMBOL = re.compile(r"(Symbol|Dummy)\('[A-Za-z]\w*'(, \w+=(True|False))*\)")
_WORDS = re.compile(r"[A-Za-z_]\w*")
_ALLOWED_WORD = re.compile(
    r"[a-z]{1,4}\d+|oo|int_oo|True|False|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|CeilToInt|FloorToInt|"
    r"ModularIndexing|Where|LShift|RShift|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|TruncToFloat|TruncToInt|"
    r"RoundToInt|RoundDecimal|ToFloat|Identity|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Integer|Rational|floor|ceiling|"
    r"IsNonOverlappingAndDenseIndicator|Pow|Add|Mul|Abs|Float"
)
_ALLOWED_TEXT = re.compile(r"[\w\s+\-*/%(),.<>=&|~]*")


@cache
def _registered(name: str) -> bool:
    return name in set(torch._C._dispatch_get_all_op_names())


def checked_graph(data: bytes, where: str) -> bytes:
    """The graph's JSON, with Python guard code taken out; raises if anything in it could run code.

    Raises:
        ArtifactError: no JSON, or not an exported graph.
        UnsafeFileError: an operator, an expression or an object that is not allowed.
    """
    try:
        graph = json.loads(data)
    except ValueError as e:
        raise ArtifactError(f"{where}: the graph is damaged (no JSON: {e}).") from e
    if not isinstance(graph, dict) or "graph_module" not in graph:
        raise ArtifactError(f"{where}: the graph is not one that torch.export wrote.")
    for key, value in _walk(graph):
        if key in ("target", "as_operator") and isinstance(value, str):
            _check_operator(value, where)
        elif key == "expr_str":
            check_expression(value, where)
        elif key in ("as_custom_obj", "custom_obj", "as_opaque", "as_custom_objs") and value:
            raise UnsafeFileError(f"{where}: the graph holds a custom object ({value}); such files are not opened.")
        elif key in ("in_spec", "out_spec") and isinstance(value, str):
            check_tree(value, where)
    for name in graph.get("range_constraints") or {}:
        check_expression(name, where)
    # Guards are Python source that torch would execute; the checks they stand for are made by `Program.misfit`.
    if "guards_code" in graph:
        graph["guards_code"] = []
    return json.dumps(graph).encode()


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            # Names of tensors and metadata are free text; what they name is checked where it stands.
            for key, child in item.items():
                if key == "metadata" and isinstance(child, dict) and "graph" not in item:
                    continue
                yield key, child
                stack.append(child)
        elif isinstance(item, list):
            stack.extend(item)


def _check_operator(target: str, where: str) -> None:
    if _ARITHMETIC.fullmatch(target):
        return
    match = re.fullmatch(r"torch\.ops\.(\w+)\.(\w+)(?:\.(\w+))?", target)
    if match:
        namespace, name, overload = match.groups()
        if namespace == "higher_order" and name in _HIGHER_ORDER and overload is None:
            return
        full = f"{namespace}::{name}"
        known = _registered(full if overload in (None, "default") else f"{full}.{overload}")
        if known and full not in _REFUSED_OPS:
            return
        if not known:
            raise UnsafeFileError(
                f"{where}: the graph calls {target!r}, which is no operator registered here. If it is a custom "
                "operator, load its library first; otherwise do not trust this file."
            )
    raise UnsafeFileError(f"{where}: the graph calls {target!r}, which is not an allowed operator. It was not opened.")


def check_expression(text: Any, where: str) -> None:
    """Raise UnsafeFileError unless `text` is arithmetic on sizes.

    Example:
        >>> check_expression("2*s77 + FloorDiv(s0, 2)", "x")
    """
    if not isinstance(text, str):
        raise UnsafeFileError(f"{where}: a size expression is a {type(text).__name__}, not text.")
    rest = _SYMBOL.sub("s0", text)
    bad_word = next((w for w in _WORDS.findall(rest) if not _ALLOWED_WORD.fullmatch(w)), None)
    if bad_word or not _ALLOWED_TEXT.fullmatch(rest) or re.search(r"\.\s*[A-Za-z_(]", rest) or len(rest) > 2000:
        raise UnsafeFileError(f"{where}: the size expression {text[:80]!r} is not plain arithmetic. It was not opened.")


def check_tree(text: str, where: str) -> None:
    """Raise UnsafeFileError if a description of nested inputs could import a module."""
    try:
        nodes = [json.loads(text)]
    except ValueError as e:
        raise ArtifactError(f"{where}: a description of nested inputs is damaged: {e}") from e
    while nodes:
        item = nodes.pop()
        if isinstance(item, list):
            nodes.extend(item)
        elif isinstance(item, dict):
            kind = item.get("type")
            # A defaultdict names a factory to import; dataclasses and named tuples are looked up among those this
            # process registered.
            if "defaultdict" in str(kind) or "default_factory" in str(item.get("context")):
                raise UnsafeFileError(f"{where}: nested inputs of type {kind!r} are not opened.")
            nodes.extend(item.get("children_spec") or [])

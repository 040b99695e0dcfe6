"""Checks of a graph in torch's JSON form, made before torch reads it.

torch resolves operator names by walking attributes from its own package, evaluates size expressions as Python, writes
the names of values into Python source that it runs, and imports what a description of nested inputs names. A tampered
graph can therefore run anything. Here every operator must be one that is registered with torch's dispatcher (or a
known piece of integer arithmetic), every expression arithmetic on known names, and every other text a plain name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

# Registers the quantize/dequantize operators, which quantised graphs name.
import torch.ao.quantization.fx._decomposed
import torch.utils._pytree as pytree

from ..core import ArtifactError, UnsafeFileError
from ._foreign_nests import plain_

#: Namespaces whose operators compute and nothing else, but for those refused.
_COMPUTING = {"aten", "prims", "quantized_decomposed"}
#: Operators that touch files, and a namespace whose operators do not check the memory they touch.
_REFUSED_OPS = {"aten::from_file", "aten::save", "aten::load"}
_REFUSED_SPACES = {"inductor"}
_HIGHER_ORDER = {
    "cond", "while_loop", "scan", "map_impl", "associative_scan", "wrap_with_set_grad_enabled", "wrap_with_autocast",
    "flex_attention",
}  # fmt: skip
_ARITHMETIC = re.compile(
    r"(_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|pos|abs|index)"
    r"|math\.(ceil|floor|trunc|sqrt|log2)"
    r"|torch\.(sym_int|sym_float|sym_max|sym_min|sym_not|sym_sum|sym_ite|sym_sqrt))"
)
# Expressions are ASCII only: Python folds look-alike letters into the names that are refused here.
_SYMBOL = re.compile(r"(Symbol|Dummy)\('[A-Za-z]\w*'(, \w+=(True|False))*\)", re.ASCII)
_WORDS = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_ALLOWED_WORD = re.compile(
    r"[a-z]{1,4}\d{1,6}|oo|int_oo|True|False|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|CeilToInt|FloorToInt|"
    r"ModularIndexing|Where|LShift|RShift|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|TruncToFloat|TruncToInt|"
    r"RoundToInt|RoundDecimal|ToFloat|Identity|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Integer|Rational|floor|ceiling|"
    r"IsNonOverlappingAndDenseIndicator|Pow|Add|Mul|Abs|Float",
    re.ASCII,
)
_ALLOWED_TEXT = re.compile(r"[\w\s+\-*/%(),.<>=&|~]*", re.ASCII)
#: Keys under which a graph holds objects of the user's own classes.
_OBJECTS = ("custom_obj", "custom_obj_values", "as_custom_obj", "as_custom_objs", "as_opaque", "as_opaque_objs")
_NAME = re.compile(r"\w*")
_DOTTED = re.compile(r"[\w.]*")
#: Names of weights and modules may hold anything but what ends a string or a line of source.
_PATH = re.compile(r"[^\"'\\\x00-\x1f\x7f-\x9f\u2028\u2029]*")


@cache
def _registered() -> frozenset[str]:
    return frozenset(torch._C._dispatch_get_all_op_names())


def checked_graph(data: bytes, where: str) -> bytes:
    """The graph's JSON without guard code and traces; raises if anything in it could run code.

    Raises:
        ArtifactError: no JSON, or not an exported graph.
        UnsafeFileError: an operator, an expression, a name or an object that is not allowed.
    """
    try:
        graph = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"{where}: the graph is damaged (no JSON: {e}).") from e
    if not isinstance(graph, dict) or not isinstance(graph.get("graph_module"), dict):
        raise ArtifactError(f"{where}: the graph is not one that torch.export wrote.")
    constraints = graph.pop("range_constraints", None) or {}
    if not isinstance(constraints, dict):
        raise ArtifactError(f"{where}: the ranges of the sizes are damaged.")
    for name in constraints:
        check_expression(name, where)
    plain_(graph)
    # Guards are Python source that torch would execute; the checks they stand for are made by `Program.misfit`.
    graph["guards_code"] = []
    graph["graph_module"]["metadata"] = {}
    for key, value in _walk(graph):
        _check_text(key, value, where)
    for key, value in _walk(constraints):
        _check_text(key, value, where)
    graph["range_constraints"] = constraints
    return json.dumps(graph).encode()


def plain_graph(data: bytes) -> bytes:
    """A graph's JSON without what says nothing of its answers (traces, paths of the user's files, versions)."""
    graph = json.loads(data)
    for _ in _walk(graph):
        pass
    for key in ("torch_version", "guards_code", "opset_version", "schema_version"):
        graph.pop(key, None)
    return json.dumps(graph, sort_keys=True).encode()


def _walk(graph: Any) -> Iterator[tuple[str, str]]:
    """Every text with the key it stands under, and every key under "". Takes the metadata of nodes out on its way."""
    stack: list[tuple[str, Any]] = [("", graph)]
    while stack:
        key, item = stack.pop()
        if isinstance(item, str):
            yield key, item
        elif isinstance(item, list):
            stack.extend((key, child) for child in item)
        elif isinstance(item, dict):
            if key == "nodes" and isinstance(item.get("metadata"), dict):
                item["metadata"] = {k: v for k, v in item["metadata"].items() if k == "nn_module_stack"}
            for name, child in item.items():
                yield "", name
                stack.append((name, "custom object") if name in _OBJECTS and child else (name, child))


def _check_text(key: str, value: str, where: str) -> None:
    check = _CHECKS.get(key)
    if check is not None:
        check(value, where)
    elif not (_NAME if key else _DOTTED).fullmatch(value):
        raise UnsafeFileError(f"{where}: {value[:80]!r} stands where a plain name must. The file was not opened.")


def _check_path(text: str, where: str) -> None:
    if not _PATH.fullmatch(text):
        raise UnsafeFileError(f"{where}: {text[:80]!r} is no name of a weight or module. The file was not opened.")


def _check_line(text: str, where: str) -> None:
    if not text.isprintable():
        raise UnsafeFileError(f"{where}: {text[:80]!r} is no path of modules. The file was not opened.")


def _refuse_object(text: str, where: str) -> None:
    raise UnsafeFileError(f"{where}: the graph holds a {text}; such files are not opened.")


def _check_operator(target: str, where: str) -> None:
    if _ARITHMETIC.fullmatch(target):
        return
    match = re.fullmatch(r"torch\.ops\.(\w+)\.(\w+)(?:\.(\w+))?", target)
    if match:
        namespace, name, overload = match.groups()
        if namespace == "higher_order":
            if name in _HIGHER_ORDER and overload is None:
                return
        elif overload is not None:
            full = f"{namespace}::{name}"
            exact = full if overload == "default" else f"{full}.{overload}"
            if exact not in _registered():
                _registered.cache_clear()  # a custom operator may have come since
            if exact not in _registered():
                raise UnsafeFileError(
                    f"{where}: the graph calls {target!r}, which is no operator registered here. If it is a custom "
                    "operator, load its library first (deepseek_r1.ops.register_custom_op); otherwise do not trust it."
                )
            harmless = namespace in _COMPUTING or not _takes_text(full, "" if overload == "default" else overload)
            if harmless and full not in _REFUSED_OPS and namespace not in _REFUSED_SPACES:
                return
    raise UnsafeFileError(f"{where}: the graph calls {target!r}, which is not an allowed operator. It was not opened.")


def _takes_text(name: str, overload: str) -> bool:
    """Whether an operator has a text argument: outside torch's own arithmetic that is likely the name of a file."""
    return any("str" in str(a.type) for a in torch._C._get_schema(name, overload).arguments)


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


def check_tree(text: Any, where: str, *, of_inputs: bool = False) -> None:
    """Raise UnsafeFileError if a description of nested values could import a module or run code.

    Args:
        of_inputs: whether it describes a model's (positional, keyword) inputs; torch writes the names of the latter
            into source.
    """
    try:
        root = json.loads(text)[1]
        nodes = [root]
        while nodes:
            _check_nest(nodes[-1], where)
            nodes.extend(nodes.pop()["children_spec"])
        for keywords in root["children_spec"][1:] if of_inputs else []:
            _check_names(_context(keywords), where)
    except UnsafeFileError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as e:
        raise ArtifactError(f"{where}: a description of nested inputs is damaged: {type(e).__name__}: {e}") from e


def _check_nest(node: Any, where: str) -> None:
    """Raise unless the type of one nest is a plain one, or one that this process registered."""
    kind = node["type"]
    if kind is None and node["context"] is None:
        return
    # A defaultdict names a factory to import, and torch imports the class of an enumeration out of any JSON object.
    known = kind in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE and kind != "collections.defaultdict"
    context = _context(node) if known and kind != "collections.namedtuple" else None
    if not known or any(isinstance(v, dict | list) for v in (context if isinstance(context, list) else [context])):
        raise UnsafeFileError(f"{where}: nested inputs of type {kind!r} are not opened.")


def _context(node: Any) -> Any:
    context = node["context"]
    return json.loads(context) if isinstance(context, str) else context


def _check_names(context: Any, where: str) -> None:
    for name in context if isinstance(context, list) else []:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UnsafeFileError(f"{where}: {str(name)[:80]!r} is no name of an input. The file was not opened.")


def _free(text: str, where: str) -> None:
    """Text that torch neither reads nor writes into source unquoted."""


#: How the text under a key is checked; under any other key it must be a plain name.
_CHECKS: dict[str, Callable[[str, str], None]] = {
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": check_expression,
    "in_spec": lambda text, where: check_tree(text, where, of_inputs=True),
    "out_spec": check_tree,
    "as_string": _free,
    "as_strings": _free,
    "torch_version": _free,
    "nn_module_stack": _check_line,
    **dict.fromkeys(_OBJECTS, _refuse_object),
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "user_input_name", "fqn"), _check_path),
}

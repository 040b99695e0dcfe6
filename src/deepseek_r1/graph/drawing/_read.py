"""From a captured graph to nodes: what is drawn, what is left out, where it comes from. Measures nothing."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree

from ..program import Program
from ._model import Node, Scope, Shape, Tensor

_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)$')
_TORCH, _OWN = torch.__path__[0] + os.sep, str(Path(__file__).parents[2]) + os.sep
#: Values with these names are there for torch itself.
_CHECKS = ("_assert", "sym_constrain", "_guards_fn")


@dataclass
class Reading:
    """What was read: nodes in program order, and what was left out."""

    nodes: list[Node] = field(default_factory=list)
    sizes: int = 0
    rename: Callable[[str], str] = str


def read(program: Program, module: fx.GraphModule, rename: Callable[[str], str] = str) -> Reading:
    """The nodes of a program's graph.

    Args:
        module: the graph as it is going to be measured.
        rename: from torch's name of a dynamic size to the one to be shown.
    """
    reading = Reading(rename=rename)
    bound: dict[fx.Node, tuple[str, ...]] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            outputs = _tensors(node, rename)
            bound[node] = (node.name,) if outputs else ()
            if outputs:
                reading.nodes.append(Node(id=node.name, kind="input", label=_plain(node.target), outputs=outputs))
    results = _Walk(reading, module, "", ()).run(bound)
    reading.nodes += _outputs(program, results, reading)
    return reading


@dataclass
class _Walk:
    """Reads one graph; a branch of control flow is another one, inside."""

    reading: Reading
    module: fx.GraphModule
    prefix: str
    scopes: tuple[Scope, ...]

    def run(self, sources: dict[fx.Node, tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Read all operators. `sources`: the drawn nodes behind each value; gives those behind each result."""
        scopes = self.scopes
        for node in self.module.graph.nodes:
            if node.op == "output":
                leaves = pytree.tree_leaves(node.args[0], is_leaf=lambda v: v is None)
                return [sources.get(v, ()) if isinstance(v, fx.Node) else () for v in leaves]
            if node.op not in ("call_function", "call_method", "call_module"):
                continue
            behind = tuple(dict.fromkeys(s for n in node.all_input_nodes for s in sources.get(n, ())))
            if _is_number(node) or node.target is operator.getitem:
                # A size is known without the tensor's values, so nothing flows along it.
                sources[node] = () if str(node.target).startswith("aten.sym_") else behind
                self.reading.sizes += node.target is not operator.getitem
                continue
            # A node that torch made for itself has no module: it stays where its neighbours are.
            scopes = self.scopes + _scopes(node, self.prefix) if _has_modules(node) else scopes
            sources[node] = (self._operator(node, behind, scopes, sources),)
        return []

    def _operator(self, node: fx.Node, behind: Any, scopes: tuple[Scope, ...], sources: Any) -> str:
        ident = self.prefix + node.name
        title, overload = _name(node)
        branches = [n for n in node.all_input_nodes if isinstance(self._value(n), fx.GraphModule)]
        if branches:
            scopes += (Scope(key=ident, path=title, type="control flow", kind="control"),)
            behind += tuple(s for branch in branches for s in self._branch(node, branch, scopes, sources))
        file, code = source_line(node.meta.get("stack_trace") or "")
        drawn = Node(
            id=ident,
            kind="operator",
            label=title,
            operator=overload,
            module=next((s.path for s in reversed(scopes) if s.kind == "module"), ""),
            scopes=scopes,
            inputs=tuple(dict.fromkeys(behind)),
            outputs=_tensors(node, self.reading.rename),
            attributes=tuple(_attributes(node)),
            weights=tuple(self._weights(node)),
            source=file,
            code=code,
        )
        self.reading.nodes.append(drawn)
        return ident

    def _branch(self, node: fx.Node, branch: fx.Node, scopes: tuple[Scope, ...], sources: Any) -> tuple[str, ...]:
        """Read the graph of one branch; the drawn nodes behind its results."""
        inner = self._value(branch)
        prefix = f"{self.prefix}{branch.target}/"
        if any(n.id.startswith(prefix) for n in self.reading.nodes):
            return ()  # two operators share the graph: it is drawn once
        takes = [n for n in inner.graph.nodes if n.op == "placeholder"]
        last = max(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        given = [v for v in pytree.tree_leaves(node.args[last + 1 :])]
        fits = len(given) == len(takes)
        bound = {t: sources.get(v, ()) for t, v in zip(takes, given) if isinstance(v, fx.Node)} if fits else {}
        title = re.sub(r"_?graph_\d+$|_\d+$", "", str(branch.target)).removeprefix(f"{_name(node)[0]}_")
        scope = Scope(key=prefix, path=title or str(branch.target), type="branch", kind="branch")
        results = _Walk(self.reading, inner, prefix, (*scopes, scope)).run(bound)
        return tuple(s for result in results for s in result)

    def _value(self, node: fx.Node) -> Any:
        if node.op != "get_attr":
            return None
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        return value

    def _weights(self, node: fx.Node) -> Iterator[str]:
        for n in node.all_input_nodes:
            value = self._value(n)
            if isinstance(value, torch.Tensor):
                yield f"{n.target} {list(value.shape)} {_dtype(value.dtype)}"


def _has_modules(node: fx.Node) -> bool:
    return any(not key.startswith("_empty") for key in node.meta.get("nn_module_stack") or ())


def _scopes(node: fx.Node, prefix: str) -> tuple[Scope, ...]:
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(
        Scope(key=f"{prefix}{key}", path=str(path), type=_type(kind))
        for key, (path, kind) in stack.items()
        if path and not key.startswith("_empty")
    )


def _type(kind: Any) -> str:
    return (kind if isinstance(kind, str) else getattr(kind, "__qualname__", str(kind))).rpartition(".")[2]


def _name(node: fx.Node) -> tuple[str, str]:
    """("linear", "aten.linear.default")."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._overloadpacket.__name__, str(target)
    full = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return str(full), str(full)


def _is_number(node: fx.Node) -> bool:
    """Whether a node only computes with sizes, or checks them."""
    name = str(getattr(node.target, "__name__", node.target))
    if name.startswith(_CHECKS):
        return True
    value = node.meta.get("val")
    if "item" in name or "_local_scalar_dense" in name or value is None:
        return False
    return not any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value))


def _tensors(node: fx.Node, rename: Callable[[str], str]) -> tuple[Tensor, ...]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return tuple(Tensor(shape=_shape(v, rename), dtype=_dtype(v.dtype)) for v in leaves if isinstance(v, torch.Tensor))


def _shape(value: torch.Tensor, rename: Callable[[str], str]) -> Shape:
    return tuple(int(str(d)) if str(d).isdigit() else rename(str(d)) for d in value.shape)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(target: Any) -> str:
    return str(target).lstrip("*")


def _attributes(node: fx.Node) -> Iterator[str]:
    """Arguments that are no tensors, by name."""
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    given = [*zip(names, node.args), *node.kwargs.items()] if names else [*node.kwargs.items()]
    for name, value in given:
        if value is not None and not any(isinstance(v, fx.Node) for v in pytree.tree_leaves(value)):
            yield f"{name}={_dtype(value) if isinstance(value, torch.dtype) else value!r}"[:120]


def source_line(trace: str) -> tuple[str, str]:
    """("file:line", code) of the user's innermost line in a stack trace that torch recorded; "" where there is none.

    Code of this package's own models counts where nobody else's is on the way.

    Example:
        >>> source_line('File "/home/me/net.py", line 7, in forward\\n    return self.fc(x)\\n')
        ('/home/me/net.py:7', 'return self.fc(x)')
    """
    found: list[tuple[str, str, str]] = []
    lines = trace.splitlines()
    for number, line in enumerate(lines):
        match = _FRAME.match(line)
        if match:
            code = lines[number + 1].strip() if number + 1 < len(lines) else ""
            found.append((match["file"], match["line"], code))
    real = [f for f in found if not f[0].startswith(("<", _TORCH))]
    frames = [f for f in real if not f[0].startswith(_OWN)] or real
    if not frames:
        return "", ""
    file, line, code = frames[-1]
    return f"{file}:{line}", code


def _outputs(program: Program, results: list[tuple[str, ...]], reading: Reading) -> Iterator[Node]:
    """One node for each tensor that the model gives, named by its place in the result."""
    spec = program.exported.call_spec.out_spec
    paths = [""] * len(results)
    if spec is not None and spec.num_leaves == len(results):
        tree = pytree.tree_unflatten(list(range(len(results))), spec)
        paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    leaves = next(n for n in program.exported.graph.nodes if n.op == "output").args[0]
    values = list(leaves)[-len(results) :] if results else []
    for number, (behind, path, value) in enumerate(zip(results, paths, values)):
        tensors = _tensors(value, reading.rename) if isinstance(value, fx.Node) else ()
        if behind and tensors:
            name = path if len(paths) > 1 else ""
            yield Node(
                id=f"output/{number}",
                kind="output",
                label=f"output{name}",
                inputs=behind,
                outputs=tensors,
            )


def measured(
    nodes: list[Node], shapes: dict[str, list[tuple[int, ...]]], costs: dict[str, dict[str, Any]]
) -> list[Node]:
    """The nodes with what a run told about them."""
    filled = []
    for node in nodes:
        sizes = shapes.get(node.id, [])
        fits = len(sizes) == len(node.outputs)
        outputs = tuple(replace(t, measured=s) for t, s in zip(node.outputs, sizes)) if fits else node.outputs
        filled.append(replace(node, outputs=outputs, **costs.get(node.id, {})))
    return filled

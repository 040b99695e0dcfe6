"""Editing the graph of a Program: the few verbs that passes and quantisers share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.passes import move_to_device_pass
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ._capture import torch_export
from .program import Program


def rewrite(program: Program, change: Callable[[GraphModule], Any], **fields: Any) -> Program:
    """A new Program whose graph is a copy of this one's after `change`; weights that were not replaced are shared.

    Args:
        change: edits the GraphModule it is given, in place. If it returns 0, nothing was changed and `program`
            itself comes back.
        fields: other fields of the new Program (precision, parent, report).
    """
    module = graph_of(program)
    if change(module) == 0:
        return program
    return adopt(program, module, **fields)


def graph_of(program: Program) -> GraphModule:
    """A fresh copy of the program's graph to edit or run, on the program's own weights."""
    module: GraphModule = program.exported.module(check_guards=False)  # type: ignore[assignment]
    return module


def adopt(program: Program, module: GraphModule, **fields: Any) -> Program:
    """A new Program with a graph that started as `graph_of` this one and was edited."""
    module.graph.eliminate_dead_code()
    module.graph.lint()
    _drop_unused(module)
    module.recompile()
    args, kwargs = program.example_inputs
    with torch.no_grad():
        exported = torch_export(module, args, kwargs, program.dynamic_shapes())
    return replace(program, exported=exported, **fields)


def _drop_unused(module: GraphModule) -> None:
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    stores = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, _ in stores:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)


def on_device(program: Program, device: str) -> Program:
    """The program with its weights, example inputs and the devices named in its graph on `device`."""
    tensors = [v for v in program.exported.state_dict.values() if isinstance(v, torch.Tensor)]
    tensors += [v for v in pytree.tree_leaves(program.example_inputs) if isinstance(v, torch.Tensor)]
    if all(t.device == torch.device(device) for t in tensors):
        return program
    exported = move_to_device_pass(program.exported, device)
    moved = pytree.tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, program.example_inputs)
    return replace(program, exported=exported, example_inputs=moved)


def constant_of(module: GraphModule, node: Any) -> torch.Tensor | None:
    """The tensor behind a `get_attr` node, else None."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, torch.Tensor) else None


def constant_value(module: GraphModule, node: Any) -> torch.Tensor | None:
    """The tensor that a node gives if it depends on constants only, worked out; else None."""
    if not isinstance(node, Node) or node.op == "get_attr":
        return constant_of(module, node)
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    sources = {source: constant_value(module, source) for source in node.all_input_nodes}
    if any(tensor is None for tensor in sources.values()):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: sources[n])
    with torch.no_grad():
        result: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def add_constant(module: GraphModule, like: Node, tensor: torch.Tensor, name: str) -> Node:
    """A `get_attr` node before `like` for a new buffer; `name` is made unique."""
    unique, number = name, 0
    while hasattr(module, unique):
        number += 1
        unique = f"{name}_{number}"
    module.register_buffer(unique, tensor)
    with module.graph.inserting_before(like):
        node = module.graph.get_attr(unique)
    if (mode := _fake_mode(module.graph)) is not None:
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    return node


def add_call(before: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
    """A call before a node, said to come from the same line, with the shape and dtype of its result worked out.

    Raises:
        Exception: whatever the operator raises for inputs of these shapes; nothing was inserted then.
    """
    values = map_arg((args, kwargs or {}), lambda node: node.meta["val"])
    with _fake_mode(before.graph) or contextlib.nullcontext(), enable_python_dispatcher():
        value = target(*values[0], **values[1])
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    node.meta.update({key: before.meta[key] for key in ("nn_module_stack", "stack_trace") if key in before.meta})
    node.meta["val"] = value
    return node


@contextlib.contextmanager
def sizes_held(module: GraphModule) -> Iterator[None]:
    """Inside, nobody can fix a dynamic size by asking a symbol for its value.

    The shapes of a graph belong to the program that it came from too, which would be fixed with it.
    """
    mode = _fake_mode(module.graph)
    environment = getattr(mode, "shape_env", None)
    with environment.suppress_guards() if environment is not None else contextlib.nullcontext():
        yield


def _fake_mode(graph: Graph) -> FakeTensorMode | None:
    values = (v for node in graph.nodes for v in pytree.tree_leaves(node.meta.get("val")))
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


def argument(node: Node, index: int, default: Any = None) -> Any:
    """An argument of a node by its place in the operator's schema; else `default`, or the operator's own default."""
    if len(node.args) > index:
        return node.args[index]
    schema = getattr(node.target, "_schema", None)
    if schema is not None and index < len(schema.arguments):
        spec = schema.arguments[index]
        if spec.name in node.kwargs:
            return node.kwargs[spec.name]
        if default is None and spec.has_default_value():
            return spec.default_value
    return default


def own_weights(module: GraphModule) -> None:
    """Give the graph copies of all its weights; names of one tied weight stay tied."""
    copies: dict[int, torch.Tensor] = {}
    for part in module.modules():
        stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in copies:
                    copy = tensor.detach().clone()
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    copies[id(tensor)] = torch.nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
                store[name] = copies[id(tensor)]

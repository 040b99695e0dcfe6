"""Editing the graph of a Program: the few verbs that passes and quantisers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ._capture import torch_export
from .program import Program


def rewrite(program: Program, change: Callable[[GraphModule], Any], **fields: Any) -> Program:
    """A new Program whose graph is a copy of this one's after `change`; weights that were not replaced are shared.

    Args:
        change: edits the GraphModule it is given, in place. If it returns 0, nothing was changed and `program`
            itself comes back.
        fields: other fields of the new Program (precision, parent, report).
    """
    module: GraphModule = program.exported.module(check_guards=False)  # type: ignore[assignment]
    if change(module) == 0:
        return program
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


def constant_of(module: GraphModule, node: Any) -> torch.Tensor | None:
    """The tensor behind a `get_attr` node, else None."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, torch.Tensor) else None


def add_constant(module: GraphModule, like: Node, tensor: torch.Tensor, name: str) -> Node:
    """A `get_attr` node before `like` for a new buffer; `name` is made unique."""
    unique, number = name, 0
    while hasattr(module, unique):
        number += 1
        unique = f"{name}_{number}"
    module.register_buffer(unique, tensor)
    with module.graph.inserting_before(like):
        return module.graph.get_attr(unique)


def argument(node: Node, index: int, default: Any = None) -> Any:
    """A positional argument of a node, or the operator's default."""
    return node.args[index] if len(node.args) > index else default


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

"""Reasons for which several engines refuse a program, and the fallback they share. Each function says why, or ""."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Node

from ..graph import Program
from ._eager import eager_runner
from .base import Runner


def changes_state(program: Program) -> str:
    """Why a program that writes into its buffers or inputs cannot be compiled to files: the files have no access."""
    signature = program.exported.graph_signature
    changed = {_origin(n.args[0]).name for n in program.exported.graph.nodes if _writes(n) and n.args}
    buffers = sorted(signature.inputs_to_buffers[name] for name in changed & set(signature.inputs_to_buffers))
    buffers += sorted({*signature.buffers_to_mutate.values()} - set(buffers))
    if buffers:
        return f"it changes its buffers {buffers}, and the compiled copy would have its own"
    inputs = sorted(changed & set(program.input_names()))
    return f"it changes its inputs {inputs} in place" if inputs else ""


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _origin(node: Any) -> Node:
    """The node whose memory a node's result is in."""
    assert isinstance(node, Node), "what is written to is a tensor of the graph"
    schema = getattr(node.target, "_schema", None)
    aliases = schema is not None and bool(schema.returns) and schema.returns[0].alias_info is not None
    return _origin(node.args[0]) if aliases and isinstance(node.args[0], Node) else node


_RECURRENT = ("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")


def unrolls(program: Program) -> str:
    """Why a compiler that writes recurrent layers out step by step cannot take a program of any length."""
    for node in program.exported.graph.nodes:
        if str(node.target) not in _RECURRENT:
            continue
        first, batch_first = node.args[0], node.args[-1]
        if not isinstance(first.meta["val"].shape[1 if batch_first else 0], int):
            return f"{node.name} runs over a length that varies; this engine would fix it at the example's"
    return ""


def devices(program: Program) -> set[str]:
    """Kinds of device ("cpu", "cuda") that the program's weights and inputs are on; "cpu" if it has neither."""
    return {t.device.type for t in tensors_of(program)} or {"cpu"}


def tensors_of(program: Program) -> Iterator[torch.Tensor]:
    """The program's weights, buffers, constants and example inputs."""
    yield from stored_tensors(program)
    yield from (v for v in pytree.tree_leaves(program.example_inputs) if isinstance(v, torch.Tensor))


def stored_tensors(program: Program) -> Iterator[torch.Tensor]:
    """The program's weights, buffers and constants."""
    stores = {**program.exported.constants, **program.exported.state_dict}
    return (v for v in stores.values() if isinstance(v, torch.Tensor))


def not_on_the_cpu(program: Program) -> str:
    """Why an engine of the CPU cannot take the program."""
    others = sorted(devices(program) - {"cpu"})
    return f"its tensors are on {', '.join(others)}; this engine runs on the CPU" if others else ""


def eager_where(outside: Callable[[Sequence[Any]], bool], runner: Runner, program: Callable[[], Program]) -> Runner:
    """The runner, and the program run by PyTorch for the inputs that the runner cannot take."""
    eager = cache(lambda: eager_runner(program()))

    def run(leaves: Sequence[Any]) -> list[torch.Tensor]:
        return eager()(leaves) if outside(leaves) else runner(leaves)

    return run


def is_empty(leaves: Sequence[Any]) -> bool:
    """Whether a tensor among the inputs has no elements."""
    return any(isinstance(v, torch.Tensor) and v.numel() == 0 for v in leaves)

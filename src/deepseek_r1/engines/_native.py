"""This package's own kernels as an engine: quantised linear layers are one operator each, PyTorch runs the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from ..core import QUANTISED, PluginError
from ..graph import Program, rewrite
from ..ops import NAMESPACE, BoundOp, native_missing, native_problem
from ._native_layers import native_layers, use_native_layers
from ._refusals import changes_state, not_on_the_cpu
from .base import Engine, Runner

_MODEL = "model.dr1"


class NativeEngine(Engine):
    """Runs the graph with its dynamic int8 and 4-bit linear layers on kernels of this package, weights packed once.

    The kernels are compiled for this machine at their first use, and kept.
    """

    name = "native"
    keeps_groups = True

    def unavailable(self) -> str:
        """Needs a C++ compiler."""
        return native_missing()

    def unsupported(self, program: Program) -> str:
        """Quantised programs on the CPU that have at least one layer for its kernels."""
        if program.precision not in QUANTISED:
            return f"it has kernels for quantised layers only, and the program is {program.precision}"
        if reason := not_on_the_cpu(program) or changes_state(program):
            return reason
        if native_layers(program):
            return ""
        return (
            "it has kernels for linear layers with int8 or 4-bit weights and dynamic int8 activations (int8-dynamic, "
            "int4-dynamic), and the program has none"
        )

    def build(self, program: Program, folder: Path, precision: str) -> None:
        """Pack the weights and write the graph that reads them so."""
        _need_kernels()
        retarget(program).save(folder / _MODEL, with_parent=False)

    def open(self, folder: Path, program: Callable[[], Program]) -> Runner:
        """Read the graph back."""
        _need_kernels()
        return flat_runner(Program.load(folder / _MODEL))

    def integer_kernels(self, folder: Path) -> int:
        """How many layers are operators of this package."""
        _need_kernels()
        nodes = Program.load(folder / _MODEL).exported.graph.nodes
        return sum(getattr(node.target, "namespace", "") == NAMESPACE for node in nodes)


def retarget(program: Program) -> Program:
    """The program with each layer that there are kernels for, and its activation function, as one operator."""
    return rewrite(program, use_native_layers, parent=None)


def _need_kernels() -> None:
    if problem := native_problem():
        raise PluginError(f"the engine 'native' has no kernels here: {problem}")


def flat_runner(program: Program) -> Runner:
    """The program's operators on flat inputs, without the checks and the nesting of a call of the program."""
    exported = program.exported
    stores = {**exported.constants, **exported.state_dict}
    inputs = [spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    stored = {
        str(getattr(spec.arg, "name", "")): stores[str(spec.target)]
        for spec in exported.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT
    }
    module = copy.copy(exported.graph_module)
    module.graph = copy.deepcopy(exported.graph_module.graph)
    _bind(module, stored)
    # A place for each argument: what is stored, or None for the next of the inputs.
    places = [stored.get(node.name) for node in module.graph.nodes if node.op == "placeholder"]
    assert sum(place is None for place in places) == len(inputs), "what is no input is stored"
    call = module.forward

    def run(leaves: Sequence[Any]) -> list[torch.Tensor]:
        given = iter(leaves)
        with torch.no_grad():
            outputs = call(*(next(given) if place is None else place for place in places))
        return [v for v in outputs if isinstance(v, torch.Tensor)]

    return run


def _bind(module: GraphModule, stored: dict[str, torch.Tensor]) -> None:
    """Changes the graph: its native operators get their weights once instead of at each call."""
    for node in module.graph.nodes:
        if getattr(node.target, "namespace", "") != NAMESPACE:
            continue
        source, *rest = node.args
        tensors = [stored[v.name] for v in rest if isinstance(v, Node)]
        given = [v for v in rest if not isinstance(v, Node)]
        schema = node.target._schema
        defaults = [a.default_value for a in schema.arguments[len(node.args) :]]
        name = f"bound_{node.name}"
        module.add_submodule(name, BoundOp(schema.name.split("::")[1], tensors, [*given, *defaults]))
        node.op, node.target, node.args = "call_module", name, (source,)
    module.recompile()

"""`trace`: a module or a Program and inputs in, a Drawing with what each operator costs out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

from ...core import ConfigError, InputError
from .._capture import as_inputs, capture_as_is, evaluation
from ..program import Program
from ..quiet import quiet_torch
from ._drawing import Drawing
from ._model import Node
from ._read import measured, read
from ._timing import measure

_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def trace(
    model: torch.nn.Module | Program,
    inputs: Any = None,
    *,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None,
    rounds: int = 9,
    max_seconds: float = 1.0,
    name: str | None = None,
) -> Drawing:
    """Capture a model, run it operator by operator, and give the graph as an object that draws itself.

    Each operator's time is the median over the rounds, of the eager operator: engines fuse operators, so the same
    graph on an engine spends its time elsewhere. The model and its buffers are left as they were. Nobody computes with
    a drawing, so its graph is not compared with the module; `trace(capture(model, inputs))` draws one that was.

    Args:
        model: a module, or a Program.
        inputs: a tensor, a tuple of positional inputs, or a mapping of keyword inputs; costs are those of these
            inputs. May be left out for a Program, which has its example inputs.
        dynamic_shapes: which dimensions vary, and under which names, as for `capture`.
        rounds: how often every operator is timed.
        max_seconds: no further round begins after this time, though three are always run.
        name: of the drawing; by default the class's name.

    Raises:
        InputError: the inputs do not fit the model.
        CaptureError: the module cannot be a static graph; the message names the line and the way out.
        ConfigError: fewer than three rounds.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        >>> drawing = trace(net, torch.ones(1, 64))
        >>> print(drawing.nodes[1].label, drawing.nodes[1].outputs[0].shape, drawing.nodes[1].flops)
        linear ('batch', 32) 4096
        >>> int(drawing.total("flops"))
        4768
    """
    if not isinstance(rounds, int) or rounds < 3:
        raise ConfigError(f"trace(rounds={rounds!r}): a median needs a whole number of rounds, 3 or more.")
    program, args, kwargs, notes = _captured(model, inputs, dynamic_shapes, name)
    leaves = pytree.tree_leaves((args, kwargs))
    names = _size_names(program, dynamic_shapes or {})
    with quiet_torch():
        module: Any = program.exported.module(check_guards=False)
    reading = read(program, module, lambda text: _SYMBOL.sub(lambda m: names.get(m[0], m[0]), text))
    found = measure(module, leaves, rounds=rounds, max_seconds=max_seconds)
    nodes = measured(reading.nodes, found.shapes, {n.id: found.of(n.id) for n in reading.nodes})
    nodes = _with_input_shapes(nodes, dict(zip(program.input_names(), leaves)))
    if reading.sizes:
        notes.append(f"not drawn, because they only compute with sizes: {reading.sizes}")
    if skipped := sum(n.kind == "operator" and not n.calls for n in nodes):
        notes.append(f"without costs, because these inputs do not take their branch: {skipped} operators")
    if unknown := sorted({n.operator for n in nodes if n.calls and n.flops is None}):
        notes.append(f"FLOPs unknown: {', '.join(unknown)}")
    title = name or program.name
    type_ = title if isinstance(model, Program) else type(model).__name__
    facts = _facts(len(found.seconds), leaves)
    sizes = _meanings(program, names, leaves)
    return Drawing(name=title, type=type_, nodes=tuple(nodes), sizes=sizes, facts=facts, notes=tuple(notes))


def _captured(
    model: Any, inputs: Any, dynamic_shapes: Any, name: str | None
) -> tuple[Program, tuple[Any, ...], dict[str, Any], list[str]]:
    """The program, the inputs to run it on, and what is to be said about them."""
    if isinstance(model, Program):
        args, kwargs = model.example_inputs if inputs is None else as_inputs(inputs)
        if misfit := model.misfit(args, kwargs):
            raise InputError(misfit)
        return model, args, kwargs, []
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"trace needs a torch.nn.Module or a Program, given {type(model).__name__}.")
    if inputs is None:
        raise InputError(f"trace({type(model).__name__}) needs inputs: a tensor, a tuple, or a dict of keyword inputs.")
    args, kwargs = as_inputs(inputs)
    with evaluation(model):
        program = capture_as_is(model, args, kwargs, dynamic_shapes=dynamic_shapes, name=name, verify=False)
    notes = [f"{what}: {why}" for what, why in program.report.skipped]
    if program.misfit(args, kwargs):
        # A batch of 1 is doubled for the capture, and this model then keeps to 2.
        args, kwargs = program.example_inputs
        notes.append("measured with a batch of 2, because the captured graph holds for nothing else")
    return program, args, kwargs, notes


def _places(program: Program) -> dict[str, tuple[int, int]]:
    """(input, axis) where each dynamic size is first seen."""
    found: dict[str, tuple[int, int]] = {}
    for number, shape in enumerate(program.input_shapes()):
        for axis, size in enumerate(shape):
            if isinstance(size, str) and _SYMBOL.fullmatch(size):
                found.setdefault(size, (number, axis))
    return found


def _size_names(program: Program, wanted: Mapping[str, Mapping[int, Any]]) -> dict[str, str]:
    """From torch's names of sizes ("s72") to those the user gave, or "batch" for dimension 0 of the first input."""
    labels = program.input_names()
    names: dict[str, str] = {}
    for symbol, (number, axis) in _places(program).items():
        given = (wanted.get(labels[number]) or {}).get(axis)
        if given is not None and not isinstance(given, type(torch.export.Dim.AUTO)):
            names[symbol] = str(getattr(given, "__name__", given))
        elif axis == 0 and "batch" not in names.values():
            names[symbol] = "batch"
    return names


def _meanings(program: Program, names: Mapping[str, str], leaves: list[Any]) -> dict[str, str]:
    labels = program.input_names()
    return {
        names.get(symbol, symbol): f"dimension {axis} of {labels[i]}, {leaves[i].shape[axis]} in this run"
        for symbol, (i, axis) in _places(program).items()
    }


def _with_input_shapes(nodes: list[Node], values: Mapping[str, Any]) -> list[Node]:
    shapes = {name: [tuple(v.shape)] for name, v in values.items() if isinstance(v, torch.Tensor)}
    shapes |= {n.id: [t.measured for t in n.outputs if t.measured is not None] for n in nodes if n.kind == "operator"}
    for node in nodes:
        # An output shows what its operator gave, where that gives one tensor.
        if node.kind == "output" and len(node.inputs) == 1 and len(shapes.get(node.inputs[0], [])) == 1:
            shapes[node.id] = shapes[node.inputs[0]]
    return measured(nodes, {n.id: shapes[n.id] for n in nodes if n.id in shapes}, {})


def _facts(rounds: int, leaves: list[Any]) -> dict[str, Any]:
    devices = sorted({str(v.device) for v in leaves if isinstance(v, torch.Tensor)})
    threads = torch.get_num_threads()
    where = ", ".join(devices) or "cpu"
    hands = f"{threads} thread{'s' * (threads != 1)}"
    return {
        "how": f"eager operators, median of {rounds} rounds, {where}, {hands}, torch {torch.__version__}",
        "rounds": rounds,
        "device": where,
        "threads": threads,
        "torch": torch.__version__,
    }

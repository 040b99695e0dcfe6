"""`capture`: a module and example inputs in, a Program out; a failure names the user's own line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..core import CaptureError, InputError, Report
from ._dimensions import automatic, batch_of, by_label, doubled, named, spelled_out
from ._explain import explain, where
from ._foreign_nests import register
from ._origin import conditions_of, fixing_lines
from ._recurrent import recurrent_shapes
from ._state import own_randomness, preserved
from ._tracing import line_by_line
from ._verify import verified
from .program import Program
from .quiet import quiet_torch

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def capture(
    model: torch.nn.Module,
    example_inputs: Any,
    *,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None,
    name: str | None = None,
    train: bool = False,
) -> Program:
    """Capture a module as a static graph.

    By default every size varies that the model does not fix itself: the batch (dimension 0) and lengths. Images (four
    dimensions, floating point) keep theirs but the batch. Examples with a batch of 1 are doubled first, because torch
    would otherwise fix the size. Where the model fixes a size, the report says so. The graph's answers are compared
    with the module's, at a batch and a length of 1 too. Buffers, attributes and training flags are left as they were.

    Args:
        model: the module. The program shares its weights; buffers that forward changes are changed by the program too.
        example_inputs: a tensor, a tuple of positional inputs, or a mapping of keyword inputs.
        dynamic_shapes: which dimensions vary, by argument name: `{"ids": {0: "batch", 1: "sequence"}}`. Arguments
            left out are fixed.
        name: name of the program; by default the class's name.
        train: capture the training graph, with each part's training flag as it is now, instead of the evaluation
            graph. Gradients flow through either.

    Raises:
        InputError: the example inputs do not fit the module.
        CaptureError: the module cannot be a static graph; the message names the line and the way out.

    Example:
        >>> program = capture(torch.nn.Linear(4, 2), torch.randn(1, 4))
        >>> [program(torch.randn(n, 4)).shape[0] for n in (0, 1, 5)]
        [0, 1, 5]
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"capture needs a torch.nn.Module, given {type(model).__name__}.")
    args, kwargs = as_inputs(example_inputs)
    with contextlib.nullcontext() if train else evaluation(model):
        return capture_as_is(model, args, kwargs, dynamic_shapes=dynamic_shapes, name=name, grad=train)


def capture_as_is(
    model: torch.nn.Module,
    args: Args,
    kwargs: Kwargs,
    *,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None,
    name: str | None = None,
    grad: bool = False,
    stateless: bool = False,
    verify: bool = True,
) -> Program:
    """As `capture`, with the training flags as they are.

    Args:
        grad: whether gradients are wanted when the graph runs.
        verify: compare the graph with the module; not for a module that computes only while it is captured.
        stateless: raise if forward sets attributes, which the graph does not; otherwise the report says so.
    """
    if not any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves((args, kwargs))):
        raise InputError("capture needs at least one example input that is a tensor, given none.")
    if batch_of(args, kwargs) == 0:
        raise InputError("the example inputs have an empty batch, which torch would fix; give a batch of 1 or more.")
    register()
    title = name or type(model).__name__
    report = Report(f"capture {title}")
    with (
        line_by_line(),
        spelled_out(model, kwargs),
        preserved(model),
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
    ):
        examples: tuple[Args, Kwargs] = pytree.tree_map(_own, (args, kwargs))
        changed = _run_eagerly(model, *examples, grad=grad)
        if dynamic_shapes is None:
            examples = _enlarged(model, *examples, grad=grad)
        program = _captured(model, *examples, dynamic_shapes, title, report)
        if verify:
            program = verified(program, model, args, kwargs, grad=grad)
    if changed and stateless:
        raise CaptureError(
            f"{title}.forward sets {', '.join(changed)}, which a graph cannot do: it keeps state in buffers only. Make "
            "it one (self.register_buffer(name, tensor), changed in place), return the value, or let the class run "
            "line by line where it must: @deepseek.model(fallback=True)."
        )
    for attribute in changed:
        report.note(f"forward sets {attribute}, which is no buffer: the graph does not. register_buffer makes it state")
    report.add("operators", sum(n.op == "call_function" for n in program.exported.graph.nodes), how="nodes")
    for slot in program.signature.slots:
        report.note(f"input {slot.name}: {list(slot.shape)}")
        for axis in [axis for axis, size in enumerate(slot.shape) if size == 0]:
            report.skip("dynamic length", f"dimension {axis} of {slot.name} is 0 in the example, which torch fixes")
    buffers, inputs = program.updates()
    if buffers:
        report.note(f"running the graph updates the module's own buffers {', '.join(buffers)}")
    if inputs:
        report.note(f"running the graph changes its inputs {', '.join(inputs)} in place, as the module does")
    return program


def _captured(
    model: torch.nn.Module, args: Args, kwargs: Kwargs, wanted: Mapping[str, Any] | None, title: str, report: Report
) -> Program:
    specs = _specs(model, args, kwargs, wanted)
    exported, spec = _export(model, args, kwargs, specs, report)
    program = Program(
        exported=exported, example_inputs=(args, kwargs), name=title, report=report, precision=precision_of(exported),
        conditions=tuple(conditions_of(exported)),
    )  # fmt: skip
    fixed = _fixed(program, spec)
    if not fixed:
        return program
    if wanted is not None:
        told = [f"dimension {axis} of {name}" for name, axis, _ in fixed]
        raise CaptureError(
            f"{title}: dynamic_shapes asks for {', '.join(told)} to vary, but the model fixes the size at the "
            f"example's{fixing_lines(exported, {size for *_, size in fixed})}. Take the sizes from the inputs' shapes "
            "in the model, or leave that dimension out."
        )
    varies = {slot.name for slot in program.signature.slots if _batch_size(program) in slot.shape}
    batch = [(name, axis, size) for name, axis, size in fixed if axis == 0 and name not in varies]
    if batch:
        told = [f"dimension {axis} of {name}" for name, axis, _ in batch]
        lines = fixing_lines(exported, {size for *_, size in batch})
        report.skip("dynamic batch", f"the model fixes {', '.join(told)} at the example's size{lines}")
    # A feature size that is fixed is what everybody expects; a number of tokens is not.
    counted = {
        slot.name for slot in program.signature.slots if slot.dtype is not None and not slot.dtype.is_floating_point
    }
    if told := [f"dimension {axis} of {name} at {size}" for name, axis, size in fixed if axis and name in counted]:
        lines = fixing_lines(exported, {size for *_, size in fixed})
        report.skip("dynamic length", f"the model fixes {', '.join(told)}{lines}")
    return program


_STORED = {
    "quantized_decomposed::dequantize_per_channel": "int8",
    "quantized_decomposed::dequantize_per_channel_group": "int4",
}
_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def precision_of(exported: torch.export.ExportedProgram) -> str:
    """The narrowest type among the weights, by name; "fp32" where there are none."""
    if (quantised := quantised_precision(exported.graph)) is not None:
        return quantised
    found = [t.dtype for t in exported.state_dict.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    narrow = min(found, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)
    return _NAMES.get(narrow, "fp32")


def quantised_precision(graph: torch.fx.Graph) -> str | None:
    """What a graph that reads stored integers is called: by their bits, or "mixed"; None if it reads none."""
    names = {getattr(getattr(node.target, "_schema", None), "name", "") for node in graph.nodes}
    found = [precision for name, precision in _STORED.items() if name in names]
    return "mixed" if len(found) > 1 else next(iter(found), None)


def as_inputs(example_inputs: Any) -> tuple[Args, Kwargs]:
    """Positional and keyword inputs from what a user calls example inputs."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


@contextlib.contextmanager
def evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each part's training flag is as it was."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def _own(value: Any) -> Any:
    # A copy: the user's inputs may be changed in place, and inference tensors cannot be traced.
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _run_eagerly(model: torch.nn.Module, args: Args, kwargs: Kwargs, *, grad: bool) -> list[str]:
    """Names of attributes that the module sets; those, its buffers and the random state are left as they were.

    Raises:
        InputError: it fails.
    """
    try:
        with preserved(model) as changed, own_randomness(model), torch.set_grad_enabled(grad):
            # Nests are made anew too: a cache of transformers grows where it is.
            own_args, own_kwargs = pytree.tree_map(_own, (args, kwargs))
            model(*own_args, **own_kwargs)
        return changed
    except Exception as e:
        shapes = pytree.tree_map(lambda v: tuple(v.shape) if isinstance(v, torch.Tensor) else v, (args, kwargs))
        raise InputError(
            f"the model itself fails on the example inputs {shapes} before any capture: {type(e).__name__}: {e}"
            f"{where(e)}"
        ) from e


def _enlarged(model: torch.nn.Module, args: Args, kwargs: Kwargs, *, grad: bool) -> tuple[Args, Kwargs]:
    """The examples with a batch of 2 where theirs is 1 and the model runs with it."""
    for larger in doubled(args, kwargs):
        with contextlib.suppress(InputError):
            _run_eagerly(model, *larger, grad=grad)
            return larger
    return args, kwargs


def _specs(model: torch.nn.Module, args: Args, kwargs: Kwargs, wanted: Mapping[str, Any] | None) -> list[Any]:
    """What may vary, nested as (positional, keyword) inputs, to be tried in turn; None fixes everything."""
    if wanted is None:
        every, batch = automatic(model, args, kwargs), automatic(model, args, kwargs, lengths=False)
        return [every, *([batch] if batch != every else []), None]
    values = named(model, args, kwargs)
    unknown = sorted(set(wanted) - set(values) - set(kwargs))
    if unknown:
        raise InputError(f"dynamic_shapes names {unknown}, but the inputs are {list(values)}.")
    asked = {key: dict.fromkeys(axes, torch.export.Dim.AUTO) for key, axes in wanted.items()}
    return [by_label(model, args, kwargs, lambda label, value: asked.get(label) if label else None)]


def _fixed(program: Program, spec: Any) -> list[tuple[str, int, int]]:
    """(input, axis, size) of dimensions that were to vary and that torch fixed."""
    if spec is None:
        return []
    asked = pytree.tree_leaves(spec, is_leaf=_is_dims)
    flat = zip(program.input_names(), program.input_shapes(), asked, strict=True)
    return [
        (name, axis, size) for name, shape, dims in flat for axis in dims or () if isinstance(size := shape[axis], int)
    ]


def _batch_size(program: Program) -> Any:
    """Symbol of the batch; None if it is fixed. States of recurrent nets have it behind their layers."""
    shape = next((slot.shape for slot in program.signature.slots if slot.shape), (0,))
    return shape[0] if isinstance(shape[0], str) else None


def _is_dims(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and any(v is torch.export.Dim.AUTO for v in value.values()))


def _export(
    model: torch.nn.Module, args: Args, kwargs: Kwargs, specs: list[Any], report: Report
) -> tuple[torch.export.ExportedProgram, Any]:
    """The graph by the first of `specs` that works, and that spec; the report tells why the others did not."""
    for number, spec in enumerate(specs):
        try:
            return torch_export(model, args, kwargs, spec and named(model, *spec)), spec
        except Exception as e:
            error, data_dependent = explain(e, model)
            if data_dependent or spec is specs[-1]:
                raise error from e
            # A model may be exportable with fewer sizes that vary; say so instead of refusing it.
            if specs[number + 1] is None:
                report.skip("dynamic batch", f"the graph holds for the example's sizes only ({error})")
            else:
                report.skip("dynamic lengths", f"only the batch varies ({error})")
    raise AssertionError("there is at least one spec to try")


def torch_export(model: torch.nn.Module, args: Any, kwargs: Any, spec: Any) -> torch.export.ExportedProgram:
    """torch.export without the warnings and log lines on which no user can act."""
    with quiet_torch(), recurrent_shapes():
        exported = torch.export.export(model, args, kwargs or None, dynamic_shapes=spec)
    # Bounds of sizes such as s27 + 1 follow from those of s27, which torch takes for at least 2 and we do not.
    for size in [size for size in exported.range_constraints if not str(size).isidentifier()]:
        del exported.range_constraints[size]
    return exported

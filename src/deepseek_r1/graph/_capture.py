"""`capture`: a module and example inputs in, a Program out; a failure names the user's own line."""

from __future__ import annotations

import contextlib
import inspect
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..core import CaptureError, InputError, Report
from .program import Program
from .quiet import quiet_torch

_OUTSIDE = (str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"], str(Path(__file__).parents[1]))


def capture(
    model: torch.nn.Module,
    example_inputs: Any,
    *,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None,
    name: str | None = None,
) -> Program:
    """Capture the evaluation graph of a module.

    By default dimension 0 of every tensor input is a batch of any size; examples with a batch of 1 are doubled first,
    because torch would otherwise fix the size. The module's training flags are restored afterwards.

    Args:
        model: the module. The program shares its weights.
        example_inputs: a tensor, a tuple of positional inputs, or a mapping of keyword inputs.
        dynamic_shapes: which dimensions vary, by argument name: `{"ids": {0: "batch", 1: "sequence"}}`. Arguments
            left out are fixed.
        name: name of the program; by default the class's name.

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
    if not pytree.tree_leaves((args, kwargs)):
        raise InputError("capture needs at least one example input, given none.")
    title = name or type(model).__name__
    report = Report(f"capture {title}")
    with evaluation(model), torch.no_grad():
        _try_eager(model, args, kwargs)
        if dynamic_shapes is None:
            args, kwargs = _at_least_two(args, kwargs)
        spec = _spec(model, args, kwargs, dynamic_shapes)
        exported, fallback = _export(model, args, kwargs, spec, dynamic_shapes is None)
    program = Program(
        exported=exported, example_inputs=(args, kwargs), name=title, report=report, precision=precision_of(exported)
    )
    fixed = _fixed(program, spec)
    if fixed and dynamic_shapes is not None:
        raise CaptureError(
            f"{title}: dynamic_shapes asks for {', '.join(fixed)} to vary, but the model fixes the size at the "
            "example's. Take the sizes from the inputs' shapes in the model, or leave that dimension out."
        )
    if fixed or fallback:
        report.skip("dynamic batch", fallback or f"the model fixes {', '.join(fixed)} at the example's size")
    report.add("operators", sum(n.op == "call_function" for n in exported.graph.nodes), how="nodes of the graph")
    for label, shape in zip(program.input_names(), program.input_shapes()):
        report.note(f"input {label}: {list(shape)}")
    return program


_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def precision_of(exported: torch.export.ExportedProgram) -> str:
    """The narrowest floating-point type among the weights, by name; "fp32" where there are none."""
    found = [t.dtype for t in exported.state_dict.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    narrow = min(found, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)
    return _NAMES.get(narrow, "fp32")


def as_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


def _try_eager(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        model(*args, **kwargs)
    except Exception as e:
        shapes = pytree.tree_map(lambda v: tuple(v.shape) if isinstance(v, torch.Tensor) else v, (args, kwargs))
        raise InputError(
            f"the model itself fails on the example inputs {shapes} before any capture: {type(e).__name__}: {e}"
            f"{_where(e)}"
        ) from e


def _at_least_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor) and v.ndim]
    if not tensors or tensors[0].shape[0] != 1:
        return args, kwargs
    double = lambda v: torch.cat([v, v]) if isinstance(v, torch.Tensor) and v.ndim and v.shape[0] == 1 else v  # noqa: E731
    doubled: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(double, (args, kwargs))
    return doubled


def _spec(model: torch.nn.Module, args: Any, kwargs: Any, wanted: Mapping[str, Mapping[int, Any]] | None) -> Any:
    """The `dynamic_shapes` of torch.export, by argument name."""
    values = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor) and v.ndim]
    batch = tensors[0].shape[0] if tensors and wanted is None else None
    unknown = sorted(set(wanted or ()) - set(values))
    if unknown:
        raise InputError(f"dynamic_shapes names {unknown}, but the inputs are {list(values)}.")

    def dims(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        return {0: torch.export.Dim.AUTO} if value.ndim and value.shape[0] == batch else None

    asked = {key: dict.fromkeys(axes, torch.export.Dim.AUTO) for key, axes in (wanted or {}).items()}
    return {name: asked.get(name) or pytree.tree_map(dims, value) for name, value in values.items()}


def _fixed(program: Program, spec: Mapping[str, Any]) -> list[str]:
    """Dimensions that were to vary and that torch fixed, as "dimension 0 of x"."""
    wanted = pytree.tree_leaves(list(spec.values()), is_leaf=_is_dims)
    flat = zip(program.input_names(), program.input_shapes(), wanted, strict=True)
    return [
        f"dimension {axis} of {name}"
        for name, shape, dims in flat
        for axis in dims or ()
        if not isinstance(shape[axis], str)
    ]


def _is_dims(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and any(v is torch.export.Dim.AUTO for v in value.values()))


def _export(model: torch.nn.Module, args: Any, kwargs: Any, spec: Any, may_fall_back: bool) -> tuple[Any, str]:
    try:
        return torch_export(model, args, kwargs, spec), ""
    except Exception as e:
        error, data_dependent = _explain(e)
        if not may_fall_back or data_dependent:
            raise error from e
        # A model may be exportable at a fixed size only; say so instead of refusing it.
        try:
            return torch_export(model, args, kwargs, None), f"the graph holds for the example's sizes only ({error})"
        except Exception as again:
            raise _explain(again)[0] from again


def torch_export(model: torch.nn.Module, args: Any, kwargs: Any, spec: Any) -> torch.export.ExportedProgram:
    """torch.export without the warnings and log lines on which no user can act."""
    with quiet_torch():
        return torch.export.export(model, args, kwargs or None, dynamic_shapes=spec)


def _explain(error: Exception) -> tuple[CaptureError, bool]:
    text = f"{type(error).__name__}: {error}"
    data_dependent = "data-dependent" in text or "GuardOnDataDependent" in text or "unbacked" in text
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if data_dependent:
        way = (
            "The model branches on the values of a tensor, which a static graph cannot do as it stands. Write the "
            "branch with torch.where (both sides computed) or torch.cond (one side), or keep the model dynamic: "
            "dr1.optimize(model, method='dynamic')."
        )
    else:
        way = "Rewrite that line with tensor operations, or keep it dynamic: dr1.optimize(model, method='dynamic')."
    message = f"the model cannot be captured{_where(error)}\n  {first[:400]}\n{way}"
    return CaptureError(message), data_dependent


def _where(error: BaseException) -> str:
    """The innermost line of the user's code in the error's trace."""
    seen: list[traceback.FrameSummary] = []
    current: BaseException | None = error
    while current is not None:
        seen = [f for f in traceback.extract_tb(current.__traceback__) if _is_users(f.filename)] or seen
        current = current.__cause__
    if not seen:
        return "."
    frame = seen[-1]
    return f": {frame.filename}, line {frame.lineno}, in {frame.name}:\n    {(frame.line or '').strip()}"


def _is_users(filename: str) -> bool:
    return not filename.startswith((*_OUTSIDE, "<"))

"""`simplify`: the passes one after the other on one graph, each judged, and one capture of the result at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule

from ...core import CaptureError, ConfigError, Report
from .._memory_plan import buffer_plan
from ..editing import constant_of, rewrite, sizes_held
from ..program import Program
from . import _batch_norm
from ._activations import name_activations
from ._attention import fuse_attention
from ._constants import fold_constants
from ._double import Judge
from ._effects import sweep
from ._linears import name_linears
from ._merge import merge_linears
from ._norms import name_norms
from ._tidy import remove_identities, share_subexpressions

#: Passes by name, in the order in which `simplify` runs them. Each returns how many places it changed.
PASSES: dict[str, Callable[[GraphModule], int]] = {
    "remove_identities": remove_identities,
    "fold_constants": fold_constants,
    "share_subexpressions": share_subexpressions,
    "fold_batch_norm": _batch_norm.fold_batch_norm,
    "name_linears": name_linears,
    "name_activations": name_activations,
    "name_norms": name_norms,
    "fuse_attention": fuse_attention,
    "merge_linears": merge_linears,
}
#: Largest relative change of an answer in float64.
TOLERANCE = 1e-6


def simplify(program: Program, passes: Sequence[str] | None = None, *, strict: bool = True) -> Program:
    """Run the named passes; each that changed something is verified on the example inputs in float64.

    Weights that no pass rewrote are shared with `program`, which is the result's `source`. A program with quantize
    nodes comes back as it is: engines match those nodes one by one, and its float parent was simplified before.

    Args:
        passes: names from `PASSES`, run in that order; by default all of them.
        strict: whether a pass that changed the answers is an error; else the result is made without it, and the
            report says so.

    Raises:
        ConfigError: no pass has that name.
        CaptureError: a pass changed the program's answers. That is a fault of the pass; the message names it.

    Example:
        >>> from deepseek_r1.graph import capture
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout())
        >>> simple = simplify(capture(net, torch.randn(2, 4)))
        >>> [row.metric for row in simple.report.rows if row.unit == "nodes"]
        ['pass remove_identities', 'pass fold_batch_norm']
    """
    names = list(PASSES) if passes is None else list(passes)
    if unknown := [name for name in names if name not in PASSES]:
        raise ConfigError(f"simplify(passes={unknown!r}): no such pass; there are {', '.join(PASSES)}.")
    report = copy.deepcopy(program.report)
    if _is_quantised(program):
        if names:
            report.skip("passes", "the program is quantised; its float parent was simplified before")
        return replace(program, report=report)
    try:
        return _simplified(program, names, report)
    except _WrongPassError as wrong:
        if strict:
            raise
        # From the start, because the graph that the pass left behind is of no use.
        result = simplify(program, [name for name in names if name != wrong.suspect], strict=False)
        report = copy.deepcopy(result.report)
        report.skip(f"pass {wrong.suspect}", str(wrong))
        return replace(result, report=report)


def fold_batch_norm(program: Program) -> Program:
    """Fold each batch normalisation into the convolution or linear layer beside it.

    Source: Jacob et al., Quantization and Training of Neural Networks, 2018, section 3.2.
    """
    return simplify(program, ("fold_batch_norm",))


class _WrongPassError(CaptureError):
    """A pass changed the answers; or all of them did together, and then the last one is the first to be left out."""

    def __init__(self, suspect: str, what: str, *, is_sure: bool = True) -> None:
        who = f"the pass {suspect!r}" if is_sure else f"the passes up to {suspect!r} together"
        super().__init__(f"{who} {what}; it is not used.")
        self.suspect = suspect


def _is_quantised(program: Program) -> bool:
    return any(getattr(n.target, "namespace", "") == "quantized_decomposed" for n in program.exported.graph.nodes)


def _simplified(program: Program, names: list[str], report: Report) -> Program:
    original: Any = program.exported.module(check_guards=False)
    judge = _LazyJudge(original, pytree.tree_leaves(program.example_inputs))
    allowed, applied = [TOLERANCE], [""]

    def change(module: GraphModule) -> int:
        total = 0
        # Passes ask who uses a value; what nobody needs does not count.
        sweep(module.graph)
        for name in names:
            nodes, known = _size(module), _constants(module)
            places, error = _run(name, module, judge)
            if not places:
                continue
            total += places
            applied.append(name)
            # A new weight is rounded once to its own type; nothing else may change the answers.
            allowed.append(max(TOLERANCE, *(8 * eps for eps in _roundings(module, known)), 0.0))
            how = f"{places} {'place' if places == 1 else 'places'}"
            if not report.check(f"pass {name}", error <= allowed[-1], f"{how}, largest relative change {error:.1e}"):
                raise _WrongPassError(name, f"changed the program's answers by {error:.1e} (relative)")
            report.add(f"pass {name}", _size(module), before=nodes, unit="nodes", how=how)
        return total

    try:
        after = rewrite(program, change, report=report, source=program.source or program)
    except _WrongPassError:
        raise
    except Exception as e:
        what = f"left a graph that cannot be captured again ({_first_line(e)})"
        raise _WrongPassError(applied[-1], what, is_sure=False) from e
    if after is program:
        return program
    if judge().why_not:
        report.skip("float64", f"the passes were verified in the program's own types ({judge().why_not})")
    if reason := _broken(program, after, 100 * max(allowed)):
        raise _WrongPassError(applied[-1], reason, is_sure=False)
    _add_memory(report, program, after)
    return after


def _add_memory(report: Report, before: Program, after: Program) -> None:
    try:
        old, new = buffer_plan(before), buffer_plan(after)
    except CaptureError as e:
        report.skip("activations", str(e))
        return
    how = f"values between operators in one arena, at the example's size; side by side {new.total_bytes:,} bytes"
    report.add("activations, planned", new.arena_bytes, before=old.arena_bytes, unit="bytes", how=how)


class _LazyJudge:
    """A judge that runs the original graph only when there is something to judge."""

    def __init__(self, module: GraphModule, leaves: Sequence[Any]) -> None:
        self._make = lambda: Judge(module, leaves)
        self._judge: Judge | None = None

    def __call__(self) -> Judge:
        self._judge = self._judge or self._make()
        return self._judge


def _run(name: str, module: GraphModule, judge: _LazyJudge) -> tuple[int, float]:
    """Run one pass; how many places it changed and by how much the answers changed."""
    try:
        with sizes_held(module):
            places = PASSES[name](module)
        if not places:
            return 0, 0.0
        sweep(module.graph)
        module.graph.lint()
    except Exception as e:
        raise _WrongPassError(name, f"failed ({_first_line(e)})") from e
    judged = judge()
    try:
        error = judged.change(module)
    except Exception as e:  # whatever an operator raises for arguments that do not fit
        raise _WrongPassError(name, f"left a graph that does not run ({_first_line(e)})") from e
    judged.accept()
    return places, error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _size(module: GraphModule) -> int:
    return sum(node.op == "call_function" for node in module.graph.nodes)


def _constants(module: GraphModule) -> dict[str, torch.Tensor]:
    nodes = [n for n in module.graph.nodes if n.op == "get_attr"]
    return {str(n.target): t for n in nodes if (t := constant_of(module, n)) is not None}


def _roundings(module: GraphModule, known: dict[str, torch.Tensor]) -> list[float]:
    """Relative rounding error of each kind of floating-point constant that was added."""
    new = [t for name, t in _constants(module).items() if name not in known]
    return [torch.finfo(dtype).eps for dtype in {t.dtype for t in new} if dtype.is_floating_point]


def _broken(before: Program, after: Program, allowed: float) -> str:
    """What differs between two programs beside the numbers on the example inputs; empty if nothing does."""
    if _pattern(before) != _pattern(after):
        return f"made inputs of {before.input_shapes()} into {after.input_shapes()}"
    if _outputs(before) != _outputs(after):
        return f"made outputs of {_outputs(before)} into {_outputs(after)}"
    leaves = _other_sizes(before)
    if leaves is None:
        return ""
    try:
        judge = Judge(before.exported.module(check_guards=False), leaves)  # type: ignore[arg-type]
    except Exception:  # these sizes may be none that the program takes
        return ""
    try:
        error = judge.change(after.exported.module(check_guards=False))  # type: ignore[arg-type]
    except Exception as e:
        return f"made a graph that fails for inputs of another size ({_first_line(e)})"
    return "" if error <= allowed else f"changed the answers for inputs of another size by {error:.1e} (relative)"


def _pattern(program: Program) -> list[tuple[Any, ...]]:
    """Shapes of the inputs, with dynamic sizes numbered in the order in which they appear."""
    numbers: dict[str, int] = {}
    return [
        tuple(f"size {numbers.setdefault(d, len(numbers))}" if isinstance(d, str) else d for d in shape)
        for shape in program.input_shapes()
    ]


def _outputs(program: Program) -> list[Any]:
    output = next(n for n in program.exported.graph.nodes if n.op == "output")
    found = [getattr(n, "meta", {}).get("val") for n in pytree.tree_leaves(output.args[0])]
    return [(str(v.dtype), v.ndim) if isinstance(v, torch.Tensor) else type(v).__name__ for v in found]


def _other_sizes(program: Program) -> list[Any] | None:
    """The example inputs, each dynamic size one larger; None if nothing is dynamic."""
    leaves = list(pytree.tree_leaves(program.example_inputs))
    is_dynamic = False
    for number, (leaf, shape) in enumerate(zip(leaves, program.input_shapes())):
        for axis, size in enumerate(shape):
            if isinstance(size, str):
                is_dynamic = True
                index = torch.arange(leaf.shape[axis] + 1, device=leaf.device) % max(1, leaf.shape[axis])
                leaf = leaf.index_select(axis, index)
        leaves[number] = leaf
    return leaves if is_dynamic and not program.outside(leaves) else None

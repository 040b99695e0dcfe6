"""Measured time: which multiples of channels are fast here, and whether the pruned module is faster than it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core import Report
from ..graph import evaluation
from ..graph.quiet import quiet_torch
from ..measure import QUIET_SPREAD, Latency, paired_latency, ratio_interval
from ._plan import PruningPlan
from ._splits import shape_of
from ._structure import Structure, layer_of

STEPS = (4, 8, 16)
#: A count of channels may take so many times as long per channel as the best one.
_WASTE = 1.1
#: Without a layer wide enough to measure.
USUAL_STEP = 8


def timed(
    modules: Mapping[str, nn.Module], example: Any, *, rounds: int = 30, seconds: float = 20.0
) -> dict[str, Latency]:
    """Latency of modules on the same example inputs, eager, in turns."""
    args, kwargs = example

    def call(module: nn.Module) -> Any:
        def run() -> None:
            with torch.no_grad():
                module(*args, **kwargs)
            if torch.cuda.is_available() and any(p.is_cuda for p in module.parameters()):
                torch.cuda.synchronize()

        return run

    with quiet_torch(), ExitStack() as stack:
        for module in {id(m): m for m in modules.values()}.values():
            stack.enter_context(evaluation(module))
        return paired_latency({n: call(m) for n, m in modules.items()}, rounds=rounds, max_seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How many times faster the pruned module is, and whether the machine was quiet enough to tell.

    Attributes:
        before_ms, after_ms: median latency.
        interval: lower end, middle and upper end of the paired ratio before / after.
        quiet: whether the module before, measured twice, was as fast as itself.
    """

    before_ms: float
    after_ms: float
    interval: tuple[float, float, float]
    quiet: bool

    @property
    def slower(self) -> bool:
        """Whether the pruned module is slower, beyond doubt."""
        return self.quiet and self.interval[2] < 1.0

    @property
    def how(self) -> str:
        """How it was measured, for a report."""
        low, middle, high = self.interval
        noise = "" if self.quiet else "; the machine was too busy for a verdict"
        return f"eager, median, in turns; {middle:.2f} times as fast, 95 % of resamples {low:.2f} to {high:.2f}{noise}"


def compared(before: nn.Module, after: nn.Module, example: Any, *, rounds: int) -> Speed:
    """Both modules in turns on the same inputs, the first one twice."""
    times = timed({"before": before, "after": after, "again": before}, example, rounds=rounds)
    spread = times["before"].median_ms / times["again"].median_ms
    return Speed(
        before_ms=times["before"].median_ms, after_ms=times["after"].median_ms,
        interval=ratio_interval(times["before"], times["after"]), quiet=1 / QUIET_SPREAD < spread < QUIET_SPREAD,
    )  # fmt: skip


def measured_step(model: nn.Module, structure: Structure, report: Report) -> int:
    """The smallest step of channels at which the widest layer wastes little time, measured just below a multiple of 16.

    Kernels work on blocks of channels, so a count between two steps of the staircase pays for the upper one.
    """
    found = _widest(model, structure)
    if found is None:
        report.note(f"channels end at multiples of {USUAL_STEP}: no layer was wide enough to measure what is fast here")
        return USUAL_STEP
    name, layer, shape = found
    base = (structure.shapes[f"{name}.weight"][0] // 16 - 1) * 16
    counts = {step: base + step for step in STEPS}
    layers = {str(step): _narrowed(layer, count) for step, count in counts.items()}
    like = next(layer.parameters())
    example: Any = ((torch.randn(shape, dtype=like.dtype, device=like.device),), {})
    times = timed(layers, example, rounds=20, seconds=5.0)
    # The quick quarter: a neighbour on the machine makes calls longer, nothing makes them shorter.
    quick = {step: times[str(step)].percentile_ms(25) for step in STEPS}
    each = {step: quick[step] / counts[step] for step in STEPS}
    best = min(each.values())
    step = next(s for s in STEPS if each[s] <= _WASTE * best)
    told = ", ".join(f"{counts[s]}: {quick[s]:.3g} ms" for s in STEPS)
    report.note(f"channels end at multiples of {step}, as measured on {name} ({told})")
    report.facts["staircase"] = {str(counts[s]): quick[s] for s in STEPS}
    return step


def _widest(model: nn.Module, structure: Structure) -> tuple[str, nn.Module, tuple[int, ...]] | None:
    """The layer of a prunable group that takes the most multiply-adds, with the shape of its input."""
    inputs: dict[str, tuple[int, ...]] = {}
    for node in structure.values:
        if node.op == "call_function" and len(node.args) > 1 and getattr(node.args[1], "op", "") == "get_attr":
            inputs.setdefault(str(node.args[1].target), shape_of(node.args[0]))  # type: ignore[union-attr]
    costs = []
    for group in structure.groups:
        for name, dim, each in group.members:
            uses = structure.ledger.uses.get(name, 0.0)
            layer = _module(model, layer_of(name))
            plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1)
            if dim == 0 and plain and name in inputs and structure.shapes[name][0] >= 48 and each:
                numel = float(torch.Size(structure.shapes[name]).numel())
                costs.append((uses * numel, layer_of(name), layer, inputs[name]))
    if not costs:
        return None
    _, name, layer, shape = max(costs, key=lambda c: c[0])
    return name, layer, shape


def _module(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _narrowed(layer: nn.Module, channels: int) -> nn.Module:
    kept = list(range(channels))
    own = {name: {0: kept} for name, p in layer.named_parameters(recurse=False) if p is not None}
    return PruningPlan(tensors=own).apply(copy.deepcopy(layer))

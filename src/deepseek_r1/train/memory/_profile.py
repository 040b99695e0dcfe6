"""Measuring a model's chain: one step in which every block is recomputed, and each kind of block by itself.

Gives the `Chain` that the solver reads. It never holds more than the least memory a step of the model takes, plus one
block: whatever limit a plan is to meet, making it does not break it. Knows no limit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._apply import COMPRESS, KEEP, OFFLOAD, PARTIAL, RECOMPUTE, SELECTIVE, Applied, BlockPlan
from ._compress import compressed
from ._discover import Unit, discover
from ._meter import Interval, Meter, storage_bytes
from ._partial import partial_form
from ._region import EACH, TOGETHER, Buffers, Region, preserved_rng_states, recorded
from ._selective import Operator, contexts, operator_sets
from ._solver import RUN, SINGLE, Action, Block, Chain, Choice
from ._units import find_blocks
from ._workload import Workload, optimizer_bytes

_TIMES = 4
#: Seconds for measuring all kinds of blocks; each way of each kind is run at least once.
_PATIENCE = 5.0
#: Shares of what compiled blocks save by themselves that are tried, where blocks are compiled by inductor.
SHARES = (0.7, 0.4)


class _Way(NamedTuple):
    """How a unit is run: an action with the operators that it keeps, or the share that it saves."""

    action: str
    kept: frozenset[Operator] = frozenset()
    share: float = 1.0


@dataclass
class _Kind:
    """What was measured of one kind of unit by itself.

    Attributes:
        number: kinds are counted in the order of their first units.
        draws: whether it drew random numbers.
        ways: by name; the order is that of the solver's choices.
        seconds: name -> (forward, forward and backward).
    """

    number: int
    draws: bool
    ways: dict[str, _Way] = field(default_factory=dict)
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    #: name -> bytes (held with its output, forward peak, backward peak) above those before it ran.
    nbytes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    #: Whether, if everything is kept, the input is among it, and the output.
    holds_input: bool = True
    holds_output: bool = True


@dataclass
class Profile:
    """A model's chain on one batch, measured.

    Attributes:
        alive: bytes that no choice changes: with gradients, and with the optimizer's state that does not exist yet.
    """

    workload: Workload
    units: list[Unit]
    kinds: dict[tuple[Any, ...], _Kind]
    chain: Chain
    buffers: dict[str, Any]
    alive: int
    compiled: bool = False

    def blocks(self, actions: tuple[Action, ...]) -> tuple[BlockPlan, ...]:
        """What each unit does under the solver's actions."""
        plans: list[BlockPlan] = []
        for action in actions:
            for index in range(action.first, action.last + 1):
                calls = self.units[index].calls
                kind = self.kinds.get(self.units[index].kind)
                named: dict[str, Any] = {
                    "modules": tuple(c.name for c in calls), "calls": tuple(c.number for c in calls),
                    "run": action.first, "draws": kind is not None and kind.draws,
                }  # fmt: skip
                if action.kind != SINGLE:
                    mode = TOGETHER if action.kind == RUN else EACH
                    plans.append(BlockPlan(**named, action=RECOMPUTE, mode=mode))
                    continue
                way = _Way(KEEP)
                if self.units[index].fit and kind is not None:
                    way = kind.ways[self.chain.blocks[index].choices[action.choice].name]
                kept = tuple(sorted(way.kept))
                plans.append(BlockPlan(**named, action=way.action, kept_operators=kept, share=way.share))
        return tuple(plans)

    def run(self, blocks: tuple[BlockPlan, ...]) -> tuple[list[Interval], float]:
        """Measure one step under a plan: its intervals, with what is pending, and its seconds."""
        workload = self.workload
        with workload.traceless():
            meter = Meter(workload.device, _static(workload))
            with Applied(workload.model, blocks, buffers=self.buffers, meter=meter, compiled=self.compiled):
                meter.start()
                began = time.perf_counter()
                try:
                    workload.run()
                    _wait(workload.device)
                finally:
                    seconds = time.perf_counter() - began
                    intervals = meter.stop()
        # The optimizer may have taken its first step since.
        pending, _ = optimizer_bytes(workload.optimizer, workload.trainable())
        return [replace(i, live=i.live + pending, peak=i.peak + pending) for i in intervals], seconds


def profile(
    workload: Workload,
    *,
    offload: bool | None = None,
    compiled: bool = False,
    shares: Sequence[float] = (),
    compress: bool = False,
) -> Profile:
    """Measure a model's chain on a batch.

    Args:
        offload: whether blocks may be offloaded; None: on CUDA.
        compiled: whether blocks are to be run through `torch.compile`.
        shares: of what compiled blocks save by themselves, that are tried.
        compress: whether blocks may save in 8 bits.
    """
    modules = find_blocks(workload.model)
    with workload.traceless():
        units, buffers = discover(workload, modules)
        offloads = workload.device.type == "cuda" if offload is None else offload
        measure = _Measurement(workload, units, offloads, shares, compress)
        plans = tuple(_base_plan(index, unit) for index, unit in enumerate(units))
        if compiled or _compiled_modules(modules):
            # What compiling allocates is no step's.
            with Applied(workload.model, plans, buffers=buffers, compiled=compiled):
                workload.run()
        workload.clear()
        measure.meter = Meter(workload.device, _static(workload))
        with Applied(
            workload.model,
            plans,
            buffers=buffers,
            meter=measure.meter,
            after_block=measure.after_block,
            compiled=compiled,
        ):
            measure.meter.start()
            try:
                workload.run()
            finally:
                intervals = measure.meter.stop()
    trainable = workload.trainable()
    missing, transient = optimizer_bytes(workload.optimizer, trainable)
    gradients = storage_bytes(trainable)
    before = intervals[0].live - (gradients if workload.accumulates else 0)
    # Whatever is alive: parameters, batch, and on CUDA all that this process has on the device.
    alive = before + gradients + missing
    chain = measure.chain(intervals, missing, alive + transient)
    return Profile(workload, units, measure.kinds, chain, buffers, alive, compiled)


def _compiled_modules(modules: dict[str, nn.Module]) -> list[Any]:
    return [m for m in modules.values() if m.__dict__.get("_compiled_call_impl") is not None or hasattr(m, "_orig_mod")]


def _base_plan(index: int, unit: Unit) -> BlockPlan:
    return BlockPlan(
        modules=tuple(c.name for c in unit.calls),
        calls=tuple(c.number for c in unit.calls),
        action=RECOMPUTE if unit.fit else KEEP,
        run=index,
    )


def _static(workload: Workload) -> int:
    return storage_bytes(workload.alive()) if workload.device.type == "cpu" else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Handle(torch.autograd.Function):
    """Stands for an output in a backward pass without keeping its values alive."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.new_zeros(()).expand(output.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Measurement:
    """The base step: called back after each block, it measures those of a kind that is new."""

    meter: Meter

    def __init__(
        self, workload: Workload, units: list[Unit], offload: bool, shares: Sequence[float], compress: bool
    ) -> None:
        self.workload, self.units, self.offload = workload, units, offload
        self.shares, self.compress = shares, compress
        self.device = workload.device
        self.kinds: dict[tuple[Any, ...], _Kind] = {}
        self._kinds = len({unit.kind for unit in units if unit.fit})
        self._left = _PATIENCE

    def after_block(self, index: int, region: Region | None) -> None:
        unit = self.units[index]
        if region is None or unit.kind in self.kinds or not unit.fit:
            return
        kind = self.kinds[unit.kind] = _Kind(len(self.kinds), region.draws)
        self.meter.mark("aside")
        modules = [self.workload.model.get_submodule(call.name) for call in unit.calls]
        parameters = list({id(p): p for m in modules for p in m.parameters() if p.requires_grad}.values())
        with preserved_rng_states(), torch.autocast(self.device.type, enabled=False):
            self._ways(kind, unit, region, parameters)
        self.meter.mark(("gap", index))

    def _ways(self, kind: _Kind, unit: Unit, region: Region, parameters: list[nn.Parameter]) -> None:
        began = time.perf_counter()
        patience = self._left / max(1, self._kinds - kind.number)
        self._look(kind, unit, region)
        kind.ways = {KEEP: _Way(KEEP), RECOMPUTE: _Way(RECOMPUTE)}
        if self._selective_fits(unit, region) and time.perf_counter() - began < patience / 4:
            plain = partial(region.isolated, lambda run, args, kwargs, buffers, first: run(*args, **kwargs))
            sets = operator_sets(plain, self.device)
            kind.ways |= {f"{SELECTIVE} {number + 1}": _Way(SELECTIVE, kept) for number, kept in enumerate(sets)}
        if self.shares and region.compiled and kind.draws:
            kind.refused[PARTIAL] = "the compiler would draw other random numbers the second time"
        elif region.compiled:
            kind.ways |= {f"{PARTIAL} {share:g}": _Way(PARTIAL, share=share) for share in self.shares}
        if self.compress:
            kind.ways[COMPRESS] = _Way(COMPRESS)
        self._measure(kind, region, parameters, patience)
        self._left = max(0.0, self._left - (time.perf_counter() - began))

    def _look(self, kind: _Kind, unit: Unit, region: Region) -> None:
        """See whether a unit that keeps everything keeps its input, and its output."""
        with torch.enable_grad(), recorded() as saved:
            _, outputs = region.isolated(_caller(_Way(KEEP)))
        own = [t.untyped_storage()._cdata for t in region.inputs(unit.calls[0].from_last)]
        kind.holds_input = not own or any(storage in saved for storage in own)
        kind.holds_output = any(t.untyped_storage()._cdata in saved for t in outputs)

    def _selective_fits(self, unit: Unit, region: Region) -> bool:
        """Whether single operators can be told apart: not inside compiled code, and not in a single layer."""
        modules = [self.workload.model.get_submodule(call.name) for call in unit.calls]
        compiled = any(hasattr(m, "_orig_mod") for m in modules) or region.compiled
        return not compiled and (len(modules) > 1 or next(modules[0].children(), None) is not None)

    def _measure(self, kind: _Kind, region: Region, parameters: list[nn.Parameter], patience: float) -> None:
        """Run a unit by itself in each way, a few times; ways take turns, so that a disturbance hits all of them."""
        compiles = any(way.action == PARTIAL for way in kind.ways.values())
        began = time.perf_counter()
        for turn in range(_TIMES):
            for name, way in list(kind.ways.items()):
                try:
                    seconds = self._once(region, parameters, _caller(way), (kind.number, name, turn))
                except Exception as e:  # the compiler has errors of many kinds
                    if name in (KEEP, RECOMPUTE) or isinstance(e, torch.OutOfMemoryError):
                        raise
                    kind.refused[name] = str(e).splitlines()[0]
                    del kind.ways[name]
                    kind.seconds.pop(name, None)
                    continue
                # The first turn finds caches cold; the fastest of all is what is left of noise.
                best = kind.seconds.get(name, (math.inf, math.inf))
                kind.seconds[name] = (min(best[0], seconds[0]), min(best[1], seconds[1]))
            if turn == 0 and compiles:
                # It compiled.
                kind.seconds.clear()
                began = time.perf_counter()
            elif time.perf_counter() - began > patience:
                break

    def _once(
        self, region: Region, parameters: list[nn.Parameter], call: Callable[..., Any], label: Any
    ) -> tuple[float, float]:
        self.meter.mark(("before", label))
        _wait(self.device)
        began = time.perf_counter()
        with torch.enable_grad():
            inputs, outputs = region.isolated(call)
        _wait(self.device)
        forward = time.perf_counter() - began
        self.meter.mark(("held", label))
        gradients = [torch.ones_like(t) for t in outputs]
        handles = [_Handle.apply(t) for t in outputs]
        del outputs
        self.meter.mark(("after", label))
        began = time.perf_counter()
        torch.autograd.grad(handles, [*inputs, *parameters], gradients, allow_unused=True)
        _wait(self.device)
        backward = time.perf_counter() - began
        del handles, gradients
        self.meter.mark("aside")
        return forward, forward + backward

    # From what was recorded to the solver's numbers.

    def chain(self, intervals: list[Interval], pending: int, floor: int) -> Chain:
        peaks: dict[Any, Interval] = {}
        for interval in intervals:
            known = peaks.get(interval.label)
            peak = max(interval.peak, known.peak) if known is not None else interval.peak
            peaks[interval.label] = Interval(interval.label, known.live if known is not None else interval.live, peak)
        self._read_kinds(peaks)
        tail = intervals[-1]
        blocks = []
        for index, unit in enumerate(self.units):
            forward, gap = peaks["forward", index], peaks["gap", index]
            backward = peaks.get(("backward", index), tail)
            choices, own, seconds = self._choices(unit)
            # In the base its input is held for recomputing it.
            free = [name for name in (KEEP, COMPRESS) if self._frees_input(index, name)]
            choices = tuple(replace(c, held=c.held - unit.boundary) if c.name in free else c for c in choices)
            blocks.append(
                Block(
                    forward_peak=forward.peak + pending, gap_peak=gap.peak + pending,
                    backward_peak=backward.peak + pending, backward_live=backward.live + pending, own_forward=own,
                    boundary=unit.boundary, linked=unit.linked, choices=choices, forward_seconds=seconds,
                )
            )  # fmt: skip
        return Chain(tuple(blocks), max(floor, intervals[0].peak + pending))

    def _frees_input(self, index: int, name: str) -> bool:
        """Whether nobody holds a unit's input if the unit keeps, or compresses, everything that it saves."""
        if not index or not self.units[index].linked:
            return False
        own, before = (self.kinds.get(self.units[k].kind) for k in (index, index - 1))
        if own is None or before is None or before.holds_output:
            return False
        return name == COMPRESS or not own.holds_input

    def _read_kinds(self, peaks: dict[Any, Interval]) -> None:
        for kind in self.kinds.values():
            for name in kind.seconds:
                found = []
                for turn in range(_TIMES):
                    label = (kind.number, name, turn)
                    if ("after", label) in peaks:
                        before, held, after = (peaks[stage, label] for stage in ("before", "held", "after"))
                        found.append((held.live - before.live, before.peak - before.live, after.peak - before.live))
                kind.nbytes[name] = found[-1]

    def _choices(self, unit: Unit) -> tuple[tuple[Choice, ...], int, float]:
        """A unit's choices, the bytes of its forward pass alone, and its seconds."""
        keep = Choice(name=KEEP, held=0, forward=0, backward=0, seconds=0.0)
        kind = self.kinds.get(unit.kind)
        if kind is None or not unit.fit:
            return (keep,), 0, 0.0
        base, fast = kind.nbytes[RECOMPUTE], kind.seconds[KEEP]
        choices = []
        # Measured times scatter; a choice that computes more is never faster.
        least = {KEEP: 0.0, RECOMPUTE: 0.5 * fast[0]}
        selective = [name for name in kind.nbytes if kind.ways[name].action == SELECTIVE]
        extra = dict(zip(selective, _rising([kind.seconds[name][1] - fast[1] for name in selective]), strict=True))
        for name in kind.nbytes:
            held, forward, backward = (own - other for own, other in zip(kind.nbytes[name], base, strict=True))
            more = max(extra.get(name, kind.seconds[name][1] - fast[1]), least.get(name, 0.02 * fast[0]), 1e-7)
            seconds = 0.0 if name == KEEP else more
            choices.append(Choice(name=name, held=max(0, held), forward=forward, backward=backward, seconds=seconds))
        if self.offload:
            choices.append(self._offloaded(kind, choices[0]))
        return tuple(choices), base[1], fast[0]

    def _offloaded(self, kind: _Kind, keep: Choice) -> Choice:
        """The copies run beside the block's own passes; what they take longer is waited for."""
        kind.ways[OFFLOAD] = _Way(OFFLOAD)
        copying = keep.held / _copy_rate(self.device)
        forward, both = kind.seconds[KEEP]
        wait = max(0.0, copying - forward) + max(0.0, copying - (both - forward)) + 0.05 * forward
        # On the way out, and one block ahead on the way back, a neighbour's tensors are there too.
        return Choice(
            name=OFFLOAD, held=0, forward=2 * keep.held, backward=keep.held + max(0, keep.backward), seconds=wait
        )


def _rising(values: Sequence[float]) -> list[float]:
    """The nearest numbers (least squares) that never fall; sets of operators come from the largest to the smallest.

    The algorithm is that of pooling neighbours that violate the order (Ayer et al., 1955).
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before = pools.pop()
            total, count = total + before[0], count + before[1]
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def _caller(way: _Way) -> Callable[..., Any]:
    if way.action == KEEP:
        return lambda run, args, kwargs, buffers, first: run(*args, **kwargs)
    if way.action == COMPRESS:
        return lambda run, args, kwargs, buffers, first: compressed(run, args, kwargs)
    if way.action == PARTIAL:
        return lambda run, args, kwargs, buffers, first: partial_form(run, way.share)(*args, **kwargs)

    region = Region()

    def call(run: Any, args: Any, kwargs: Any, buffers: Buffers, first: bool) -> Any:
        nonlocal region
        if first:
            region = Region(contexts=contexts(way.kept) if way.action == SELECTIVE else None)
        return region.call(run, args, kwargs, buffers=buffers, new_group=first)

    return call


@cache
def _copy_rate(device: torch.device) -> float:
    """Bytes a second from a device to page-locked memory, the slower of both ways."""
    size = 1 << 24
    there = torch.empty(size, dtype=torch.uint8, device=device)
    here = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    rates = []
    for _ in range(3):
        for target, source in ((here, there), (there, here)):
            _wait(device)
            began = time.perf_counter()
            target.copy_(source, non_blocking=True)
            _wait(device)
            rates.append(size / (time.perf_counter() - began))
    return min(rates[2:])

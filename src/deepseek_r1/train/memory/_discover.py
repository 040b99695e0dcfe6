"""The chain of a model: which blocks are called in which order, seen in one forward pass that saves nothing.

Knows what makes a block unfit for recomputation. Measures no bytes and no seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...core import InputError
from ...data import to_device, unpack_batch
from .._step import autocast
from ._apply import buffers_of
from ._intercept import Interception
from ._meter import storage_bytes
from ._region import changed, copied, dropped, version
from ._units import structure
from ._workload import Workload

#: More blocks than this are joined to as many of equal length, so that the solver stays quick.
MOST_UNITS = 48
_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.layout, torch.Size, slice)


@dataclass
class Call:
    """One call of a block in the forward pass."""

    name: str
    number: int
    linked: bool
    boundary: int
    changes_input: bool
    fit: bool
    why: str
    kind: tuple[Any, ...]
    #: Which of its inputs (as leaves of its arguments) are the output of the call before.
    from_last: tuple[int, ...] = ()


@dataclass
class Unit:
    """One position of the chain: a call, or several that cannot be parted.

    Attributes:
        linked: whether its input is the output of the unit before.
        boundary: bytes of that input.
        fit: whether it can be recomputed.
        why: why not.
        kind: equal for units that are measured once.
    """

    calls: list[Call]
    linked: bool
    boundary: int
    fit: bool
    why: str = ""

    @property
    def kind(self) -> tuple[Any, ...]:
        return tuple(call.kind for call in self.calls)

    @property
    def name(self) -> str:
        first = self.calls[0]
        more = f" to {self.calls[-1].name}" if len(self.calls) > 1 else ""
        return first.name + (f" (call {first.number + 1})" if first.number else "") + more


@dataclass
class _Watch:
    calls: list[Call] = field(default_factory=list)
    inputs: list[list[tuple[Tensor, int]]] = field(default_factory=list)
    given: list[dict[int, Tensor]] = field(default_factory=list)
    buffers: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    structures: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    count: Counter[str] = field(default_factory=Counter)
    last: list[tuple[Tensor, int]] = field(default_factory=list)
    inside: bool = False


def discover(workload: Workload, modules: Mapping[str, nn.Module]) -> tuple[list[Unit], dict[str, Any]]:
    """Units in the order of the forward pass, and for each module the buffers that a forward pass changes.

    Raises:
        InputError: no block is called.
    """
    watch = _Watch()

    def handle(name: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if watch.inside or not torch.is_grad_enabled():
            return run(*args, **kwargs)
        watch.inside = True
        try:
            return _observe(watch, name, modules[name], run, args, kwargs)
        finally:
            watch.inside = False

    with Interception(modules, handle), dropped():
        _forward(workload)
    if not watch.calls:
        raise InputError(
            f"no block of {type(workload.model).__name__} was called with gradients on (its blocks: "
            f"{list(modules)[:5]}). Memory is planned for models whose parts are called as modules."
        )
    used = Counter(
        id(tensor)
        for call, given in zip(watch.calls, watch.given, strict=True)
        for tensor in ({} if call.changes_input else given).values()
    )
    for call, inputs, given in zip(watch.calls, watch.inputs, watch.given, strict=True):
        # What other blocks read too stays alive for them.
        call.boundary = storage_bytes(given[k] for k in call.from_last if used[id(given[k])] <= 1)
        if any(version(tensor) != seen for tensor, seen in inputs) and call.fit:
            call.fit, call.why = False, "its input is changed in place after it has run"
    return _units(watch.calls), watch.buffers


def _forward(workload: Workload) -> None:
    """The forward pass and the loss as `accumulate` runs them, without a backward pass."""
    args, kwargs, labels = to_device(unpack_batch(workload.batch), workload.device)
    with autocast(workload.device, workload.precision):
        workload.objective(workload.model, args, kwargs, labels)


def _observe(
    watch: _Watch, name: str, module: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    leaves = tree_leaves((args, kwargs))
    given = [(leaf, version(leaf)) for leaf in leaves if isinstance(leaf, Tensor)]
    from_last = tuple(
        k for k, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and any(leaf is known and version(leaf) == seen for known, seen in watch.last)
    )  # fmt: skip
    opaque = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))})
    before = [] if name in watch.buffers else copied(buffers_of(module))
    output = run(*args, **kwargs)
    if name not in watch.buffers:
        paths = {inner: path for path, inner in module.named_modules()}
        watch.buffers[name] = tuple((paths[m], b) for m, b, _ in changed(before))
        watch.structures[name] = structure(module)
    outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    changes_input = any(version(tensor) != seen for tensor, seen in given)
    fit, why = True, ""
    if opaque:
        fit, why = False, f"it is given an object ({', '.join(opaque)}) that a second run could change"
    elif not any(t.requires_grad for t in outputs):
        fit, why = False, "no gradient flows through it"
    shapes = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t, _ in given)
    kind = (watch.structures[name], shapes, repr([x for x in leaves if isinstance(x, _PLAIN)]))
    linked = bool(from_last) and bool(watch.calls) and watch.calls[-1].fit
    call = Call(name, watch.count[name], linked, 0, changes_input, fit, why, kind, from_last)
    watch.given.append({k: leaf for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)})
    watch.count[name] += 1
    watch.calls.append(call)
    # Changes by the block itself are dealt with apart; from here on the input must stay as it is.
    watch.inputs.append([(tensor, version(tensor)) for tensor, _ in given] if not changes_input else [])
    watch.last = [(t, version(t)) for t in outputs]
    return output


def _units(calls: list[Call]) -> list[Unit]:
    """Calls joined to units: one that changes its input in place belongs to the one that made it."""
    units: list[Unit] = []
    for call in calls:
        if call.changes_input and call.linked and call.fit and units[-1].fit:
            units[-1].calls.append(call)
            continue
        fit = call.fit and not call.changes_input
        why = call.why or ("it changes its input in place" if call.changes_input else "")
        units.append(Unit([call], call.linked and fit, call.boundary, fit, why))
    if len(units) > MOST_UNITS:
        units = _joined(units, -(-len(units) // MOST_UNITS))
    return units


def _joined(units: list[Unit], length: int) -> list[Unit]:
    """Neighbours that are linked joined to units of `length`."""
    found: list[Unit] = []
    room = 0
    for unit in units:
        if room and unit.linked and unit.fit and found[-1].fit:
            found[-1].calls += unit.calls
            room -= 1
        else:
            found.append(unit)
            room = length - 1
    return found

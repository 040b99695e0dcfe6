"""Selective recomputation: which operators of a block keep their outputs, solved for several amounts of memory.

Knows one block at a time: traces its operators with time and bytes, chooses by a small integer program (HiGHS), and
makes the contexts of a block's two forward passes for a set of operators. torch has such contexts, too
(`torch.utils.checkpoint.create_selective_checkpoint_contexts`), which take some 60 microseconds an operator.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import SAC_IGNORED_OPS

from ._intercept import undisturbed
from ._region import static

#: An operator of a block: its name and the how-manieth of that name it is.
Operator = tuple[str, int]
#: Of the bytes of all operators that are worth keeping.
_SHARES = (1.0, 0.8, 0.6, 0.45, 0.3, 0.15)


@dataclass
class _Op:
    key: Operator
    seconds: float
    nbytes: int
    savable: bool
    random: bool


class _Trace(TorchDispatchMode):
    """Times every operator below autograd and finds the bytes of the outputs that are not views."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.ops: list[_Op] = []
        self._count: Counter[str] = Counter()
        self._owner: dict[int, _Op] = {}
        self._kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SAC_IGNORED_OPS:
            return func(*args, **kwargs)
        random = torch.Tag.nondeterministic_seeded in func.tags
        before = self._generator() if random else None
        began = self._now()
        output = func(*args, **kwargs)
        op = _Op((str(func), self._count[str(func)]), self._now() - began, 0, True, False)
        self._count[str(func)] += 1
        if random:
            op.random = before != self._generator()
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if func._schema.is_mutable:
            for key in inputs & self._owner.keys():
                self._owner[key].savable = False
        fresh = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        op.savable = bool(fresh) and not func._schema.is_mutable
        for tensor in fresh:
            storage = tensor.untyped_storage()
            if storage._cdata in inputs:
                op.savable = False
            else:
                op.nbytes += storage.nbytes()
                self._owner[storage._cdata] = op
                self._kept.append(storage)
        self.ops.append(op)
        return output

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _generator(self) -> bytes:
        own = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()
        return own.numpy().tobytes()


def operator_sets(run: Callable[[], Any], device: torch.device) -> list[frozenset[Operator]]:
    """Sets of operators worth keeping in a block, from those of most of its bytes to the few with most time per byte.

    Random operators are in all sets or in none: one that is not run again would shift the random numbers of the rest.

    Args:
        run: runs the block's forward pass once; it is run twice.
    """
    first, second = _traced(run, device), _traced(run, device)
    if [op.key for op in first] != [op.key for op in second]:
        return []
    for one, other in zip(first, second, strict=True):
        one.seconds = min(one.seconds, other.seconds)
    total = sum(op.seconds for op in first)
    candidates = [op for op in first if op.savable and not op.random and op.nbytes and op.seconds > 0.01 * total]
    sets: list[frozenset[Operator]] = []
    for share in _SHARES if candidates else ():
        chosen = _most_seconds(candidates, share * sum(op.nbytes for op in candidates))
        if chosen and chosen not in sets:
            sets.append(chosen)
    return sets


def _most_seconds(ops: list[_Op], limit: float) -> frozenset[Operator]:
    """Of operators, those to keep within bytes so that the fewest seconds are computed again.

    What is not kept is computed again, whatever else is kept: the seconds add up, and this is a knapsack.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # 0.2 s that training without a limit is spared

    size = max(op.nbytes for op in ops)
    solved = milp(
        [-op.seconds / ops[0].seconds for op in ops], integrality=np.ones(len(ops)), bounds=Bounds(0, 1),
        constraints=LinearConstraint(np.array([[op.nbytes / size for op in ops]]), ub=limit / size),
    )  # fmt: skip
    return frozenset(op.key for op, kept in zip(ops, solved.x, strict=True) if kept > 0.5)


def _traced(run: Callable[[], Any], device: torch.device) -> list[_Op]:
    """The operators up to the last tensor that is saved: running the block again ends there."""
    trace = _Trace(device)
    needed = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal needed
        if not static(tensor):
            needed = len(trace.ops)
        return tensor.detach()

    with saved_tensors_hooks(undisturbed(pack), lambda tensor: tensor), trace:
        run()
    return trace.ops[:needed]


class _Eager(TorchDispatchMode):
    """A mode for blocks that are not compiled: spared the guard against the compiler at each operator."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Keep(_Eager):
    """Stores the outputs of some operators of the forward pass."""

    def __init__(self, kept: frozenset[Operator]) -> None:
        super().__init__()
        self.numbers = {name: {number for own, number in kept if own == name} for name, _ in kept}
        #: (name, number) -> output with the versions of its tensors.
        self.stored: dict[Operator, tuple[Any, list[int]]] = {}
        self._count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = _name(func)
        if name in self.numbers:
            key = name, self._count[name]
            self._count[name] += 1
            if key[1] in self.numbers[name]:
                # The tensor itself is about to become part of autograd's graph.
                alike = tree_map_only(Tensor, torch.detach, output)
                self.stored[key] = alike, _versions(alike)
        return output


class _Reuse(_Eager):
    """Gives what was stored in place of running its operator again; each once."""

    def __init__(self, keep: _Keep) -> None:
        super().__init__()
        self._keep = keep
        self._count: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._count.clear()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        if name in self._keep.numbers:
            key = name, self._count[name]
            self._count[name] += 1
            output, versions = self._keep.stored.pop(key, (None, None))
            # Changed in place since, or asked for by a second backward pass, it is computed again.
            if output is not None and versions == _versions(output):
                return output
        return func(*args, **(kwargs or {}))


@cache
def _name(func: Any) -> str:
    return str(func)


def _versions(output: Any) -> list[int]:
    return [tensor._version for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]


def contexts(kept: frozenset[Operator]) -> tuple[Any, Any]:
    """Contexts for the two forward passes of a block that keep the outputs of these operators."""
    keep = _Keep(kept)
    return keep, _Reuse(keep)

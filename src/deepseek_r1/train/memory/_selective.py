"""Selective recomputation: which operators of a block keep their outputs, solved for several amounts of memory.

Knows one block at a time: traces its operators with time and bytes, chooses by a small integer program (HiGHS), and
makes the contexts of `torch.utils.checkpoint.create_selective_checkpoint_contexts` for a set of operators.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)

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


def contexts(kept: frozenset[Operator]) -> tuple[Any, Any]:
    """Contexts for the two forward passes of a block that keep the outputs of these operators."""
    count: Counter[str] = Counter()

    def policy(_: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(func)
        number = count[name]
        count[name] += 1
        return CheckpointPolicy.MUST_SAVE if (name, number) in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)

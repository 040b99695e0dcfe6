"""Does a captured graph answer as its module does, also at a batch and at a length of 1? Knows no capture.

torch takes every varying size for at least 2 while it captures, so a branch of the model on a size of 1 leaves no
trace in the graph. The only way to know is to ask both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree

from ..core import CaptureError
from ._dimensions import shrunk
from ._state import own_randomness, preserved
from .program import Program

#: How far the graph may be from the module, relative to the largest answer: both run the same operators.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}

_SEED = 1_948_305_217


def verified(program: Program, model: torch.nn.Module, args: Any, kwargs: Any, *, grad: bool) -> Program:
    """The program, with the conditions that hold it to sizes at which it answers as the module does.

    Args:
        args, kwargs: the user's own example inputs.
        grad: whether it is a training graph; those are compared at the examples only.

    Raises:
        CaptureError: it answers differently at the examples themselves.
    """
    examples = (args, kwargs) if program.misfit(args, kwargs) is None else program.example_inputs
    wanted = _answers(model, model, examples)
    if wanted is None:
        return program
    problem = _difference(wanted, _answers(program.module(), model, examples))
    if problem:
        again = _difference(wanted, _answers(model, model, examples))
        if again:
            program.report.note(
                "the model does not answer twice alike from one random state, so its graph could not be compared with "
                "it; what it takes from outside torch is fixed in the graph as it was at capture"
            )
            return program
        raise CaptureError(
            f"the captured graph of {program.name!r} does not answer as the module does: {problem}. Its forward takes "
            "something from outside that a graph cannot hold: numbers of Python's or NumPy's random, the time, a "
            "global, a file. Make it an input or a buffer, or keep the model dynamic: dr1.optimize(model, "
            "method='dynamic')."
        )
    return program if grad else _at_one(program, model)


def _at_one(program: Program, model: torch.nn.Module) -> Program:
    """Compares at a size of 1, the batch's and the lengths' in turn, and bars a size that gives other answers."""
    dynamic = [
        (i, axis, size)
        for i, slot in enumerate(program.signature.slots)
        for axis, size in enumerate(slot.shape)
        if isinstance(size, str) and size.isidentifier()
    ]
    conditions = list(program.conditions)
    batch = dynamic[0][2] if dynamic and dynamic[0][1] == 0 else None
    groups = [[d for d in dynamic if d[2] == batch], [d for d in dynamic if d[2] != batch and d[1] > 0]]
    for group in groups:
        small = shrunk(*program.example_inputs, [(i, axis) for i, axis, _ in group]) if group else None
        if small is None or program.misfit(*small) is not None:
            continue
        wanted = _answers(model, model, small)
        if wanted is None:
            continue
        if problem := _difference(wanted, _answers(program.module(), model, small)):
            names = [f"dimension {axis} of {program.signature.slots[i].name}" for i, axis, _ in group]
            program.report.skip("a size of 1", f"the model takes another way where {', '.join(names)} is 1: {problem}")
            conditions += [f"size_{i}_{axis} >= 2" for i, axis, _ in group]
    return replace(program, conditions=tuple(conditions))


def _answers(run: Any, model: torch.nn.Module, inputs: tuple[Any, Any]) -> list[Any] | None:
    """Flat answers from one random state; None if it fails. The module's buffers are left as they were."""
    # Inputs that are changed in place are the user's.
    args, kwargs = pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, inputs)
    try:
        with preserved(model), own_randomness(model):
            # A state that no user is likely to have seeded: a number drawn at capture must not come again by chance.
            torch.manual_seed(_SEED)
            random.seed(_SEED)
            np.random.seed(_SEED)
            leaves = pytree.tree_leaves(run(*args, **kwargs))
        return [v.detach() if isinstance(v, torch.Tensor) else v for v in leaves]
    except Exception:
        return None


def _difference(wanted: Sequence[Any], given: Sequence[Any] | None) -> str:
    if given is None or len(given) != len(wanted):
        return "it fails" if given is None else f"{len(given)} values instead of {len(wanted)}"
    for number, (a, b) in enumerate(zip(wanted, given)):
        if not isinstance(a, torch.Tensor):
            if type(a) is not type(b) or a != b:
                return f"output {number} is {b!r} instead of {a!r}"
        elif not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return f"output {number} is of another shape or dtype"
        elif problem := _distance(a, b):
            return f"output {number} {problem}"
    return ""


def _distance(a: torch.Tensor, b: torch.Tensor) -> str:
    if not a.numel() or a.is_meta or a.layout is not torch.strided:
        return ""
    if not a.is_floating_point():
        return "" if torch.equal(a, b) else "differs"
    scale = float(a.double().nan_to_num(0, 0, 0).abs().max())
    allowed = _TOLERANCE.get(a.dtype, 1e-1) * max(scale, 1e-6)
    if torch.allclose(a.double(), b.double(), rtol=0, atol=allowed, equal_nan=True):
        return ""
    return f"differs by {float((a.double() - b.double()).abs().max()):.3g}, the largest value being {scale:.3g}"

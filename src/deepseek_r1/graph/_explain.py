"""What went wrong in a capture, in the user's words: the line, the reason, the way out."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from typing import Any

import torch

from ..core import CaptureError

_OUTSIDE = (str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"], str(Path(__file__).parents[1]))

_DYNAMIC = "or keep the model dynamic: dr1.optimize(model, method='dynamic')."
_BRANCH = (
    "The model branches on the values of a tensor, which a static graph cannot do as it stands. Let "
    "deepseek.jit.trace(model) keep the branch as it is written; or write it with torch.where (both sides computed) or "
    f"torch.cond (one side); {_DYNAMIC}"
)
_NUMBER = (
    "A number is taken out of a tensor there (.item(), int(), a 0-d tensor as an index or size) and Python needs its "
    "value. Stay with tensors: index with torch.index_select, gather or index_copy_, choose with torch.where; "
    f"deepseek.jit.trace(model) keeps loops and branches on such numbers; {_DYNAMIC}"
)
#: (words of torch's message, way out); the first that fits is told. Numbers come before branches: both are data.
_WAYS = (
    (("extract specialized integer", "specialized float", "_local_scalar_dense"), _NUMBER),
    (("data-dependent", "GuardOnDataDependent", "unbacked"), _BRANCH),
    (
        (".numpy()", "__array__", "numpy.ndarray", "NumPy"),
        f"NumPy cannot take part in a graph. Use the torch function of the same name; {_DYNAMIC}",
    ),
    (
        ("in output, which is not a known type", "output type", "Unsupported output"),
        "The model returns an object of a class that torch does not know as a nest of values. Return tensors in a "
        "tuple, list, dict or named tuple, or register the class with torch.export.register_dataclass or "
        "torch.utils._pytree.register_pytree_node.",
    ),
    (
        ("Unsupported input type", "input type", "not a valid input"),
        "An input is an object of a class that torch does not know as a nest of values. Give tensors, numbers and text "
        "in tuples, lists and dicts, or register the class with torch.export.register_dataclass.",
    ),
    (
        ("ScriptModule", "ScriptFunction", "torch.jit"),
        "Scripted code is a graph of another kind. Capture the Python module that it was scripted from.",
    ),
    (
        ("requires_grad", "autograd", "does not require grad", "backward"),
        "The model computes gradients inside its forward. Capture its training graph, capture(model, inputs, "
        f"train=True), or take the gradients outside; {_DYNAMIC}",
    ),
    (
        ("Constraints violated", "ConstraintViolation", "specialized"),
        "A size that was asked to vary is fixed by the model. Take the sizes from the inputs' shapes in the model "
        "instead of numbers, or leave that dimension out of dynamic_shapes.",
    ),
)
_OTHERWISE = f"Rewrite that line with tensor operations, {_DYNAMIC}"


def explain(error: Exception) -> tuple[CaptureError, bool]:
    """The error to raise, and whether the values of tensors are the reason (then no other sizes can help)."""
    text = f"{type(error).__name__}: {error}"
    way = next((way for words, way in _WAYS if any(w in text for w in words)), _OTHERWISE)
    message = f"the model cannot be captured{where(error)}\n  {_first_line(error)}\n{way}"
    return CaptureError(message), way in (_BRANCH, _NUMBER)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400]


def where(error: BaseException) -> str:
    """The innermost line of the user's code in the error's trace."""
    seen: list[traceback.FrameSummary] = []
    current: BaseException | None = error
    while current is not None:
        seen = [f for f in traceback.extract_tb(current.__traceback__) if is_users(f.filename)] or seen
        current = current.__cause__
    return f": {line_of(seen[-1])}" if seen else "."


def line_of(frame: Any) -> str:
    """A frame as "file, line 3, in forward:" and the line itself."""
    return f"{frame.filename}, line {frame.lineno}, in {frame.name}:\n    {(frame.line or '').strip()}"


def is_users(filename: str) -> bool:
    """Whether a file is neither torch's, nor Python's, nor ours."""
    return not filename.startswith((*_OUTSIDE, "<"))

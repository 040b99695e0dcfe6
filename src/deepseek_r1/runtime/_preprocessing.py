"""From raw data to what a model takes, as a list of plain steps that travels in the manifest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import InputError

Array = NDArray[Any]


def _cast(x: Array, dtype: str) -> Array:
    return x.astype(np.dtype(dtype))


def _scale(x: Array, factor: float) -> Array:
    _needs_float(x)
    return np.asarray(x * np.asarray(factor, dtype=x.dtype), dtype=x.dtype)


def _normalize(x: Array, mean: list[float], std: list[float]) -> Array:
    _needs_float(x)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    m = np.asarray(mean, dtype=x.dtype).reshape(shape)
    s = np.asarray(std, dtype=x.dtype).reshape(shape)
    return np.asarray((x - m) / s)


def _needs_float(x: Array) -> None:
    # A factor such as 1/16 is 0 as a whole number.
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError("cast it to float32 first")


def _reshape(x: Array, shape: list[int]) -> Array:
    return x.reshape(shape)


def _transpose(x: Array, order: list[int]) -> Array:
    return x.transpose(order)


STEPS: dict[str, Callable[..., Array]] = {
    "cast": _cast,
    "scale": _scale,
    "normalize": _normalize,
    "reshape": _reshape,
    "transpose": _transpose,
}


def check_steps(steps: Iterable[Mapping[str, Any]]) -> None:
    """Raise InputError if a step is unknown or its arguments are not those it takes; looks at no data.

    Example:
        >>> check_steps([{"op": "scale", "by": 2}])
        Traceback (most recent call last):
        deepseek_r1.core.errors.InputError: preprocessing step 0 (scale) takes ['factor']; given ['by'].
    """
    for number, step in enumerate(steps):
        name = step.get("op")
        if name not in STEPS:
            raise InputError(f"preprocessing step {number} is {name!r}; known steps: {', '.join(STEPS)}.")
        takes, given = list(inspect.signature(STEPS[name]).parameters)[1:], [k for k in step if k != "op"]
        if set(takes) != set(given):
            raise InputError(f"preprocessing step {number} ({name}) takes {takes}; given {given}.")


def preprocess(steps: Iterable[Mapping[str, Any]], array: Any) -> Array:
    """Apply the steps in order.

    Steps: `{"op": "cast", "dtype": "float32"}`, `{"op": "scale", "factor": f}`,
    `{"op": "normalize", "mean": [...], "std": [...]}` (axis 1 is the channel), `{"op": "reshape", "shape": [...]}`,
    `{"op": "transpose", "order": [...]}`.

    Raises:
        InputError: an unknown step, or one that does not fit the data; the message names the step.

    Example:
        >>> preprocess([{"op": "cast", "dtype": "float32"}, {"op": "scale", "factor": 0.5}], [[2, 4]]).tolist()
        [[1.0, 2.0]]
    """
    x = np.asarray(array)
    steps = list(steps)
    check_steps(steps)
    for number, step in enumerate(steps):
        name = step["op"]
        arguments = {k: v for k, v in step.items() if k != "op"}
        try:
            x = STEPS[name](x, **arguments)
        except (TypeError, ValueError) as e:
            raise InputError(
                f"preprocessing step {number} ({name}) does not fit data of shape {x.shape} and type {x.dtype}: {e}"
            ) from e
    return x

"""From raw data to what a model takes, as a list of plain steps that travels in the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import InputError

Array = NDArray[Any]


def _cast(x: Array, dtype: str) -> Array:
    return x.astype(np.dtype(dtype))


def _scale(x: Array, factor: float) -> Array:
    return np.asarray(x * np.asarray(factor, dtype=x.dtype), dtype=x.dtype)


def _normalize(x: Array, mean: list[float], std: list[float]) -> Array:
    shape = (1, -1) + (1,) * (x.ndim - 2)
    m = np.asarray(mean, dtype=x.dtype).reshape(shape)
    s = np.asarray(std, dtype=x.dtype).reshape(shape)
    return np.asarray((x - m) / s)


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
    for number, step in enumerate(steps):
        name = step.get("op")
        if name not in STEPS:
            raise InputError(f"preprocessing step {number} is {name!r}; known steps: {', '.join(STEPS)}.")
        arguments = {k: v for k, v in step.items() if k != "op"}
        try:
            x = STEPS[name](x, **arguments)
        except (TypeError, ValueError) as e:
            raise InputError(
                f"preprocessing step {number} ({name}) does not fit data of shape {x.shape} and type {x.dtype}: {e}"
            ) from e
    return x

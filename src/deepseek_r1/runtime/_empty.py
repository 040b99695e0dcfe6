"""Answers to a batch of no rows, without giving one to a runtime's kernels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core import InputError

Array = NDArray[Any]


def run_empty(
    run: Callable[[Mapping[str, Array]], list[Array]],
    feeds: Mapping[str, Array],
    batch_inputs: Collection[str],
    batch_outputs: Sequence[bool],
) -> list[Array]:
    """Outputs of no rows, by running one row of zeros and dropping it.

    Some kernels give wrong shapes for an empty batch, and some (ONNX Runtime's LSTM, as of 1.31) end the process.

    Args:
        batch_inputs: names of the inputs whose first dimension is a batch of any size.
        batch_outputs: for each output whether its first dimension is.

    Raises:
        InputError: something else than a batch is empty.
    """
    full = {}
    for name, value in feeds.items():
        if name not in batch_inputs or value.shape[0] != 0 or 0 in value.shape[1:]:
            raise InputError(f"input {name!r} of shape {value.shape} has no elements; only a batch may be empty.")
        full[name] = np.zeros((1, *value.shape[1:]), dtype=value.dtype)
    return [out[:0] if cut else out for out, cut in zip(run(full), batch_outputs, strict=True)]

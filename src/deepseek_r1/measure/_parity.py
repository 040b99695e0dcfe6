"""How far two sets of arrays lie apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core import InputError


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Distance of a candidate from its reference, over all outputs.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: `max_abs` over the largest absolute reference value.
        cosine: smallest cosine similarity of an output, flattened.
        sqnr_db: 10 log10(signal power / error power), infinite for equal arrays.
        top1: share of rows whose largest entry is in the same place (first output, last axis).
    """

    max_abs: float
    max_rel: float
    cosine: float
    sqnr_db: float
    top1: float


def compare(reference: Sequence[Any], candidate: Sequence[Any]) -> Parity:
    """Compare outputs pairwise in float64. NaN or infinity on one side only makes every distance infinite.

    Raises:
        InputError: different numbers of outputs or different shapes.

    Example:
        >>> compare([np.array([[1.0, 2.0]])], [np.array([[1.0, 2.5]])]).max_abs
        0.5
    """
    if len(reference) != len(candidate):
        raise InputError(f"{len(reference)} reference outputs against {len(candidate)}; the numbers must be equal.")
    max_abs, max_rel, cosine, signal, noise = 0.0, 0.0, 1.0, 0.0, 0.0
    for number, (a, b) in enumerate(zip(reference, candidate)):
        x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
        if x.shape != y.shape:
            raise InputError(f"output {number}: shape {x.shape} against {y.shape}.")
        if x.size == 0:
            continue
        if not np.array_equal(np.isfinite(x), np.isfinite(y)):
            return Parity(max_abs=math.inf, max_rel=math.inf, cosine=-1.0, sqnr_db=-math.inf, top1=0.0)
        finite = np.isfinite(x)
        x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
        difference = float(np.max(np.abs(x - y)))
        max_abs = max(max_abs, difference)
        max_rel = max(max_rel, difference / max(float(np.max(np.abs(x))), 1e-30))
        norm = float(np.linalg.norm(x) * np.linalg.norm(y))
        cosine = min(cosine, float(np.vdot(x, y)) / norm if norm else 1.0)
        signal += float(np.sum(x * x))
        noise += float(np.sum((x - y) ** 2))
    sqnr = math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
    top1 = _top1(np.asarray(reference[0]), np.asarray(candidate[0])) if reference else 1.0
    return Parity(max_abs=max_abs, max_rel=max_rel, cosine=cosine, sqnr_db=sqnr, top1=top1)


def _top1(a: Any, b: Any) -> float:
    if a.ndim == 0 or a.size == 0:
        return 1.0
    return float(np.mean(np.argmax(a, axis=-1) == np.argmax(b, axis=-1)))

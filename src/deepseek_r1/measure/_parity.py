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
        signal: sum of squares of the reference; noise: of the differences; rows: of the first output.
    """

    max_abs: float
    max_rel: float
    cosine: float
    sqnr_db: float
    top1: float
    signal: float = 0.0
    noise: float = 0.0
    rows: int = 0


def pool(parts: Sequence[Parity]) -> Parity:
    """The parity over several batches: the worst distances, the ratio of the summed powers, the share of all rows.

    Raises:
        InputError: no parts.

    Example:
        >>> a, b = compare([np.eye(2)], [np.eye(2)]), compare([np.eye(2)], [1 - np.eye(2)])
        >>> pool([a, b]).top1
        0.5
    """
    if not parts:
        raise InputError("pool needs at least one parity.")
    signal, noise, rows = sum(p.signal for p in parts), sum(p.noise for p in parts), sum(p.rows for p in parts)
    return Parity(
        max_abs=max(p.max_abs for p in parts),
        max_rel=max(p.max_rel for p in parts),
        cosine=min(p.cosine for p in parts),
        sqnr_db=_decibel(signal, noise),
        top1=sum(p.top1 * p.rows for p in parts) / rows if rows else 1.0,
        signal=signal,
        noise=noise,
        rows=rows,
    )


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(signal, 1e-300) / noise) if math.isfinite(noise) else -math.inf


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
        if not np.array_equal(np.where(np.isfinite(x), 0, x), np.where(np.isfinite(y), 0, y), equal_nan=True):
            return Parity(
                max_abs=math.inf, max_rel=math.inf, cosine=-1.0, sqnr_db=-math.inf, top1=0.0,
                noise=math.inf, rows=_rows(x),
            )  # fmt: skip
        finite = np.isfinite(x)
        x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
        difference = float(np.max(np.abs(x - y)))
        max_abs = max(max_abs, difference)
        max_rel = max(max_rel, difference / max(float(np.max(np.abs(x))), 1e-30))
        norm = float(np.linalg.norm(x) * np.linalg.norm(y))
        cosine = min(cosine, float(np.vdot(x, y)) / norm if norm else 1.0)
        signal += float(np.sum(x * x))
        noise += float(np.sum((x - y) ** 2))
    first = np.asarray(reference[0]) if reference else np.zeros(0)
    return Parity(
        max_abs=max_abs,
        max_rel=max_rel,
        cosine=cosine,
        sqnr_db=_decibel(signal, noise),
        top1=_top1(first, np.asarray(candidate[0])) if reference else 1.0,
        signal=signal,
        noise=noise,
        rows=_rows(first),
    )


def _rows(a: Any) -> int:
    return int(np.prod(a.shape[:-1])) if a.ndim and a.size else 0


def _top1(a: Any, b: Any) -> float:
    if a.ndim == 0 or a.size == 0:
        return 1.0
    return float(np.mean(np.argmax(a, axis=-1) == np.argmax(b, axis=-1)))

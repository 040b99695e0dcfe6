"""Differences between two who were judged on the same samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Losses = Sequence[float] | npt.NDArray[np.float64]


def mean_difference(
    ours: Losses, other: Losses, clusters: Sequence[int] = (), *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ours - other with its bootstrap interval: (low, mean, high).

    Args:
        clusters: for each sample the number of what it is from; whole clusters are drawn, as samples of one
            photograph are no independent evidence. Empty: every sample is its own.

    Source: percentile bootstrap over clusters, Efron and Tibshirani, An Introduction to the Bootstrap, 1993.
    """
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    _, group = np.unique(clusters, return_inverse=True) if len(clusters) else (None, np.arange(len(difference)))
    sums, counts = np.bincount(group, difference), np.bincount(group)
    drawn = np.random.default_rng(seed).integers(0, len(sums), size=(2000, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(difference.mean()), float(high)

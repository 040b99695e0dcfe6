"""Length buckets: few padded lengths with little padding, and batches of samples that share one. Knows lengths only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core import ConfigError, InputError

#: No table of the search is larger than this many classes of length squared; longer ranges are made coarser.
_MOST_CLASSES = 2048


def choose_shapes(lengths: Any, *, max_shapes: int = 8, multiple: int = 64) -> tuple[int, ...]:
    """The padded lengths, at most `max_shapes` multiples of `multiple`, with the least padding for these samples.

    Solved exactly by dynamic programming over the histogram of lengths (for more than 2,048 different multiples, over
    neighbours joined). The last shape holds the longest sample.

    Args:
        lengths: a sequence of integers >= 1.

    Raises:
        ConfigError: `max_shapes` or `multiple` below 1.
        InputError: no lengths, or one below 1.

    Example:
        >>> choose_shapes([10, 12, 60, 500], max_shapes=2, multiple=16)
        (64, 512)
    """
    for name, value in (("max_shapes", max_shapes), ("multiple", multiple)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"choose_shapes({name}={value!r}): an integer >= 1 is needed.")
    sizes = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if len(sizes) == 0 or sizes.min() < 1:
        raise InputError("choose_shapes: lengths of at least one sample are needed, each >= 1.")
    step = multiple * -(-int(sizes.max()) // (multiple * _MOST_CLASSES))
    histogram = np.bincount(-(-sizes // step))
    classes = np.flatnonzero(histogram)
    below = np.concatenate([[0], np.cumsum(histogram[classes])])
    return tuple(int(classes[end - 1]) * step for end in _cuts(classes, below, min(max_shapes, len(classes))))


def _cuts(classes: np.ndarray, below: np.ndarray, most: int) -> list[int]:
    """Ends of the cheapest `most` stretches of classes, each as costly as its samples times its last class."""
    count = len(classes)
    # cost[i]: the least cost of the first i classes with the stretches so far.
    cost = np.full(count + 1, np.inf)
    cost[0] = 0
    came: list[np.ndarray] = []
    for _ in range(most):
        new, origin = np.full(count + 1, np.inf), np.zeros(count + 1, np.int64)
        for end in range(1, count + 1):
            options = cost[:end] + (below[end] - below[:end]) * classes[end - 1]
            origin[end] = int(np.argmin(options))
            new[end] = options[origin[end]]
        cost = new
        came.append(origin)
    ends, at = [], count
    for origin in reversed(came):
        ends.append(at)
        at = int(origin[at])
    return ends[::-1]


def batch_sizes(shapes: Sequence[int], batch_size: int | None, max_tokens: int | None) -> tuple[int, ...]:
    """Samples in a batch of each shape: `batch_size`, or as many as `max_tokens` hold, or the smaller of both.

    Raises:
        ConfigError: the longest shape has more tokens than `max_tokens`.

    Example:
        >>> batch_sizes((64, 512), None, 1024)
        (16, 2)
    """
    if max_tokens is None:
        assert batch_size is not None, "one of the two is given"
        return (batch_size,) * len(shapes)
    if shapes[-1] > max_tokens:
        raise ConfigError(
            f"max_tokens={max_tokens} is less than one sample of the padded length {shapes[-1]}; raise it, or give a "
            "smaller max_length."
        )
    return tuple(min(max_tokens // shape, batch_size or max_tokens) for shape in shapes)


def bucket_batches(
    lengths: np.ndarray, shapes: Sequence[int], sizes: Sequence[int], *, drop_last: bool
) -> list[tuple[int, np.ndarray]]:
    """Batches (padded length, positions in `lengths`), every position once, shape after shape.

    What does not fill a batch goes up into the next shape, so that one batch at most is not full: the last, which
    `drop_last` drops. How many batches there are depends on how often each length occurs only.

    Raises:
        InputError: a length beyond the last shape.

    Example:
        >>> bucket_batches(np.array([3, 9, 2, 4]), (4, 16), (2, 2), drop_last=False)
        [(4, array([0, 2])), (16, array([1, 3]))]
    """
    bucket = np.searchsorted(np.asarray(shapes), lengths)
    if len(lengths) and bucket.max() >= len(shapes):
        longest = int(np.argmax(lengths))
        raise InputError(f"a sample has {lengths[longest]} tokens, but the longest shape is {shapes[-1]}.")
    found: list[tuple[int, np.ndarray]] = []
    rest = np.empty(0, np.int64)
    for i, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        mine = np.sort(np.concatenate([rest, np.flatnonzero(bucket == i)]))
        whole = len(mine) // size * size
        found += [(shape, mine[at : at + size]) for at in range(0, whole, size)]
        rest = mine[whole:]
    if len(rest) and not drop_last:
        found.append((shapes[-1], rest))
    return found

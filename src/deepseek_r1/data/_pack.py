"""Packing: which samples share a row, so that rows of one length are nearly full. Knows lengths only.

Best-fit decreasing (D. Johnson, Near-optimal bin packing algorithms, MIT, 1973), on the histogram of lengths: rows
with the same contents are one group with a count, so that the work grows with the number of different lengths and
hardly with the number of samples.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core import ConfigError, InputError


@dataclass(frozen=True)
class Packing:
    """Samples by row.

    Attributes:
        order: every sample's index once, row after row; within a row in ascending order.
        starts: where each row begins in `order`, and its end: row r is `order[starts[r]:starts[r + 1]]`.
        fill: share of the rows' tokens that samples take, 0 to 1.
    """

    order: np.ndarray
    starts: np.ndarray
    fill: float

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.order[self.starts[row] : self.starts[row + 1]]


def pack_lengths(lengths: Any, max_length: int) -> Packing:
    """Put samples of the given lengths into as few rows of `max_length` tokens as best-fit decreasing finds.

    Never worse than 11/9 of the fewest rows possible plus one; any two rows together hold more than `max_length`.
    The number of rows depends on how often each length occurs only, not on the order of the samples.

    Args:
        lengths: a sequence of integers, 1 to `max_length` each.
        max_length: tokens of a row.

    Raises:
        ConfigError: a `max_length` below 1.
        InputError: a length outside 1 to `max_length`; the sample is named.

    Example:
        >>> packing = pack_lengths([5, 3, 4, 8], max_length=8)
        >>> [packing[r].tolist() for r in range(len(packing))]
        [[3], [0, 1], [2]]
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int | np.integer) or max_length < 1:
        raise ConfigError(f"pack_lengths(max_length={max_length!r}): an integer >= 1 is needed.")
    sizes = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if len(sizes) == 0:
        return Packing(np.empty(0, np.int64), np.zeros(1, np.int64), 1.0)
    bad = np.flatnonzero((sizes < 1) | (sizes > max_length))
    if len(bad):
        raise InputError(f"sample {bad[0]} has {sizes[bad[0]]} tokens; rows of {max_length} take 1 to {max_length}.")
    row_of, rows = _assign(sizes, _fill_rows(np.bincount(sizes), int(max_length)))
    order = np.argsort(row_of, kind="stable")
    starts = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows), out=starts[1:])
    return Packing(order, starts, float(sizes.sum() / (rows * max_length)))


def _fill_rows(histogram: np.ndarray, max_length: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Groups of rows with the same contents: (rows, [(length, samples of it in each row), ...])."""
    contents: list[tuple[int, int, int]] = []  # (what was there before, length, samples), linked backwards
    spaces: list[int] = []  # the free spaces for which there are rows, ascending
    rows: dict[int, list[tuple[int, int]]] = {}  # free space -> [(rows, contents)]

    def put(space: int, count: int, before: int, length: int, each: int) -> None:
        contents.append((before, length, each))
        if space not in rows:
            insort(spaces, space)
            rows[space] = []
        rows[space].append((count, len(contents) - 1))

    for size in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[size])
        while left:
            at = bisect_left(spaces, size)
            if at == len(spaces):
                _open_rows(put, left, size, max_length)
                break
            space = spaces[at]
            count, before = rows[space].pop()
            each = space // size
            whole = min(count, left // each)
            if whole:
                put(space - each * size, whole, before, size, each)
                left -= whole * each
                count -= whole
            if count and left and left < each:
                put(space - left * size, 1, before, size, left)
                count, left = count - 1, 0
            if count:
                rows[space].append((count, before))
            elif not rows[space]:
                del rows[space], spaces[bisect_left(spaces, space)]
    return [(count, _unlink(contents, last)) for groups in rows.values() for count, last in groups]


def _open_rows(put: Callable[[int, int, int, int, int], None], left: int, size: int, max_length: int) -> None:
    each = min(left, max_length // size)
    whole, rest = divmod(left, each)
    put(max_length - each * size, whole, -1, size, each)
    if rest:
        put(max_length - rest * size, 1, -1, size, rest)


def _unlink(contents: list[tuple[int, int, int]], last: int) -> list[tuple[int, int]]:
    found = []
    while last >= 0:
        last, size, each = contents[last]
        found.append((size, each))
    return found


def _assign(sizes: np.ndarray, groups: list[tuple[int, list[tuple[int, int]]]]) -> tuple[np.ndarray, int]:
    """The row of each sample: samples of one length take the places for it in turn."""
    counts = np.array([count for count, _ in groups], dtype=np.int64)
    first_row = np.concatenate([[0], np.cumsum(counts)])
    entries = np.array([(size, g, each) for g, (_, parts) in enumerate(groups) for size, each in parts], dtype=np.int64)
    entries = entries[np.argsort(entries[:, 0], kind="stable")]
    places = counts[entries[:, 1]] * entries[:, 2]
    entry = np.repeat(np.arange(len(entries)), places)
    within = np.arange(len(entry)) - np.repeat(np.cumsum(places) - places, places)
    # Short integers are sorted by radix, four times as fast.
    small = sizes.astype(np.uint16) if sizes.max() < 2**16 else sizes
    row_of = np.empty(len(sizes), np.int64)
    row_of[np.argsort(small, kind="stable")] = first_row[entries[entry, 1]] + within // entries[entry, 2]
    return row_of, int(first_row[-1])


def pack_stream(
    samples: Iterable[Any], length: Callable[[Any], int], max_length: int, *, window: int = 64
) -> Iterator[list[Any]]:
    """Rows of samples out of a stream, of which about `window` rows are held in memory.

    The held samples are packed together; the fuller half of the rows is given, and the row with the sample that has
    waited longest, so that none waits for ever. The others are packed again with what comes next.

    Args:
        length: tokens of a sample, 1 to `max_length`.
        window: rows' worth of tokens to collect before packing, at least 1.

    Raises:
        ConfigError: a window below 1.
        InputError: a length outside 1 to `max_length`.

    Example:
        >>> list(pack_stream(["aaaaa", "bbb", "cccc", "dd"], len, 8, window=1))
        [['aaaaa', 'bbb'], ['cccc', 'dd']]
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ConfigError(f"pack_stream(window={window!r}): an integer >= 1 is needed.")
    held: list[Any] = []
    sizes: list[int] = []
    tokens = 0
    for sample in samples:
        held.append(sample)
        sizes.append(length(sample))
        tokens += sizes[-1]
        if tokens >= window * max_length:
            packing = pack_lengths(sizes, max_length)
            given = _fuller_half(packing, np.asarray(sizes))
            yield from ([held[i] for i in packing[r]] for r in given)
            gone = {int(i) for r in given for i in packing[r]}
            held = [sample for i, sample in enumerate(held) if i not in gone]
            sizes = [size for i, size in enumerate(sizes) if i not in gone]
            tokens = sum(sizes)
    packing = pack_lengths(sizes, max_length)
    yield from ([held[i] for i in packing[r]] for r in _by_first(packing, range(len(packing))))


def _fuller_half(packing: Packing, sizes: np.ndarray) -> list[int]:
    filled = np.add.reduceat(sizes[packing.order], packing.starts[:-1])
    fullest = np.argsort(-filled, kind="stable")[: max(1, len(packing) // 2)].tolist()
    oldest = min(range(len(packing)), key=lambda r: packing[r][0])
    return _by_first(packing, {oldest, *fullest})


def _by_first(packing: Packing, rows: Iterable[int]) -> list[int]:
    """Rows in the order of their first samples."""
    return sorted(rows, key=lambda r: int(packing[r][0]))

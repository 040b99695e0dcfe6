"""How samples become batches: the options, and the plan of a pass for datasets whose lengths are known.

Knows lengths and orders of samples. Reads no samples, and knows no workers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from ..core import ConfigError, InputError
from ._buckets import batch_sizes, bucket_batches, choose_shapes
from ._pack import Packing, pack_lengths
from ._reader import too_long_error
from ._samples import Length

MODES = ("auto", "fixed", "buckets", "packed")
TOO_LONG = ("error", "truncate", "skip")


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Options of a DSDataLoader on samples of different lengths; see there."""

    batching: str = "fixed"
    length: Length = None
    max_length: int | None = None
    max_tokens: int | None = None
    max_shapes: int = 8
    multiple: int = 64
    shapes: tuple[int, ...] | None = None
    too_long: str = "error"
    padding: Mapping[str | int, float] = field(default_factory=dict)
    model_shifts_labels: bool = False
    window: int = 64

    def __post_init__(self) -> None:
        for name, allowed in (("batching", MODES), ("too_long", TOO_LONG)):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"DSDataLoader({name}={getattr(self, name)!r}): one of {', '.join(map(repr, allowed))} is needed."
                )
        for name in ("max_length", "max_tokens", "max_shapes", "multiple", "window"):
            value = getattr(self, name)
            if value is None and name in ("max_length", "max_tokens"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"DSDataLoader({name}={value!r}): an integer >= 1 is needed.")
        if self.shapes is not None:
            object.__setattr__(self, "shapes", _checked_shapes(self.shapes))
        if self.batching == "fixed" and (given := self._changed()):
            raise ConfigError(
                f"DSDataLoader({given[0]}=...) belongs to length buckets or packing; give batching='buckets', 'packed' "
                "or 'auto' too."
            )
        if self.batching == "packed" and self.max_length is None:
            raise ConfigError("DSDataLoader(batching='packed') needs max_length=, the tokens of a row.")
        if self.batching == "packed" and (self.max_tokens is not None or self.shapes is not None):
            raise ConfigError(
                "max_tokens and shapes are for batching='buckets'; packed rows have max_length tokens, batch_size rows "
                "a batch."
            )

    def _changed(self) -> list[str]:
        plain = Batching.__dataclass_fields__
        return [
            f.name for f in fields(self)
            if f.name not in ("batching", "padding") and getattr(self, f.name) != plain[f.name].default
        ] + (["padding"] if self.padding else [])  # fmt: skip


def _checked_shapes(shapes: Any) -> tuple[int, ...]:
    found = tuple(shapes)
    if not found or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in found):
        raise ConfigError(f"DSDataLoader(shapes={shapes!r}): padded lengths are needed, integers >= 1.")
    return tuple(sorted(set(found)))


class Plan:
    """Which samples go together, for samples of known lengths.

    Args:
        lengths: of every sample of the dataset, in tokens.
        batch_size: samples (packed: rows) of a batch; None where `max_tokens` alone decides.

    Attributes:
        max_length: the longest that a sample may be.
        shapes: padded lengths.
        most_samples: of a row, over all rows; 1 for buckets.
        fill: share of the batches' tokens that are samples', for one pass over the whole dataset.
        largest: for buckets, padded length and samples of the batch with most tokens in such a pass; None for packed
            rows, which are all alike.

    Raises:
        InputError: a sample without tokens, or one that is too long where that is an error.
    """

    def __init__(self, lengths: np.ndarray, options: Batching, batch_size: int | None, drop_last: bool) -> None:
        self.options, self.batch_size, self.drop_last = options, batch_size, drop_last
        self.packed = options.batching == "packed"
        self.max_length = self._longest(lengths)
        empty, long = np.flatnonzero(lengths < 1), np.flatnonzero(lengths > self.max_length)
        if len(empty):
            raise InputError(f"sample {empty[0]} has no tokens (and {len(empty) - 1} others); leave such samples out.")
        if len(long) and options.too_long == "error":
            raise too_long_error(int(long[0]), int(lengths[long[0]]), self.max_length)
        self.too_long = len(long)
        self.lost_tokens = int(lengths[long].sum()) - (self.max_length * len(long) if options.too_long != "skip" else 0)
        self._kept = lengths <= self.max_length if options.too_long == "skip" else np.ones(len(lengths), bool)
        self.lengths = np.minimum(lengths, self.max_length)
        whole = self.lengths[self._kept]
        if not len(whole):
            raise InputError(f"every sample has more than max_length={self.max_length} tokens; none is left.")
        self.shapes = (self.max_length,) if self.packed else self._choose(whole)
        self.sizes = batch_sizes(self.shapes, batch_size, options.max_tokens)
        self.largest: tuple[int, list[int]] | None = None
        self.most_samples, self.fill, self.batches = self._describe(whole)

    def _longest(self, lengths: np.ndarray) -> int:
        ends = [self.options.max_length, None if self.options.shapes is None else self.options.shapes[-1]]
        return min([end for end in ends if end is not None], default=int(lengths.max(initial=1)))

    def _choose(self, lengths: np.ndarray) -> tuple[int, ...]:
        if self.options.shapes is not None:
            return self.options.shapes
        chosen = choose_shapes(lengths, max_shapes=self.options.max_shapes, multiple=self.options.multiple)
        return (*chosen[:-1], min(chosen[-1], self.max_length) if self.options.max_length else chosen[-1])

    def _describe(self, lengths: np.ndarray) -> tuple[int, float, int]:
        if self.packed:
            packing = pack_lengths(lengths, self.max_length)
            return int(np.diff(packing.starts).max()), packing.fill, self._count(len(packing))
        batches = bucket_batches(lengths, self.shapes, self.sizes, drop_last=self.drop_last)
        padded = sum(shape * len(mine) for shape, mine in batches)
        real = sum(int(lengths[mine].sum()) for _, mine in batches)
        if batches:
            shape, most = max(batches, key=lambda batch: (batch[0] * len(batch[1]), batch[0]))
            self.largest = shape, np.flatnonzero(self._kept)[most].tolist()
        return 1, real / max(padded, 1), len(batches)

    def _count(self, rows: int) -> int:
        size = self.sizes[0]
        return rows // size if self.drop_last else -(-rows // size)

    def batches_of(self, order: np.ndarray, mixed: bool) -> list[tuple[int, Any]]:
        """The batches of a pass: (padded length, keys), where packed rows are tuples of keys.

        Args:
            order: samples in the order in which they were drawn.
            mixed: whether batches come in a random order, which follows from `order` alone; otherwise in the order
                of their first samples.
        """
        order = order[self._kept[order]]
        lengths = self.lengths[order]
        draw = np.random.default_rng(zlib.crc32(order.tobytes())) if mixed else None
        if self.packed:
            return self._rows(order, pack_lengths(lengths, self.max_length), draw)
        batches = bucket_batches(lengths, self.shapes, self.sizes, drop_last=self.drop_last)
        turns = draw.permutation(len(batches)) if draw else np.argsort([mine[0] for _, mine in batches], kind="stable")
        return [(batches[i][0], order[batches[i][1]].tolist()) for i in turns]

    def _rows(self, order: np.ndarray, packing: Packing, draw: np.random.Generator | None) -> list[tuple[int, Any]]:
        count = len(packing)
        turns = draw.permutation(count) if draw else np.argsort(packing.order[packing.starts[:-1]], kind="stable")
        keys, starts = order[packing.order].tolist(), packing.starts.tolist()
        rows = [tuple(keys[starts[r] : starts[r + 1]]) for r in turns.tolist()]
        size = self.sizes[0]
        stop = len(rows) // size * size if self.drop_last else len(rows)
        return [(self.max_length, rows[at : at + size]) for at in range(0, stop, size)]

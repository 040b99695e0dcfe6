"""What runs where samples are read, in the process itself or in a worker: task in, batch out.

Knows datasets and how a batch is put together. Knows nothing about orders, passes or worker counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..core import InputError
from ._assemble import Padding, pack_batch, pad_batch
from ._generators import kept_process_state, mixed_seed, seed_process
from ._pack import pack_stream
from ._samples import Layout, Length, cut, find_layout


class Task(NamedTuple):
    """One batch to be read.

    Attributes:
        epoch, number: which pass, and which batch of it, both from 0.
        keys: what the dataset is asked for: a list of keys, a list of rows of them, or a single key.
        length: what its samples are padded to.
    """

    epoch: int
    number: int
    keys: Any
    length: int = 0


class Collated:
    """Batches as the loader's `collate_fn` makes them."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any, task: Task) -> Any:
        return self.collate(samples)


class Padded:
    """Batches of one padded length."""

    def __init__(self, layout: Layout, padding: Padding, max_length: int) -> None:
        self.layout, self.padding, self.max_length = layout, padding, max_length

    def __call__(self, samples: Any, task: Task) -> Any:
        fit = [_fitting(sample, self.layout, self.max_length) for sample in samples]
        longest = max(self.layout.size(sample) for sample in fit)
        if longest > task.length:
            raise InputError(
                f"a sample has {longest} tokens, more than the {task.length} of its bucket: it is longer now than when "
                "the batches were planned. Length buckets need a dataset whose samples keep their lengths."
            )
        return pad_batch(fit, self.layout, task.length, self.padding)


class Packed:
    """Batches of rows with several samples each."""

    def __init__(self, layout: Layout, padding: Padding, max_length: int, most_samples: int) -> None:
        self.layout, self.padding, self.max_length, self.most = layout, padding, max_length, most_samples

    def __call__(self, samples: Any, task: Task) -> Any:
        fit = iter([_fitting(sample, self.layout, self.max_length) for sample in samples])
        rows = [[next(fit) for _ in row] for row in task.keys]
        return pack_batch(rows, self.layout, self.max_length, self.padding, self.most)


def _fitting(sample: Any, layout: Layout, max_length: int) -> Any:
    return sample if layout.size(sample) <= max_length else cut(sample, layout, max_length)


class Reader(Dataset[Any]):
    """A dataset whose keys are tasks and whose samples are batches.

    Args:
        batched: whether a task has a list of keys, or a single one.
        seed: each batch is read with the process's generators seeded from it, so that it depends neither on the
            process that reads it nor on the batches before; None leaves the generators alone.
    """

    def __init__(
        self, dataset: Any, assemble: Callable[[Any, Task], Any], *, batched: bool = True, seed: int | None = None
    ) -> None:
        self.dataset, self.assemble, self.batched, self.seed = dataset, assemble, batched, seed

    def __getitem__(self, task: Task) -> Any:
        follow_epoch(self.dataset, task.epoch)
        with self._seeded(task):
            return self.assemble(self._read(task), task)

    def _read(self, task: Task) -> Any:
        if not self.batched:
            return self._each([task.keys], task)[0]
        keys = [key for row in task.keys for key in row] if isinstance(self.assemble, Packed) else task.keys
        together = getattr(self.dataset, "__getitems__", None)
        return together(keys) if together else self._each(keys, task)

    def _each(self, keys: Any, task: Task) -> list[Any]:
        dataset, samples, key = self.dataset, [], None
        try:
            for key in keys:
                samples.append(dataset[key])
        except StopIteration as e:
            # Left alone it would end the pass without a word.
            raise InputError(
                f"the dataset raised StopIteration for sample {key!r}, which its length says it has; return every "
                "sample up to len(dataset), or correct __len__."
            ) from e
        except Exception as e:
            e.add_note(f"While sample {key!r} was read, for batch {task.number + 1} of pass {task.epoch + 1}.")
            raise
        return samples

    def _seeded(self, task: Task) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.seed is None else seeded(mixed_seed(self.seed, task.epoch, task.number))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The process's generators seeded inside the block, and afterwards, where it matters, as they were before."""
    if get_worker_info() is not None:
        seed_process(seed)
        yield
        return
    with kept_process_state():
        seed_process(seed)
        yield


def follow_epoch(dataset: Any, epoch: int) -> None:
    """Tell a dataset that has `set_epoch` which pass this is; in workers that live on, nobody else does."""
    set_epoch = getattr(dataset, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)


class Stream(IterableDataset[Any]):
    """Batches out of a dataset that can only be read from its beginning: packed rows, or length buckets.

    Attributes:
        shapes: padded lengths of the buckets; None packs rows.
        counts: samples that were too long, in this process.
    """

    def __init__(
        self, dataset: Any, *, length: Length, padding: Padding, max_length: int, rows: int, window: int,
        too_long: str, drop_last: bool, shapes: tuple[int, ...] | None = None, sizes: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.dataset, self.length, self.padding = dataset, length, padding
        self.max_length, self.rows, self.window = max_length, rows, window
        self.too_long, self.drop_last, self.shapes, self.sizes = too_long, drop_last, shapes, sizes
        self.counts = {"samples": 0, "too long": 0, "rows": 0, "tokens": 0, "row tokens": 0, "max length": max_length}

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.dataset)
        first: list[Any] = []
        for sample in samples:
            first.append(sample)
            if len(first) == 16:
                break
        if not first:
            return
        layout = find_layout(first, self.length)
        yield from (self._bucketed if self.shapes else self._packed)(self._fit([first, samples], layout), layout)

    def _fit(self, parts: list[Any], layout: Layout) -> Iterator[Any]:
        for part in parts:
            for sample in part:
                size = layout.size(sample)
                self.counts["samples"] += 1
                if size > self.max_length:
                    self.counts["too long"] += 1
                    if self.too_long == "error":
                        raise too_long_error(self.counts["samples"] - 1, size, self.max_length)
                    if self.too_long == "skip":
                        continue
                    sample = cut(sample, layout, self.max_length)
                elif size == 0:
                    raise InputError(f"sample {self.counts['samples'] - 1} of the stream has no tokens; leave it out.")
                yield sample

    def _packed(self, samples: Iterator[Any], layout: Layout) -> Iterator[Any]:
        batch: list[list[Any]] = []
        for row in pack_stream(samples, layout.size, self.max_length, window=self.window):
            batch.append(row)
            self.counts["tokens"] += sum(map(layout.size, row))
            self.counts["rows"] += 1
            self.counts["row tokens"] += self.max_length
            if len(batch) == self.rows:
                yield pack_batch(batch, layout, self.max_length, self.padding)
                batch = []
        if batch and not self.drop_last:
            yield pack_batch(batch, layout, self.max_length, self.padding)

    def _bucketed(self, samples: Iterator[Any], layout: Layout) -> Iterator[Any]:
        assert self.shapes is not None, "checked by the caller"
        held: list[list[Any]] = [[] for _ in self.shapes]
        for sample in samples:
            i = next(i for i, shape in enumerate(self.shapes) if layout.size(sample) <= shape)
            held[i].append(sample)
            if len(held[i]) == self.sizes[i]:
                yield pad_batch(held[i], layout, self.shapes[i], self.padding)
                held[i] = []
        rest: list[Any] = []
        for mine, shape, size in zip(held, self.shapes, self.sizes, strict=True):
            rest += mine
            while len(rest) >= size:
                yield pad_batch(rest[:size], layout, shape, self.padding)
                rest = rest[size:]
        if rest and not self.drop_last:
            yield pad_batch(rest, layout, self.shapes[-1], self.padding)


def too_long_error(sample: int, size: int, max_length: int) -> InputError:
    """The error for a sample beyond `max_length`."""
    return InputError(
        f"sample {sample} has {size} tokens, more than max_length={max_length}. Raise max_length, or say what becomes "
        'of such samples: too_long="truncate" or too_long="skip".'
    )


class WorkerStart:
    """What a worker does first: shows the user's dataset in `get_worker_info()`, then the user's own function."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker_id: int) -> None:
        info = get_worker_info()
        assert info is not None, "called in workers only"
        # The object refuses assignments, and knows only the dataset around the user's.
        object.__setattr__(info, "dataset", info.dataset.dataset)  # type: ignore[attr-defined]
        if self.then is not None:
            self.then(worker_id)


def as_is(batch: Any) -> Any:
    """The batch itself, for a loader whose dataset makes batches."""
    return batch

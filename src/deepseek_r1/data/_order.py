"""The tasks of a pass: which samples are read together, in the order that the samplers draw.

Knows a dataset's lengths and samplers. Holds no loader, so that a loader in the middle of a pass is freed at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import RandomSampler, SequentialSampler

from ..core import InputError
from ._batching import Batching, Plan
from ._generators import kept_process_state
from ._reader import Task, follow_epoch
from ._samples import Layout, distinct, find_layout, read_lengths


class Order:
    """What a map-style loader draws in a pass.

    Args:
        batch_size: samples (packed: rows) of a batch in length buckets and packing.

    Attributes:
        plan, layout: of the pass that was planned last; None before.
        lengths_s: seconds that the lengths took.
    """

    def __init__(
        self, dataset: Any, sampler: Any, batch_sampler: Any, options: Batching, batch_size: int | None, drop_last: bool
    ) -> None:
        self.dataset, self.sampler, self.batch_sampler = dataset, sampler, batch_sampler
        self.options, self.batch_size, self.drop_last = options, batch_size, drop_last
        self.plan: Plan | None = None
        self.layout: Layout | None = None
        self.lengths_s = 0.0
        self._planned = -1

    def planned(self, epoch: int) -> tuple[Plan, Layout]:
        """The plan of pass number `epoch`, and how samples are made; reads the lengths if they are not known."""
        changes = hasattr(self.dataset, "set_epoch")
        if self.plan is None or self.layout is None or (changes and self._planned != epoch):
            began = time.perf_counter()
            follow_epoch(self.dataset, epoch)
            with kept_process_state():
                lengths = read_lengths(self.dataset, self.options.length)
                if not len(lengths):
                    raise InputError("the dataset is empty (0 samples). Check the path or the split.")
                self.layout = find_layout([self.dataset[i] for i in distinct(lengths)], self.options.length)
            self.lengths_s = time.perf_counter() - began
            self.plan = Plan(lengths, self.options, self.batch_size, self.drop_last)
            self._planned = epoch
        return self.plan, self.layout

    def tasks(self, epoch: int) -> Iterator[Task]:
        """The tasks of pass number `epoch`; the samplers draw when the first one is asked for."""
        follow_epoch(self.dataset, epoch)
        if self.options.batching == "fixed":
            for number, keys in enumerate(self.sampler if self.batch_sampler is None else self.batch_sampler):
                yield Task(epoch, number, keys)
            return
        plan, _ = self.planned(epoch)
        order = np.fromiter((int(i) for i in self.sampler), np.int64)
        batches = plan.batches_of(order, mixed=not isinstance(self.sampler, SequentialSampler))
        for number, (length, keys) in enumerate(batches):
            yield Task(epoch, number, keys, length)

    def batches(self, epoch: int) -> int:
        """Batches of a planned pass. Raises TypeError where the sampler decides how many there are."""
        known = isinstance(self.sampler, SequentialSampler) or (
            isinstance(self.sampler, RandomSampler)
            and not self.sampler.replacement
            and self.sampler.num_samples == len(self.dataset)
        )
        if not known:
            raise TypeError(
                "how many batches there are depends on which samples the sampler draws; it is known after each pass."
            )
        return self.planned(epoch)[0].batches

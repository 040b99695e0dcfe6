"""`DSDataLoader`: torch's DataLoader with a seed, length buckets, packing, tuned workers and exact resumption.

Knows orders, plans and passes. Knows nothing about models or files.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ..core import ConfigError, InputError, Report
from ._ahead import OnDevice, checked_device
from ._arguments import check, resolved, tuned
from ._assemble import Padding
from ._batching import Batching, Plan
from ._buckets import batch_sizes
from ._generators import (
    kept_process_state,
    loader_state,
    process_state,
    same_process_state,
    set_loader_state,
    set_process_state,
)
from ._order import Order
from ._pass import Pass, Position, Tasks
from ._reader import Collated, Packed, Padded, Reader, Stream, Task, WorkerStart, as_is, follow_epoch
from ._samples import Length
from ._told import loader_report
from ._tuning import Setting

_TORCH = inspect.signature(DataLoader.__init__)
STATE_VERSION = 1


class DSDataLoader(DataLoader[Any]):
    """A drop-in for `torch.utils.data.DataLoader`: the same arguments, the same batches, and more where it is asked.

    Args:
        *args, **kwargs: as for `torch.utils.data.DataLoader`. `num_workers="auto"` begins without workers and tries
            some after a pass that waited for data; `prefetch_factor="auto"` likewise. Neither changes the order of
            the data, and a trial is kept only if the measured waiting falls. Each worker has a copy of the dataset.
        seed: decides the order of every pass, whatever else the process draws, and what the dataset and `collate_fn`
            draw from the generators of python, numpy and torch for a batch, in whichever process they run.
        device: "cuda" gives batches that are there already, copied through pinned memory on a stream of their own.
        batching: "fixed": as torch. "buckets": samples of about one length share a batch, padded to one of a few
            lengths. "packed": several samples share a row of `max_length`; the batch is a dict with `sequence_ids`
            (1, 2, ... within a row, 0 for padding) and `position_ids` [B, L]. "auto": "buckets" if the first samples
            differ in length and there is no `collate_fn`, else "fixed". For packed rows `batch_size` counts rows.
        length: field with a sample's tokens, or a function that gives its length; None looks for it. A dataset with
            an attribute `lengths` is asked for that; otherwise every sample is read once before the first pass.
        max_length: tokens of a packed row; the longest sample in buckets.
        max_tokens: for buckets, tokens of a batch, padding included; a `batch_size` that is given too is the most.
        max_shapes, multiple: for buckets, how many padded lengths there may be, and what they are multiples of.
        shapes: for buckets, the padded lengths themselves.
        too_long: samples beyond `max_length`: "error", "truncate" or "skip". The report counts them.
        padding: filling by field. Without it: -100 for labels (fields "labels", "label", second of a tuple) of whole
            numbers, 0 for the rest.
        model_shifts_labels: for packed rows, set a sample's first label to -100, because the model compares a
            token's label with its prediction at the token before, which belongs to another sample.
        window: for packing a stream (`IterableDataset`), rows' worth of tokens that are held.

    Attributes:
        passes_begun: how often the loader has been iterated over; the number of the next pass.
        batching: what "auto" became.

    Raises:
        ConfigError: an option that is not allowed, or two that exclude each other.
        InputError: samples in which no tokens are found, that have none, or that are too long (when they are read).

    Example:
        >>> texts = [{"input_ids": list(range(n))} for n in (5, 3, 4, 8)]
        >>> loader = DSDataLoader(texts, batching="packed", max_length=8, batch_size=3)
        >>> for batch in loader:
        ...     print(batch["sequence_ids"].tolist())
        [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]
        >>> a = DSDataLoader(list(range(6)), batch_size=3, shuffle=True, seed=1)
        >>> b = DSDataLoader(list(range(6)), batch_size=3, shuffle=True, seed=1)
        >>> [batch.tolist() for batch in a] == [batch.tolist() for batch in b]
        True
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Any,
        *args: Any,
        seed: int | None = None,
        device: torch.device | str | None = None,
        batching: str = "fixed",
        length: Length = None,
        max_length: int | None = None,
        max_tokens: int | None = None,
        max_shapes: int = 8,
        multiple: int = 64,
        shapes: tuple[int, ...] | None = None,
        too_long: str = "error",
        padding: Mapping[str | int, float] | None = None,
        model_shifts_labels: bool = False,
        window: int = 64,
        **kwargs: Any,
    ) -> None:
        given = dict(_TORCH.bind(self, dataset, *args, **kwargs).arguments)
        given.pop("self")
        options = Batching(
            batching=batching, length=length, max_length=max_length, max_tokens=max_tokens, max_shapes=max_shapes,
            multiple=multiple, shapes=shapes, too_long=too_long, padding=padding or {},
            model_shifts_labels=model_shifts_labels, window=window,
        )  # fmt: skip
        options, why = resolved(options, given)
        check(given, options, seed)
        if seed is not None:
            given["generator"] = torch.Generator().manual_seed(seed)
        place = checked_device(device)
        if place is not None:
            given["pin_memory"] = True
        plain, tuner, later = tuned(given)
        super().__init__(**plain)
        vars(self).update(later)
        self.seed, self.device, self.batching, self.passes_begun = seed, place, options.batching, 0
        if options.max_tokens is not None:
            # No one number is right, and whoever asks for it must not take it for one.
            vars(self)["batch_size"] = None
        self._options, self._why, self._tuner = options, why, tuner
        self._auto = tuner.active
        self._cap = given.get("batch_size", 1) if options.max_tokens is None else given.get("batch_size")
        self._own_collate = given.get("collate_fn") is not None
        self._order = Order(self.dataset, self.sampler, self.batch_sampler, options, self._cap, self.drop_last)
        self._counts: dict[str, int] | None = None
        # Kept only while its workers live on.
        self._inner: tuple[tuple[Any, ...], DataLoader[Any], Tasks | None] | None = None
        self._position: Position | None = None
        self._pending: dict[str, Any] | None = None
        self._notes: list[str] = []

    # Passes.

    def __iter__(self) -> Any:
        pending, self._pending = self._pending, None
        epoch = self.passes_begun
        self.passes_begun += 1
        if pending is None:
            position = Position(epoch, self._start_state())
            try:
                source, _ = self._open(epoch)
            except Exception as e:
                if not self._tuner.trial:
                    raise
                source = self._call_off(position, 0, e)
        else:
            position = Position(epoch, pending["start"], pending["batch"])
            source = self._reopen(epoch, pending)
        self._position = position

        def again(batch: int, error: Exception) -> Iterator[Any]:
            return self._placed(self._call_off(position, batch, error))

        trial = self._tuner.trial and self._by_tasks
        return Pass(self._placed(source), position, lambda: len(self), self._ended, again if trial else None)

    def _placed(self, source: Iterator[Any]) -> Iterator[Any]:
        if self.device is None:
            return source
        apart = self.num_workers > 0
        # Reading ahead in this process would mix the dataset's draws with the model's, unless they are seeded.
        return OnDevice(source, self.device, ahead=apart or self._seeds_batches, threaded=apart)

    @property
    def _by_tasks(self) -> bool:
        """Whether samples are read by their keys, so that those before a place can be left out."""
        return not isinstance(self.dataset, IterableDataset)

    @property
    def _seeds_batches(self) -> bool:
        # Neither of the two draws anything, and seeding takes about as long as a small batch.
        plain = type(self.dataset) in (TensorDataset, list) and not self._own_collate
        return self.seed is not None and self._by_tasks and not plain

    def _start_state(self) -> dict[str, Any]:
        alive = self._inner is not None and getattr(self._inner[1], "_iterator", None) is not None
        return {"process": process_state(), "loader": loader_state(self), "workers_alive": alive}

    def _open(self, epoch: int, skip: int = 0) -> tuple[Iterator[Any], Tasks | None]:
        """Begin to read pass number `epoch`, without its first `skip` batches."""
        inner, tasks = self._reading(epoch)
        if tasks is None:
            follow_epoch(self.dataset, epoch)
        else:
            tasks.epoch, tasks.skip = epoch, skip
        with warnings.catch_warnings():
            # Said once, when the user made this loader.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            if inner is self:
                return super().__iter__(), None
            if self._auto and inner._iterator is not None:
                # Workers that live on draw no seed; without this their number would change the order of the data.
                torch.empty((), dtype=torch.int64).random_(generator=self.generator)
            source = iter(inner)
        self._iterator = inner._iterator
        return source, tasks

    def _reopen(self, epoch: int, state: dict[str, Any]) -> Iterator[Any]:
        """Begin a pass as it began before, and go to where it was."""
        start, batch = state["start"], state["batch"]
        exact = self._by_tasks and (self.num_workers == 0 or self._seeds_batches)
        now = process_state()
        there = same_process_state(now, start["process"])
        if not start["workers_alive"]:
            self._inner = None
        elif self._start_state()["workers_alive"] is False:
            # Workers that lived already drew no seed of their own when the pass began.
            self._open(epoch)
        set_process_state(start["process"])
        set_loader_state(self, {**start["loader"], "passes": None})
        source, tasks = self._open(epoch, batch if exact else 0)
        if not exact:
            for done in range(batch):
                if next(source, source) is source:
                    raise InputError(f"the state was taken after batch {batch} of a pass; now it has {done} only.")
        elif tasks is not None and (batch or not there):
            tasks.begin()
        if not there:
            set_process_state(now)
        return source

    def _reading(self, epoch: int) -> tuple[DataLoader[Any], Tasks | None]:
        """What reads the next pass: torch's loader on tasks or on a stream of batches, or this very loader."""
        stream = not self._by_tasks
        if stream and self._options.batching == "fixed":
            return self, None
        setting = (
            self.num_workers, self.prefetch_factor, self.pin_memory, self.timeout, self.worker_init_fn,
            self.persistent_workers, self.in_order, self.collate_fn, self.multiprocessing_context, self.generator,
        )  # fmt: skip
        if self._inner is not None and self._inner[0] == setting and self.persistent_workers:
            return self._inner[1], self._inner[2]
        tasks = None if stream else Tasks(self._order.tasks)
        workers: dict[str, Any] = {}
        if self.num_workers:
            workers = {
                "num_workers": self.num_workers, "prefetch_factor": self.prefetch_factor, "timeout": self.timeout,
                "persistent_workers": self.persistent_workers, "in_order": self.in_order,
                "multiprocessing_context": self.multiprocessing_context,
                "worker_init_fn": WorkerStart(self.worker_init_fn),
            }  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            inner: DataLoader[Any] = DataLoader(
                self._stream() if stream else self._reader(epoch), batch_size=None, sampler=tasks, collate_fn=as_is,
                pin_memory=self.pin_memory, generator=self.generator, **workers,
            )  # fmt: skip
        self._inner = (setting, inner, tasks) if self.persistent_workers and self.num_workers else None
        return inner, tasks

    def _reader(self, epoch: int) -> Reader:
        o, seed = self._options, self.seed if self._seeds_batches else None
        if o.batching == "fixed" or self._own_collate:
            return Reader(self.dataset, Collated(self.collate_fn), batched=self.batch_sampler is not None, seed=seed)
        (plan, layout), padding = self._order.planned(epoch), Padding(o.padding, o.model_shifts_labels)
        if o.batching == "packed":
            return Reader(self.dataset, Packed(layout, padding, plan.max_length, plan.most_samples), seed=seed)
        return Reader(self.dataset, Padded(layout, padding, plan.max_length), seed=seed)

    def _stream(self) -> Stream:
        o = self._options
        buckets = o.batching == "buckets"
        shapes = o.shapes if buckets else None
        longest = o.max_length if not shapes else min(o.max_length or shapes[-1], shapes[-1])
        assert longest is not None, "checked when the loader was made"
        stream = Stream(
            self.dataset, length=o.length, padding=Padding(o.padding, o.model_shifts_labels), max_length=longest,
            rows=self._cap or 1, window=o.window, too_long=o.too_long, drop_last=self.drop_last, shapes=shapes,
            sizes=batch_sizes(shapes, self._cap, o.max_tokens) if shapes else (),
        )  # fmt: skip
        self._counts = stream.counts
        return stream

    def _ended(self, position: Position) -> None:
        if self._tuner.active:
            self._tuner.ended(position.waited_s, position.computed_s, position.batch)
            self._use(self._tuner.setting)
        try:
            promised = None if self._by_tasks or self._options.batching != "fixed" else len(self)
        except TypeError:
            promised = None
        if promised is not None and position.batch < promised:
            self._notes.append(
                f"pass {position.epoch + 1} ended after {position.batch} batches; len(dataset) promised {promised}"
            )

    def _use(self, setting: Setting) -> None:
        self.num_workers = setting.workers
        self.prefetch_factor = setting.prefetch if setting.workers else None

    def _call_off(self, position: Position, batch: int, error: Exception) -> Iterator[Any]:
        """Go on with the setting before a trial in which reading failed, from the batch that failed."""
        self._tuner.failed(f"reading failed in them ({type(error).__name__})")
        self._use(self._tuner.setting)
        self._inner = None
        state = {"start": {**position.start, "workers_alive": False}, "batch": batch}
        return self._reopen(position.epoch, state)

    # Lengths.

    def plan(self, epoch: int | None = None) -> Plan:
        """How samples go together: shapes, fill and the number of batches. Reads the lengths if they are not known.

        Args:
            epoch: the number of a pass; matters only for a dataset with `set_epoch`. None: the next one.

        Raises:
            ConfigError: there are no length buckets and no packing, or the dataset is a stream.
            InputError: see `DSDataLoader`.
        """
        if self._options.batching == "fixed" or not self._by_tasks:
            raise ConfigError("plan() is for batching='buckets' or 'packed' and a dataset that is no stream.")
        return self._order.planned(self.passes_begun if epoch is None else epoch)[0]

    def largest_batch(self) -> Any:
        """A batch as large as any of a pass in length buckets, read now; None where that is not known before it comes.

        That is for a stream, a `collate_fn`, packed rows (all are alike) and torch's own batches. No pass is begun, and
        the process's generators are afterwards as they were.
        """
        if self._options.batching != "buckets" or not self._by_tasks or self._own_collate:
            return None
        epoch, largest = self.passes_begun, self.plan().largest
        with kept_process_state():
            return None if largest is None else self._reader(epoch)[Task(epoch, 0, largest[1], largest[0])]

    def __len__(self) -> int:
        if self._options.batching == "fixed":
            return super().__len__()
        if not self._by_tasks:
            raise TypeError("a stream in length buckets or packed rows has no length before it is read.")
        return self._order.batches(self.passes_begun)

    # State and report.

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: `load_state_dict` in a loader made alike gives the batches that are left.

        Tensors, numbers and tuples only. Taken in the middle of a pass it counts the batches given so far.
        """
        if self._pending is not None:
            return dict(self._pending)
        position = self._position
        if position is None or position.done:
            return self.next_pass_state()
        return self._state(position.epoch, position.batch, position.start)

    def next_pass_state(self) -> dict[str, Any]:
        """The state of a pass that would begin now; with another "batch" in it, of that pass later on."""
        return self._state(self.passes_begun, 0, self._start_state())

    def _state(self, epoch: int, batch: int, start: dict[str, Any]) -> dict[str, Any]:
        workers = (self.num_workers, self.prefetch_factor or 0)
        return {
            "version": STATE_VERSION, "epoch": epoch, "batch": batch, "start": start, "workers": workers,
            "batching": self.batching, "max_length": self._options.max_length,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another loader was: the next iteration gives the batches that were left.

        The batches before are not read again where that is exact: for a dataset read by index, without workers or
        with a `seed`. For a stream, and for workers without a seed, they are read and thrown away. What a dataset
        draws from generators of its own is not restored, and without a seed and without workers what it draws from
        the process's generators is theirs to put back (the Trainer does).

        Raises:
            InputError: no such state, one of a later version, or of a loader that batches otherwise.
        """
        wanted = {"version", "epoch", "batch", "start", "workers", "batching", "max_length"}
        if not isinstance(state, Mapping) or not wanted <= set(state):
            raise InputError("this is no state of a DSDataLoader; give what state_dict() gave.")
        if state["version"] != STATE_VERSION:
            raise InputError(f"the state has version {state['version']}; this release reads {STATE_VERSION}.")
        for name, mine in (("batching", self.batching), ("max_length", self._options.max_length)):
            if state[name] != mine:
                raise InputError(
                    f"the state is of a loader with {name}={state[name]!r}, and this one has {mine!r}; make it alike."
                )
        self.passes_begun, self._position = state["epoch"], None
        self._pending = dict(state)
        workers, prefetch = state["workers"]
        if self._tuner.active:
            # What was found before; and without a seed, what workers draw depends on how many there are.
            self._tuner.setting = Setting(workers, prefetch)
            self._use(self._tuner.setting)

    @property
    def report(self) -> Report:
        """What was chosen and measured so far: batching, fill, samples that were too long, waiting, workers."""
        report = loader_report(
            batching=self.batching, why=self._why, plan=self._order.plan, counts=self._counts,
            lengths_s=self._order.lengths_s, position=self._position, too_long=self._options.too_long,
            workers=self.num_workers, decisions=self._tuner.decisions, notes=self._notes,
        )  # fmt: skip
        report.facts.update(seed=self.seed, device=str(self.device or "cpu"), passes=self.passes_begun)
        return report

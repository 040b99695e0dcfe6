"""Counting a step's bytes: how many are alive, and the most that were, between marks.

On CUDA the caching allocator's own counters are read (`torch.cuda.memory_allocated`); on a CPU every allocation that
torch's allocator reports is recorded, temporaries inside operators included. Resident memory of the process is not
used: it also has what the allocator keeps. Knows nothing about modules.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from ...core import InputError

_MARK = "deepseek_r1.memory.mark"


@dataclass(frozen=True)
class Interval:
    """Between a mark and the next one.

    Attributes:
        label: of the mark that begins it.
        live: bytes alive at its beginning.
        peak: most bytes alive in it.
    """

    label: Any
    live: int
    peak: int


class Meter:
    """Records bytes between `start` and `stop`; `mark` begins an interval.

    Args:
        device: whose memory.
        static: bytes alive before, which a CPU's recording cannot see.
        clean: collect garbage first.

    Example:
        >>> meter = Meter(torch.device("cpu"))
        >>> meter.start()
        >>> x = torch.zeros(1000)
        >>> meter.mark("later")
        >>> del x
        >>> [(i.label, i.live, i.peak) for i in meter.stop()]
        [('start', 0, 4000), ('later', 4000, 4000)]
    """

    def __init__(self, device: torch.device, static: int = 0, *, clean: bool = True) -> None:
        self.device = device
        self._clean = clean
        self._static = static
        self._labels: list[Any] = []
        self._intervals: list[Interval] = []
        self._live = 0

    def start(self) -> None:
        """Begin with an interval labelled "start"."""
        self._labels = ["start"]
        self._intervals = []
        # Garbage that is freed in the middle would look like memory that the step gives back.
        if self._clean:
            gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._live = torch.cuda.memory_allocated(self.device)
            return
        try:
            _begin_recording()
        except RuntimeError as e:
            raise InputError(f"memory cannot be measured while another profiler is on; stop it first ({e}).") from e

    def mark(self, label: Any) -> None:
        """End the interval and begin the next."""
        if self.device.type == "cuda":
            self._close()
        else:
            with record_function(f"{_MARK}{len(self._labels)}"):
                pass
        self._labels.append(label)

    def _close(self) -> None:
        peak = torch.cuda.max_memory_allocated(self.device)
        self._intervals.append(Interval(self._labels[-1], self._live, peak))
        torch.cuda.reset_peak_memory_stats(self.device)
        self._live = torch.cuda.memory_allocated(self.device)

    def stop(self) -> list[Interval]:
        """The intervals, in their order."""
        if self.device.type == "cuda":
            self._close()
            return self._intervals
        live = peak = self._static
        begin = live
        number = 0
        for event in _end_recording():
            if isinstance(event, int):
                live += event
                peak = max(peak, live)
            else:
                self._intervals.append(Interval(self._labels[number], begin, peak))
                begin = peak = live
                number += 1
        self._intervals.append(Interval(self._labels[number], begin, peak))
        return self._intervals


def _begin_recording() -> None:
    from torch._C._profiler import _ExperimentalConfig
    from torch.autograd import ProfilerConfig, ProfilerState, _enable_profiler_legacy

    # The profiler of torch's public surface has the same records, but prints, and orders them by its clock.
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()))


def _end_recording() -> Iterable[int | str]:
    """Allocations (bytes, negative when freed) and marks, in the order in which they happened."""
    from torch.autograd import _disable_profiler_legacy

    for thread in _disable_profiler_legacy():
        for event in thread:
            kind = event.kind()
            if kind == "memory_alloc":
                yield int(event.cpu_memory_usage())
            elif kind == "push" and event.name().startswith(_MARK):
                yield event.name()


def measured_peak(
    step: Callable[[], Any], device: torch.device | str = "cpu", held: Iterable[Tensor] = (), *, clean: bool = True
) -> int:
    """The most bytes that are alive on a device while `step` runs.

    Args:
        held: tensors that are alive before; on a CPU their storages are added to what the step allocates (on CUDA
            the allocator knows them).
        clean: collect garbage first, which otherwise may be freed, and subtracted, in the middle.

    Example:
        >>> measured_peak(lambda: [torch.zeros(100), torch.zeros(100)])
        800
    """
    place = torch.device(device)
    meter = Meter(place, storage_bytes(held) if place.type == "cpu" else 0, clean=clean)
    meter.start()
    try:
        step()
    finally:
        intervals = meter.stop()
    return max(interval.peak for interval in intervals)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each storage once.

    Example:
        >>> x = torch.zeros(10)
        >>> storage_bytes([x, x[2:], x.view(2, 5)])
        40
    """
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())

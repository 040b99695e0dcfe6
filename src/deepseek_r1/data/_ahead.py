"""Batches on a GPU before they are asked for: the copy of the next one runs beside the work on the present one.

Knows CUDA streams. Knows nothing about where batches come from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ..core import ConfigError
from ._batch import tensors, to_device

_END = object()


def checked_device(device: Any) -> torch.device | None:
    """The device that batches are copied to, or None where there is nothing to copy (none given, or the CPU).

    Raises:
        ConfigError: no device's name, one that is neither a CPU nor CUDA, or no CUDA on this machine.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as e:
        raise ConfigError(f"DSDataLoader(device={device!r}): 'cpu', 'cuda' or 'cuda:1' is needed.") from e
    if found.type == "cpu":
        return None
    if found.type != "cuda":
        raise ConfigError(f"DSDataLoader(device={device!r}): batches are copied to 'cuda' or left on the 'cpu'.")
    if not torch.cuda.is_available():
        raise ConfigError(f"DSDataLoader(device={device!r}): there is no CUDA device; leave device out.")
    return found


class OnDevice:
    """An iterator's batches on `device`, each copied on a stream of its own.

    The stream on which a batch is taken waits for its copy, and its memory is not given to another tensor before
    that stream is done with it.

    Args:
        ahead: read and copy a batch before it is asked for.
        threaded: do so in a thread, for a source that waits for other processes.
    """

    def __init__(self, source: Iterator[Any], device: torch.device, *, ahead: bool, threaded: bool) -> None:
        self._source, self._device, self._ahead = source, device, ahead
        self._stream = torch.cuda.Stream(device)
        self._pool = ThreadPoolExecutor(1, "batches-ahead") if ahead and threaded else None
        self._next: Callable[[], Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        ready = (self._next or self._begin())()
        self._next = None
        if ready is _END:
            self.close()
            raise StopIteration
        batch, copied = ready
        here = torch.cuda.current_stream(self._device)
        here.wait_event(copied)
        for value in tensors(batch):
            value.record_stream(here)
        if self._ahead:
            self._next = self._begin()
        return batch

    def _begin(self) -> Callable[[], Any]:
        """Read and copy the next batch, or have it done; what is given back says or waits for how it went."""
        if self._pool is not None:
            return self._pool.submit(self._load).result
        done: Future[Any] = Future()
        try:
            done.set_result(self._load())
        except Exception as e:
            # Raised when this batch is asked for; the one before is whole.
            done.set_exception(e)
        return done.result

    def _load(self) -> Any:
        batch = next(self._source, _END)
        if batch is _END:
            return _END
        with torch.cuda.stream(self._stream):
            moved = to_device(batch, self._device)
            return moved, self._stream.record_event()

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

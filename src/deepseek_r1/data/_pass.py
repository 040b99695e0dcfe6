"""One pass over a DSDataLoader: what has been given, how long it took, and how a trial of workers is called off.

Knows the loader's inner iterators. Knows nothing about what is in a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..core import InputError


@dataclass
class Position:
    """How far a pass has come.

    Attributes:
        epoch: number of the pass, from 0.
        start: states of all generators when it began.
        batch: batches given so far.
        done: whether it has come to its end.
        waited_s, computed_s: time in which a batch was waited for, and time between batches.
    """

    epoch: int
    start: dict[str, Any]
    batch: int = 0
    done: bool = False
    waited_s: float = 0.0
    computed_s: float = 0.0


class Tasks:
    """The inner loader's sampler: tasks of pass number `epoch`, from `skip` on, drawn when the first is asked for."""

    def __init__(self, draw: Callable[[int], Iterator[Any]]) -> None:
        self._draw = draw
        self.epoch, self.skip = 0, 0
        self._present: _Peekable | None = None

    def __iter__(self) -> Iterator[Any]:
        self._present = _Peekable(_after(self._draw(self.epoch), self.skip))
        return self._present

    def begin(self) -> None:
        """Draw the order now, unless it was drawn already."""
        if self._present is not None:
            self._present.peek()


def _after(tasks: Iterator[Any], skip: int) -> Iterator[Any]:
    """The tasks behind the first `skip`. Raises InputError if there are not as many."""
    skipped = sum(1 for _ in islice(tasks, skip))
    if skipped < skip:
        raise InputError(
            f"the state was taken after batch {skip} of a pass, but there are only {skipped} batches; resume with the "
            "data and the batch size that the pass began with."
        )
    yield from tasks


class _Peekable:
    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._held: list[Any] = []
        self._begun = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._begun = True
        return self._held.pop() if self._held else next(self._source)

    def peek(self) -> None:
        if not self._begun:
            self._begun = True
            self._held = list(islice(self._source, 1))


class Pass:
    """The iterator that a DSDataLoader gives."""

    def __init__(
        self,
        source: Iterator[Any],
        position: Position,
        length: Callable[[], int],
        ended: Callable[[Position], None],
        again: Callable[[int, Exception], Iterator[Any]] | None = None,
    ) -> None:
        self._source, self._position, self._length, self._ended, self._again = source, position, length, ended, again
        self._given = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __len__(self) -> int:
        return self._length()

    def __next__(self) -> Any:
        position, asked = self._position, time.perf_counter()
        if self._given:
            position.computed_s += asked - self._given
        try:
            batch = self._take()
        except StopIteration:
            if not position.done:
                position.done = True
                self._ended(position)
            raise
        self._given = time.perf_counter()
        position.waited_s += self._given - asked
        position.batch += 1
        return batch

    def _take(self) -> Any:
        try:
            return next(self._source)
        except StopIteration:
            raise
        except Exception as e:
            if self._again is None:
                raise
            # In a trial of workers the fault may lie with the workers: the same batch is read without them.
            self._source, self._again = self._again(self._position.batch, e), None
            return next(self._source)

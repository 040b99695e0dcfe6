"""Progress bars for long work. One `track` for loops, one `bar` for work that reports in steps.

Bars are drawn by rich on standard error where that is a terminal; elsewhere long work can say a line now and then.
Set `enabled(False)` to silence both.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
_ENABLED = [True]


def enabled(on: bool) -> None:
    """Switch all progress bars of this process on or off."""
    _ENABLED[0] = on


@contextlib.contextmanager
def bar(
    description: str, total: int | None, *, done: int = 0, lines_s: float | None = None
) -> Iterator[Callable[[int, str], None]]:
    """A bar; the value is `advance(steps, text)`, where `text` replaces the note beside the bar.

    Args:
        done: steps that were done before.
        lines_s: seconds between two plain lines where there is no terminal. None: none are written.

    Example:
        >>> with bar("work", 2) as advance:
        ...     advance(1, "half")
        ...     advance(1, "done")
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not (_ENABLED[0] and console.is_terminal):
        yield Lines(description, total, lines_s if _ENABLED[0] else None, done=done)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=total, completed=done, note="")

        def advance(steps: int, text: str = "") -> None:
            progress.update(task, advance=steps, note=text)

        yield advance


class Lines:
    """A bar where there is no terminal: a line with the time left, every `every_s` seconds and not before the first.

    Example:
        >>> ticks = iter([0.0, 20.0, 40.0])
        >>> advance = Lines("training", 40, 30.0, clock=lambda: next(ticks), write=lambda line: print(line, end=""))
        >>> advance(5, "loss 2")
        >>> advance(5, "loss 1")
        training 10/40 (25 %), 0:02:00 left: loss 1
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        every_s: float | None,
        *,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], object] | None = None,
    ) -> None:
        self._description, self._total, self._every_s = description, total, every_s
        self._clock, self._write = clock, write
        self._done = self._before = done
        self._began = self._last = clock()

    def __call__(self, steps: int, text: str = "") -> None:
        """Go on by some steps."""
        self._done += steps
        if self._every_s is None or (now := self._clock()) - self._last < self._every_s:
            return
        self._last = now
        (self._write or sys.stderr.write)(f"{self._description} {self._share(now)}: {text}\n")

    def _share(self, now: float) -> str:
        if not self._total:
            return str(self._done)
        left = (now - self._began) / max(1, self._done - self._before) * (self._total - self._done)
        hours, minutes = divmod(int(left) // 60, 60)
        share = 100 * self._done // self._total
        return f"{self._done}/{self._total} ({share} %), {hours}:{minutes:02d}:{int(left) % 60:02d} left"


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` under a bar.

    Example:
        >>> list(track([1, 2, 3], "counting"))
        [1, 2, 3]
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(description, total) as advance:
        for item in items:
            yield item
            advance(1, "")

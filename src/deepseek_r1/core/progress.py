"""Progress bars for long work. One `track` for loops, one `bar` for work that reports in steps.

Bars are drawn by rich on standard error, only where that is a terminal; set `enabled(False)` to silence them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
_ENABLED = [True]


def enabled(on: bool) -> None:
    """Switch all progress bars of this process on or off."""
    _ENABLED[0] = on


@contextlib.contextmanager
def bar(description: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """A bar; the value is `advance(steps, text)`, where `text` replaces the note beside the bar.

    Example:
        >>> with bar("work", 2) as advance:
        ...     advance(1, "half")
        ...     advance(1, "done")
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not (_ENABLED[0] and console.is_terminal):

        def ignore(steps: int, text: str = "") -> None:
            return

        yield ignore
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
        task = progress.add_task(description, total=total, note="")

        def advance(steps: int, text: str = "") -> None:
            progress.update(task, advance=steps, note=text)

        yield advance


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

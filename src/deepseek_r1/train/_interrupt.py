"""Ctrl-C and SIGTERM that wait for a step to end, so that what is saved is whole. Knows nothing about training."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SAYS = {
    signal.SIGINT: b"\nCtrl-C: finishing this step; press it again to stop at once\n",
    signal.SIGTERM: b"\nSIGTERM: finishing this step\n",
}
_WRITING = b"\na checkpoint is being written; stopping right after it\n"


class Terminated(SystemExit):
    """SIGTERM ended a run. The step was finished and a checkpoint saved, if there is a `save_dir`.

    As a SystemExit it ends a script that does not catch it: with exit code 0 if the run can be resumed, with 143
    (128 + SIGTERM) if nothing was saved.

    Attributes:
        message: what was done and how to go on.

    Example:
        >>> error = Terminated("stopped at step 3", code=0)
        >>> error.code, error.message
        (0, 'stopped at step 3')
    """

    def __init__(self, message: str = "", code: int = 128 + signal.SIGTERM) -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interrupts:
    """While the block runs, the first Ctrl-C or SIGTERM sets `asked`, and a second Ctrl-C raises KeyboardInterrupt.

    Inside `held` none raises. Does nothing outside the main thread, and leaves alone a signal for which the program has
    its own handler.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._held = 0
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                if signal.getsignal(number) is usual:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No signal raises inside the block; `check` tells of it afterwards."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        if os.getpid() != self._pid:
            self._handle_in_child(kind)
            return
        again = self.asked is not None
        if not self._held and kind == signal.SIGINT and again:
            raise KeyboardInterrupt
        self.asked = self.asked or kind
        if kind == signal.SIGTERM and hasattr(signal, "SIGCHLD") and signal.SIGCHLD not in self._before:
            # Workers that were terminated together with this process must not break the step under way.
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Buffered streams may not be written to in a signal handler.
        os.write(2, _WRITING if self._held else _SAYS[kind])

    def _handle_in_child(self, kind: signal.Signals) -> None:
        """In a process that inherited the handler, such as a loader's worker: silent, and the first Ctrl-C waits."""
        if kind == signal.SIGTERM:
            signal.signal(kind, signal.SIG_DFL)
            os.kill(os.getpid(), kind)
        elif self.asked is not None:
            raise KeyboardInterrupt
        self.asked = kind

    def check(self) -> None:
        """Raise KeyboardInterrupt or Terminated if one was asked for."""
        if self.asked is not None:
            raise self.error()

    def error(self, raised: BaseException | None = None) -> BaseException:
        """What stands for the signal: what it has `raised`, or would at the next check."""
        if isinstance(raised, KeyboardInterrupt | Terminated):
            return raised
        return Terminated() if self.asked == signal.SIGTERM else KeyboardInterrupt()

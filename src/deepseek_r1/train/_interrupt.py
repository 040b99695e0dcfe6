"""Ctrl-C that waits for a step to end, so that what is saved is whole. Knows nothing about training."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


class Interrupts:
    """While the block runs, Ctrl-C sets `asked` and a second one raises KeyboardInterrupt at once.

    Where `safe` is set the first one raises as well. Does nothing outside the main thread, or where the program has
    its own handler.
    """

    def __init__(self) -> None:
        self.asked = False
        self.safe = False
        self._installed = False

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked or self.safe:
            raise KeyboardInterrupt
        self.asked = True
        # Buffered streams may not be written to in a signal handler.
        os.write(2, b"\nCtrl-C: finishing this step; press it again to stop at once\n")

    def check(self) -> None:
        """Raise KeyboardInterrupt if one was asked for."""
        if self.asked:
            raise KeyboardInterrupt

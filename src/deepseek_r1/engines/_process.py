"""Child processes for the race, from the parent's side: start, ask, watch, keep warm. Knows no engine.

They are started as programs of their own, never by forking the user's process or importing its `__main__`, so that
notebooks and lambdas work and a crash, a hang or running out of memory costs the child only.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

_CODE = "from deepseek_r1.engines._worker import main; main()"


class ChildError(Exception):
    """The child could not do what it was asked; the message says why."""


class Worker:
    """One child process. `alive` is False once it ended or was ended."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        # The child must find the same packages as this process, in the same order.
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path}, bufsize=0,
        )  # fmt: skip
        self._pending = b""

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process.poll() is None

    def ask(self, op: str, *, timeout_s: float, memory_bytes: float | None = None, **fields: Any) -> dict[str, Any]:
        """The reply to one request.

        Args:
            timeout_s: the child is killed after this time.
            memory_bytes: the child is killed when its resident memory exceeds this.

        Raises:
            ChildError: it failed, died, or was killed for time or memory.
        """
        assert self._process.stdin is not None, "opened as a pipe"
        try:
            self._process.stdin.write(json.dumps({"op": op, **fields}).encode() + b"\n")
        except OSError as e:
            raise ChildError(self._obituary()) from e
        reply: dict[str, Any] = json.loads(self._line(timeout_s, memory_bytes))
        if not reply["ok"]:
            raise ChildError(reply["error"])
        return reply

    def _line(self, timeout_s: float, memory_bytes: float | None) -> bytes:
        assert self._process.stdout is not None, "opened as a pipe"
        end = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            left = end - time.monotonic()
            if left <= 0:
                self.kill()
                raise ChildError(f"did not answer within {timeout_s:g} s and was ended")
            if memory_bytes is not None and (used := _resident(self._process.pid)) > memory_bytes:
                self.kill()
                raise ChildError(f"used {used / 1e9:.1f} GB of memory, allowed {memory_bytes / 1e9:.1f}, and was ended")
            if not select.select([self._process.stdout], [], [], min(left, 0.2))[0]:
                continue
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise ChildError(self._obituary())
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _obituary(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()
            return "stopped answering"
        if code < 0:
            return f"its process died of {signal.Signals(-code).name}"
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return f"its process ended with exit code {code}{': ' + last[0][:300] if last else ''}"

    def kill(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "opened as pipes"
            pipe.close()
        self._errors.close()


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


_idle: list[Worker] = []
_lock = threading.Lock()


def borrow() -> Worker:
    """A child that is free, else a new one. Starting one costs an import of torch; children are kept for a while.

    Raises:
        ChildError: no process can be started here.
    """
    with _lock:
        while _idle:
            worker = _idle.pop()
            if worker.alive:
                return worker
            worker.kill()
    try:
        return Worker()
    except (OSError, ValueError) as e:
        raise ChildError(f"no child process could be started: {e}") from e


def give_back(worker: Worker) -> None:
    """Keep a child that is in order for the next candidate."""
    try:
        worker.ask("drop", timeout_s=10)
    except ChildError:
        worker.kill()
        return
    with _lock:
        _idle.append(worker)
        # Once, however often this runs; importing the module registers nothing.
        atexit.unregister(_end_idle)
        atexit.register(_end_idle)


def _end_idle() -> None:
    while _idle:
        _idle.pop().kill()

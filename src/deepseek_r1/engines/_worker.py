"""The child process of a race: opens one candidate at a time, answers and times it. Knows one candidate, no race.

Requests come as lines of JSON on standard input, replies go as lines of JSON to standard output; tensors travel in
safetensors files. Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from safetensors.torch import load_file, save_file

from .. import ops
from ..core import Report
from ..graph import Program, on_device
from ..measure import Turn, turn_of
from .base import ENGINES, Runner
from .executable import Executable

#: A child that holds no candidate ends after this time.
IDLE_SECONDS = 60.0


class Child:
    """What the parent may ask for; each method takes the request's fields and gives the reply's."""

    def __init__(self) -> None:
        self._program: Program | None = None
        self._runner: Runner | None = None
        self._turn: Turn | None = None
        self._device = "cpu"

    @property
    def free(self) -> bool:
        """Whether it holds nothing."""
        return self._program is None

    def load(
        self, program: str, imports: list[str], libraries: dict[str, str], threads: int, device: str
    ) -> dict[str, Any]:
        """Read a saved Program onto a device, after importing what registers its classes and its operators."""
        for name in imports:
            importlib.import_module(name)
        for operator, library in libraries.items():
            ops.register_custom_op(operator, library)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        self._device = device
        self._program = on_device(Program.load(program), device)
        return {}

    def open(self, engine: str, precision: str, folder: str, build: bool) -> dict[str, Any]:
        """Open the candidate in `folder`, after building it there if asked to."""
        assert self._program is not None, "load comes first"
        program = self._program
        plugin = ENGINES.get(engine)()
        start, cpu = time.perf_counter(), time.process_time()
        if build:
            plugin.build(program, Path(folder), precision)
        built = time.perf_counter()
        runner = plugin.open(Path(folder), lambda: program)
        seconds = {"build_s": built - start, "open_s": time.perf_counter() - built, "cpu_s": time.process_time() - cpu}
        args, kwargs = program.example_inputs
        # What is timed is what the user would get, checks of the inputs included.
        executable = Executable(program, engine, runner, Report("candidate"), precision=precision)

        def call() -> None:
            executable(*args, **kwargs)
            if self._device != "cpu":
                torch.accelerator.synchronize()

        self._runner, self._turn = runner, turn_of(call)
        return seconds

    def answer(self, inputs: str, outputs: str) -> dict[str, Any]:
        """Run once on the tensors of one file, write the answers to another."""
        assert self._program is not None, "load comes first"
        assert self._runner is not None, "open comes first"
        given = load_file(inputs, device=self._device)
        leaves = [given.get(str(i), v) for i, v in enumerate(pytree.tree_leaves(self._program.example_inputs))]
        with torch.no_grad():
            answers = list(self._runner(leaves))
        save_file({str(i): v.detach().cpu().contiguous().clone() for i, v in enumerate(answers)}, outputs)
        return {"count": len(answers)}

    def turn(self, settle_s: float, calls: int) -> dict[str, Any]:
        """A turn of the timing."""
        assert self._turn is not None, "open comes first"
        return {"seconds": self._turn(settle_s, calls)}

    def drop(self) -> dict[str, Any]:
        """Forget the candidate."""
        self._program = self._runner = self._turn = None
        return {}


def main() -> None:
    """Serve until standard input ends, or nothing was asked of a free child for a minute."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _end_with_parent()
    child = Child()
    requests = os.fdopen(0, "rb", buffering=0)
    pending = b""
    while True:
        while b"\n" not in pending:
            # One that holds a candidate waits: others may take minutes to compile.
            if not select.select([requests], [], [], IDLE_SECONDS if child.free else None)[0]:
                return
            part = os.read(0, 1 << 16)
            if not part:
                return
            pending += part
        line, _, pending = pending.partition(b"\n")
        request = json.loads(line)
        try:
            reply = {"ok": True, **getattr(child, request.pop("op"))(**request)}
        except Exception as e:  # a candidate may fail in any way; the parent decides what it costs
            reply = {"ok": False, "error": f"{type(e).__name__}: {e}"[:2000]}
        replies.write(json.dumps(reply) + "\n")


def _end_with_parent() -> None:
    # A parent that is killed cannot tell its children; the kernel can. And if memory ends, the child goes first.
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        return

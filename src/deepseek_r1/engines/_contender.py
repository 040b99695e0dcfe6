"""A compiled candidate that can be asked for answers and timed, in this process or in a child. Knows no rival."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from .. import ops
from ..measure import turn_of
from ._process import ChildError, Worker, borrow, give_back

#: Time that a child process may take to start and read a program.
_START_SECONDS = 180.0


class Contender(Protocol):
    """What the race asks of a candidate. Every method may raise anything."""

    def answer(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        """Flat inputs to flat outputs."""

    def turn(self, settle_s: float, calls: int) -> float:
        """Seconds per call on the probe, see `measure.turn_of`."""

    def close(self) -> None:
        """Free what it holds."""


class LocalContender:
    """A candidate in this process.

    Args:
        run: flat inputs to flat outputs.
        call: what is timed: the object that the user would get, called on the probe.
    """

    def __init__(self, run: Callable[[Sequence[Any]], list[torch.Tensor]], call: Callable[[], Any]) -> None:
        self._run = run
        self.turn = turn_of(call)

    def answer(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        """Flat inputs to flat outputs."""
        return self._run(leaves)

    def close(self) -> None:
        """Nothing to free."""


class Unreadable(Exception):
    """A child process cannot read the program; the message says why."""


class ChildContender:
    """A candidate in a child process: built into `folder` there, and opened.

    Args:
        program: a saved Program whose example inputs are the probe.
        imports: modules that register the classes of its inputs and outputs.
        timeout_s: for building, and for each answer.
        build: False if `folder` holds what was built before.
        memory_bytes: resident memory at which the child is ended.

    Raises:
        Unreadable: the child cannot read the program, which says nothing about the engine.
        ChildError: building or opening failed, or ended the child.
    """

    def __init__(
        self, program: Path, imports: Sequence[str], engine: str, precision: str, folder: Path, *,
        timeout_s: float, memory_bytes: float, build: bool = True,
    ) -> None:  # fmt: skip
        self._limits: dict[str, float] = {"timeout_s": timeout_s, "memory_bytes": memory_bytes}
        self._worker: Worker | None = None
        try:
            self._worker = borrow()
            # A child that starts has torch to import first, whatever the candidate is allowed.
            self._worker.ask(
                "load", timeout_s=max(timeout_s, _START_SECONDS), program=str(program), imports=list(imports),
                libraries={name: str(path) for name, path in ops.libraries().items()}, threads=torch.get_num_threads(),
            )  # fmt: skip
        except ChildError as e:
            self.close()
            raise Unreadable(str(e)) from e
        self.seconds = self._ask("open", engine=engine, precision=precision, folder=str(folder), build=build)

    def _ask(self, op: str, **fields: Any) -> dict[str, Any]:
        if self._worker is None:
            raise ChildError("its process was ended")
        try:
            return self._worker.ask(op, **self._limits, **fields)  # type: ignore[arg-type]
        except ChildError:
            # Whatever went wrong, the next candidate gets a fresh process.
            self._worker.kill()
            self._worker = None
            raise

    def answer(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        """Flat inputs to flat outputs."""
        tensors = {str(i): v.detach().cpu().contiguous() for i, v in enumerate(leaves) if isinstance(v, torch.Tensor)}
        with tempfile.TemporaryDirectory(prefix="deepseek-r1-") as folder:
            inputs, outputs = Path(folder) / "inputs", Path(folder) / "outputs"
            # A clone each, because two views of one storage may not go into one file.
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, inputs)
            count = self._ask("answer", inputs=str(inputs), outputs=str(outputs))["count"]
            answers = load_file(outputs)
        return [answers[str(i)] for i in range(count)]

    def turn(self, settle_s: float, calls: int) -> float:
        """Seconds per call on the probe."""
        return float(self._ask("turn", settle_s=settle_s, calls=calls)["seconds"])

    def close(self) -> None:
        """Let the child forget the candidate and be kept for the next one."""
        if self._worker is not None:
            give_back(self._worker)
            self._worker = None

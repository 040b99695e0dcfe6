"""How much memory the values between operators need, and where each could lie if they shared one block.

An analysis: engines plan for themselves (the arena of ONNX Runtime, the reuse of buffers in Inductor, the planner of
ExecuTorch), and PyTorch frees each value after its last use. The plan tells what is possible, and what a rewrite did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from ..core import CaptureError
from ._capture import as_inputs
from .program import Program

#: Where a buffer may begin: a multiple of a cache line, as allocators have it.
ALIGNMENT_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """One block of memory, needed from step `start` to step `end`, both included.

    Attributes:
        name: the value that makes it.
        offset: where it lies in the arena, in bytes.
    """

    name: str
    size_bytes: int
    start: int
    end: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class BufferPlan:
    """Places of all buffers of a graph in one arena.

    Attributes:
        arena_bytes: size of the arena.
        bound_bytes: what is needed at the worst step; no plan can do with less.
        total_bytes: all buffers side by side, without any reuse.
    """

    buffers: tuple[Buffer, ...]
    arena_bytes: int
    bound_bytes: int
    total_bytes: int


def buffer_plan(program: Program, inputs: Any = None) -> BufferPlan:
    """A plan for the values between the operators of a program: not its inputs, outputs and weights.

    What an operator needs inside itself is not known here. Nothing is computed; only shapes are worked out.

    Args:
        inputs: of the size to plan for; by default the example inputs.

    Raises:
        CaptureError: a size depends on the values of a tensor.

    Example:
        >>> from deepseek_r1.graph import capture
        >>> net = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)])
        >>> plan = buffer_plan(capture(net, torch.randn(2, 64)))
        >>> plan.total_bytes, plan.arena_bytes
        (2560, 1024)
    """
    args, kwargs = program.example_inputs if inputs is None else as_inputs(inputs)
    module: Any = program.exported.module(check_guards=False)
    mode = FakeTensorMode()
    leaves = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in pytree.tree_leaves((args, kwargs))]
    watch = _Lifetimes(module, mode)
    try:
        with mode, torch.no_grad():
            watch.run(*leaves, enable_io_processing=False)
    except Exception as e:
        reason = f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
        raise CaptureError(f"the sizes inside {program.name!r} are not known before it runs ({reason}).") from e
    return place(watch.buffers())


def place(buffers: Sequence[Buffer], alignment: int = ALIGNMENT_BYTES) -> BufferPlan:
    """Offsets for buffers, so that no two that are needed at one time overlap: the largest first, each in the
    smallest gap that holds it.

    Source: Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net Inference, 2020, section 5.2.

    Example:
        >>> a, b = Buffer(name="a", size_bytes=64, start=0, end=1), Buffer(name="b", size_bytes=64, start=2, end=3)
        >>> [buffer.offset for buffer in place([a, b]).buffers]
        [0, 0]
    """
    rounded = [replace(b, size_bytes=-(-b.size_bytes // alignment) * alignment) for b in buffers]
    placed: list[Buffer] = []
    for buffer in sorted(rounded, key=lambda b: -b.size_bytes):
        others = sorted((p for p in placed if p.start <= buffer.end and buffer.start <= p.end), key=lambda p: p.offset)
        placed.append(replace(buffer, offset=_gap(others, buffer.size_bytes)))
    steps = sorted({b.start for b in rounded})
    return BufferPlan(
        buffers=tuple(sorted(placed, key=lambda b: (b.start, b.name))),
        arena_bytes=max((b.offset + b.size_bytes for b in placed), default=0),
        bound_bytes=max((sum(b.size_bytes for b in rounded if b.start <= step <= b.end) for step in steps), default=0),
        total_bytes=sum(b.size_bytes for b in rounded),
    )


def _gap(others: Sequence[Buffer], size: int) -> int:
    """Where the smallest gap between buffers (sorted by offset) begins that is large enough; else behind them all."""
    best, best_size, end = None, 0, 0
    for other in others:
        room = other.offset - end
        if room >= size and (best is None or room < best_size):
            best, best_size = end, room
        end = max(end, other.offset + other.size_bytes)
    return end if best is None else best


class _Lifetimes(Interpreter):
    """Runs a graph on shapes alone, and notes when each block of memory is made and needed last."""

    def __init__(self, module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._mode = mode
        self._steps = {node: step for step, node in enumerate(module.graph.nodes)}
        self._found: dict[int, Buffer] = {}
        self._foreign: set[int] = set()
        self._kept: list[Any] = []  # a block that was freed might give its number to another

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self._mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    def run_node(self, n: Node) -> Any:
        used = self.fetch_args_kwargs_from_env(n)
        value = super().run_node(n)
        step = self._steps[n]
        for storage in _storages(used):
            if storage._cdata in self._found:
                self._found[storage._cdata] = replace(self._found[storage._cdata], end=step)
        for storage in _storages(value):
            key = storage._cdata
            self._kept.append(storage)
            if n.op != "call_function":
                self._foreign.add(key)
            elif key not in self._found:
                made = Buffer(name=n.name, size_bytes=int(storage.nbytes()), start=step, end=step)
                self._found[key] = made
        return value

    def buffers(self) -> list[Buffer]:
        """What was made on the way and is neither input, weight nor output."""
        return [b for key, b in self._found.items() if key not in self._foreign and b.size_bytes]


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [v.untyped_storage() for v in pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]

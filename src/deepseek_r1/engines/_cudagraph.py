"""CUDA graphs over Inductor's code: the launches of a whole call recorded once for each input shape, and replayed.

At small batches a GPU waits for its launches; a replay is one launch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..graph import Program
from ._inductor import InductorEngine
from ._inductor_cuda import open_runner
from ._refusals import devices, eager_where, is_empty
from .base import Runner

#: Input shapes that are kept as graphs, each with buffers of its own; further shapes run without one.
SHAPES = 8
#: Calls before the recording: kernels are loaded and libraries choose algorithms, which a recording may not do.
_WARM_UP = 3


class CudaGraphEngine(InductorEngine):
    """Compiles as `inductor` does, and records the compiled calls. For programs on a CUDA device."""

    name = "cudagraph"

    def unavailable(self) -> str:
        """Needs a CUDA device, and what `inductor` needs."""
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device"
        return super().unavailable()

    def unsupported(self, program: Program) -> str:
        """CUDA tensors only, and no state."""
        others = sorted(devices(program) - {"cuda"})
        if others:
            return f"its tensors are on {', '.join(others)}; this engine runs on CUDA"
        return super().unsupported(program)

    def open(self, folder: Path, program: Callable[[], Program]) -> Runner:
        """Load the machine code; shapes are recorded when they first come."""
        return eager_where(is_empty, ShapePool(open_runner(folder), _Recorder(), SHAPES), program)


class ShapePool:
    """Runs flat inputs by a function recorded for their shapes, and beyond a number of shapes by the plain function.

    Args:
        run: the plain function.
        record: makes of the plain function and the first inputs of a shape one that serves this shape.
        most: shapes that are recorded; the first ones that come.
    """

    def __init__(self, run: Runner, record: Callable[[Runner, Sequence[Any]], Runner], most: int) -> None:
        self._run, self._record, self._most = run, record, most
        self._recorded: dict[tuple[Any, ...], Runner] = {}
        self._busy = threading.Lock()

    def __call__(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        key = tuple((v.shape, v.dtype) if isinstance(v, torch.Tensor) else v for v in leaves)
        with self._busy:
            found = self._recorded.get(key)
            if found is None and len(self._recorded) < self._most:
                found = self._recorded[key] = self._record(self._run, leaves)
            return (found or self._run)(leaves)


class _Recorder:
    """Records CUDA graphs that share one pool of memory, which holds because their answers are copied out of it."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._last: torch.cuda.Stream | None = None

    def __call__(self, run: Runner, leaves: Sequence[Any]) -> Runner:
        inputs = [v.detach().contiguous().clone() for v in leaves if isinstance(v, torch.Tensor)]
        with torch.cuda.device(inputs[0].device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    run(inputs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile; only this one must not.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = run(inputs)

        def replay(given: Sequence[Any]) -> list[torch.Tensor]:
            with torch.cuda.device(inputs[0].device):
                self._follow(torch.cuda.current_stream())
                torch._foreach_copy_(inputs, [v.detach() for v in given if isinstance(v, torch.Tensor)])
                graph.replay()
                return [v.clone() for v in outputs]

        return replay

    def _follow(self, stream: torch.cuda.Stream) -> None:
        """Wait on the device for the previous caller's replay, if that was on another stream."""
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream

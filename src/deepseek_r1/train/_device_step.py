"""An optimizer step that the host starts and does not wait for, and such steps recorded as CUDA graphs.

Knows one window of batches at a time. Knows nothing about epochs or files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..data import map_tensors, tensors
from ._objective import Objective
from ._recordable import drawn_on_host
from ._step import accumulate, found_on_device

#: What a step gives: the mean loss, 1.0 if this step or one before it was not finite, else 0.0, and the gradients' norm
#: before clipping. Scalars on the device.
Outcome = tuple[Tensor, Tensor, Tensor]
#: Graphs kept at most: each holds the memory of one step on inputs of one shape.
_GRAPHS = 8
#: Steps on inputs of one shape before theirs is recorded: one that compiles and tunes, one that is watched.
_BEFORE = 2


def device_step(
    forward: Callable[..., Any],
    window: list[Any],
    optimizer: Optimizer,
    objective: Objective,
    bad: Tensor,
    *,
    device: torch.device,
    precision: str,
    micro_batch_size: int | None,
    clip_grad_norm: float | None,
) -> Outcome:
    """One optimizer step on unpacked or loader batches without reading anything back from the device.

    Args:
        bad: scalar on the device, set to 1.0 if the loss or a gradient is not finite. While it is set, this step and
            all that follow leave the parameters alone; so the host may look at it later.

    Returns:
        The loss (a new scalar), `bad`, and the gradients' norm (a new scalar).
    """
    optimizer.zero_grad(set_to_none=True)
    loss, _ = accumulate(
        forward, objective, window, device=device, precision=precision, micro_batch_size=micro_batch_size
    )
    verdict, norm, shrink = found_on_device(loss, optimizer, clip_grad_norm)
    torch.maximum(bad, verdict, out=bad)
    optimizer.found_inf, optimizer.grad_scale = bad, shrink  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
    return loss, bad, norm


class Graphs:
    """Optimizer steps by the shapes of their inputs: run, watched, then recorded and replayed.

    All steps are steps of the training: none is run for the recording's sake.

    Attributes:
        refused: why steps are no longer recorded; empty while they are.
        waits: whether that is because the host waits for the device in the middle of a step.

    Args:
        run: a step on a window of batches that are on the device.
        record: makes a callable that does again what a function without arguments does, and the function's result.
    """

    def __init__(self, run: Callable[[list[Any]], Outcome], record: Callable[..., Any] | None = None) -> None:
        self._run, self._record = run, record or _Recorder()
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, tuple[list[Any], Callable[[], None], Outcome]] = {}
        self._ever: set[Any] = set()
        self.refused, self.waits = "", False

    def step(self, window: list[Any]) -> Outcome:
        """One step; the outcome's tensors belong to the caller."""
        key = signature(window)
        seen = self._seen.get(key, 0)
        self._seen[key] = seen + 1
        if key in self._graphs:
            return self._replay(key, window)
        if self.refused or seen < _BEFORE - 1 or len(self._graphs) >= _GRAPHS:
            return self._run(window)
        if seen < _BEFORE:
            (outcome, wait), generator = drawn_on_host(lambda: watched(lambda: self._run(window)))
            self.refused, self.waits = wait, bool(wait)
            if generator and not wait:
                self.refused = (
                    f"the step draws from {generator} generator on the CPU (a layer left out at random?), which a "
                    "recording would decide once for all"
                )
            return outcome
        inputs = map_tensors(window, torch.clone)
        try:
            again, outcome = self._record(lambda: self._run(inputs))
        except Exception as e:  # a recording fails in many ways, none of which has changed a parameter
            if torch.cuda.is_available():
                _end_recording()
            self.refused = f"the step could not be recorded: {type(e).__name__}: {str(e).splitlines()[0][:200]}"
            return self._run(window)
        self._graphs[key] = inputs, again, outcome
        self._ever.add(key)
        return self._replay(key, window)

    @property
    def recorded(self) -> int:
        """Shapes for which there is a graph, or was one."""
        return len(self._ever)

    def _replay(self, key: Any, window: list[Any]) -> Outcome:
        inputs, again, (loss, bad, norm) = self._graphs[key]
        for mine, given in zip(tensors(inputs), tensors(window), strict=True):
            mine.copy_(given)
        again()
        # The next replay writes to the same memory, and the host reads them later.
        return loss.clone(), bad, norm.clone()

    def forget(self) -> None:
        """Free what was recorded, and begin anew."""
        self._graphs.clear()
        self._seen.clear()
        self.refused, self.waits = "", False


def signature(part: Any) -> Any:
    """What a recorded step depends on in its inputs: nesting, shapes and types of tensors, and all other values."""
    if isinstance(part, Tensor):
        return tuple(part.shape), part.dtype
    if isinstance(part, dict):
        return tuple((key, signature(value)) for key, value in part.items())
    if isinstance(part, tuple | list):
        return type(part).__name__, tuple(signature(value) for value in part)
    return repr(part)


class _Recorder:
    """Records on the stream in use, all graphs in one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        torch.cuda.synchronize()
        # What the steps before left in the allocator's cache would lie idle beside the graph's own pool.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one in which a loader pins its batches, go on meanwhile.
        mode = "thread_local"
        with torch.cuda.graph(graph, self._pool, torch.cuda.current_stream(), capture_error_mode=mode):
            result = function()
        self._pool = self._pool or graph.pool()
        return graph.replay, result


def _end_recording() -> None:
    """After a recording that failed, the generator would go on taking itself for recorded."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


def watched(function: Callable[[], Any]) -> tuple[Any, str]:
    """A function's result, and where it waited for the GPU; empty if nowhere."""
    if not torch.cuda.is_available():
        return function(), ""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for one in caught:
        if "synchronizing CUDA operation" in str(one.message):
            return result, f"the step waits for the GPU, at {one.filename}:{one.lineno}"
    for one in caught:
        if "Synchronization debug mode" in str(one.message):
            continue
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return result, ""


class Feed:
    """Brings windows of batches to the device beside what runs there.

    A copy on the stream of the training waits for the step before. Large tensors that are not pinned are pinned first,
    as such copies would hold up the host.
    """

    _LARGE_BYTES = 1 << 16

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, torch.cuda.Stream(device)

    def __call__(self, window: list[Any]) -> list[Any]:
        """The window on the device, safe to be read on the current stream."""
        with torch.cuda.stream(self._side):
            moved = map_tensors(window, self._moved)
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._side)
        for tensor in tensors(moved):
            tensor.record_stream(here)
        return moved  # type: ignore[no-any-return]

    def _moved(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu" and tensor.nbytes > self._LARGE_BYTES and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

"""Offloading: what a block saves for its backward pass waits in page-locked CPU memory.

Copies run on a stream of their own: out while the next block computes, and back, one block ahead, while the block
behind it (in the order of the backward pass: before it) computes its gradients. On a CPU they are plain copies, which
saves nothing; the path is there so that it can be tested. Knows no plan.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ._intercept import undisturbed

#: Smaller tensors stay: their copies would cost more than their bytes are worth.
_SMALLEST = 1 << 18


class _Packed:
    """A saved tensor on its way, in CPU memory, or back again."""

    __slots__ = ("__weakref__", "batch", "device", "fetched", "host")

    def __init__(self, batch: _Batch, tensor: Tensor) -> None:
        self.batch, self.device = batch, tensor.device
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
        self.fetched: Tensor | None = None


class _Batch:
    """What one block offloaded."""

    def __init__(self, previous: _Batch | None) -> None:
        self.packed: list[weakref.ref[_Packed]] = []
        self.previous = previous
        self.fetched = False
        self.there: torch.cuda.Event | None = None


class Offloader:
    """Runs calls of blocks with their saved tensors offloaded.

    Example:
        >>> layer, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
        >>> offloader = Offloader(smallest=0)
        >>> y = offloader.call(layer, (x,), {})
        >>> y.sum().backward()
        >>> torch.equal(x.grad, layer.weight.sum(0, keepdim=True))
        True
    """

    def __init__(self, smallest: int = _SMALLEST) -> None:
        self._smallest = smallest
        self._stream: torch.cuda.Stream | None = None
        #: Tensors whose copies may not have ended, each with the event of its end.
        self._leaving: list[tuple[torch.cuda.Event, Tensor]] = []
        self._last: weakref.ref[_Batch] | None = None

    def call(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block's forward pass."""
        before = self._last() if self._last is not None else None
        batch = _Batch(before)
        self._last = weakref.ref(batch)
        earlier = self._leaving
        self._leaving = []
        with saved_tensors_hooks(undisturbed(lambda tensor: self._pack(batch, tensor)), self._unpack):
            output = run(*args, **kwargs)
        _release(earlier)
        return output

    def settle(self) -> None:
        """Let go of every tensor that was copied, once its copy has ended."""
        _release(self._leaving)
        self._leaving = []

    def _pack(self, batch: _Batch, tensor: Tensor) -> Any:
        own = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if own:
            return tensor
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() < self._smallest:
            # Detached: the tensor itself would hold the graph that holds it.
            return tensor.detach()
        packed = _Packed(batch, tensor)
        batch.packed.append(weakref.ref(packed))
        if tensor.device.type != "cuda":
            packed.host.copy_(tensor)
            return packed
        stream = self._side(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            packed.host.copy_(tensor, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        self._leaving.append((done, tensor.detach()))
        return packed

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Packed):
            return packed
        batch = packed.batch
        self._fetch(batch)
        if batch.there is not None:
            torch.cuda.current_stream(packed.device).wait_event(batch.there)
        tensor, packed.fetched = packed.fetched, None
        if tensor is None:
            tensor = packed.host.to(packed.device)
        if batch.previous is not None:
            self._fetch(batch.previous)
            batch.previous = None
        return tensor

    def _fetch(self, batch: _Batch) -> None:
        """Begin to bring a block's tensors back."""
        if batch.fetched:
            return
        batch.fetched = True
        for reference in batch.packed:
            packed = reference()
            if packed is None:
                continue
            packed.fetched = torch.empty_like(packed.host, device=packed.device, pin_memory=False)
            if packed.device.type != "cuda":
                packed.fetched.copy_(packed.host)
                continue
            stream = self._side(packed.device)
            # The memory may have been in use on the present stream until now.
            stream.wait_stream(torch.cuda.current_stream(packed.device))
            with torch.cuda.stream(stream):
                packed.fetched.copy_(packed.host, non_blocking=True)
                batch.there = torch.cuda.Event()
                batch.there.record(stream)

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        return self._stream


def _release(leaving: list[tuple[torch.cuda.Event, Tensor]]) -> None:
    for done, tensor in leaving:
        torch.cuda.current_stream(tensor.device).wait_event(done)
    leaving.clear()

"""A run of steps on a GPU that the host only starts: graphs, rates, verdicts. Knows no loaders and no files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._device_step import Feed, Graphs, Outcome

#: Steps that the host may be ahead of the device: enough to never let it wait, few enough to keep their batches.
_AHEAD = 2


class BadStep(NamedTuple):
    """The first step whose loss or gradient was not finite.

    Attributes:
        step: its number.
        window: its batches as the loader gave them.
    """

    step: int
    window: list[Any]


class DeviceRates:
    """The rates of an optimizer's groups as tensors on the device, from which a recorded step reads them.

    Groups that are added later are taken in too.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> rates = DeviceRates(optimizer, torch.device("cpu"))
        >>> optimizer.param_groups[0]["lr"]
        tensor(0.5000)
        >>> rates.close()
        >>> optimizer.param_groups[0]["lr"]
        0.5
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer, self._device = optimizer, device
        self._rates: list[Tensor] = []
        self._capturable: list[Any] = []
        # Steps that are not recorded are taken too, which torch would warn of.
        optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
        self.take()

    def take(self) -> None:
        """Before a step: someone may have set a group's rate to a number, or added a group."""
        for group in self._optimizer.param_groups[len(self._rates) :]:
            self._rates.append(torch.tensor(float(group["lr"]), device=self._device))
            self._capturable.append(group.get("capturable"))
            if "capturable" in group:
                group["capturable"] = True
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(float(group["lr"]))
                group["lr"] = rate

    def close(self) -> None:
        """Put the rates back as numbers."""
        # A group may have been added since the last step.
        for group, rate, capturable in zip(
            self._optimizer.param_groups, self._rates, self._capturable, strict=False
        ):  # fmt: skip
            group["lr"] = float(rate) if group["lr"] is rate else group["lr"]
            if capturable is not None:
                group["capturable"] = capturable


class DeviceRun:
    """Steps on one CUDA device, started on a stream of their own.

    A step that is not finite leaves the parameters alone, and so do those behind it, until the host has read that.

    Args:
        run: a step on a window of batches on the device, given the scalar that is set when a step was not finite.
        optimizer: one that can leave out an update by such a scalar; its rates become tensors until `close`.
        graphs: whether steps are recorded and replayed.
    """

    def __init__(
        self, run: Callable[[list[Any], Tensor], Outcome], optimizer: Optimizer, device: torch.device, *, graphs: bool
    ) -> None:
        self._device = device
        self._stream, self._feed = torch.cuda.Stream(device), Feed(device)
        self._bad = torch.zeros((), device=device)
        self._run: Callable[[list[Any]], Outcome] = lambda window: run(window, self._bad)
        self._pending: deque[tuple[BadStep, Tensor, torch.cuda.Event]] = deque()
        self._free = [(torch.zeros((), pin_memory=True), torch.cuda.Event()) for _ in range(_AHEAD + 1)]
        self._rates = DeviceRates(optimizer, device) if graphs else None
        self.graphs = Graphs(self._run) if graphs else None

    def step(self, number: int, window: list[Any]) -> tuple[Tensor, Tensor, BadStep | None]:
        """Start a step: its loss and norm, on the device, and a bad step among those that have ended meanwhile."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            if self._rates is not None:
                self._rates.take()
            moved = self._feed(window)
            loss, bad, norm = self._run(moved) if self.graphs is None else self.graphs.step(moved)
            host, event = self._free.pop()
            host.copy_(bad, non_blocking=True)
            event.record()
        self._pending.append((BadStep(number, window), host, event))
        here.wait_stream(self._stream)
        return loss, norm, self.settle(_AHEAD)

    def settle(self, ahead: int = 0) -> BadStep | None:
        """Wait until at most `ahead` steps are under way; the first bad one among the others."""
        while len(self._pending) > ahead:
            step, host, event = self._pending.popleft()
            event.synchronize()
            self._free.append((host, event))
            if float(host):
                self.forget()
                return step
        return None

    def forget(self) -> None:
        """Drop verdicts that no longer matter."""
        self._free += [(host, event) for _, host, event in self._pending]
        self._pending.clear()
        self._bad.zero_()

    def close(self) -> None:
        """Free the graphs, and put the optimizer's rates back as numbers."""
        if self.graphs is not None and self._rates is not None:
            self.graphs.forget()
            self._rates.close()

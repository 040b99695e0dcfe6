"""An exponential moving average of the parameters, as a callback. Knows the Trainer only as an argument."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core import ConfigError, InputError
from ._callbacks import Callback
from .optimizers._tick import promoted


class ExponentialMovingAverage(Callback):
    """Keeps average = d * average + (1 - d) * parameters after every step (Polyak and Juditsky 1992).

    d climbs with the updates n as (1 + n) / (10 + n) up to `decay`, so that a short run is not an average of its
    beginning. Averages are fp32 (fp64 of fp64 parameters), on the parameters' device; no step waits for it. Buffers,
    as batch norm's statistics, are not averaged: the model's present ones are used. `TrainingConfig(ema_decay=...)`
    makes one; the Trainer then evaluates, predicts and exports with the averages.

    Args:
        decay: the largest d, between 0 and 1; 0.999 remembers about a thousand steps.

    Raises:
        ConfigError: `decay` is out of range.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = ExponentialMovingAverage(0.5)
        >>> for value in (0.0, 1.0):  # the average begins with the first
        ...     _ = nn.init.constant_(model.weight, value)
        ...     average.update(model)
        >>> with average.applied(model):
        ...     round(model.weight.item(), 3)
        0.9
    """

    def __init__(self, decay: float = 0.999) -> None:
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay < 1:
            raise ConfigError(f"ExponentialMovingAverage(decay={decay!r}): a number between 0 and 1 is needed.")
        self.decay = float(decay)
        self.updates = 0
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the parameters as they are now into the average; the first time, begin with them."""
        if not self._average:
            self._begin(model)
            return
        named = self._parameters(model)
        weight = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        kinds: dict[Any, list[str]] = {}
        for name, p in named.items():
            if self._average[name].device != p.device:
                self._average[name] = self._average[name].to(p.device)
            kinds.setdefault((p.device, p.dtype), []).append(name)
        for names in kinds.values():
            values = promoted([named[name] for name in names])
            torch._foreach_lerp_([self._average[name] for name in names], values, weight)
        self.updates += 1

    def _begin(self, model: nn.Module) -> None:
        self._average = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        self.updates = 0

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        named = dict(model.named_parameters())
        for name, average in self._average.items():
            if name not in named or named[name].shape != average.shape:
                raise InputError(f"the moving average is of another model: it has {name!r} of {tuple(average.shape)}.")
        return {name: named[name] for name in self._average}

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The averages in the place of the model's parameters; at the end these are put back. Nothing before a run."""
        named = self._parameters(model)
        kept = [p.detach().clone() for p in named.values()]
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(self._average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(named.values(), kept, strict=True):
                    p.copy_(value)

    def on_train_start(self, trainer: Any) -> None:
        """Begin with the parameters as they are, unless a run is being resumed."""
        if not (trainer.resumed and self._average):
            with torch.no_grad():
                self._begin(trainer.model)

    def on_step_end(self, trainer: Any) -> None:
        """Take the step's parameters into the average."""
        self.update(trainer.model)

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, and how many updates they have seen."""
        return {"updates": self.updates, "average": dict(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.updates = int(state["updates"])
        self._average = {name: value.clone() for name, value in state["average"].items()}


@contextlib.contextmanager
def averaged(callbacks: Iterable[Callback], model: nn.Module) -> Iterator[None]:
    """The model with the averages that the callbacks keep, if one of them does."""
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, ExponentialMovingAverage):
                stack.enter_context(callback.applied(model))
                break
        yield


def averaged_copy(callbacks: Iterable[Callback], model: nn.Module) -> nn.Module:
    """A copy of the model with the averages, in evaluation mode.

    Raises:
        InputError: no callback keeps an average.
    """
    if not any(isinstance(c, ExponentialMovingAverage) for c in callbacks):
        raise InputError("no moving average is kept; use TrainingConfig(ema_decay=0.999).")
    with averaged(callbacks, model):
        return copy.deepcopy(model).eval()

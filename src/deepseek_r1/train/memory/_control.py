"""What a Trainer does about memory: nothing, runs of blocks recomputed, or a plan made at its first batch.

Knows the configuration and the step. The Trainer only says when a step begins and when the run ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...core import Report
from ...data import batch_size, slice_batch, unpack_batch
from .._objective import Objective
from ._apply import Applied
from ._manual import Checkpointed, checkpoint_every
from ._plan import MemoryPlan, MemoryPlanner, summary
from ._profile import SHARES

if TYPE_CHECKING:
    from .._config import TrainingConfig


def make_control(
    model: nn.Module, objective: Objective, optimizer: Optimizer, config: TrainingConfig
) -> MemoryControl | None:
    """The control that a settled configuration asks for; None if it asks for none."""
    if config.memory_gb is None and config.checkpoint_interval is None:
        return None
    return MemoryControl(model, objective, optimizer, config)


class MemoryControl:
    """Keeps a model's steps to what its configuration says about memory.

    Attributes:
        plan: the plan in force, once the first batch was seen; None without a limit.
        reason: what was chosen and why, in a sentence.
    """

    def __init__(self, model: nn.Module, objective: Objective, optimizer: Optimizer, config: TrainingConfig) -> None:
        self.plan: MemoryPlan | None = None
        self.reason = ""
        self._model, self._objective, self._optimizer = model, objective, optimizer
        self._device, self._precision = torch.device(config.device), config.precision
        self._memory_gb, self._interval = config.memory_gb, config.checkpoint_interval
        self._micro = config.micro_batch_size
        self._compress = config.compress_activations
        self._shares = SHARES if config.compile == "blocks" else ()
        self._applied: Applied | Checkpointed | None = None

    def begin(self, window: Sequence[Any]) -> None:
        """Before a step: put the plan in force, and make it first if there is none.

        Raises:
            ConfigError: the limit is less than the model needs.
        """
        if self._applied is not None:
            return
        if self._interval is not None:
            self._applied = checkpoint_every(self._model, self._interval)
            self.reason = f"checkpoint_interval={self._interval}: blocks are recomputed in runs of {self._interval}"
            return
        if self.plan is None:
            assert self._memory_gb is not None, "a control has something to control"
            self.plan = self._planned(window)
            peak, limit = self.plan.measured_peak_bytes / 1e9, self.plan.budget_bytes / 1e9
            self.reason = f"peak {peak:.4g} GB measured, limit {limit:.4g} GB; {summary(self.plan)}"
        self._applied = self.plan.applied(self._model)

    def _planned(self, window: Sequence[Any]) -> MemoryPlan:
        assert self._memory_gb is not None, "a control has something to control"
        parts = [unpack_batch(batch) for batch in window]
        sizes = [batch_size(part) for part in parts]
        largest = max(range(len(parts)), key=sizes.__getitem__)
        size = min(sizes[largest], self._micro or sizes[largest])
        args, kwargs, labels = slice_batch(parts[largest], 0, size) if size < sizes[largest] else parts[largest]
        # Back in the form of a loader: keyword inputs are a dict, several positional ones a tuple.
        inputs = args if args else kwargs
        planner = MemoryPlanner(
            self._model, (inputs, labels) if labels is not None else (inputs,), self._objective, device=self._device,
            precision=self._precision, optimizer=self._optimizer,
            accumulates=len(parts) > 1 or size < sizes[largest], shares=self._shares,
            compress=self._compress,
        )  # fmt: skip
        return planner.plan(self._memory_gb)

    def end(self) -> None:
        """After the run, or where the model is used otherwise: take the plan off. `begin` puts it on again."""
        if self._applied is not None:
            self._applied.remove()
            self._applied = None

    @property
    def why_not_recorded(self) -> str:
        """Why steps cannot be recorded as CUDA graphs; empty if they can."""
        return "blocks are recomputed at a fixed interval" if self.plan is None else self.plan.why_not_recorded

    @property
    def report(self) -> Report | None:
        """The plan's report, if there is a plan."""
        return None if self.plan is None else self.plan.report

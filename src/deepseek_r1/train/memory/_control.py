"""What a Trainer does about memory: nothing, runs of blocks recomputed, or plans made as larger batches come.

Knows the configuration and the step. The Trainer only says when a step begins and when the run ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...core import ConfigError, InputError, Report
from ...data import batch_size, slice_batch, tensors, unpack_batch
from .._objective import Objective
from ._apply import Applied
from ._manual import Checkpointed, checkpoint_every
from ._plan import MemoryPlan, MemoryPlanner, summary
from ._profile import SHARES

if TYPE_CHECKING:
    from .._config import TrainingConfig

#: For every tensor of a micro-batch its shape and the bytes of an element.
Extent = tuple[tuple[tuple[int, ...], int], ...]


def make_control(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    config: TrainingConfig,
    *,
    asked: bool,
    before_plan: Callable[[], None],
) -> MemoryControl | None:
    """The control that a settled configuration asks for; None if it asks for none.

    Args:
        asked: whether the user gave the limit, and not the environment: then what cannot be planned is an error.
        before_plan: called before a plan is made: frees what would be counted and is not there in a step.
    """
    if config.memory_gb is None and config.checkpoint_interval is None:
        return None
    return MemoryControl(model, objective, optimizer, config, asked, before_plan)


@dataclass(frozen=True)
class _Piece:
    """What one forward pass of a step is given, and how often the same comes in a row."""

    parts: tuple[tuple[Any, ...], dict[str, Any], Any]
    extent: Extent
    times: int


@dataclass(frozen=True)
class _Planned:
    extent: Extent
    accumulates: bool
    plan: MemoryPlan

    def covers(self, extent: Extent, accumulates: bool) -> bool:
        """Whether a plan made for this holds there: no tensor is longer in any dimension."""
        return (accumulates <= self.accumulates and len(extent) == len(self.extent)) and all(
            len(shape) == len(mine) and size <= own and all(a <= b for a, b in zip(shape, mine, strict=True))
            for (shape, size), (mine, own) in zip(extent, self.extent, strict=True)
        )


class MemoryControl:
    """Keeps a model's steps to what its configuration says about memory.

    A plan holds for batches up to the size it was made for. For a batch that is longer in some dimension than every
    one before, another is made before its step; each batch then runs under the plan that covers it.

    Attributes:
        plan: the plan made last; None without a limit, before the first batch, and where none could be made.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: Optimizer,
        config: TrainingConfig,
        asked: bool,
        before_plan: Callable[[], None],
    ) -> None:
        self.plan: MemoryPlan | None = None
        self._model, self._objective, self._optimizer = model, objective, optimizer
        self._device, self._precision = torch.device(config.device), config.precision
        self._memory_gb, self._interval = config.memory_gb, config.checkpoint_interval
        self._micro, self._several = config.micro_batch_size, config.gradient_accumulation_steps > 1
        self._compress = config.compress_activations
        self._shares = SHARES if config.compile == "blocks" else ()
        self._asked, self._refused, self._before_plan = asked, "", before_plan
        self._expected: list[Any] = []
        self._latest: Extent = ()
        self._made: list[_Planned] = []
        self._every: list[MemoryPlan] = []
        #: What was decided for an extent stays, so that a recorded step and its plan belong together.
        self._chosen: dict[tuple[Extent, bool], _Planned] = {}
        self._ahead: deque[MemoryPlan] = deque()
        self._applied: tuple[MemoryPlan | None, Applied | Checkpointed] | None = None

    @property
    def wants_largest(self) -> bool:
        """Whether a loader's largest batch would be of use, so that one plan does for all."""
        return self._memory_gb is not None and not self._made and not self._refused

    def expect(self, batch: Any) -> None:
        """A batch as large as those to come, for which the first plan is made."""
        self._expected = [batch]

    def begin(self, window: Sequence[Any]) -> None:
        """Before a step: put the plan that covers its batches in force, and make it first if there is none.

        Raises:
            ConfigError: the limit is less than the model needs.
            InputError: the model cannot be planned, and the user gave the limit.
        """
        if self._interval is not None:
            if self._applied is None:
                self._applied = None, checkpoint_every(self._model, self._interval)
            return
        if self._refused:
            return
        try:
            plans = self._plans(window)
        except InputError as e:
            if self._asked:
                raise
            self._refused, self.plan = str(e), None
            self.forget()
            return
        self._put(plans[0])
        self._ahead = deque(plans if any(plan is not plans[0] for plan in plans) else ())

    def _plans(self, window: Sequence[Any]) -> list[MemoryPlan]:
        """The plan of every forward pass of a step."""
        pieces = [self._piece(batch) for batch in window]
        if self._expected:
            first, self._expected = self._piece(self._expected[0]), []
            self._planned(first, self._several or first.times > 1)
        accumulates = self._several or len(pieces) > 1 or any(piece.times > 1 for piece in pieces)
        return [self._planned(piece, accumulates).plan for piece in pieces for _ in range(piece.times)]

    def _piece(self, batch: Any) -> _Piece:
        parts = unpack_batch(batch)
        whole = batch_size(parts)
        size = min(whole, self._micro or whole)
        if size < whole:
            args, kwargs, labels = slice_batch(parts, 0, size)
            parts = args, kwargs, labels
        extent = tuple((tuple(t.shape), t.element_size()) for t in tensors(parts))
        return _Piece(parts, extent, -(-whole // size))

    def _planned(self, piece: _Piece, accumulates: bool) -> _Planned:
        key = piece.extent, accumulates
        if key not in self._chosen:
            fitting = (made for made in self._made if made.covers(*key))
            found = next(fitting, None) or _Planned(piece.extent, accumulates, self._make(piece, accumulates))
            if found not in self._made:
                self._made.append(found)
                self._every.append(found.plan)
                self.plan, self._latest = found.plan, piece.extent
            self._chosen[key] = found
        return self._chosen[key]

    def _make(self, piece: _Piece, accumulates: bool) -> MemoryPlan:
        assert self._memory_gb is not None, "a control has something to control"
        self.end()
        self._before_plan()
        # The step begins without gradients; those of the step before would be counted.
        self._optimizer.zero_grad(set_to_none=True)
        args, kwargs, labels = piece.parts
        # Back in the form of a loader: keyword inputs are a dict, several positional ones a tuple.
        inputs = args if args else kwargs
        try:
            return MemoryPlanner(
                self._model, (inputs, labels) if labels is not None else (inputs,), self._objective,
                device=self._device, precision=self._precision, optimizer=self._optimizer, accumulates=accumulates,
                shares=self._shares, compress=self._compress,
            ).plan(self._memory_gb)  # fmt: skip
        except ConfigError as e:
            if not self._made:
                raise
            raise ConfigError(f"{e} (The batch, {_words(piece.extent)}, is larger than those before.)") from e

    def forget(self) -> None:
        """The model takes other memory from now on: plan anew before the next step."""
        self.end()
        self._made.clear()
        self._chosen.clear()

    def _put(self, plan: MemoryPlan) -> None:
        if self._applied is None or self._applied[0] is not plan:
            self.end()
            self._applied = plan, plan.applied(self._model)

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward pass with the plan changed first, where the passes of a step need several."""
        if not self._ahead:
            return forward

        def planned(*args: Any, **kwargs: Any) -> Any:
            if self._ahead:
                self._put(self._ahead.popleft())
            return forward(*args, **kwargs)

        return planned

    def end(self) -> None:
        """After the run, or where the model is used otherwise: take the plan off. `begin` puts it on again."""
        if self._applied is not None:
            self._applied[1].remove()
            self._applied = None

    @property
    def reason(self) -> str:
        """What was chosen and why, in a sentence; empty before the first step."""
        if self._interval is not None:
            return f"checkpoint_interval={self._interval}: blocks are recomputed in runs of {self._interval}"
        if self._refused:
            return f"not planned, trained without a limit: {self._refused}"
        if self.plan is None:
            return ""
        peak = max(plan.measured_peak_bytes for plan in self._every) / 1e9
        text = f"peak {peak:.4g} GB measured, limit {self.plan.budget_bytes / 1e9:.4g} GB; {summary(self.plan)}"
        if len(self._every) > 1:
            text += f"; planned {len(self._every)} times, last for a batch of {_words(self._latest)}"
        return text

    @property
    def why_not_recorded(self) -> str:
        """Why steps cannot be recorded as CUDA graphs; empty if they can."""
        if self._interval is not None:
            return "blocks are recomputed at a fixed interval"
        return next((made.plan.why_not_recorded for made in self._made if made.plan.why_not_recorded), "")

    @property
    def reports(self) -> list[Report]:
        """The reports of the plans, in the order in which they were made."""
        return [plan.report for plan in self._every]


def _words(extent: Extent) -> str:
    return "shapes " + " ".join(str(shape) for shape, _ in extent)

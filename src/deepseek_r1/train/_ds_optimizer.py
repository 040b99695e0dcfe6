"""`DSOptimizer`: precision, micro-batch, optimizer state and recomputation, chosen together for a limit of memory.

Tries settings on the real model and batch (`memory.MemoryPlanner`) and takes the fastest. Knows nothing about loops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..core import ConfigError, InputError, Report
from ..data import batch_size, slice_batch, unpack_batch
from ._config import TrainingConfig, resolve
from ._evaluate import mode, placed
from ._objective import LossFunction, Objective
from .memory import MemoryPlan, MemoryPlanner
from .memory._plan import summary
from .optimizers import AdamW, AdamW8bit

#: 8-bit states change what is computed, a little; they must be so much faster to be taken where 32 bits fit.
_WORTH = 1.15


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """What a `Trainer` needs to stay below a limit: `Trainer(model, loader, config=s.config, optimizer=s.optimizer)`.

    Attributes:
        config: with precision, micro_batch_size and memory_gb settled.
        optimizer: makes the model's optimizer: AdamW, with 32-bit or 8-bit states.
        plan: what the blocks do, as planned for the batch that was given.
        report: what was tried, and why this was chosen.
    """

    config: TrainingConfig
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    plan: MemoryPlan
    report: Report = field(compare=False)


@dataclass(frozen=True)
class _Trial:
    state: str
    micro: int
    seconds: float
    plan: MemoryPlan


def _keeps_all(plan: MemoryPlan) -> bool:
    return all(block.action == "keep" for block in plan.blocks)


class DSOptimizer:
    """Settings of a training run for a limit of memory.

    Precision is that of the configuration ("auto": where the hardware gains). For AdamW with 32-bit states and with
    8-bit states, and for the whole batch, its half, its quarter... as the micro-batch, what each block keeps or
    recomputes is planned and a step is measured; the fastest is taken, with 8-bit states only where 32-bit ones do not
    fit or are a good deal slower.

    Args:
        model: to be trained; afterwards what it was.
        memory_gb: the limit, in 10**9 bytes of everything alive on the device, or "auto" (what is free, less a margin).
        lr: learning rate of the optimizer.
        config: other settings of the run; its `memory_gb` is replaced.

    Raises:
        InputError: the model is no module.
        ConfigError: the limit is no number above zero.

    Example:
        >>> net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)))
        >>> batch = torch.randn(256, 64), torch.randn(256, 64)
        >>> setup = DSOptimizer(net, memory_gb=1, config=TrainingConfig(device="cpu")).setup(batch)
        >>> setup.config.memory_gb, setup.config.micro_batch_size, setup.optimizer(net.parameters()).__class__.__name__
        (1, None, 'AdamW')
    """

    def __init__(
        self, model: nn.Module, memory_gb: float | str = "auto", lr: float = 2e-5, config: TrainingConfig | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"DSOptimizer(model={type(model).__name__}): an nn.Module is needed.")
        given = replace(config or TrainingConfig(), memory_gb=memory_gb)
        self.model, self.lr = model, lr
        self.config, self._reasons = resolve(given, model)

    def setup(self, batch: Any, loss: LossFunction | None = None) -> TrainingSetup:
        """Choose for a batch as the loader gives it.

        Args:
            loss: as for the Trainer; None: chosen for outputs and labels.

        Raises:
            ConfigError: nothing fits, not even one sample at a time with 8-bit states; the message has the least.
        """
        parts = unpack_batch(batch)
        trials: list[_Trial] = []
        refused: list[tuple[str, str]] = []
        device = torch.device(self.config.device)
        with placed(self.model, device), mode(self.model, True):
            trials += self._tried("32-bit", parts, loss, refused)
            if not trials or trials[0].micro < batch_size(parts) or not _keeps_all(trials[0].plan):
                trials += self._tried("8-bit", parts, loss, refused)
        if not trials:
            raise ConfigError(f"DSOptimizer(memory_gb={self.config.memory_gb!r}): nothing fits. {refused[-1][1]}")
        best = self._best(trials)
        size = batch_size(parts)
        config = replace(self.config, micro_batch_size=best.micro if best.micro < size else None)
        return TrainingSetup(
            config=config, optimizer=self._factory(best.state), plan=best.plan,
            report=self._report(best, trials, refused, size),
        )  # fmt: skip

    def _tried(self, state: str, parts: Any, loss: LossFunction | None, refused: list[tuple[str, str]]) -> list[_Trial]:
        """Micro-batches from the whole batch down, until everything is kept or one sample is left."""
        found: list[_Trial] = []
        size = micro = batch_size(parts)
        while micro:
            args, kwargs, labels = slice_batch(parts, 0, micro) if micro < size else parts
            inputs = args if args else kwargs
            limit = self.config.memory_gb
            assert limit is not None, "resolve keeps the limit that was given"
            try:
                plan = MemoryPlanner(
                    self.model, (inputs, labels) if labels is not None else (inputs,), Objective(self.model, loss),
                    device=self.config.device, precision=self.config.precision, accumulates=micro < size,
                    optimizer=self._factory(state)(self.model.parameters()),
                ).plan(limit)  # fmt: skip
            except ConfigError as e:
                refused.append((f"{state} states, micro-batch {micro}", str(e)))
            else:
                found.append(_Trial(state, micro, plan.step_seconds * -(-size // micro), plan))
                if _keeps_all(plan):
                    break
            micro //= 2
        return found

    def _factory(self, state: str) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
        kind: Any = AdamW if state == "32-bit" else AdamW8bit
        model, lr, decay = self.model, self.lr, self.config.weight_decay

        def make(_: Iterable[nn.Parameter]) -> Optimizer:
            optimizer: Optimizer = kind.from_model(model, lr=lr, weight_decay=decay)
            return optimizer

        return make

    @staticmethod
    def _best(trials: list[_Trial]) -> _Trial:
        fastest = min(trials, key=lambda trial: trial.seconds)
        exact = [trial for trial in trials if trial.state == "32-bit"]
        plain = min(exact, key=lambda trial: trial.seconds, default=fastest)
        return plain if plain.seconds <= _WORTH * fastest.seconds else fastest

    def _report(self, best: _Trial, trials: list[_Trial], refused: list[tuple[str, str]], size: int) -> Report:
        report = Report("settings for a limit of memory")
        for trial in trials:
            report.add(
                f"{trial.state} states, micro-batch {trial.micro}", trial.seconds, unit="s", how="forward and backward"
                f" passes of the whole batch; peak {trial.plan.measured_peak_bytes / 1e9:.4g} GB",
            )  # fmt: skip
        report.note(
            f"chosen: {self.config.precision}, AdamW with {best.state} states, micro-batches of {best.micro} of {size}"
            f"; {summary(best.plan)}"
        )
        for name, reason in self._reasons.items():
            report.note(f"{name}: {reason}")
        for what, why in refused:
            report.skip(what, why)
        report.sections.append(best.plan.report)
        return report

"""The steps of a run: rates by schedule, the step itself, its verdict, the count. Knows no loaders and no files."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core import ConfigError, InputError, NonFiniteLossError
from ..data._batch import batch_size, unpack_batch
from ._checkpoint import advice
from ._config import TrainingConfig
from ._diagnose import first_non_finite
from ._objective import Objective
from ._optim import lr_factor
from ._progress import Progress
from ._step import make_scaler, train_step

#: In the message of torch's own error for a batch norm with one value a channel.
_ONE_SAMPLE = "Expected more than 1 value per channel when training"


class Stepper:
    """Takes optimizer steps and counts them in `progress`.

    A step whose loss or gradient is not finite is never applied. On a CPU that is known before the update. On a GPU
    a fused optimizer skips such an update by itself, and the host reads the verdict during the step after, before
    that step's update: so neither waits for the other, and the parameters are those before the bad step.

    Attributes:
        progress: the counters.
        base_lrs: the learning rate of each parameter group that the schedule scales.
        scaler: the gradient scaler of precision "fp16", or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        objective: Objective,
        config: TrainingConfig,
    ) -> None:
        self.progress = Progress()
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._model, self._optimizer, self._objective, self._config = model, optimizer, objective, config
        self._device = torch.device(config.device)
        self.scaler = make_scaler(self._device, config.precision)
        self._forward: Callable[..., Any] = torch.compile(model) if config.compile else model
        self._verdict: tuple[Tensor, torch.cuda.Event] | None = None
        self._pending: tuple[int, list[Any]] | None = None

    def step(self, window: list[Any], total: int | None) -> None:
        """One optimizer step on the batches in `window`, of `total` steps in the run.

        Raises:
            NonFiniteLossError: this step or (on a GPU) the one before is not finite.
            InputError: a batch of one sample met a batch norm, or the batch is no batch.
        """
        began = time.perf_counter()
        c, progress = self._config, self.progress
        if c.schedule != "constant" or c.warmup:
            factor = lr_factor(progress.step - progress.first_step, total, c.schedule, c.warmup)
            for group, base in zip(self._optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = base * factor
        try:
            result = train_step(
                self._forward, window, self._optimizer, self._objective, device=self._device, precision=c.precision,
                micro_batch_size=c.micro_batch_size, clip_grad_norm=c.clip_grad_norm, scaler=self.scaler,
                before_update=self.settle,
            )  # fmt: skip
        except ValueError as e:
            if _ONE_SAMPLE not in str(e):
                raise
            raise InputError(
                f"step {progress.step + 1}: a batch norm was given a batch of one sample, of which no variance can be "
                "taken. Use drop_last=True in the loader, or a larger batch (and micro-batch), so that no batch has "
                "one sample."
            ) from e
        if isinstance(result.bad, Tensor):
            if self._verdict is None:
                self._verdict = torch.empty((), pin_memory=True), torch.cuda.Event()
            host, event = self._verdict
            host.copy_(result.bad, non_blocking=True)
            event.record()
            self._pending = (progress.step + 1, window)
        elif result.bad:
            self._fail(window, progress.step + 1)
        progress.count(result.loss, len(window), result.samples, time.perf_counter() - began, c.log_every)
        if self.scaler is not None and progress.step % c.log_every == 0 and self.scaler.get_scale() < 1:
            self._fail(window, progress.step)

    def settle(self) -> None:
        """Wait for the verdict on the step before, and raise NonFiniteLossError if it is bad."""
        if self._pending is not None and self._verdict is not None:
            step, window = self._pending
            self._pending = None
            host, event = self._verdict
            event.synchronize()
            if bool(host):
                self._fail(window, step)

    def forget(self) -> None:
        """Drop a verdict that no longer matters."""
        self._pending = None

    def check_micro_batch(self, window: list[Any]) -> None:
        """Raise ConfigError if the first batch of an epoch is smaller than a micro-batch."""
        micro = self._config.micro_batch_size
        if micro is not None and (size := batch_size(unpack_batch(window[0]))) < micro:
            raise too_large(micro, size)

    def _fail(self, window: list[Any], step: int) -> None:
        where = first_non_finite(
            self._model, self._objective, window, device=self._device, precision=self._config.precision,
            micro_batch_size=self._config.micro_batch_size,
        )  # fmt: skip
        raise NonFiniteLossError(
            f"step {step} (epoch {self.progress.epoch + 1}): the loss or a gradient is not a finite number: {where}. "
            f"The step was not applied. {advice(self._config.save_dir)} Common ways out: a smaller lr, "
            "clip_grad_norm=1.0, a warm-up, precision='fp32', cleaner data."
        )


def too_large(micro: int, size: int) -> ConfigError:
    """The error for a micro-batch that is larger than the loader's batch."""
    return ConfigError(
        f"TrainingConfig(micro_batch_size={micro}) is larger than the loader's batch of {size}. The loader's batch is "
        "what is split: raise the loader's batch_size, or use gradient_accumulation_steps for a larger step."
    )

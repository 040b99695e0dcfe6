"""The steps of a run: rates by schedule, the step itself, its verdict, the count. Knows no loaders and no files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core import ConfigError, InputError, NonFiniteLossError
from ..data import batch_size, unpack_batch
from ._blocks import block_runs, compiled
from ._config import TrainingConfig
from ._device_run import BadStep, DeviceRun
from ._device_step import Outcome, device_step
from ._diagnose import first_non_finite
from ._objective import Objective
from ._optim import set_rates, tell_total
from ._progress import Progress
from ._recordable import PARAMETERS, decided
from ._schedule import config_lr_factor
from ._step import make_scaler, skips_on_device, train_step
from .memory._control import make_control

#: Changes of what a recording freezes, each so many steps after the one before, after which none is made any more.
_CHANGES, _SOON = 4, 4
#: In the message of torch's own error for a batch norm with one value a channel.
_ONE_SAMPLE = "Expected more than 1 value per channel when training"


class Stepper:
    """Takes optimizer steps and counts them in `progress`.

    A step whose loss or gradient is not finite is never applied. On a CPU that is known before the update. On a GPU
    a fused optimizer skips such an update by itself, and all that follow, until the host has read the verdict, a few
    steps later: so neither waits for the other, and the parameters are those before the bad step.

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
        *,
        advice: Callable[[], str],
        may_compile: bool = False,
        limit_asked: bool = True,
    ) -> None:
        self.progress = Progress()
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._model, self._optimizer, self._objective, self._config = model, optimizer, objective, config
        self._device = torch.device(config.device)
        self.scaler = make_scaler(self._device, config.precision)
        self.memory = make_control(
            model, objective, optimizer, config, asked=limit_asked, before_plan=self._forget_graphs
        )
        self._forward: Callable[..., Any] = torch.compile(model) if config.compile is True else model
        # A plan for memory is made for the blocks as they are.
        self._may_compile, self._advice = may_compile and self.memory is None, advice
        self._factor = 1.0
        self._first_batch: dict[int, int] = {}
        self._run: DeviceRun | None = None
        self._blocks = contextlib.ExitStack()
        self._graphs = ""
        self._decided: dict[str, Any] = {}
        self._last_change, self._changes = 0, 0

    @property
    def rate(self) -> float:
        """The learning rate of the first group, without waiting for a GPU where it is a number there."""
        rate = self._optimizer.param_groups[0]["lr"]
        on_gpu = isinstance(rate, Tensor) and rate.device.type != "cpu"
        return self.base_lrs[0] * self._factor if on_gpu else float(rate)

    @property
    def graphs(self) -> str:
        """What became of recording steps in the last run, for the Report; empty where it was not tried."""
        return self._graphs

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Steps are taken inside the block: blocks are compiled and steps recorded as the configuration says."""
        c = self._config
        self._compile_blocks()
        try:
            if self._device.type == "cuda" and self.scaler is None and skips_on_device(self._optimizer):
                # Paged states are brought by the host, which a recording leaves out.
                graphs = bool(c.cuda_graph) and not getattr(self._optimizer, "paged", False)
                self._run = DeviceRun(self._started, self._optimizer, self._device, graphs=graphs)
            yield
        finally:
            self.release()
            self._blocks.close()
            if self._run is not None and (recorded := self._run.graphs) is not None:
                many = f"whole steps, for {recorded.recorded} shape(s) of batches"
                self._graphs = f"not used: {recorded.refused}" if recorded.refused else many
                if self._forward is not self._model and c.compile is not True:
                    self._graphs += "; the model is compiled as a whole, as otherwise the host waits within a step"
            if self._run is not None:
                self._run.close()

    def _compile_blocks(self) -> None:
        if self._config.compile == "blocks" and self._forward is self._model:
            modules = [block for run in block_runs(self._model) for block in run]
            self._blocks.enter_context(compiled(modules))

    def _compile_more(self) -> None:
        """A model that makes the host wait may not do so compiled as a whole; if it still does, as it was."""
        assert self._run is not None
        assert self._run.graphs is not None
        graphs = self._run.graphs
        if self._forward is self._model and self._may_compile:
            self._blocks.close()
            self._forward = torch.compile(self._model)
            graphs.forget()
        elif self._forward is not self._model and self._config.compile is not True:
            self._forward, self._may_compile, graphs.waits = self._model, False, False
            self._compile_blocks()

    @property
    def _called(self) -> Callable[..., Any]:
        return self._forward if self.memory is None else self.memory.around(self._forward)

    def _started(self, window: list[Any], bad: Tensor) -> Outcome:
        c = self._config
        return device_step(
            self._called, window, self._optimizer, self._objective, bad, device=self._device, precision=c.precision,
            micro_batch_size=c.micro_batch_size, clip_grad_norm=c.clip_grad_norm,
        )  # fmt: skip

    def step(self, window: list[Any], total: int | None) -> None:
        """One optimizer step on the batches in `window`, of `total` steps in the run.

        Raises:
            NonFiniteLossError: this step or (on a GPU) the one before is not finite.
            InputError: a batch of one sample met a batch norm, or the batch is no batch.
        """
        began = time.perf_counter()
        c, progress = self._config, self.progress
        added = self._optimizer.param_groups[len(self.base_lrs) :]
        self.base_lrs += [float(group["lr"]) for group in added]
        if c.schedule != "constant" or c.warmup:
            self._factor = config_lr_factor(progress.step - progress.first_step, total, c)
            set_rates(self._optimizer, self.base_lrs, self._factor)
        if added or progress.step == progress.first_step:
            tell_total(self._optimizer, total)
        number = progress.step + 1
        # A bad step is known a few steps later.
        self._first_batch = {k: v for k, v in self._first_batch.items() if k > number - 8} | {
            number: progress.batch + 1
        }
        if self.memory is not None:
            self.memory.begin(window)
            if self._run is not None and self._run.graphs is not None:
                self._run.graphs.refused = self._run.graphs.refused or self.memory.why_not_recorded
        try:
            loss, samples, norm = self._taken(window, number)
        except ValueError as e:
            if _ONE_SAMPLE not in str(e):
                raise
            raise InputError(
                f"step {number}: a batch norm was given a batch of one sample, of which no variance can be "
                "taken. Use drop_last=True in the loader, or a larger batch (and micro-batch), so that no batch has "
                "one sample."
            ) from e
        progress.count(loss, len(window), samples, time.perf_counter() - began, c.log_every, norm)
        if self.scaler is not None and progress.step % c.log_every == 0 and self.scaler.get_scale() < 1:
            self._fail(window, progress.step)

    def _taken(self, window: list[Any], number: int) -> tuple[Tensor, int, Tensor | None]:
        c = self._config
        if self._run is not None:
            samples = sum(batch_size(unpack_batch(batch)) for batch in window)
            loss, norm, bad = self._run.step(number, window)
            self._refuse(bad)
            if self._run.graphs is not None and self._run.graphs.waits:
                self._compile_more()
            return loss, samples, None if c.clip_grad_norm is None else norm
        result = train_step(
            self._called, window, self._optimizer, self._objective, device=self._device, precision=c.precision,
            micro_batch_size=c.micro_batch_size, clip_grad_norm=c.clip_grad_norm, scaler=self.scaler,
        )  # fmt: skip
        if bool(result.bad):
            self._fail(window, number)
        return result.loss, result.samples, result.grad_norm

    def settle(self) -> None:
        """Wait for the steps under way, and raise NonFiniteLossError if one of them is bad."""
        if self._run is not None:
            self._refuse(self._run.settle())

    def _refuse(self, bad: BadStep | None) -> None:
        if bad is not None:
            self._fail(bad.window, bad.step)

    def forget(self) -> None:
        """Drop verdicts that no longer matter."""
        if self._run is not None:
            self._run.forget()

    def look(self) -> None:
        """After others had the model in hand: what was recorded or planned for it as it was is made anew."""
        recorded = None if self._run is None else self._run.graphs
        if recorded is None and self.memory is None:
            return
        before, self._decided = self._decided, decided(self._model, self._optimizer)
        changed = [name for name, now in self._decided.items() if before and now != before[name]]
        if self.memory is not None and PARAMETERS in changed:
            self.memory.forget()
        if changed and recorded is not None and not recorded.refused:
            soon = self.progress.step - self._last_change <= _SOON
            self._last_change, self._changes = self.progress.step, self._changes + 1 if soon else 0
            self._forget_graphs()
            if self._changes >= _CHANGES:
                recorded.refused = f"callbacks change {', '.join(changed)} every few steps, which a recording freezes"

    def _forget_graphs(self) -> None:
        """Free what recorded steps hold; they are recorded anew."""
        if self._run is not None and self._run.graphs is not None:
            self.settle()
            self._run.graphs.forget()

    def release(self) -> None:
        """Take what limits memory off the model, until the next step."""
        if self.memory is not None:
            self.memory.end()

    def check_micro_batch(self, window: list[Any]) -> None:
        """Raise ConfigError if the first batch of an epoch is smaller than a micro-batch."""
        micro = self._config.micro_batch_size
        if micro is not None and (size := batch_size(unpack_batch(window[0]))) < micro:
            raise too_large(micro, size)

    def _fail(self, window: list[Any], step: int) -> None:
        with torch.compiler.set_stance("force_eager"):
            where = first_non_finite(
                self._model, self._objective, window, device=self._device, precision=self._config.precision,
                micro_batch_size=self._config.micro_batch_size, first_batch=self._first_batch[step],
            )  # fmt: skip
        first, last = self._first_batch[step], self._first_batch[step] + len(window) - 1
        batches = f"batch {first}" if first == last else f"batches {first} to {last}"
        raise NonFiniteLossError(
            f"step {step} (epoch {self.progress.epoch + 1}), {batches}: the loss or a gradient is not a finite number: "
            f"{where}. The step was not applied. {self._advice()} Common ways out: a smaller lr, clip_grad_norm=1.0, a "
            "warm-up, precision='fp32', cleaner data."
        )


def check_batch_size(loader: Any, micro: int | None) -> None:
    """Raise ConfigError if a micro-batch is larger than the loader's batch, where the loader says how large that is."""
    size = getattr(loader, "batch_size", None)
    if micro is not None and isinstance(size, int) and micro > size:
        raise too_large(micro, size)


def too_large(micro: int, size: int) -> ConfigError:
    """The error for a micro-batch that is larger than the loader's batch."""
    return ConfigError(
        f"TrainingConfig(micro_batch_size={micro}) is larger than the loader's batch of {size}. The loader's batch is "
        "what is split: raise the loader's batch_size, or use gradient_accumulation_steps for a larger step."
    )

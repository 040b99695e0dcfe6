"""Who trains: Hugging Face's Trainer, a loop by hand, ours. Each as its own documentation has it. Knows no files."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from deepseek_r1 import Trainer, TrainingConfig
from deepseek_r1.train import Callback

if TYPE_CHECKING:
    from .cases import Case

LR = 2e-5
#: A run of a case against the clock; gives notes.
Run = Callable[["Case", "Clock"], list[str]]
_CASES_OWN = -1.0


class Clock:
    """The rate between two steps on a device, and when the first of them was reached."""

    def __init__(self, warm: int, steps: int, device: torch.device) -> None:
        self._first, self._last, self.device = warm, warm + steps, device
        self.begun = time.perf_counter()
        self.warm_s, self.seconds = 0.0, 0.0

    def step(self, number: int) -> bool:
        """Whether a run that has done `number` steps may end."""
        if number in (self._first, self._last):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter() - self.begun
            if number == self._first:
                self.warm_s = now
            else:
                self.seconds = now - self.warm_s
        return number >= self._last


def _built(make: Callable[[], nn.Module], clock: Clock) -> nn.Module:
    """The model, made where it will be: drawing a billion weights on a CPU takes longer than the run."""
    with clock.device:
        return make()


def hugging_face(case: Case, clock: Clock) -> list[str]:
    """Hugging Face's Trainer with `bf16=True`."""
    from transformers import Trainer as Theirs
    from transformers import TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = clock.step(state.global_step)

    class Plain(Theirs):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if case.labels:
                return super().compute_loss(model, inputs, *args, **kwargs)
            return F.cross_entropy(model(inputs["x"]), inputs["labels"])

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, per_device_train_batch_size=case.batch, num_train_epochs=1, bf16=True, learning_rate=LR,
            dataloader_num_workers=case.workers or 0, save_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, dataloader_drop_last=True, use_cpu=clock.device.type == "cpu",
        )  # fmt: skip
        model = _built(case.theirs, clock)
        Plain(model, options, train_dataset=case.dataset(named=True), callbacks=[Watch()]).train()
    return []


def by_hand(case: Case, clock: Clock, compiled: bool = False) -> list[str]:
    """The loop of PyTorch's tutorials: autocast, a fused AdamW, and `torch.compile` of the model if that is wanted."""
    model = _built(case.theirs, clock).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    forward: Callable[..., Any] = torch.compile(model) if compiled else model
    device = clock.device
    for number, batch in enumerate(case.loader(device), 1):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            if case.labels:
                loss = forward(**{k: v.to(device, non_blocking=True) for k, v in batch.items()}).loss
            else:
                x, y = (v.to(device, non_blocking=True) for v in batch)
                loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        if clock.step(number):
            break
    return []


def ours(
    case: Case,
    clock: Clock,
    model: Callable[[], nn.Module] | None = None,
    memory_gb: float | None = _CASES_OWN,
) -> list[str]:
    """The Trainer with what it chooses, and the limit of memory that the case (or `memory_gb`) sets.

    On a CPU it is told what it would choose on a GPU.
    """

    class Watch(Callback):
        def on_step_end(self, trainer: Any) -> None:
            if clock.step(trainer.step):
                trainer.stop("measured")

    limit = case.memory_gb if memory_gb == _CASES_OWN else memory_gb
    more: dict[str, Any] = {} if clock.device.type == "cuda" else {"precision": "bf16", "compile": "blocks"}
    config = TrainingConfig(memory_gb=limit, device=str(clock.device), **more)
    built = _built(model or case.ours or case.theirs, clock)
    trainer = Trainer(built, case.loader(clock.device), lr=LR, config=config, callbacks=[Watch()])
    return list(trainer.train(epochs=1).notes)

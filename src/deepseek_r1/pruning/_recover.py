"""Getting back what pruning cost: batch statistics estimated anew, and training against the float model's answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core import Report
from ..data import batch_size, to_device, unpack_batch
from ..train import Objective, Trainer, TrainingConfig
from ._config import PruneConfig

LossFunction = Callable[[Any, Any], Tensor]


#: From fewer samples than this, batch statistics are less exact than those that pruning left.
ENOUGH_SAMPLES = 200


def reestimate_(model: nn.Module, loader: Iterable[Any], batches: int, *, least: int = ENOUGH_SAMPLES) -> int:
    """Changes the running statistics of batch normalisation in `model`: their means over batches of training data.

    What feeds a layer has fewer channels now, so its inputs are spread differently. Returns the samples that were run;
    with fewer than `least` the statistics are left as they were.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms or not batches:
        return 0
    before = [(m, m.training) for m in model.modules()]
    momenta = [m.momentum for m in norms]
    kept = [copy.deepcopy(m.state_dict()) for m in norms]
    device = next(iter(model.parameters())).device
    done = 0
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            # None: the plain mean over all batches.
            norm.momentum = None
        with torch.no_grad():
            for batch in islice(loader, batches):
                args, kwargs, _ = to_device(unpack_batch(batch), device)
                model(*args, **kwargs)
                done += batch_size((args, kwargs))
    finally:
        for norm, momentum, before_it in zip(norms, momenta, kept, strict=True):
            norm.momentum = momentum
            if done < least:
                norm.load_state_dict(before_it)
        for module, was in before:
            module.training = was
    return done


class Distilled(nn.Module):
    """The pruned model with a loss of its own: the task's, and the distance from the float model's answers.

    Softened classes after Hinton et al. 2015 (arXiv 1503.02531) where the task is one of classes, else the squared
    distance relative to the spread of the float model's answers.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, config: PruneConfig, loss: LossFunction | None) -> None:
        super().__init__()
        self.student = student
        # In a tuple, so that the trainer neither trains nor moves it.
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._config = config
        self._objective = Objective(student, loss)

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The loss and the student's outputs."""
        weight = self._config.distillation
        parts = []
        if labels is not None:
            task, output = self._objective(self.student, args, kwargs, labels)
            parts.append((1 - weight, task))
        else:
            output, weight = self.student(*args, **kwargs), 1.0
        if weight:
            with torch.no_grad():
                wanted = self._teacher[0](*args, **kwargs)
            classes = self._objective.name == "cross entropy" or self._config.distance == "kl"
            parts.append((weight, self._distance(output, wanted, classes)))
        return {"loss": sum(w * p for w, p in parts), "logits": output}

    def _distance(self, output: Any, wanted: Any, classes: bool) -> Tensor:
        pairs = list(zip(_floats(output), _floats(wanted), strict=False))
        if classes and pairs and pairs[0][0].ndim > 1:
            return self._softened(*pairs[0])
        distances = [F.mse_loss(a, b) / b.var().clamp(min=1e-6) for a, b in pairs if a.ndim]
        return torch.stack(distances).sum()

    def _softened(self, a: Tensor, b: Tensor) -> Tensor:
        heat = self._config.temperature
        dim = 1 if a.ndim != 3 else -1
        one, other = (F.log_softmax(v / heat, dim=dim) for v in (a, b))
        rows = a.numel() / a.shape[dim]
        return F.kl_div(one, other, reduction="sum", log_target=True) * heat * heat / rows


def _floats(output: Any) -> list[Tensor]:
    """The outputs that are compared: not the model's own loss, which is a single number."""
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point() and v.ndim]


def recover_(
    model: nn.Module, teacher: nn.Module, train_loader: Iterable[Any], *, epochs: int, lr: float, config: PruneConfig,
    loss: LossFunction | None = None,
) -> Report:  # fmt: skip
    """Changes `model`: trains it for some epochs to answer as the float model and to do the task."""
    settings = config.training or TrainingConfig(
        schedule="cosine", warmup=0.1, weight_decay=1e-4, seed=config.seed, clip_grad_norm=5.0
    )
    settings = replace(settings, save_dir=None)
    distilled = Distilled(model, copy.deepcopy(teacher), config, loss)
    trainer = Trainer(distilled, train_loader, lr=lr, config=settings)
    distilled._teacher[0].to(trainer.device)
    return trainer.train(epochs)

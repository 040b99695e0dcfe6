"""The default optimizer and the learning-rate schedule, as plain functions. Knows nothing about loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..core import ConfigError, InputError
from ._config import TrainingConfig

OptimizerLike = Optimizer | type[Optimizer] | Callable[[Iterable[nn.Parameter]], Optimizer]


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices and kernels with decay, biases and norms without.

    A parameter with fewer than two dimensions is a bias, a norm's scale or a single number: decaying it pulls
    outputs towards zero and regularises nothing.

    Example:
        >>> [len(g["params"]) for g in decay_groups(nn.Linear(2, 2), 0.1)]
        [1, 1]
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def make_optimizer(
    model: nn.Module, lr: float, config: TrainingConfig, given: OptimizerLike | None
) -> tuple[Optimizer, str]:
    """The optimizer to train with, and one sentence on it.

    Args:
        given: None (AdamW), an instance (its own rates are kept, `lr` is not used), a class (called with the
            parameters and `lr`) or a function of the parameters (decides on its own rate).

    Raises:
        InputError: nothing to train, or `given` is no optimizer of this model's parameters.
        ConfigError: `lr` is no number above zero.
    """
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not math.isfinite(lr) or lr <= 0:
        raise ConfigError(f"Trainer(lr={lr!r}): a finite number > 0 is needed, such as 1e-3.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InputError(f"{type(model).__name__} has no parameter with requires_grad=True, so nothing can be trained.")
    if given is None:
        plain = all(p.is_floating_point() for p in parameters)
        optimizer: Any = torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=lr, fused=plain)
        return optimizer, f"AdamW (lr {lr:g}, decay {config.weight_decay:g} except on biases and norms)"
    if isinstance(given, Optimizer):
        optimizer, text = given, f"{type(given).__name__} as given, with its own learning rates"
    elif isinstance(given, type):
        optimizer, text = given(parameters, lr=lr), f"{given.__name__} (lr {lr:g})"  # type: ignore[call-arg]
    elif callable(given):
        optimizer = given(parameters)
        text = f"{type(optimizer).__name__} as made by {getattr(given, '__name__', 'the given function')}"
    else:
        optimizer = None
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"optimizer={given!r}: an optimizer, its class, or a function of the parameters is needed.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError("LBFGS runs the model several times a step, which the Trainer does not; use AdamW or SGD.")
    mine = {id(p) for p in parameters}
    if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise InputError("the optimizer holds none of the model's parameters; make it from this model's parameters().")
    return optimizer, text


def lr_factor(step: int, total: int | None, schedule: str, warmup: int | float) -> float:
    """What the base learning rate is multiplied with at `step` (counted from 0) of `total`.

    It climbs linearly over the warm-up, then stays ("constant") or falls to zero at the end of the run along a
    line ("linear") or half a cosine ("cosine"; Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983).

    Raises:
        ConfigError: the schedule needs the number of steps, and it is unknown.

    Example:
        >>> [round(lr_factor(s, 10, "linear", 2), 3) for s in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    if total is None and (schedule != "constant" or isinstance(warmup, float)):
        raise ConfigError(
            f"TrainingConfig(schedule={schedule!r}, warmup={warmup!r}) needs the number of steps, but the loader has "
            "no length; use schedule='constant' with warmup as a number of steps."
        )
    climb = round(warmup * total) if isinstance(warmup, float) and total else int(warmup)
    if step < climb:
        return (step + 1) / climb
    if schedule == "constant" or total is None:
        return 1.0
    done = min(1.0, (step - climb) / max(1, total - climb))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

"""The optimizer of a run, from what the user gave, as plain functions. Knows nothing about loops."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..core import ConfigError, InputError
from ._config import TrainingConfig
from .optimizers import AdamW, AdamW8bit, AdaptiveOptimizer, Lion, Muon
from .optimizers._groups import decay_groups

OptimizerLike = str | Optimizer | type[Optimizer] | Callable[[Iterable[nn.Parameter]], Optimizer]

#: What can be asked for by name: the class and the options that the name stands for.
BY_NAME: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (AdamW, {}),
    "adamw8bit": (AdamW8bit, {}),
    "paged_adamw8bit": (AdamW8bit, {"paged": True}),
    "lion": (Lion, {}),
    "muon": (Muon, {}),
    "adaptive": (AdaptiveOptimizer, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}


def make_optimizer(
    model: nn.Module, lr: float, config: TrainingConfig, given: OptimizerLike | None
) -> tuple[Optimizer, str]:
    """The optimizer to train with, and one sentence on it.

    Args:
        given: None ("adamw"), a name of `BY_NAME`, an instance (its own rates are kept, `lr` is not used), a class
            (one of ours is made for the whole model, another is called with the parameters and `lr`) or a function of
            the parameters (decides on its own rate).

    Raises:
        InputError: nothing to train, or `given` is no optimizer of this model's parameters.
        ConfigError: `lr` is no number above zero, or the name is unknown.
    """
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not math.isfinite(lr) or lr <= 0:
        raise ConfigError(f"Trainer(lr={lr!r}): a finite number > 0 is needed, such as 1e-3.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InputError(f"{type(model).__name__} has no parameter with requires_grad=True, so nothing can be trained.")
    if given is None or isinstance(given, str):
        kind, options = _by_name("adamw" if given is None else given)
        return _for_model(kind, model, lr, config.weight_decay, options)
    if isinstance(given, type) and hasattr(given, "from_model"):
        return _for_model(given, model, lr, config.weight_decay, {})
    optimizer: Any
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
        raise InputError(
            f"optimizer={given!r}: a name ({', '.join(BY_NAME)}), an optimizer, its class, or a function of the "
            "parameters is needed."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError("LBFGS runs the model several times a step, which the Trainer does not; use AdamW or SGD.")
    mine = {id(p) for p in parameters}
    if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise InputError("the optimizer holds none of the model's parameters; make it from this model's parameters().")
    return optimizer, text


def _by_name(name: str) -> tuple[Any, dict[str, Any]]:
    if name not in BY_NAME:
        near = difflib.get_close_matches(name.lower(), BY_NAME, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"optimizer={name!r} is unknown.{hint} Known: {', '.join(BY_NAME)}.")
    return BY_NAME[name]


def _for_model(
    kind: Any, model: nn.Module, lr: float, weight_decay: float, options: dict[str, Any]
) -> tuple[Optimizer, str]:
    if hasattr(kind, "from_model"):
        optimizer = kind.from_model(model, lr=lr, weight_decay=weight_decay, **options)
    else:
        # torch's fused ones are told on the device that a step is bad; on a CPU the verdict is there before.
        on_gpu = all(p.is_cuda for p in model.parameters() if p.requires_grad)
        optimizer = kind(decay_groups(model, weight_decay), lr=lr, fused=on_gpu or None, **options)
    decay = f", decay {weight_decay:g} except on biases and norms" if "weight_decay" in optimizer.defaults else ""
    more = ", states paged" if options.get("paged") else ""
    more += f", momentum {options['momentum']:g}" if "momentum" in options else ""
    return optimizer, f"{kind.__name__} (lr {lr:g}{decay}{more})"


def set_rates(optimizer: Optimizer, base_lrs: list[float], factor: float) -> None:
    """Give every parameter group its base rate times `factor`. A rate that is a tensor stays the same tensor."""
    for group, base in zip(optimizer.param_groups, base_lrs, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(base * factor)
        else:
            group["lr"] = base * factor


def tell_total(optimizer: Optimizer, total: int | None) -> None:
    """Tell optimizers with a schedule of their own how many steps the run has, unless the user did."""
    for group in optimizer.param_groups:
        if total is not None and group.get("total_steps", total) is None:
            group["total_steps"] = total

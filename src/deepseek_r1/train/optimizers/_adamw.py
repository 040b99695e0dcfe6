"""AdamW: torch's own, in its fastest form, and the update rule on lists of tensors for optimizers that contain it.

Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._groups import decay_groups
from ._tick import Tick, promoted, write_back_


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, fused into one kernel for all parameters unless another form is asked for.

    Args:
        params: parameters, or groups of them, as in torch. `AdamW.from_model` leaves biases and norms undecayed.
        lr: learning rate.
        **options: as for `torch.optim.AdamW` (betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, ...).

    Example:
        >>> optimizer = AdamW(nn.Linear(2, 2).parameters(), lr=1e-3, weight_decay=0.1)
        >>> optimizer.param_groups[0]["fused"]
        True
    """

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, **options: Any) -> None:
        given: list[Any] = [params] if isinstance(params, Tensor) else list(params)
        if not any(options.get(form) for form in ("foreach", "fused", "differentiable")) and "fused" not in options:
            options["fused"] = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in _tensors(given))
        super().__init__(given, lr=lr, **options)

    @classmethod
    def from_model(cls, model: nn.Module, *, lr: float, weight_decay: float = 0.01, **options: Any) -> AdamW:
        """The optimizer of a whole model, with weight decay on all but biases and norms."""
        return cls(decay_groups(model, weight_decay), lr=lr, **options)


def _tensors(given: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for item in given:
        if isinstance(item, dict):
            inside = item["params"]
            found += [inside] if isinstance(inside, Tensor) else _tensors(item.setdefault("params", list(inside)))
        else:
            found.append(item[1] if isinstance(item, tuple) else item)
    return found


def adamw_(
    params: Sequence[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    tick: Tick,
    group: dict[str, Any],
) -> None:
    """One AdamW update in place, on lists of tensors that step together; `grads` as `Tick.gradients` gives them."""
    beta1, beta2 = group["betas"]
    dtype = exp_avgs[0].dtype
    torch._foreach_mul_(exp_avgs, tick.scalar(beta1, 1.0, dtype))
    torch._foreach_add_(exp_avgs, grads, alpha=1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, tick.scalar(beta2, 1.0, dtype))
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    update = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(update, tick.correction(beta2).sqrt().to(dtype))
    torch._foreach_add_(update, group["eps"])
    torch._foreach_reciprocal_(update)
    torch._foreach_mul_(update, exp_avgs)
    torch._foreach_mul_(update, tick.scalar(-tick.lr / tick.correction(beta1), 0.0, dtype))
    values = promoted(params)
    decay_(values, tick, group["weight_decay"])
    torch._foreach_add_(values, update)
    write_back_(params, values)


def decay_(values: list[Tensor], tick: Tick, weight_decay: float) -> None:
    """Decoupled weight decay in place: every value is multiplied with 1 - lr * weight_decay."""
    if weight_decay:
        torch._foreach_mul_(values, tick.scalar(1.0 - tick.lr * weight_decay, 1.0, values[0].dtype))

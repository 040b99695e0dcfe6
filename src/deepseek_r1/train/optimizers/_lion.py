"""Lion: the sign of an interpolated momentum. One state for each parameter.

Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", https://arxiv.org/abs/2302.06675.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._adamw import decay_
from ._base import DeviceOptimizer, Layout
from ._tick import Tick, promoted, write_back_


class Lion(DeviceOptimizer):
    """Every parameter moves by the learning rate in the direction of its momentum's sign.

        c = beta1 * m + (1 - beta1) * g;  p = p - lr * (sign(c) + weight_decay * p);  m = beta2 * m + (1 - beta2) * g

    As every element moves by the full rate, the paper advises 3 to 10 times less `lr` than AdamW's, and as many times
    more `weight_decay`. It keeps half of AdamW's states.

    Args:
        params: parameters, or groups of them, as in torch.
        lr: learning rate.
        betas: of the direction and of the momentum.
        weight_decay: decoupled, as in AdamW.
        capturable: the rate is a tensor on the device, so that a CUDA graph of the step follows its changes.

    Raises:
        ConfigError: an option is out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(3))
        >>> p.grad = torch.tensor([2.0, -0.5, 0.0])
        >>> Lion([p], lr=0.1).step()
        >>> p.tolist()
        [-0.10000000149011612, 0.10000000149011612, 0.0]
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "capturable": capturable})

    def _layout(self, p: Tensor, group: dict[str, Any]) -> Layout:
        return {"exp_avg": (tuple(p.shape), torch.promote_types(p.dtype, torch.float32))}

    def _update(self, params: list[Tensor], group: dict[str, Any], tick: Tick) -> None:
        beta1, beta2 = group["betas"]
        grads = tick.gradients([p.grad for p in params if p.grad is not None])
        averages = [self.state[p]["exp_avg"] for p in params]
        values = promoted(params)
        dtype = values[0].dtype
        update = torch._foreach_lerp(grads, averages, beta1)
        torch._foreach_sign_(update)
        torch._foreach_mul_(update, tick.scalar(-tick.lr, 0.0, dtype))
        decay_(values, tick, group["weight_decay"])
        torch._foreach_add_(values, update)
        write_back_(params, values)
        torch._foreach_mul_(averages, tick.scalar(beta2, 1.0, dtype))
        torch._foreach_add_(averages, grads, alpha=1 - beta2)

"""`AdaptiveOptimizer`: gradient descent with momentum whose rate grows with the mean of the gradient.

The cosine is that of Loshchilov and Hutter, "SGDR", https://arxiv.org/abs/1608.03983.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...core import ConfigError
from ._base import DeviceOptimizer, Layout
from ._tick import Tick, promoted, write_back_

#: Steps of the cosine where nobody says how many there will be.
DEFAULT_TOTAL_STEPS = 10_000


class AdaptiveOptimizer(DeviceOptimizer):
    """Gradient descent with a momentum buffer, a cosine schedule, and a rate that grows with the mean gradient.

    For each parameter tensor, with t counted from 0 and T = `total_steps`:

        lr_t = base_lr * (1 + cos(pi * (t mod T) / T)) / 2
        buffer = momentum * buffer + g
        p = p - lr_t * (1 + 0.1 * |mean(g)|) * buffer

    The mean is over the elements of the tensor's gradient, and where gradients are small, as they mostly are, the
    factor is near one. After T steps the cosine starts again. It has its own schedule: leave the Trainer's at
    "constant".

    Args:
        params: parameters, or groups of them, as in torch.
        base_lr: learning rate at the first step.
        lr: another name for `base_lr`.
        momentum: of the buffer.
        total_steps: steps of the cosine. None: the Trainer's number of steps in the run, else 10,000.
        capturable: the rate is a tensor on the device, so that a CUDA graph of the step follows its changes.

    Raises:
        ConfigError: an option is out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 1.0])
        >>> AdaptiveOptimizer([p], base_lr=0.5).step()
        >>> [round(x, 6) for x in p.tolist()]
        [-1.8, -0.6]
    """

    def __init__(
        self,
        params: Any,
        base_lr: float | Tensor = 0.001,
        *,
        lr: float | Tensor | None = None,
        momentum: float = 0.9,
        total_steps: int | None = None,
        capturable: bool = False,
    ) -> None:
        rate = base_lr if lr is None else lr
        super().__init__(
            params, {"lr": rate, "momentum": momentum, "total_steps": total_steps, "capturable": capturable}
        )

    @classmethod
    def from_model(cls, model: nn.Module, *, lr: float, weight_decay: float = 0.0, **options: Any) -> AdaptiveOptimizer:
        """The optimizer of a whole model. It has no weight decay; what is given is not used."""
        return cls([p for p in model.parameters() if p.requires_grad], lr=lr, **options)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        steps = group["total_steps"]
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ConfigError(f"AdaptiveOptimizer(total_steps={steps!r}): None or an integer >= 1 is needed.")

    def _layout(self, p: Tensor, group: dict[str, Any]) -> Layout:
        return {"momentum_buffer": (tuple(p.shape), torch.promote_types(p.dtype, torch.float32))}

    def _update(self, params: list[Tensor], group: dict[str, Any], tick: Tick) -> None:
        grads = tick.gradients([p.grad for p in params if p.grad is not None])
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        values = promoted(params)
        dtype = buffers[0].dtype
        torch._foreach_mul_(buffers, tick.scalar(group["momentum"], 1.0, dtype))
        torch._foreach_add_(buffers, grads)
        period = group["total_steps"] or DEFAULT_TOTAL_STEPS
        done = torch.remainder(tick.count.double() - 1.0, period) / period
        rate = tick.scalar(-tick.lr * (0.5 + 0.5 * torch.cos(math.pi * done)), 0.0, dtype)
        # torch has no mean of many tensors in one kernel.
        factors = torch.stack([g.mean() for g in grads]).abs_().mul_(0.1).add_(1.0).mul_(rate)
        torch._foreach_add_(values, torch._foreach_mul(buffers, list(factors.unbind())))
        write_back_(params, values)

"""What a recorded step freezes: everything that Python decides. Found by looking, before and after.

Knows modules, optimizers and the process's random generators. Knows no graphs and no devices.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

#: What a recorded step reads from tensors on the device, or what recording itself sets.
_READ = ("params", "lr", "capturable")
PARAMETERS = "which parameters are trained"
MODULES = "flags or rates of modules"
OPTIONS = "options of the optimizer"


def decided(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What steps depend on beside their batches and tensors: equal where a recorded step may go on.

    Flags and rates are modules' attributes that are a bool or a float: `training`, a dropout's `p`. Whole numbers are
    left out, as modules count with them.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> before = decided(net, optimizer)
        >>> net[1].p = 0.2
        >>> [name for name, now in decided(net, optimizer).items() if now != before[name]]
        ['flags or rates of modules']
    """
    groups = optimizer.param_groups
    return {
        PARAMETERS: (
            [(id(p), p.requires_grad) for p in model.parameters()],
            [[id(p) for p in group["params"]] for group in groups],
        ),
        MODULES: [
            (id(module), *((name, value) for name, value in vars(module).items() if isinstance(value, bool | float)))
            for module in model.modules()
        ],
        OPTIONS: [
            {k: v for k, v in group.items() if k not in _READ and not isinstance(v, Tensor)} for group in groups
        ],
    }  # fmt: skip


def drawn_on_host(function: Callable[[], Any]) -> tuple[Any, str]:
    """A function's result, and which of the process's generators it drew from on the CPU; empty if from none.

    Example:
        >>> drawn_on_host(lambda: len("abc"))
        (3, '')
        >>> drawn_on_host(lambda: random.random() < 2)
        (True, "python's")
    """
    python, (_, keys, place, *_), cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    result = function()
    _, keys_now, place_now, *_ = np.random.get_state()
    found = {
        "python's": random.getstate() != python,
        "numpy's": place != place_now or not np.array_equal(keys, keys_now),
        "torch's": not torch.equal(torch.get_rng_state(), cpu),
    }
    return result, " and ".join(name for name, drew in found.items() if drew)

"""Which parameters are decayed. Knows nothing about optimizers."""

from __future__ import annotations

from typing import Any

from torch import nn


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

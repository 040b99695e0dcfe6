"""Optimizers: AdamW with states of 32 or 8 bits, Lion, Muon, AdaptiveOptimizer.

All are `torch.optim.Optimizer`s, work on many tensors at once, read nothing from the device in a step, and leave no
trace of a step whose gradients are no numbers. Knows nothing about loops, data or files.
"""

from __future__ import annotations

from ._adamw import AdamW
from ._adamw8bit import AdamW8bit
from ._adaptive import AdaptiveOptimizer
from ._base import DeviceOptimizer
from ._groups import decay_groups
from ._lion import Lion
from ._muon import Muon, orthogonalize

__all__ = [
    "AdamW",
    "AdamW8bit",
    "AdaptiveOptimizer",
    "DeviceOptimizer",
    "Lion",
    "Muon",
    "decay_groups",
    "orthogonalize",
]

"""Training on one device: the step, the `Trainer` around it, its configuration, checkpoints, seeding.

Knows data (batches) and deployment (for `Trainer.export`). Knows nothing about compression.
"""

from __future__ import annotations

from ._callbacks import Callback, EarlyStopping
from ._checkpoint import CheckpointError
from ._config import TrainingConfig, resolve
from ._ds_optimizer import DSOptimizer, TrainingSetup
from ._dscheckpoint import DSCheckpoint, PendingCheckpoint
from ._ema import ExponentialMovingAverage
from ._ewc import ElasticWeightConsolidation
from ._interrupt import Terminated
from ._objective import Objective
from ._rng import seed_everything
from ._schedule import lr_factor
from ._step import StepResult, train_step
from ._trainer import Trainer
from .memory import MemoryPlan, MemoryPlanner, checkpoint_every, checkpoint_recursively, plan_memory
from .optimizers import AdamW, AdamW8bit, AdaptiveOptimizer, Lion, Muon, decay_groups, orthogonalize

__all__ = [
    "AdamW",
    "AdamW8bit",
    "AdaptiveOptimizer",
    "Callback",
    "CheckpointError",
    "DSCheckpoint",
    "DSOptimizer",
    "EarlyStopping",
    "ElasticWeightConsolidation",
    "ExponentialMovingAverage",
    "Lion",
    "MemoryPlan",
    "MemoryPlanner",
    "Muon",
    "Objective",
    "PendingCheckpoint",
    "StepResult",
    "Terminated",
    "Trainer",
    "TrainingConfig",
    "TrainingSetup",
    "checkpoint_every",
    "checkpoint_recursively",
    "decay_groups",
    "lr_factor",
    "orthogonalize",
    "plan_memory",
    "resolve",
    "seed_everything",
    "train_step",
]

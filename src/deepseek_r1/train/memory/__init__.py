"""Training under a limit of memory: what each block keeps for its backward pass, recomputes, or offloads.

Knows the step and the objective. Knows nothing about the Trainer, which asks for a plan at its first batch.
"""

from __future__ import annotations

from ._apply import Applied, BlockPlan
from ._manual import Checkpointed, checkpoint_every, checkpoint_recursively
from ._meter import measured_peak
from ._plan import MemoryPlan, MemoryPlanner, plan_memory

__all__ = [
    "Applied",
    "BlockPlan",
    "Checkpointed",
    "MemoryPlan",
    "MemoryPlanner",
    "checkpoint_every",
    "checkpoint_recursively",
    "measured_peak",
    "plan_memory",
]

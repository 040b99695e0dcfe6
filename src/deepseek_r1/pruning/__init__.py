"""Compression by fewer channels: finds what has to leave together, judges and removes it. Knows no engine, no HTTP."""

from __future__ import annotations

from ._allocate import CurvePoint, GroupCurve
from ._config import PruneConfig
from ._file import load_pruned, plan_in, save_pruned
from ._plan import PruningPlan
from ._pruner import R1Pruner

__all__ = [
    "CurvePoint",
    "GroupCurve",
    "PruneConfig",
    "PruningPlan",
    "R1Pruner",
    "load_pruned",
    "plan_in",
    "save_pruned",
]

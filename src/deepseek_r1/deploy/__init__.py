"""A Program as files for one target, checked in that target's own runtime before anything is kept. Knows no HTTP."""

from __future__ import annotations

from ._artifact import ARTIFACT_ENGINE
from ._export import export
from ._scorecard import scorecard
from .base import TARGETS, Job, Target

__all__ = ["ARTIFACT_ENGINE", "TARGETS", "Job", "Target", "export", "scorecard"]

"""Control flow on tensors: a Python function is rewritten and captured with its branches and loops kept."""

from __future__ import annotations

from ._traced import Traced, trace

__all__ = ["Traced", "trace"]

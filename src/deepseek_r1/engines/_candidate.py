"""One way to run the model, as the race sees it. Knows no rung and no verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..measure import Latency
from ._contender import Contender
from ._process import ChildError


@dataclass
class Candidate:
    """One way to run the model.

    Attributes:
        prepare: compiles it; may raise anything.
        size_bytes: bytes of its weights.
        exact: whether it computes in the model's own precision and so must match the float64 reference about as well
            as the plain model does; otherwise it is judged by the task metric.
        latency: from the last rung against eager that it took part in, and `bar` eager's from the same.
        problem: why it is out, empty while it is in.
        measure_peak: gives the peak memory of a fresh process that runs it, in bytes; called if a budget limits that.
    """

    name: str
    prepare: Callable[[], Contender] = field(repr=False)
    size_bytes: int
    exact: bool
    contender: Contender | None = field(default=None, repr=False)
    latency: Latency | None = None
    bar: Latency | None = None
    accuracy: float | None = None
    problem: str = ""
    measure_peak: Callable[[], int] | None = field(default=None, repr=False)
    peak_bytes: int | None = None
    tag: Any = field(default=None, repr=False)

    @property
    def median_ms(self) -> float:
        """Of its last rung; infinite before the first."""
        return self.latency.median_ms if self.latency is not None else math.inf

    def drop(self, problem: str) -> None:
        """Take it out of the race."""
        self.problem = problem
        self.close()

    def close(self) -> None:
        """Free what it holds."""
        if self.contender is not None:
            self.contender.close()
        self.contender = None


def failure(e: Exception) -> str:
    """What to say of a candidate that failed."""
    # A child's error names its class already, and says how it died.
    return f"failed: {e}" if isinstance(e, ChildError) else f"failed: {type(e).__name__}: {str(e)[:200]}"

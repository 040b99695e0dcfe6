"""`Budget`: how much latency, size, memory and accuracy an automatic choice may spend."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from .errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits for an automatic choice. Any subset may be given; `None` means no limit.

    Attributes:
        latency_ms: longest allowed median latency of one call, in milliseconds.
        size_mb: largest allowed size of the weights, in megabytes (10**6 bytes).
        memory_gb: largest allowed peak memory, in gigabytes (10**9 bytes).
        accuracy_drop: largest allowed loss of the task metric against the float model, in the metric's own
            unit (0.005 is half a percentage point of accuracy).

    Raises:
        ConfigError: a limit is negative, not a number, or zero where zero cannot be met.

    Example:
        >>> Budget(latency_ms=5, accuracy_drop=0.005).limits()
        {'latency_ms': 5, 'accuracy_drop': 0.005}
    """

    latency_ms: float | None = None
    size_mb: float | None = None
    memory_gb: float | None = None
    accuracy_drop: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"Budget({field.name}={value!r}): a finite number or None is needed.")
            if value < 0 or (value == 0 and field.name != "accuracy_drop"):
                allowed = ">= 0" if field.name == "accuracy_drop" else "> 0"
                raise ConfigError(f"Budget({field.name}={value!r}): the limit must be {allowed}.")

    def limits(self) -> dict[str, float]:
        """The limits that were given, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

"""Measuring: paired latency, peak memory, parity of arrays, cost of operators. Knows no stage and no model.

Only counting what an operator costs needs torch, which is imported when that is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._latency import ENOUGH_ROUNDS, QUIET_SPREAD, Latency, Turn, paired_latency, paired_turns, ratio_interval, turn_of
from ._memory import peak_memory_of
from ._parity import Parity, compare, pool

if TYPE_CHECKING:
    from ._cost import OperatorCost, operator_cost

__all__ = [
    "ENOUGH_ROUNDS",
    "QUIET_SPREAD",
    "Latency",
    "OperatorCost",
    "Parity",
    "Turn",
    "compare",
    "operator_cost",
    "paired_latency",
    "paired_turns",
    "peak_memory_of",
    "pool",
    "ratio_interval",
    "turn_of",
]


def __getattr__(name: str) -> Any:
    if name in ("OperatorCost", "operator_cost"):
        return getattr(importlib.import_module("._cost", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

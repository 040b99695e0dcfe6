"""Measuring: paired latency, peak memory, parity of arrays, cost of operators. Knows no stage and no model."""

from __future__ import annotations

from ._cost import OperatorCost, operator_cost
from ._latency import ENOUGH_ROUNDS, QUIET_SPREAD, Latency, paired_latency, ratio_interval
from ._memory import peak_memory_of
from ._parity import Parity, compare, pool

__all__ = [
    "ENOUGH_ROUNDS",
    "QUIET_SPREAD",
    "Latency",
    "OperatorCost",
    "Parity",
    "compare",
    "operator_cost",
    "paired_latency",
    "peak_memory_of",
    "pool",
    "ratio_interval",
]

"""Measuring callables: paired latency, peak memory of a process, parity of arrays. Knows no stage and no model."""

from __future__ import annotations

from ._latency import ENOUGH_ROUNDS, QUIET_SPREAD, Latency, Turn, paired_latency, paired_turns, ratio_interval, turn_of
from ._memory import peak_memory_of
from ._parity import Parity, compare, pool

__all__ = [
    "ENOUGH_ROUNDS",
    "QUIET_SPREAD",
    "Latency",
    "Parity",
    "Turn",
    "compare",
    "paired_latency",
    "paired_turns",
    "peak_memory_of",
    "pool",
    "ratio_interval",
    "turn_of",
]

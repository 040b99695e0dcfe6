"""Latency of rivals, measured in turns, so that what disturbs one disturbs all.

Each round runs every rival once, in an order drawn anew; ratios are then taken within rounds. A rival that is run
twice under two names ("A against A") shows how much of a difference is noise.

Between turns everybody sleeps. A thread pool keeps spinning for a while after its last call, so as to be quick at the
next one, and takes the cores from whoever comes after it, in this process or in another: eager PyTorch took 1.8 times
as long right after ONNX Runtime, and no longer than usual after 30 ms.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Something that differs from itself by more than this factor was timed on a machine too busy for a verdict.
QUIET_SPREAD = 1.25
#: Fewer rounds than this are too few to quote.
ENOUGH_ROUNDS = 20


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds per call of one rival, one value for each round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median, in milliseconds."""
        return float(np.median(self.seconds)) * 1e3

    def percentile_ms(self, q: float) -> float:
        """The q-th percentile, in milliseconds."""
        return float(np.percentile(self.seconds, q)) * 1e3


#: Runs a rival: for at least so many seconds untimed, then so many calls timed; gives seconds per call.
Turn = Callable[[float, int], float]


def turn_of(function: Callable[[], Any]) -> Turn:
    """A function without arguments as a rival's turn. On a GPU it must wait for its result itself."""

    def turn(settle_s: float, calls: int) -> float:
        end = time.perf_counter() + settle_s
        function()
        while time.perf_counter() < end:
            function()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    return turn


def paired_latency(rivals: Mapping[str, Callable[[], Any]], **how: Any) -> dict[str, Latency]:
    """Time functions in turns; the arguments are those of `paired_turns`.

    Example:
        >>> times = paired_latency({"a": lambda: sum(range(50)), "b": lambda: sum(range(5000))}, rounds=9)
        >>> times["a"].median_ms < times["b"].median_ms
        True
    """
    return paired_turns({name: turn_of(function) for name, function in rivals.items()}, **how)


def paired_turns(
    rivals: Mapping[str, Turn],
    *,
    rounds: int = 50,
    warmup: int = 3,
    min_round_s: float = 1e-2,
    max_seconds: float | None = None,
    pause_s: float = 4e-2,
    settle_s: float = 3e-2,
) -> dict[str, Latency]:
    """Time the rivals in turns, wherever each of them runs.

    Args:
        rivals: name -> its turn; see `turn_of`.
        rounds: how often each is timed.
        warmup: untimed calls of each before.
        min_round_s: a faster rival is called several times a round, up to 1,000 times.
        max_seconds: stop after this time, though never before five rounds.
        pause_s: sleep before each rival's turn, in which the thread pools of the one before come to rest.
        settle_s: length of the untimed calls that follow, which wake its own.
    """
    repeats = {}
    for name, turn in rivals.items():
        time.sleep(pause_s)
        turn(0.0, max(1, warmup))
        once = max(turn(0.0, 1), 1e-7)
        repeats[name] = max(1, min(1000, int(min_round_s / once)))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    names = list(rivals)
    order = random.Random(0)
    begin = time.perf_counter()
    for number in range(rounds):
        # A fixed order would always put the same one before another.
        order.shuffle(names)
        for name in names:
            time.sleep(pause_s)
            times[name].append(rivals[name](settle_s, repeats[name]))
        if max_seconds is not None and number >= 4 and time.perf_counter() - begin > max_seconds:
            break
    return {name: Latency(name=name, seconds=tuple(values)) for name, values in times.items()}


def ratio_interval(a: Latency, b: Latency, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """How many times faster `b` is than `a`: median of the paired ratios a/b, and its bootstrap interval.

    Source: percentile bootstrap, Efron and Tibshirani, An Introduction to the Bootstrap, 1993.

    Example:
        >>> a = Latency(name="a", seconds=(2.0, 2.1, 1.9)); b = Latency(name="b", seconds=(1.0, 1.0, 1.0))
        >>> low, middle, high = ratio_interval(a, b)
        >>> low <= middle <= high and round(middle, 2) == 2.0
        True
    """
    n = min(len(a.seconds), len(b.seconds))
    ratios = np.asarray(a.seconds[:n]) / np.asarray(b.seconds[:n])
    rng = np.random.default_rng(seed)
    medians = np.median(ratios[rng.integers(0, n, size=(1000, n))], axis=1)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(low), float(np.median(ratios)), float(high)

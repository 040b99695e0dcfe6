"""Distances, paired timing, peak memory."""

import itertools
import math
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deepseek_r1.core import InputError
from deepseek_r1.measure import Latency, compare, paired_latency, paired_turns, peak_memory_of, ratio_interval

ARRAYS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=5), elements=st.floats(-1e4, 1e4, width=32)
)


@given(ARRAYS)
def test_an_array_is_at_no_distance_from_itself(a):
    p = compare([a], [a])
    assert (p.max_abs, p.max_rel, p.sqnr_db, p.top1) == (0.0, 0.0, math.inf, 1.0)
    assert p.cosine == pytest.approx(1.0)


@given(ARRAYS, st.integers(-3, 3))
def test_distances_are_what_they_say(a, exponent):
    step = 2.0**exponent
    b = a.astype(np.float64) + step
    p = compare([a], [b])
    assert p.max_abs == pytest.approx(step, rel=1e-6)
    largest = float(np.abs(a).max())
    if largest > 1e-3:
        assert p.max_rel == pytest.approx(step / largest, rel=1e-6)
        noise = a.size * step**2
        assert p.sqnr_db == pytest.approx(10 * math.log10(float((a.astype(np.float64) ** 2).sum()) / noise), abs=1e-3)
    assert -1.0 - 1e-9 <= p.cosine <= 1.0 + 1e-9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_on_one_side_is_infinitely_far(bad):
    for a, b in (([1.0, bad], [1.0, 2.0]), ([1.0, 2.0], [bad, 2.0])):
        p = compare([np.array(a)], [np.array(b)])
        assert (p.max_abs, p.max_rel, p.sqnr_db, p.cosine, p.top1) == (math.inf, math.inf, -math.inf, -1.0, 0.0)


def test_the_same_infinity_is_no_distance_and_another_is():
    a = np.array([[1.0, -math.inf]])
    assert compare([a], [a]).max_abs == 0
    assert compare([a], [-a]).max_abs == math.inf
    assert compare([a], [np.array([[1.0, math.nan]])]).max_abs == math.inf


def test_several_outputs_take_the_worst():
    p = compare([np.array([1.0, 0.0]), np.array([10.0])], [np.array([1.0, 0.5]), np.array([11.0])])
    assert (p.max_abs, p.max_rel, p.top1) == (1.0, 0.5, 1.0)
    assert compare([np.array([[0.0, 1], [1, 0]])], [np.array([[1.0, 0], [1, 0]])]).top1 == 0.5
    assert compare([np.zeros((0, 3))], [np.zeros((0, 3))]).max_abs == 0
    assert compare([], []).top1 == 1.0
    assert compare([np.float64(3)], [np.float64(3)]).top1 == 1.0


def test_what_cannot_be_compared():
    with pytest.raises(InputError, match="1 reference outputs against 2"):
        compare([np.zeros(1)], [np.zeros(1)] * 2)
    with pytest.raises(InputError, match=r"output 0: shape \(1,\) against \(2,\)"):
        compare([np.zeros(1)], [np.zeros(2)])


def test_paired_latency_times_all():
    slow = {"a": lambda: time.sleep(0.002), "b": lambda: time.sleep(0.006)}
    times = paired_latency(slow, rounds=6, warmup=1, min_round_s=0, pause_s=0)
    assert {k: len(v.seconds) for k, v in times.items()} == {"a": 6, "b": 6}
    low, middle, high = ratio_interval(times["b"], times["a"])
    assert 1 < low <= middle <= high
    assert times["a"].percentile_ms(0) <= times["a"].median_ms <= times["a"].percentile_ms(100)


def test_turns_come_in_changing_order_each_after_a_rest():
    log = []

    def turn_of(name):
        def turn(settle_s, calls):
            log.append((name, settle_s, time.perf_counter()))
            return 0.001

        return turn

    paired_turns({"a": turn_of("a"), "b": turn_of("b")}, rounds=12, pause_s=0.01, settle_s=0.02)
    timed = [(name, at) for name, settle, at in log if settle == 0.02]
    rounds = ["".join(name for name, _ in timed[i : i + 2]) for i in range(0, len(timed), 2)]
    assert set(rounds) == {"ab", "ba"}
    assert all(after - before >= 0.01 for (_, before), (_, after) in itertools.pairwise(timed))


def test_time_limits_hold_but_five_rounds_are_run():
    slow = {"a": lambda: time.sleep(0.01)}
    assert len(paired_latency(slow, rounds=500, max_seconds=0.05, warmup=1)["a"].seconds) == 5


@settings(max_examples=30)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=20), st.floats(0.5, 4))
def test_the_interval_of_a_constant_ratio_is_that_ratio(seconds, factor):
    a = Latency(name="a", seconds=tuple(s * factor for s in seconds))
    b = Latency(name="b", seconds=tuple(seconds))
    assert ratio_interval(a, b) == pytest.approx((factor,) * 3)


def test_peak_memory_counts_what_the_process_held():
    small, result = peak_memory_of("import sys; RESULT = sys.argv[1:]", ["x y", "z"])
    large, _ = peak_memory_of("x = bytearray(b'a') * 200_000_000; del x")
    assert result == ["x y", "z"]
    assert 1.5e8 < large - small < 2.5e8
    hoard = bytearray(b"a") * 300_000_000
    again, _ = peak_memory_of("pass")
    assert again - small < 1e8, f"what this process holds ({len(hoard)}) is not the child's"


def test_programs_that_fail_hang_or_print():
    with pytest.raises(InputError, match=r"(?s)failed \(exit 1\).*ValueError: no"):
        peak_memory_of("raise ValueError('no')")
    with pytest.raises(InputError, match=r"longer than 0\.3 s"):
        peak_memory_of("import time; time.sleep(9)", timeout_s=0.3)
    with pytest.raises(InputError, match="exit 3"):
        peak_memory_of("import sys; sys.exit(3)")
    assert peak_memory_of("print('@@peak {}'); RESULT = {'a': 1}", python=sys.executable)[1] == {"a": 1}


def test_a_program_that_leaves_without_its_last_line():
    with pytest.raises(InputError, match="measured program"):
        peak_memory_of("import os; os._exit(0)")
    with pytest.raises(InputError, match=r"(?s)measured program failed.*not JSON serializable"):
        peak_memory_of("RESULT = object()")

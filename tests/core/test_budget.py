"""Budget: any subset of limits, and nothing that is no limit."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_r1.core import Budget, ConfigError

NAMES = [f.name for f in fields(Budget)]
POSITIVE = st.one_of(st.integers(1, 10**9), st.floats(1e-9, 1e9))


@given(st.dictionaries(st.sampled_from(NAMES), POSITIVE))
def test_what_was_given_is_what_limits(given_limits):
    assert Budget(**given_limits).limits() == given_limits


@given(st.sampled_from(NAMES), st.one_of(st.floats(max_value=-1e-12), st.integers(max_value=-1)))
def test_negative_limits_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        Budget(**{name: value})


@given(
    st.sampled_from(NAMES),
    st.one_of(
        st.sampled_from([math.nan, math.inf, -math.inf, True, False]),
        st.text(),
        st.lists(st.floats()),
        st.complex_numbers(),
    ),
)
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        Budget(**{name: value})


def test_zero_is_a_limit_for_the_drop_only():
    assert Budget(accuracy_drop=0).limits() == {"accuracy_drop": 0}
    for name in set(NAMES) - {"accuracy_drop"}:
        with pytest.raises(ConfigError, match="> 0"):
            Budget(**{name: 0})


def test_unknown_limits_and_changes_are_errors():
    with pytest.raises(TypeError, match="latency"):
        Budget(latency=3)
    with pytest.raises(FrozenInstanceError):
        Budget(size_mb=3).size_mb = 4
    assert Budget() == Budget()

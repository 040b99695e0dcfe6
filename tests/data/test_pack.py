"""The packer and the buckets: every sample once, nothing over length, nearly full, on any lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.data import choose_shapes, pack_lengths, pack_stream
from deepseek_r1.data._batching import Batching, Plan
from deepseek_r1.data._buckets import batch_sizes, bucket_batches

pytestmark = pytest.mark.tiny
_lengths = st.integers(1, 60).flatmap(
    lambda most: st.tuples(st.just(most), st.lists(st.integers(1, most), min_size=1, max_size=120))
)


def _zipf(count, most, seed=0, exponent=1.2):
    return np.minimum(np.random.default_rng(seed).zipf(exponent, count), most)


@given(_lengths)
def test_every_sample_is_in_one_row_and_no_two_rows_would_fit_into_one(case):
    most, lengths = case
    packing = pack_lengths(lengths, most)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    filled = [int(np.asarray(lengths)[packing[r]].sum()) for r in range(len(packing))]
    assert max(filled) <= most
    assert sum(filled) == sum(lengths)
    two_emptiest = sorted(filled)[:2]
    assert len(filled) < 2 or sum(two_emptiest) > most
    assert packing.fill == pytest.approx(sum(lengths) / (len(packing) * most))


@given(_lengths, st.randoms(use_true_random=False))
def test_the_number_of_rows_does_not_depend_on_the_order(case, draw):
    most, lengths = case
    mixed = list(lengths)
    draw.shuffle(mixed)
    assert len(pack_lengths(lengths, most)) == len(pack_lengths(mixed, most))


def test_rows_are_those_of_best_fit_decreasing_one_sample_at_a_time():
    lengths = np.random.default_rng(5).integers(1, 101, 400)
    free = []
    for size in sorted(lengths.tolist(), reverse=True):
        fitting = [i for i, space in enumerate(free) if space >= size]
        if fitting:
            free[min(fitting, key=lambda i: free[i])] -= size
        else:
            free.append(100 - size)
    assert len(pack_lengths(lengths, 100)) == len(free)


@pytest.mark.parametrize("exponent", [1.05, 1.2, 1.5, 2.0])
def test_zipf_lengths_fill_the_rows(exponent):
    assert pack_lengths(_zipf(50_000, 2048, exponent=exponent), 2048).fill >= 0.98


def test_a_million_lengths_are_planned_in_two_seconds(slower):
    from time import process_time

    lengths = _zipf(1_000_000, 2048)
    began = process_time()
    pack_lengths(lengths, 2048)
    assert process_time() - began < 2 * slower


def test_what_cannot_be_packed_is_named():
    with pytest.raises(InputError, match="sample 1 has 9 tokens; rows of 8"):
        pack_lengths([3, 9], 8)
    with pytest.raises(InputError, match="sample 0 has 0 tokens"):
        pack_lengths([0], 8)
    with pytest.raises(ConfigError, match="max_length=0"):
        pack_lengths([1], 0)
    assert len(pack_lengths([], 8)) == 0


@given(_lengths, st.integers(1, 6))
def test_a_stream_gives_every_sample_once(case, window):
    most, lengths = case
    rows = list(pack_stream(enumerate(lengths), lambda s: s[1], most, window=window))
    assert sorted(s for row in rows for s in row) == list(enumerate(lengths))
    assert all(sum(size for _, size in row) <= most for row in rows)


def test_a_stream_is_nearly_full_and_holds_no_more_than_its_window():
    lengths = _zipf(20_000, 512).tolist()
    read, held = 0, []

    def source():
        nonlocal read
        for size in lengths:
            read += size
            yield size

    given_tokens = 0
    rows = 0
    for row in pack_stream(source(), lambda size: size, 512, window=32):
        given_tokens += sum(row)
        rows += 1
        held.append(read - given_tokens)
    assert max(held) <= 33 * 512
    assert given_tokens == sum(lengths)
    assert given_tokens / (rows * 512) >= 0.98


def test_no_sample_of_a_stream_waits_for_ever():
    # The first one fits badly beside everything that follows.
    stream = [("odd", 7)] + [("even", 10)] * 200
    rows = list(pack_stream(stream, lambda s: s[1], 10, window=4))
    assert next(i for i, row in enumerate(rows) if ("odd", 7) in row) < 8


def _padding_of(lengths, shapes):
    return int(np.asarray(shapes)[np.searchsorted(shapes, lengths)].sum())


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 3))
def test_shapes_are_the_best_there_are(lengths, most):
    from itertools import combinations

    shapes = choose_shapes(lengths, max_shapes=most, multiple=8)
    assert len(shapes) <= most
    assert all(shape % 8 == 0 for shape in shapes)
    assert shapes[-1] >= max(lengths)
    last = -(-max(lengths) // 8) * 8
    options = [(*c, last) for n in range(most) for c in combinations(range(8, last, 8), n)]
    assert _padding_of(lengths, shapes) == min(_padding_of(lengths, option) for option in options)


def test_very_long_lengths_still_have_shapes():
    lengths = np.random.default_rng(0).integers(1, 1_000_000, 5000)
    shapes = choose_shapes(lengths, max_shapes=4, multiple=32)
    assert len(shapes) == 4
    assert shapes[-1] >= lengths.max()
    assert all(shape % 32 == 0 for shape in shapes)


@given(_lengths, st.integers(1, 7), st.booleans())
def test_buckets_hold_every_sample_once_and_one_batch_is_not_full(case, size, drop):
    _, lengths = case
    lengths = np.asarray(lengths)
    shapes = choose_shapes(lengths, max_shapes=3, multiple=4)
    batches = bucket_batches(lengths, shapes, (size,) * len(shapes), drop_last=drop)
    seen = [int(i) for _, mine in batches for i in mine]
    assert len(seen) == len(set(seen))
    assert len(seen) == (len(lengths) // size * size if drop else len(lengths))
    assert all(lengths[mine].max() <= shape for shape, mine in batches)
    assert sum(len(mine) != size for _, mine in batches) <= (0 if drop else 1)


@given(_lengths, st.integers(60, 300))
def test_batches_by_tokens_keep_within_them(case, tokens):
    _, lengths = case
    lengths = np.asarray(lengths)
    shapes = choose_shapes(lengths, max_shapes=4, multiple=1)
    sizes = batch_sizes(shapes, None, tokens)
    for shape, mine in bucket_batches(lengths, shapes, sizes, drop_last=False):
        assert shape * len(mine) <= tokens


def test_too_few_tokens_for_one_sample_are_refused():
    with pytest.raises(ConfigError, match="max_tokens=10 is less than one sample"):
        batch_sizes((8, 16), 4, 10)


def test_mixed_rows_come_in_no_order_of_length():
    lengths = _zipf(4000, 64)
    plan = Plan(lengths, Batching(batching="packed", max_length=64), 1, False)
    order = np.random.default_rng(1).permutation(4000)
    sizes = [len(row) for _, (row,) in plan.batches_of(order, mixed=True)]
    half = len(sizes) // 2
    assert np.mean(sizes[:half]) == pytest.approx(np.mean(sizes[half:]), rel=0.15)
    again = [len(row) for _, (row,) in plan.batches_of(order, mixed=True)]
    assert sizes == again

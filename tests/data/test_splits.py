"""The split: fixed, stratified, complete."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.data import split
from deepseek_r1.data._splits import class_indices

pytestmark = pytest.mark.tiny


@given(
    y=st.lists(st.integers(0, 4), min_size=3, max_size=120),
    seed=st.integers(0, 5),
    fractions=st.sampled_from([(0.7, 0.1, 0.2), (0.34, 0.33, 0.33), (1.0, 0.0, 0.0), (0.5, 0.0, 0.5)]),
)
def test_every_sample_is_in_exactly_one_part_with_its_label(y, seed, fractions):
    y = np.array(y)
    x = np.arange(len(y)) * 10
    parts = split(x, y, seed=seed, fractions=fractions)
    assert sorted(np.concatenate([p[0] for p in parts]).tolist()) == x.tolist()
    for inputs, labels in parts:
        assert (y[inputs // 10] == labels).all()
    for (inputs, _), fraction in zip(parts, fractions):
        assert (len(inputs) > 0) == (fraction > 0)


@given(sizes=st.lists(st.integers(1, 60), min_size=2, max_size=5), seed=st.integers(0, 3))
def test_classes_keep_their_shares(sizes, seed):
    y = np.repeat(np.arange(len(sizes)), sizes)
    if len(y) < 10:
        return
    parts = split(np.arange(len(y)), y, seed=seed, fractions=(0.5, 0.2, 0.3))
    for label, size in enumerate(sizes):
        for (_, labels), share in zip(parts, (0.5, 0.2, 0.3)):
            assert abs((labels == label).sum() - size * share) <= 2


def test_a_seed_gives_the_same_split_and_another_seed_another():
    x, y = np.arange(100), np.arange(100) % 3
    first, again, other = (split(x, y, seed=s)[2][0].tolist() for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_split_is_fixed_for_ever():
    # Accuracies in the documentation stand on this order: a change of it is a change of every number.
    _, _, test = split(np.arange(20), np.arange(20) % 2, seed=0)
    assert test[0].tolist() == [1, 14, 15, 18]


def test_tensors_and_lists_are_split_too():
    train, _, _ = split(torch.arange(10), torch.arange(10) % 2, seed=0)
    assert isinstance(train[0], torch.Tensor)
    assert len(split(list(range(10)), ["a", "b"] * 5)[0][0]) == 7


def test_a_lone_sample_of_a_class_goes_to_training():
    train, _, _ = split(np.arange(21), np.array([0] * 20 + [1]), seed=3)
    assert 1 in train[1]


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (0.0, 0.5, 0.5), (-0.1, 0.6, 0.5), (0.5, 0.5)])
def test_wrong_fractions_are_named(fractions):
    with pytest.raises(ConfigError, match="fractions="):
        split(np.arange(10), np.arange(10), fractions=fractions)


def test_lengths_that_differ_and_too_few_samples_are_errors():
    with pytest.raises(InputError, match="3 inputs and 2 labels"):
        split(np.arange(3), np.arange(2))
    with pytest.raises(InputError, match="2 samples cannot be split"):
        split(np.arange(2), np.arange(2))


def test_labels_become_class_indices_by_a_stated_rule():
    assert class_indices(np.array([3, 0, 1]), "t")[1] == ("0", "1", "2", "3")
    indices, names = class_indices(np.array(["dog", "cat", "dog"]), "t")
    assert (indices.tolist(), names) == ([1, 0, 1], ("cat", "dog"))
    indices, names = class_indices(np.array([-1, 1, 1]), "t")
    assert (indices.tolist(), names) == ([0, 1, 1], ("-1", "1"))
    values, names = class_indices(np.array([0.5, 1.5]), "t")
    assert (values.dtype, names) == (np.float32, None)
    tokens, names = class_indices(np.array([[3, -100], [5, 3]], dtype=np.int32), "t", tokens=(2, 2))
    assert (tokens.dtype, tokens.tolist(), names) == (np.int64, [[3, -100], [5, 3]], None)


def test_labels_of_tokens_that_cannot_be_used_are_named():
    with pytest.raises(InputError, match=r"shape \(2, 2\); one label for each sample.* or one for each token"):
        class_indices(np.ones((2, 2), dtype=int), "t", tokens=(2, 3))
    with pytest.raises(InputError, match=r"token 1 of sample 0 is -1; .*-100"):
        class_indices(np.array([[0, -1]]), "t", tokens=(1, 2))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array([1, 1, 1]), "every label is 1"),
        (np.array([0, 5_000_000]), "no class index"),
        (np.array([0.1, np.nan]), "label of sample 1 is not a finite"),
        (np.zeros((3, 2), dtype=int), "one label for each sample"),
    ],
)
def test_labels_that_cannot_be_used_are_named(y, message):
    with pytest.raises(InputError, match=message):
        class_indices(y, "t")

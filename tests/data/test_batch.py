"""The rule for reading a batch."""

from __future__ import annotations

from collections import UserDict, namedtuple

import pytest
import torch

from deepseek_r1.core import InputError
from deepseek_r1.data import batch_size, slice_batch, tensors, to_device, unpack_batch

pytestmark = pytest.mark.tiny
X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 1])


def test_a_bare_tensor_is_inputs_alone():
    args, kwargs, labels = unpack_batch(X)
    assert args[0] is X
    assert (kwargs, labels) == ({}, None)


@pytest.mark.parametrize("pair", [(X, Y), [X, Y], namedtuple("Pair", "x y")(X, Y)])
def test_a_pair_is_inputs_and_labels(pair):
    args, kwargs, labels = unpack_batch(pair)
    assert len(args) == 1
    assert args[0] is X
    assert kwargs == {}
    assert labels is Y


@pytest.mark.parametrize("inputs", [(X, X), [X, X]])
def test_several_positional_inputs(inputs):
    args, kwargs, labels = unpack_batch((inputs, Y))
    assert len(args) == 2
    assert kwargs == {}
    assert labels is Y


def test_one_part_is_inputs_alone():
    args, _, labels = unpack_batch([X])
    assert args[0] is X
    assert labels is None


@pytest.mark.parametrize("key", ["labels", "label"])
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_dict_is_keyword_inputs_with_optional_labels(kind, key):
    args, kwargs, labels = unpack_batch(kind({"input_ids": X, key: Y}))
    assert args == ()
    assert list(kwargs) == ["input_ids"]
    assert labels is Y
    assert unpack_batch(kind({"input_ids": X}))[2] is None


def test_a_dict_beside_labels():
    args, kwargs, labels = unpack_batch(({"a": X}, Y))
    assert (args, list(kwargs)) == ((), ["a"])
    assert labels is Y
    assert unpack_batch(({"a": X, "labels": Y}, None))[2] is Y


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ((X, X, Y), "3 parts"),
        ((), "0 parts"),
        ("text", "type str"),
        (None, "type NoneType"),
        ({"labels": Y}, "no inputs"),
        ({"x": X, "labels": Y, "label": Y}, "both"),
    ],
)
def test_what_is_no_batch_is_refused_with_the_rule(batch, says):
    with pytest.raises(InputError, match=says):
        unpack_batch(batch)


def test_size_is_shared_by_all_tensors():
    assert batch_size(((X,), {"mask": torch.zeros(3, 5)}, Y)) == 3
    assert batch_size(X, torch.tensor(1.0)) == 3, "a number counts for no sample"


def test_ragged_and_empty_batches_are_refused():
    with pytest.raises(InputError, match=r"ragged.*\(3, 2\).*\(2,\)"):
        batch_size(X, torch.zeros(2))
    with pytest.raises(InputError, match="no samples"):
        batch_size(torch.zeros(0, 2))
    with pytest.raises(InputError, match="no tensor"):
        batch_size(["text"])


def test_slices_together_are_the_whole():
    part = ((X, {"deep": [X]}), Y, None, torch.tensor(2.0))
    pieces = [slice_batch(part, 0, 2), slice_batch(part, 2, 3)]
    whole = list(tensors(part))
    for i, tensor in enumerate(whole):
        cut = [list(tensors(piece))[i] for piece in pieces]
        assert torch.equal(torch.cat(cut) if tensor.ndim else cut[0], tensor)
    with pytest.raises(InputError, match="cannot be split"):
        slice_batch((X, "text"), 0, 1)


def test_to_device_keeps_the_structure():
    moved = to_device({"a": (X, [Y]), "b": "text"}, "meta")
    assert moved["a"][0].is_meta
    assert moved["a"][1][0].is_meta
    assert moved["b"] == "text"

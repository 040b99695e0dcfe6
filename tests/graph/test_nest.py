"""Leaves of nested inputs: the same as torch's own walk gives, and None where it finds another nest."""

from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.utils._pytree as pytree

from deepseek_r1.graph._nest import reader_of

Pair = namedtuple("Pair", "a b")
X = torch.zeros(1)
NESTS = [
    X,
    (),
    (X, X),
    [X, (X, None)],
    ((X, 3), {"a": X, "b": [X, {"c": True}]}),
    {"b": X, "a": X},
    {"a": X, "b": X},
    {"a": X},
    (X, [X, X]),
    (X, (X, X)),
    (X, Pair(X, X)),
    [X],
    (X,),
    "text",
    [[], {}],
    ({}, []),
    torch.Size([2]),
]


@pytest.mark.parametrize("captured", [n for n in NESTS if not isinstance(n, torch.Size)], ids=repr)
def test_every_nest_against_every_other(captured):
    spec = pytree.tree_structure(captured)
    read = reader_of(spec)
    if "Pair" in repr(captured):
        assert read is None, "left to torch"
        return
    for given in NESTS:
        leaves, tree = pytree.tree_flatten(given)
        found = []
        assert read(given, found) == (tree == spec), given
        if tree == spec:
            assert [id(v) for v in found] == [id(v) for v in leaves]


def test_a_nest_of_a_registered_class_is_left_to_torch():
    assert reader_of(pytree.tree_structure((X, OrderedDict(a=X)))) is None

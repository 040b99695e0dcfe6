"""`deepseek_r1.nn`: torch's names, and the own Sequential."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch

import deepseek_r1.nn as nn
import deepseek_r1.nn.functional
import deepseek_r1.nn.init
from deepseek_r1.nn import Sequential
from deepseek_r1.nn import functional as F


def _layers():
    return [torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)]


@pytest.mark.parametrize(
    "form", [lambda m: (m,), lambda m: (tuple(m),), lambda m: m], ids=["list", "tuple", "separate"]
)
def test_forms_are_the_same_network(form):
    layers = _layers()
    ours, torchs = Sequential(*form(layers)), torch.nn.Sequential(*layers)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(ours(x), torchs(x))
    assert len(ours) == 3
    assert ours[0] is layers[0]
    assert isinstance(ours, torch.nn.Sequential)


def test_names_from_an_ordered_dict():
    net = Sequential(OrderedDict(first=torch.nn.Linear(1, 2), last=torch.nn.Linear(2, 1)))
    assert list(net.state_dict()) == ["first.weight", "first.bias", "last.weight", "last.bias"]


def test_slices_copies_and_weights_from_torch():
    net = Sequential(_layers())
    assert type(net[:2]) is Sequential
    assert type(copy.deepcopy(net)) is Sequential
    other = torch.nn.Sequential(*_layers())
    net.load_state_dict(other.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(net(x), other(x))


def test_nested_and_empty():
    assert len(Sequential()) == len(Sequential([])) == 0
    assert list(Sequential([Sequential([torch.nn.Linear(1, 1)])]).state_dict()) == ["0.0.weight", "0.0.bias"]


@pytest.mark.parametrize("wrong", [[1], ["a"], [torch.nn.ReLU(), torch.nn.ReLU]])
def test_something_else_is_refused(wrong):
    with pytest.raises(TypeError):
        Sequential(wrong)


def test_capture():
    net = Sequential(_layers()).eval()
    program = torch.export.export(net, (torch.randn(2, 4),))
    x = torch.randn(2, 4)
    torch.testing.assert_close(program.module()(x), net(x))


def test_everything_of_torch_is_here():
    own = {"Sequential"}
    for name in dir(torch.nn):
        if not name.startswith("_") and name not in own:
            assert getattr(nn, name) is getattr(torch.nn, name)
            assert name in dir(nn)
    assert F is torch.nn.functional is deepseek_r1.nn.functional
    assert deepseek_r1.nn.init is torch.nn.init
    assert nn.utils.clip_grad_norm_ is torch.nn.utils.clip_grad_norm_
    assert nn.parallel is torch.nn.parallel


def test_star_import():
    names: dict[str, object] = {}
    exec("from deepseek_r1.nn import *", names)
    assert names["Sequential"] is Sequential
    assert names["Linear"] is torch.nn.Linear


@pytest.mark.parametrize("name", ["Linaer", "__wrapped__"])
def test_unknown_names(name):
    with pytest.raises(AttributeError, match=name):
        getattr(nn, name)

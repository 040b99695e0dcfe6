"""The tables of names against the installed torch and against the package itself."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch

import deepseek_r1
from deepseek_r1.core.names import PUBLIC, ROOMS, TORCH_NN, TORCH_OPTIM, lazy_getattr, mirror

#: The torch that the tables were written for. Other releases may lack some names.
WRITTEN_FOR = "2.13"


def _classes(module):
    return {n for n in dir(module) if not n.startswith("_") and isinstance(getattr(module, n), type)}


@pytest.mark.parametrize(("module", "table"), [(torch.nn, TORCH_NN), (torch.optim, TORCH_OPTIM)])
def test_the_tables_hold_what_torch_has(module, table):
    if torch.__version__.startswith(WRITTEN_FOR):
        assert _classes(module) == table
    else:
        # Newer releases add names, older ones lack some; what both have must be a class.
        shared = {n for n in table if hasattr(module, n)}
        assert len(shared) > 0.9 * len(table)
        assert all(isinstance(getattr(module, n), type) for n in shared)


def test_no_name_stands_for_two_things():
    assert not TORCH_NN & TORCH_OPTIM
    assert not set(PUBLIC) & set(ROOMS)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_resolves(name):
    module, _, attribute = PUBLIC[name].partition(":")
    found = getattr(deepseek_r1, name)
    assert found is getattr(importlib.import_module(module), attribute)
    assert inspect.getdoc(found), f"{name} has no docstring"


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_resolves(room):
    assert getattr(deepseek_r1, room) is importlib.import_module(f"deepseek_r1.{room}")


def test_every_package_is_a_room():
    packages = {m.name for m in pkgutil.iter_modules(deepseek_r1.__path__) if m.ispkg}
    assert packages - {"cli"} == set(ROOMS)


def test_torch_names_are_torchs_own():
    assert deepseek_r1.Linear is torch.nn.Linear
    assert deepseek_r1.SGD is torch.optim.SGD
    assert deepseek_r1.Sequential is not torch.nn.Sequential, "own names win"


def test_dir_lists_everything():
    assert {*PUBLIC, *ROOMS, "Linear", "SGD", "__version__"} <= set(dir(deepseek_r1))


@pytest.mark.parametrize("name", ["Linaer", "__wrapped__", "__path_x__", "_private"])
def test_unknown_names(name):
    with pytest.raises(AttributeError, match=f"'deepseek_r1' has no attribute '{name}'"):
        getattr(deepseek_r1, name)


def test_a_name_torch_lacks_is_an_attribute_error(monkeypatch):
    monkeypatch.delattr(torch.nn, "Bilinear")
    with pytest.raises(AttributeError, match="Bilinear"):
        lazy_getattr("example", {})("Bilinear")


def test_mirror():
    look, names = mirror("example.m", "math")
    import math

    assert look("pi") is math.pi
    assert "tau" in names()
    for unknown in ("nothing", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"'example.m' has no attribute '{unknown}'"):
            look(unknown)

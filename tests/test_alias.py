"""The `deepseek` package: the same objects under the older names, and nothing heavy until one is used."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

import deepseek
import deepseek_r1
from deepseek_r1.core.names import PUBLIC, ROOMS


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_the_same_object(name):
    assert getattr(deepseek, name) is getattr(deepseek_r1, name)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_can_be_imported(room):
    alias = importlib.import_module(f"deepseek.{room}")
    real = importlib.import_module(f"deepseek_r1.{room}")
    assert getattr(deepseek, room) is alias
    names = [n for n in getattr(real, "__all__", ()) if n != "__version__"]
    assert names, f"{room} says what is public"
    for name in names:
        assert getattr(alias, name) is getattr(real, name)
    assert set(names) <= set(dir(alias))


def test_the_forms_that_people_write():
    import deepseek.nn
    import deepseek.nn.functional
    from deepseek import Trainer, load_model, nn, optimize
    from deepseek.nn import Linear, Sequential

    assert nn is deepseek.nn
    assert Linear is torch.nn.Linear
    assert Sequential is deepseek_r1.nn.Sequential
    assert deepseek.nn.functional.gelu is torch.nn.functional.gelu
    assert Trainer is deepseek_r1.Trainer
    assert load_model is deepseek_r1.load_model
    assert optimize is deepseek_r1.optimize
    assert deepseek.quantize is deepseek_r1.quantize
    assert deepseek.SGD is torch.optim.SGD


@pytest.mark.parametrize("module", ["deepseek", "deepseek.nn", "deepseek.data"])
@pytest.mark.parametrize("name", ["nothing_like_it", "__wrapped__", "__signature__"])
def test_unknown_names_are_attribute_errors(module, name):
    with pytest.raises(AttributeError, match=f"'{module}' has no attribute '{name}'"):
        getattr(importlib.import_module(module), name)
    assert not hasattr(importlib.import_module(module), name)


def test_importing_and_wrong_names_load_no_torch():
    rooms = ", ".join(f"deepseek.{room}" for room in ROOMS)
    code = f"""
import sys
import deepseek, {rooms}, deepseek.nn.functional
for module in (deepseek, deepseek.nn):
    assert not hasattr(module, "__wrapped__")
assert not hasattr(deepseek, "nothing_like_it")
dir(deepseek)
heavy = {{"torch", "numpy", "onnx", "scipy", "sklearn", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

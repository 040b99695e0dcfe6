"""The registry of model sources, and users' factory files."""

from __future__ import annotations

import sys

import pytest
import torch

from deepseek_r1.core import InputError, PluginError
from deepseek_r1.models import SOURCES, load_factory, load_onnx


def _write(tmp_path, text, name="model.py"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def _clean_path(monkeypatch):
    # load_file puts the user's directory on sys.path, as `python file.py` would.
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_sources_are_listed_and_found():
    assert {"file", "onnx"} <= set(SOURCES.names())
    assert SOURCES.get("onnx") is load_onnx
    assert SOURCES.get("file") is load_factory


def test_an_unknown_source_lists_the_known_ones():
    with pytest.raises(PluginError, match=r"unknown model source 'onx'\. Did you mean 'onnx'\? Known: .*file"):
        SOURCES.get("onx")


def test_a_factory_builds(tmp_path):
    path = _write(tmp_path, "import torch\ndef build():\n    return torch.nn.Linear(2, 3)\n")
    assert isinstance(load_factory(f"{path}:build"), torch.nn.Linear)


def test_a_class_is_a_factory(tmp_path):
    path = _write(tmp_path, "from torch import nn\nclass Net(nn.Sequential):\n    pass\n")
    assert type(load_factory(f"{path}:Net")).__name__ == "Net"


def test_two_files_of_one_name_stay_apart(tmp_path):
    models = []
    for size in (2, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        path = _write(folder, f"import torch\nSIZE = {size}\ndef build():\n    return torch.nn.Linear(SIZE, 1)\n")
        models.append(load_factory(f"{path}:build"))
    assert [m.in_features for m in models] == [2, 3]


def test_a_missing_factory_lists_what_is_there(tmp_path):
    path = _write(tmp_path, "import os\nfrom math import pi\ndef bild():\n    pass\nclass Net:\n    pass\n")
    with pytest.raises(InputError, match="'build' does not exist; functions and classes there: bild, Net"):
        load_factory(f"{path}:build")
    with pytest.raises(InputError, match="'pi' is not callable"):
        load_factory(f"{path}:pi")


def test_a_failing_factory_shows_the_line(tmp_path):
    path = _write(tmp_path, "def inner():\n    return 1 / 0  # here\ndef build():\n    return inner()\n")
    with pytest.raises(InputError, match=r"line 2 \(return 1 / 0  # here\): ZeroDivisionError: division by zero") as e:
        load_factory(f"{path}:build")
    assert isinstance(e.value.__cause__, ZeroDivisionError)


def test_a_failing_file_shows_the_line(tmp_path):
    path = _write(tmp_path, "import torch\nraise KeyError('setting')\n")
    with pytest.raises(InputError, match=r"line 2.*setting"):
        load_factory(f"{path}:build")


def test_something_else_than_a_module_is_named(tmp_path):
    path = _write(tmp_path, "from torch import nn\ndef build():\n    return 3\ndef cls():\n    return nn.Linear\n")
    with pytest.raises(InputError, match=r"gave a int; it must return a torch\.nn\.Module"):
        load_factory(f"{path}:build")
    with pytest.raises(InputError, match=r"gave a class \(Linear\)"):
        load_factory(f"{path}:cls")


@pytest.mark.parametrize("spec", ["model.py", "model.py:", ":build", ""])
def test_a_malformed_spec_shows_the_form(spec):
    with pytest.raises(InputError, match=r"not of the form file\.py:factory"):
        load_factory(spec)

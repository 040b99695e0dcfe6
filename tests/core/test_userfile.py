"""Names from the user's files: run like a script, failures with the file and the line."""

import sys

import pytest

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.core.userfile import load_attribute, load_file, place, told

pytestmark = pytest.mark.tiny


def test_a_file_may_import_its_neighbours_and_equal_names_do_not_clash(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text(f"VALUE = {name!r}\nimport beside_{name}")
        (tmp_path / name / f"beside_{name}.py").write_text("")
    values = [load_attribute(f"{tmp_path}/{name}/model.py:VALUE", example="x.py:y") for name in "ab"]
    assert values == ["a", "b"]


def test_classes_of_a_file_know_their_module(tmp_path):
    # dataclasses and torch look a class's module up in sys.modules.
    (tmp_path / "m.py").write_text("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n")
    assert load_file(tmp_path / "m.py").A().x == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = 1 / 0", r"bad\.py could not be run: ZeroDivisionError in line 2"),
        ("x = (", r"SyntaxError in line 1"),
        ("import beside_that_is_not_there", "ModuleNotFoundError in line 1"),
    ],
)
def test_a_file_that_fails_is_named_with_the_line(tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    before = set(sys.modules)
    with pytest.raises(InputError, match=message):
        load_file(tmp_path / "bad.py")
    assert not {m for m in set(sys.modules) - before if m.startswith("_dr1_")}


def test_our_own_errors_pass_through(tmp_path):
    (tmp_path / "bad.py").write_text("import deepseek_r1 as dr1\ndr1.Budget(latency_ms=-1)")
    with pytest.raises(ConfigError, match="latency_ms"):
        load_file(tmp_path / "bad.py")


@pytest.mark.parametrize("spec", ["model.py", "model.py:", "model.txt:build", ":build"])
def test_another_form_is_an_error_with_an_example(spec):
    with pytest.raises(InputError, match=r"file\.py:name; write for example model\.py:build"):
        load_attribute(spec, example="model.py:build")


def test_an_unknown_name_gets_the_nearest(tmp_path):
    (tmp_path / "m.py").write_text("def build(): ...")
    with pytest.raises(InputError, match=r"Did you mean .*m\.py:build\?"):
        load_attribute(f"{tmp_path}/m.py:biuld", example="m.py:build")


@pytest.mark.parametrize("call", ["sys.exit(3)", "sys.exit('no')", "exit()", "raise SystemExit"])
def test_a_file_that_leaves_python_is_an_error(tmp_path, call):
    (tmp_path / "bad.py").write_text(f"import sys\n{call}\n")
    with pytest.raises(InputError, match=r"bad\.py could not be run: SystemExit in line 2"):
        load_file(tmp_path / "bad.py")


def _error(function):
    try:
        function()
    except BaseException as e:
        return e
    raise AssertionError("no error")


def test_an_error_is_placed_in_the_users_own_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside_placed.py").write_text("import json\n\ndef read():\n    return json.loads('{')\n")
    (tmp_path / "placed.py").write_text(
        "import sys, beside_placed\ngo = beside_placed.read\nend = lambda: sys.exit(4)\n"
    )
    module = load_file(tmp_path / "placed.py")
    error = _error(module.go)
    assert place(error) == "beside_placed.py, line 4 (return json.loads('{'))", "not a line of the standard library"
    assert told(error).startswith("beside_placed.py, line 4 (return json.loads('{')): JSONDecodeError: Expecting")
    assert "\n" not in told(ValueError("two\nlines"))
    assert told(_error(module.end)).endswith("sys.exit was called: 4")
    assert place(_error(lambda: load_file("absent.py"))) == "", "our own lines are not the user's"

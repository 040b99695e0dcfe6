"""Finding and running recipes."""

import pytest

from deepseek_r1.core import InputError, PluginError, Report
from deepseek_r1.recipes import RECIPES, run_recipe

pytestmark = pytest.mark.tiny
HEAD = "from deepseek_r1.core import Report\n"


def _recipe(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text(HEAD + body)
    return path


def test_a_file_is_a_recipe_and_its_report_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = "def main(*, out, seed=0):\n    r = Report('mine')\n    r.add('seed', seed)\n    r.add('out', str(out))\n"
    body += "    return r"
    report = run_recipe(_recipe(tmp_path, body), seed=7)
    assert (report["seed"].after, report["out"].after) == (7, "runs/mine")
    assert Report.load(tmp_path / "runs" / "mine" / "report.json").title == "mine"
    assert "mine" in (tmp_path / "runs" / "mine" / "report.html").read_text()


def test_a_registered_function_is_a_recipe(tmp_path):
    RECIPES.register("quick", lambda *, out, seed=0: Report("quick"))
    try:
        assert run_recipe("quick", out=tmp_path / "o").title == "quick"
    finally:
        RECIPES.unregister("quick")


def test_digits_is_listed_without_importing_it():
    assert RECIPES.names() == ["digits"]


def test_an_unknown_recipe_gets_the_nearest_and_all():
    with pytest.raises(PluginError, match=r"unknown recipe 'digit'. Did you mean 'digits'\? Known: digits"):
        run_recipe("digit")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "has no main"),
        ("main = 3", "has no main"),
        ("def main(*, out, seed=0): return 3", "gave int"),
        ("def main(:", "SyntaxError in line 2"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, body, message):
    with pytest.raises(InputError, match=message):
        run_recipe(_recipe(tmp_path, body), out=tmp_path / "o")


def test_paths_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        run_recipe(tmp_path / "absent.py")
    (tmp_path / "file").write_text("")
    path = _recipe(tmp_path, "def main(*, out, seed=0): ...")
    with pytest.raises(InputError, match="is a file"):
        run_recipe(path, out=tmp_path / "file")

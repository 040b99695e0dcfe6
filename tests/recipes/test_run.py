"""Finding and running recipes."""

import pytest

from deepseek_r1.core import CheckFailedError, InputError, PluginError, Report
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


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("def main():", r"has main\(\): .*; write: def main\(\*, out, seed=0\) -> Report"),
        ("def main(out):", "unexpected keyword argument 'seed'"),
        ("def main(*, out, seed, more):", "missing a required argument: 'more'"),
    ],
)
def test_a_main_with_other_arguments_is_known_before_anything_runs(tmp_path, monkeypatch, head, message):
    monkeypatch.chdir(tmp_path)
    path = _recipe(tmp_path, f"{head}\n    open('ran', 'w')\n")
    with pytest.raises(InputError, match=message):
        run_recipe(path)
    assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["mine.py"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}['x']", r"mine\.py, line 3 .*: KeyError: 'x'"),
        ("out.nothing", r"mine\.py, line 3 .*: AttributeError: .*has no attribute 'nothing'"),
        ("raise SystemExit(3)", r"mine\.py, line 3 .*: sys\.exit was called: 3"),
        ("open('/absent/file')", r"mine\.py, line 3 .*: FileNotFoundError"),
    ],
)
def test_a_recipe_that_fails_is_named_with_its_line(tmp_path, line, message):
    path = _recipe(tmp_path, f"def main(*, out, seed=0):\n    {line}\n")
    with pytest.raises(InputError, match=message):
        run_recipe(path, out=tmp_path / "o")


def test_our_own_errors_and_installed_recipes_bugs_pass_through(tmp_path):
    body = "from deepseek_r1.core import CheckFailedError\ndef main(*, out, seed=0): raise CheckFailedError('0.5')"
    with pytest.raises(CheckFailedError, match=r"^0\.5$"):
        run_recipe(_recipe(tmp_path, body), out=tmp_path / "o")
    RECIPES.register("buggy", lambda *, out, seed=0: {}["x"])
    try:
        with pytest.raises(KeyError):
            run_recipe("buggy", out=tmp_path / "o")
    finally:
        RECIPES.unregister("buggy")


def test_a_report_that_cannot_be_kept_comes_with_the_error(tmp_path):
    path = _recipe(tmp_path, "def main(*, out, seed=0):\n    (out / 'report.html').mkdir()\n    return Report('mine')")
    with pytest.raises(OSError, match=r"report\.html'$") as caught:
        run_recipe(path, out=tmp_path / "o")
    assert caught.value.report.title == "mine"

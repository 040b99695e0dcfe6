"""Exit codes, error lines and where reports go, for any verb."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from deepseek_r1.cli import _frame as frame
from deepseek_r1.cli import app
from deepseek_r1.core import CheckFailedError, InputError, NonFiniteLossError, Report
from deepseek_r1.core.userfile import load_file

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def _no_traceback():
    """One test's `--traceback` is not the next one's."""
    frame.show_traceback(False)


def _report(ok=True):
    report = Report("demo")
    report.add("size", 12, unit="MB")
    report.check("parity", ok, "1e-6")
    return report


def _app(action):
    """An application with one verb that does `action` and returns what it gives."""
    made = frame.new_app()

    def work(json: frame.Json = None, html: frame.Html = None) -> Report:
        return action()

    made.command()(frame.verb()(work))
    return made


def _raise(error):
    raise error


def test_done_prints_the_table_and_exits_0():
    result = run(_app(_report), [])
    assert result.exit_code == 0
    assert "size" in result.stdout
    assert "pass  parity" in result.stdout


def test_a_failed_check_exits_1_and_is_named():
    result = run(_app(lambda: _report(ok=False)), [])
    assert result.exit_code == 1
    assert "check failed: parity" in result.stderr


def test_a_check_that_stops_the_verb_exits_1_and_leaves_its_report(tmp_path):
    error = CheckFailedError("parity is 0.5", report=_report(ok=False))
    result = run(_app(lambda: _raise(error)), ["--json", str(tmp_path / "r.json")])
    assert result.exit_code == 1
    assert result.stderr == "check failed: parity is 0.5\n"
    assert not Report.load(tmp_path / "r.json").ok


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("the model is no model"), 2, "error: the model is no model"),
        (NonFiniteLossError("loss is nan at step 3"), 1, "check failed: loss is nan at step 3"),
        (FileNotFoundError(2, "No such file or directory", "x.npz"), 2, "error: [Errno 2] No such file"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "error: this needs torch, which is not inst"),
    ],
)
def test_errors_are_one_line_and_a_code(error, code, line):
    result = run(_app(lambda: _raise(error)), [])
    assert result.exit_code == code
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("error", [ZeroDivisionError(), ModuleNotFoundError("no 'nonsense'", name="nonsense")])
def test_a_bug_keeps_its_traceback(error):
    result = run(_app(lambda: _raise(error)), [])
    assert result.exception is error


@pytest.mark.parametrize("args", [["--nonsense"], ["run"], ["train", "m.py:f"], ["optimise"], ["export", "a", "b"]])
def test_wrong_use_exits_2(args):
    result = run(app, args)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_json_and_html_are_written(tmp_path):
    result = run(_app(_report), ["--json", str(tmp_path / "a" / "r.txt"), "--html", str(tmp_path / "r.html")])
    assert result.exit_code == 0
    assert json.loads((tmp_path / "a" / "r.txt").read_text())["rows"][0]["after"] == 12
    assert "parity" in (tmp_path / "r.html").read_text()


def test_json_on_standard_output_is_alone_there():
    def noisy():
        sys.stdout.write("a library speaks\n")
        return _report()

    result = run(_app(noisy), ["--json", "-"])
    assert json.loads(result.stdout)["title"] == "demo"
    assert "a library speaks" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--json", "{tmp}"], "that is a directory"), (["--html", "{tmp}/r.pdf"], "must end in .html")],
)
def test_reports_that_cannot_be_written_are_known_before_the_work(tmp_path, args, message):
    result = run(_app(lambda: _raise(AssertionError("the work began"))), [a.format(tmp=tmp_path) for a in args])
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_traceback_comes_when_asked():
    quiet, loud = run(app, ["run", "nonsense"]), run(app, ["--traceback", "run", "nonsense"])
    assert quiet.exit_code == loud.exit_code == 2
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert "unknown recipe 'nonsense'" in quiet.stderr


def test_ctrl_c_is_130_and_no_traceback(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\ndef main(*, out, seed=0):\n    (out / 'started').touch()\n    time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "deepseek_r1", "run", "slow.py", "--out", "out"],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (tmp_path / "out" / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err.startswith("interrupted")
    assert "Traceback" not in out + err
    assert err.count("\n") == 1


def test_exit_codes_reach_the_shell(tmp_path):
    for name, code in (("nonsense", 2), ("bad.py", 1), ("good.py", 0)):
        (tmp_path / "bad.py").write_text(
            "from deepseek_r1.core import Report\n"
            "def main(*, out, seed=0):\n    r = Report('r')\n    r.check('accuracy', False)\n    return r\n"
        )
        (tmp_path / "good.py").write_text(
            "from deepseek_r1.core import Report\ndef main(*, out, seed=0):\n    return Report('r')\n"
        )
        command = [sys.executable, "-m", "deepseek_r1", "run", name]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == code


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--json", ""], "--json '': no name was given; give the name of a file, or - for standard output."),
        (["--html", ""], "--html '': no name was given; give the name of a file."),
        (["--json", "{tmp}/file/r.json"], "file is a file, so nothing can be in it"),
        (["--html", "{tmp}/file/deep/r.html"], "file is a file, so nothing can be in it"),
        (["--json", "/dev/null"], "no ordinary file"),
        (["--json", "{tmp}/shut/r.json"], "shut cannot be written to"),
    ],
)
def test_places_that_cannot_be_written_to_are_known_before_the_work(tmp_path, monkeypatch, args, message):
    (tmp_path / "file").touch()
    (tmp_path / "shut").mkdir()
    # The super-user may write anywhere, so permissions alone would not show.
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "shut")
    result = run(_app(lambda: _raise(AssertionError("the work began"))), [a.format(tmp=tmp_path) for a in args])
    assert result.exit_code == 2, result.exception
    assert message in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "shut"]


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize("ok", [True, False])
def test_the_table_is_there_even_if_the_files_cannot_be(tmp_path, option, ok):
    target = tmp_path / "r.html"

    def work():
        target.mkdir()
        return _report() if ok else _raise(CheckFailedError("parity", report=_report(ok=False)))

    result = run(_app(work), [option, str(target)])
    assert result.exit_code == 2
    assert "size" in result.stdout
    assert result.stderr.startswith(f"error: {option} {target} could not be written: Is a directory. ")
    assert ".tmp" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_error_may_bring_a_report():
    error = OSError(28, "No space left on device", "out/report.json")
    error.report = _report()
    result = run(_app(lambda: _raise(error)), [])
    assert "size" in result.stdout
    assert result.stderr.endswith("'out/report.json'. Free space, or give another place.\n")


def test_errors_in_a_users_file_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_framed.py").write_text("import sys\ndef bad():\n    {}['x']\ndef leave():\n    sys.exit(5)\n")
    module = load_file("mine_framed.py")
    result = run(_app(module.bad), [])
    assert (result.exit_code, result.stderr) == (2, "error: mine_framed.py, line 3 ({}['x']): KeyError: 'x'\n")
    result = run(_app(module.leave), [])
    assert result.exit_code == 2
    assert result.stderr == "error: mine_framed.py, line 5 (sys.exit(5)): sys.exit was called: 5\n"


@pytest.mark.parametrize(
    ("verb", "out", "message"),
    [
        ("export", "net.pt", "a name ending in .onnx, or a folder's name without an ending, is needed"),
        ("quantize", "net.pt", "a name ending in .dr1 or a name ending in .onnx, or a folder's name"),
        ("optimize", "best.v2", "a name ending in .onnx, or a folder's name without an ending"),
        ("export", "folder.onnx", "that is a directory"),
        ("quantize", "folder.dr1", "that is a directory"),
        ("export", "file", "that is a file; give the name of a folder"),
        ("optimize", "file", "that is a file; give the name of a folder"),
        ("optimize", "full", "the folder has other things in it"),
        ("export", "file/x.onnx", "so nothing can be in it"),
        ("train", "file", "that is a file"),
        ("train", "file/deep", "so nothing can be in it"),
        ("run", "file", "that is a file"),
    ],
)
def test_an_out_that_cannot_be_is_known_before_the_work(tmp_path, monkeypatch, verb, out, message):
    monkeypatch.chdir(tmp_path)
    for name in ("folder.onnx", "folder.dr1", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "thesis").touch()
    (tmp_path / "file").touch()
    # A model whose file fails: were it opened first, that would be the error.
    (tmp_path / "m.py").write_text("raise RuntimeError('opened')")
    data = ["--data", "digits"] if verb != "run" else []
    result = run(app, [verb, "m.py:build" if verb != "run" else "m.py", *data, "--out", out])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: --out {out}: ")
    assert message in result.stderr

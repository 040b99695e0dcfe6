"""Exit codes, error lines and where reports go, for any verb."""

import json
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from deepseek_r1.cli import _frame as frame
from deepseek_r1.cli import app
from deepseek_r1.core import CheckFailedError, InputError, NonFiniteLossError, Report

run = CliRunner().invoke


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

"""`doctor`, `ds-doctor` and `version`."""

import json
import subprocess
import sys

from typer.testing import CliRunner

from deepseek_r1 import __version__
from deepseek_r1.cli import app
from deepseek_r1.core import Report, _facts

run = CliRunner().invoke
#: Makes a process in which torch neither can be imported nor is listed as installed.
NO_TORCH = """
import importlib.metadata as m, sys
from deepseek_r1.core import _facts
real = _facts.metadata.version
def version(name):
    if name == "torch":
        raise m.PackageNotFoundError(name)
    return real(name)
_facts.metadata.version = version
sys.modules["torch"] = None
"""


def test_doctor_is_well_here_and_each_line_has_a_verdict(tmp_path):
    result = run(app, ["doctor", "--json", str(tmp_path / "d.json")])
    assert result.exit_code == 0
    states = ("ok ", "warn ", "not installed ")
    assert all(line.startswith(states) for line in result.stdout.splitlines())
    assert Report.load(tmp_path / "d.json")["Python"].after == "ok"


def test_doctor_exits_1_when_something_is_wrong(monkeypatch):
    monkeypatch.setattr(_facts.platform, "python_version", lambda: "3.8.1")
    result = run(app, ["doctor"])
    assert result.exit_code == 1
    assert "fail           Python" in result.stdout
    assert "check failed: Python, nothing is wrong" in result.stderr


def test_ds_doctor_works_without_torch():
    code = (
        NO_TORCH + "sys.argv = ['ds-doctor', '--check-compatibility']\nfrom deepseek_r1.cli.doctor import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "not installed  torch" in done.stdout, done.stderr
    assert done.returncode == 0


def test_ds_doctor_has_its_own_help():
    code = "import sys; sys.argv = ['ds-doctor', '--help']; from deepseek_r1.cli.doctor import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: ds-doctor [OPTIONS]")


def test_version_needs_no_torch():
    result = run(app, ["version"])
    assert f"deepseek-r1 {__version__}" in result.stdout
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['x', 'version', '--json', '-']\n"
    code += "from deepseek_r1.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [row["metric"] for row in json.loads(done.stdout)["rows"]][:3] == ["deepseek-r1", "torch", "onnxruntime"]

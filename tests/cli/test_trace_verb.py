"""`deepseek-r1 trace` as a user types it."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from deepseek_r1.cli import app

MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(MODEL)
    np.savez(tmp_path / "data.npz", x=np.ones((40, 6), dtype=np.float32), y=np.arange(40) % 3)
    monkeypatch.chdir(tmp_path)
    return lambda line: CliRunner().invoke(app, line.split())


@pytest.mark.parametrize("feed", ["--input-shape 1,6", "--data data.npz"])
def test_it_draws_a_model(run, tmp_path, feed):
    result = run(f"trace model.py:build {feed} --out net.html --json report.json")
    assert result.exit_code == 0, result.output
    assert "wrote net.html" in result.output
    assert (tmp_path / "net.html").read_text().startswith("<!doctype html>")
    rows = {r["metric"]: r["after"] for r in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert rows["operators"] == 3
    assert rows["compute"] == (2 * 6 * 32 + 32 + 2 * 32 * 3) / 1e6


def test_other_endings_are_refused_before_any_work(run, tmp_path):
    result = run("trace model.py:build --input-shape 1,6 --out net.pdf")
    assert result.exit_code == 2
    assert ".html" in result.stderr
    assert "folder" not in result.stderr
    assert not (tmp_path / "net.pdf").exists()

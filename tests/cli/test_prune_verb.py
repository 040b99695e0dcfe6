"""`deepseek-r1 prune` on a user's own model and data, as a user types it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from deepseek_r1.cli import app
from deepseek_r1.graph import Program

MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

def flat():
    return nn.Linear(6, 3)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "model.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = rng.normal(size=(300, 6)).astype(np.float32) + 3 * np.eye(6, dtype=np.float32)[y]
    np.savez(folder / "data.npz", x=x, y=y)
    return folder


@pytest.fixture
def run(place, monkeypatch):
    monkeypatch.chdir(place)
    return lambda line: CliRunner().invoke(app, line.split(), prog_name="deepseek-r1")


def _done(result):
    assert result.exit_code == 0, result.output
    return result


def test_pruned_weights_go_to_the_next_command(run, place):
    line = "--data data.npz --sparsity 0.4 --epochs 12 --lr 0.01 --out small.safetensors --json p.json"
    _done(run(f"prune model.py:build {line}"))
    report = json.loads((place / "p.json").read_text())
    rows = {row["metric"]: row for row in report["rows"]}
    assert rows["parameters"]["after"] <= 0.6 * rows["parameters"]["before"]
    assert rows["validation accuracy"]["after"] > 0.8
    kept = load_file(place / "small.safetensors")
    assert sum(t.numel() for t in kept.values()) == rows["parameters"]["after"]
    _done(run("export model.py:build --weights small.safetensors --data data.npz --out small.onnx"))
    _done(run("train model.py:build --weights small.safetensors --data data.npz --epochs 1 --out again"))
    assert load_file(place / "again" / "model.safetensors")["0.weight"].shape == kept["0.weight"].shape


def test_a_graph_and_an_artifact_without_data(run, place):
    _done(run("prune model.py:build --input-shape 1,6 --out small.dr1"))
    assert Program.load(place / "small.dr1")(torch.zeros(5, 6)).shape == (5, 3)
    _done(run("prune model.py:build --data data.npz --epochs 0 --out small"))
    assert (place / "small" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prune model.py:build --data data.npz --sparsity 1.2 --out x.onnx", "above 0 and below 1"),
        ("prune model.py:flat --data data.npz --out x.onnx", "nothing in Linear can be pruned"),
        ("prune model.py:build --out x.onnx", "--input-shape"),
        ("prune model.py:build --input-shape 1,6 --accuracy-drop 0.1 --out x.onnx", "val_loader"),
        ("prune model.py:build --input-shape 1,6 --out x.pth", ".safetensors"),
    ],
)
def test_wrong_use(run, line, message):
    result = run(line)
    assert result.exit_code == 2, result.output
    assert message in result.output.replace("\n", " ")


def test_a_budget_that_cannot_be_met(run):
    result = run("prune model.py:build --input-shape 1,6 --size-mb 0.0001 --out x.onnx")
    assert result.exit_code == 1
    assert "best that can be reached" in result.output.replace("\n", " ")

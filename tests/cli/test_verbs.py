"""train, quantize, optimize and export on a user's own model and data, as a user types them."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from deepseek_r1 import runtime
from deepseek_r1.cli import _inputs, app
from deepseek_r1.core import ConfigError, Report
from deepseek_r1.data import load_data

MODEL = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))

def other():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

class Ids(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2, 4)
        self.scale = nn.Linear(4, 3)
    def forward(self, ids, x):
        return self.scale(self.table(ids) * x)

def diverges():
    model = build()
    nn.init.constant_(model[0].weight, float("nan"))
    return model
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and separable data of three classes; the tests of this file share it."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "model.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = rng.normal(size=(300, 6)).astype(np.float32) + 3 * np.eye(6, dtype=np.float32)[y]
    np.savez(folder / "data.npz", x=x, y=y)
    np.savez(folder / "wide.npz", x=np.ones((30, 9)), y=np.arange(30) % 3)
    return folder


@pytest.fixture
def run(place, monkeypatch):
    """Runs a command line in that folder; gives the result."""
    monkeypatch.chdir(place)
    return lambda line: CliRunner().invoke(app, line.split())


def _check(result, code=0):
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def trained(place):
    """The folder of a run of `train`."""
    line = f"train {place}/model.py:build --data {place}/data.npz --epochs 6 --lr 0.02 --out {place}/run --seed 3"
    _check(CliRunner().invoke(app, line.split()))
    return place / "run"


def test_train_leaves_weights_checkpoints_and_a_report_that_agree(trained, place):
    report = Report.load(trained / "report.json")
    assert (trained / "report.html").stat().st_size > 1000
    assert len(list((trained / "checkpoints").iterdir())) == 3
    model = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    model.load_state_dict(load_file(trained / "model.safetensors"))
    x, y = load_data(place / "data.npz", seed=3).tensors("test")
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    assert report["test accuracy"].after == pytest.approx(accuracy)
    assert accuracy > 0.9


def test_the_same_command_gives_the_same_weights(trained, run, place):
    _check(run("train model.py:build --data data.npz --epochs 6 --lr 0.02 --out again --seed 3"))
    _check(run("train model.py:build --data data.npz --epochs 6 --lr 0.02 --out other --seed 4"))
    first, again, other = (load_file(place / d / "model.safetensors") for d in ("run", "again", "other"))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


def test_a_resumed_run_ends_like_one_that_was_never_stopped(trained, run, place):
    line = "train model.py:build --data data.npz --lr 0.02 --out halves --seed 3"
    _check(run(f"{line} --epochs 3"))
    again = _check(run(f"{line} --epochs 3"), code=2)
    assert "add --resume" in again.stderr
    _check(run(f"{line} --epochs 6 --resume"))
    first, second = (load_file(place / d / "model.safetensors") for d in ("run", "halves"))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_ctrl_c_saves_and_the_same_command_goes_on(run, place):
    line = "train model.py:build --data data.npz --out stopped"
    child = subprocess.Popen(
        [sys.executable, "-m", "deepseek_r1", *line.split(), "--epochs", "100000"],
        cwd=place, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list((place / "stopped").glob("checkpoints/step-*")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == 130
    assert err.splitlines()[-1].startswith("interrupted: stopped at step")
    assert "--resume" in err
    assert "Traceback" not in err
    assert not (place / "stopped" / "model.safetensors").exists()
    done = int(re.search(r"at step (\d+)", err)[1])
    result = _check(run(f"{line} --epochs {done // 7 + 1} --resume"))
    assert f"(step {done})" in result.stdout


def test_train_exports_and_takes_its_settings(run, place):
    line = "train model.py:build --data data.npz --epochs 1 --out settings --export --micro-batch-size 8"
    result = _check(run(f"{line} --gradient-accumulation-steps 2 --batch-size 16 --precision fp32 --json -"))
    report = json.loads(result.stdout)
    steps = next(row["after"] for row in report["rows"] if row["metric"] == "steps")
    assert steps == 7  # 210 training samples, 16 in a batch, two batches a step
    assert any(c["name"].startswith("parity") and c["passed"] for s in report["sections"] for c in s["checks"])
    onnxruntime.InferenceSession(place / "settings" / "model.onnx")


def test_the_main_job_on_a_users_model(trained, run, place):
    weights = "--weights run/model.safetensors --data data.npz --seed 3"
    result = _check(run(f"quantize model.py:build {weights} --out int8.dr1 --json q.json"))
    assert "deepseek-r1 optimize int8.dr1" in result.stdout
    result = _check(run("optimize int8.dr1 --data data.npz --seed 3 --accuracy-drop 0.05 --out best --html best.html"))
    assert "int8" in result.stdout
    assert "pass  parity in onnxruntime" in result.stdout
    assert "latency" in (place / "best.html").read_text()
    _check(run(f"export model.py:build {weights} --out net.onnx"))

    x, y = load_data(place / "data.npz", seed=3).tensors("test")
    session = onnxruntime.InferenceSession(place / "net.onnx")
    model = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    model.load_state_dict(load_file(trained / "model.safetensors"))
    answers = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(answers, model(x).detach().numpy(), atol=1e-4)

    labels = runtime.load(place / "best").predict(x.numpy())
    assert np.mean(np.array(labels) == y.numpy().astype(str)) > 0.9


def test_quantize_writes_an_artifact_too(trained, run, place):
    _check(run("quantize model.py:build --weights run/model.safetensors --data data.npz --seed 3 --out int8"))
    assert runtime.load(place / "int8").manifest.precision == "int8"


def test_quantize_chooses_formats_under_a_budget(trained, run, place):
    line = "quantize model.py:build --weights run/model.safetensors --data data.npz --seed 3 --out chosen.dr1"
    result = _check(run(f"{line} --accuracy-drop 0.1 --size-mb 0.00085 --json chosen.json"))
    assert "its loss" in result.stdout
    report = json.loads((place / "chosen.json").read_text())
    rows = {r["metric"]: r["after"] for r in report["rows"]}
    assert rows["weights"] <= 850
    assert {c["name"] for c in report["checks"]} >= {"quality", "weights budget"}
    result = _check(run(f"{line} --size-mb 0.0001"), code=1)
    assert "smallest alone" in " ".join((result.stdout + result.stderr).split())
    assert "a budget chooses the bits itself" in run(f"{line} --bits 8 --auto").stderr


def test_an_onnx_file_and_an_artifact_are_models(trained, run, place):
    _check(run("export model.py:build --weights run/model.safetensors --data data.npz --out a.onnx"))
    _check(run("export a.onnx --data data.npz --out a"))
    _check(run("export a --data data.npz --out b.onnx"))
    x = np.ones((4, 6), dtype=np.float32)
    first, last = (onnxruntime.InferenceSession(place / f) for f in ("a.onnx", "b.onnx"))
    outputs = [s.run(None, {s.get_inputs()[0].name: x})[0] for s in (first, last)]
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_without_data_shapes_are_enough(run, place):
    _check(run("export model.py:build --input-shape 1,6 --out shapes.onnx"))
    line = "export model.py:Ids --input-shape 1,5 --input-dtype int64 --input-shape 1,5,4 --out ids.onnx"
    _check(run(line))
    types = [i.type for i in onnxruntime.InferenceSession(place / "ids.onnx").get_inputs()]
    assert types == ["tensor(int64)", "tensor(float)"]
    _check(run("optimize model.py:build --input-shape 8,6 --out raced"))
    assert runtime.load(place / "raced")(np.ones((2, 6), dtype=np.float32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("export model.py:build --out x.onnx", "the shape of the inputs is not known"),
        ("export model.py:build --out x.onnx --input-shape 1,x", "whole numbers with commas"),
        ("export model.py:build --out x.onnx --input-shape 1,6 --input-dtype flaot32", "a torch dtype is needed"),
        ("export model.py:build --out x.onnx --input-shape 1,6 --data data.npz", "one of them is enough"),
        ("export model.py:build --out x.onnx --input-shape 1,7", "fails on the example inputs"),
        ("export model.py:biuld --out x.onnx --input-shape 1,6", "build"),
        ("export nowhere.onnx --out x.onnx", "does not exist"),
        ("export model.py:build --out x.onnx --data nowhere.csv", "nowhere.csv does not exist"),
        ("export model.py:build --out x.onnx --input-shape 1,6 --weights no.safetensors", "there is no such file"),
        ("optimize model.py:build --input-shape 1,6 --out x --latency-ms -1", "latency_ms=-1.0"),
        ("quantize model.py:build --data data.npz --bits 3 --out x.dr1", "bits=3"),
        ("quantize model.py:build --data wide.npz --out x.dr1", "fails on the example inputs"),
        ("train model.py:build --data wide.npz --out x", "the model cannot be trained on this data"),
        ("train model.py:build --data data.npz --out x --precision int8", "precision='int8'"),
        ("train model.py:build --data data.npz --out x --resume", "no checkpoint"),
        ("train model.py:build --data data.npz --out x --image-size big", "--image-size big"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(run, place, line, message):
    result = _check(run(line), code=2)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not [p for p in place.iterdir() if p.name in ("x.onnx", "x.dr1") or (p.name == "x" and any(p.iterdir()))]


def test_a_loss_that_is_no_number_exits_1(run):
    result = _check(run("train model.py:diverges --data data.npz --out nan"), code=1)
    assert result.stderr.startswith("check failed: ")
    assert "0.weight" in result.stderr


def test_a_budget_that_cannot_be_met_exits_1_with_the_measurements(run, place):
    line = "optimize model.py:build --data data.npz --latency-ms 0.0000001 --out tight --json tight.json"
    result = _check(run(line), code=1)
    assert "latency" in result.stderr
    assert not Report.load(place / "tight.json").ok
    assert not (place / "tight").exists()


def test_weights_of_another_model_are_refused_with_names(trained, run):
    result = _check(run("export model.py:other --weights run/model.safetensors --data data.npz --out x.onnx"), code=2)
    assert "0.weight (32, 6), the model has (16, 6)" in result.stderr


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_weights_from_pth_files(trained, run, place, nest):
    state = load_file(trained / "model.safetensors")
    torch.save({nest: state, "epoch": 3} if nest else state, place / "w.pth")
    model = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    _inputs.load_weights_(model, place / "w.pth")
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


class _Payload:
    def __reduce__(self):
        return (print, ("ran",))


def test_weights_that_carry_code_are_refused_unread(run, place):
    torch.save({"0.weight": _Payload()}, place / "bad.pth")
    result = _check(run("export model.py:build --input-shape 1,6 --weights bad.pth --out x.onnx"), code=2)
    assert "could run code" in result.stderr
    assert "ran" not in result.stdout


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth", "cut.bin"])
def test_damaged_weights_are_named(run, place, name):
    save_file({"a": torch.ones(99)}, place / "whole.safetensors")
    (place / name).write_bytes((place / "whole.safetensors").read_bytes()[:60])
    result = _check(run(f"export model.py:build --input-shape 1,6 --weights {name} --out x.onnx"), code=2)
    assert name in result.stderr


def test_sizes_of_images():
    assert _inputs.parse_size("12x9") == (12, 9)
    for text in ("0", "1x", "axb", "-3", "1x2x3"):
        with pytest.raises(ConfigError, match="--image-size"):
            _inputs.parse_size(text)


FAILING = """
import sys
import torch
from torch import nn

class Fails(nn.Module):
    def __init__(self, after, error):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.left, self.error = after, error
    def forward(self, x):
        if self.training:
            self.left -= 1
        if self.left < 0:
            raise self.error
        return self.layer(x)

def attribute():
    return Fails(0, AttributeError("no such thing"))

def key():
    return Fails(10, KeyError("late"))

def leaves():
    return Fails(10, SystemExit(3))

def factory_leaves():
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("factory", "message", "resume"),
    [
        (
            "attribute",
            "the model failed after step 0: failing.py, line 15 (raise self.error): AttributeError: no",
            False,
        ),
        ("key", "the model failed after step 10: failing.py, line 15 (raise self.error): KeyError: 'late'", True),
        ("leaves", "line 15 (raise self.error): sys.exit was called: 3", True),
        ("factory_leaves", "failing.py:factory_leaves failed: line 28 (sys.exit(3)): SystemExit: 3", False),
    ],
)
def test_a_model_that_fails_is_one_line_with_its_place(run, place, factory, message, resume):
    (place / "failing.py").write_text(FAILING)
    result = _check(run(f"train failing.py:{factory} --data data.npz --out failing_{factory}"), code=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert ("--resume" in result.stderr) is resume
    loud = run(f"--traceback train failing.py:{factory} --data data.npz --out failing_{factory}_loud")
    assert "Traceback" in loud.stderr


def test_data_that_do_not_fit_are_said_with_their_shape(run, place):
    rows = "\n".join(f"{i % 5},{i % 7},{i % 3}" for i in range(40))
    (place / "narrow.csv").write_text("a,b,label\n" + rows.replace(",", ".5,", 2) + "\n")
    result = _check(run("train model.py:build --data narrow.csv --out narrow"), code=2)
    assert "cannot be trained on this data, whose samples have the shape (2,): RuntimeError: mat1" in result.stderr


def test_a_finished_run_resumed_says_so_and_what_was_given_in_vain(run, place):
    line = "train model.py:build --data data.npz --epochs 2 --out finished"
    _check(run(f"{line} --lr 0.02"))
    result = _check(run(f"{line} --lr 0.02 --resume --json -"))
    notes = json.loads(result.stdout)["notes"]
    assert not [n for n in notes if n.startswith("loss: ,")]
    assert any(n.startswith("no step was taken: the run has its 2 epoch(s) already") for n in notes)
    assert not [n for n in notes if "changed since" in n or n.startswith("lr: ")]
    line = line.replace("--epochs 2", "--epochs 3")
    result = _check(run(f"{line} --lr 0.5 --batch-size 16 --resume --json -"))
    notes = json.loads(result.stdout)["notes"]
    (resumed,) = [n for n in notes if n.startswith("resumed: ")]
    assert "the loader's batch size (was 32, is 16)" in resumed
    assert any(n.startswith("lr: 0.02 as the run began with, not 0.5 as given") for n in notes)
    assert any(n.startswith("optimizer: AdamW (lr 0.02,") for n in notes)


def test_a_training_whose_files_cannot_be_written_is_still_shown(run, place):
    (place / "kept" / "report.html").mkdir(parents=True)
    result = _check(run("train model.py:build --data data.npz --epochs 1 --out kept"), code=2)
    assert "test accuracy" in result.stdout
    assert "kept/report.html" in result.stderr
    assert ".tmp" not in result.stderr

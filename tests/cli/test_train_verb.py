"""The options of `train`: what they become, what is refused in one line, and what a signal does."""

import importlib
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from deepseek_r1.cli import app
from deepseek_r1.core import Report
from deepseek_r1.models import GPT2, GPT2Config
from deepseek_r1.train import DSCheckpoint
from deepseek_r1.train._logs import NAME, read_lines
from deepseek_r1.train._optim import BY_NAME

MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "model.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    np.savez(folder / "data.npz", x=rng.normal(size=(300, 6)).astype(np.float32) + 3 * np.eye(6)[y], y=y)
    return folder


@pytest.fixture
def run(place, monkeypatch):
    monkeypatch.chdir(place)
    return lambda line: CliRunner().invoke(app, shlex.split(line))


@pytest.fixture
def config(run, monkeypatch):
    """The settings that a command line becomes."""

    def settings(line):
        found = {}

        def stop(model, data, **rest):
            found.update(model=model, **rest["settings"], **{k: v for k, v in rest.items() if k != "settings"})
            return Report("seen")

        # The package's `_train` is the verb.
        monkeypatch.setattr(importlib.import_module("deepseek_r1.cli._train"), "train_model", stop)
        result = run(line)
        assert result.exit_code == 0, result.output
        return found

    return settings


def test_the_documented_flags_are_taken(config):
    found = config(
        "train --model model.py:build --data data.npz --devices 0 --pipeline 1 --gradient_accumulation 8 "
        "--fp16_enable True"
    )
    assert found["model"] == "model.py:build"
    assert (found["device"], found["precision"], found["gradient_accumulation_steps"]) == ("cuda:0", "fp16", 8)


def test_every_option_reaches_the_configuration(config, tmp_path):
    found = config(
        f"train model.py:build --data data.npz --epochs 7 --lr 0.5 --optimizer lion "
        f"--schedule cosine --warmup 0.1 --weight-decay 0.2 "
        f"--clip-grad-norm 1.5 --batch-size 9 --micro-batch-size 3 --gradient-accumulation-steps 2 --precision bf16 "
        f"--memory-gb 4 --compile --device cpu --threads 1 --deterministic --save-dir {tmp_path}/c "
        f"--save-every-steps 5 --save-every-epochs 2 --keep-last 4 --keep-best 2 --async-save --on-save-error continue "
        f"--no-save-frozen --early-stop-patience 6 --log-dir {tmp_path}/l --log-every 3 --resume --seed 11"
    )
    expected = {
        "epochs": 7, "lr": 0.5, "optimizer": "lion",
        "schedule": "cosine", "warmup": 0.1, "weight_decay": 0.2, "clip_grad_norm": 1.5,
        "batch_size": 9, "micro_batch_size": 3, "gradient_accumulation_steps": 2, "precision": "bf16", "memory_gb": 4.0,
        "compile": True, "device": "cpu", "threads": 1, "deterministic": True, "save_dir": tmp_path / "c",
        "save_every_steps": 5, "save_every_epochs": 2, "keep_last": 4, "keep_best": 2, "async_save": True,
        "on_save_error": "continue", "save_frozen": False, "early_stop_patience": 6, "log_dir": tmp_path / "l",
        "log_every": 3, "resume": True, "seed": 11,
    }  # fmt: skip
    assert {k: found[k] for k in expected} == expected
    assert isinstance(config("train model.py:build --data data.npz --warmup 5")["warmup"], int)
    assert config("train model.py:build --data data.npz --memory-gb auto")["memory_gb"] == "auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "no model was given"),
        ("model.py:build --model model.py:build", "two models were given"),
        ("model.py:build --devices 0,1,2,3", "--devices 0,1,2,3: this release trains on one device"),
        ("model.py:build --pipeline 4", "--pipeline 4: this release trains on one device"),
        ("model.py:build --fp16_enable perhaps", "True or False is needed"),
        ("model.py:build --fp16_enable True --precision bf16", "contradict each other"),
        ("model.py:build --warmup soon", "--warmup soon: a number is needed"),
        ("model.py:build --warmup 1.5", "fraction of the run"),
        ("model.py:build --memory-gb much", "--memory-gb much: a number is needed"),
        ("model.py:build --schedule step", "schedule='step'): the value must be one of 'constant', 'linear', 'cosine'"),
        ("model.py:build --precision fp8", "precision='fp8'): the value must be one of 'auto', 'fp32', 'bf16', 'fp16'"),
        ("model.py:build --on-save-error shrug", "one of 'stop', 'continue'"),
        ("model.py:build --keep-last 0", "keep_last=0): the value must be an integer >= 1"),
        ("model.py:build --micro-batch-size 64", "larger than the loader's batch of 32"),
        ("model.py:build --device tpu", "one of 'auto', 'cpu', 'cuda'"),
        ("model.py:build --device 99", "torch finds"),
        ("model.py:build --optimizer best", "optimizer='best' is unknown. Known: adamw, adamw8bit, paged_adamw8bit, "),
        ("model.py:build --optimizer AdamW-8bit", "optimizer='AdamW-8bit' is unknown. Did you mean 'adamw8bit'?"),
        ("model.py:build --optimizer ''", "optimizer='' is unknown"),
        ("model.py:build --optimizer muon --weight-decay -1", "weight_decay=-1.0): the value must be a number >= 0"),
        ("model.py:build --lr -1", "a finite number > 0"),
        ("model.py:build --log-dir data.npz", "log_dir data.npz cannot be written to"),
    ],
)
def test_wrong_options_are_one_line(run, place, options, message):
    result = run(f"train {options} --data data.npz --out x")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (place / "x" / "model.safetensors").exists()


def test_log_and_checkpoints_go_where_they_are_told(run, place):
    line = "train model.py:build --data data.npz --epochs 2 --out told --save-dir told/kept --log-dir told/log"
    result = run(f"{line} --log-every 2 --keep-last 1 --keep-best 1")
    assert result.exit_code == 0, result.output
    assert not (place / "told" / "checkpoints").exists()
    assert DSCheckpoint(place / "told" / "kept" / "step-00000014").metrics["val_accuracy"] > 0.3
    assert [e["step"] for e in read_lines(place / "told" / "log" / NAME) if e["kind"] == "step"] == [
        2, 4, 6, 7, 8, 10, 12, 14,
    ]  # fmt: skip
    assert list((place / "told" / "log").glob("events.out.tfevents.*"))
    result = run(f"{line} --epochs 3 --resume")
    assert result.exit_code == 0, result.output
    assert "(step 14)" in result.stdout


@pytest.mark.parametrize("name", BY_NAME)
def test_every_optimizer_trains_and_is_resumed(run, place, name):
    lr = {"lion": 1e-3, "adaptive": 0.05, "sgd": 0.05}.get(name, 5e-3)
    line = f"train model.py:build --data data.npz --optimizer {name} --lr {lr} --out by-name/{name}"
    result = run(f"{line} --epochs 2")
    assert result.exit_code == 0, result.output
    assert f"optimizer: {BY_NAME[name][0].__name__} (lr {lr:g}" in " ".join(result.stdout.split())
    result = run(f"{line} --epochs 3 --resume --json by-name/{name}.json")
    assert result.exit_code == 0, result.output
    report = Report.load(place / "by-name" / f"{name}.json")
    assert report["test accuracy"].after > 0.6
    other = "sgd" if name != "sgd" else "adamw"
    result = run(f"{line} --epochs 4 --resume --optimizer {other}")
    assert result.exit_code == 2
    assert "has the state of the optimizer" in result.stderr


def test_the_help_and_the_documents_name_every_optimizer(run):
    shown = run("train --help").stdout
    words = set(re.findall(r"[a-z0-9_]+", shown))
    table = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    for name in BY_NAME:
        assert name in words
        assert f"| `{name}` " in table


def test_sigterm_saves_exits_0_and_says_the_whole_command(place, run):
    line = "train model.py:build --data data.npz --out 'ended early'"
    child = subprocess.Popen(
        [sys.executable, "-m", "deepseek_r1", *shlex.split(line), "--epochs", "100000"],
        cwd=place, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list((place / "ended early").glob("checkpoints/step-*")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == 0, err
    last = err.splitlines()[-1]
    assert last == f"resume with: python -m deepseek_r1 {line} --epochs 100000 --resume"
    assert "Traceback" not in err
    done = int(re.search(r"stopped at step (\d+); saved", err)[1])
    again = shlex.split(last.removeprefix("resume with: python -m deepseek_r1 "))
    again[again.index("100000")] = str(done // 7 + 1)
    result = CliRunner().invoke(app, again)
    assert result.exit_code == 0, result.output
    assert f"(step {done})" in result.stdout


LANGUAGE_MODEL = """
from deepseek_r1.models import GPT2, GPT2Config

def lm():
    return GPT2(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2))
"""


@pytest.fixture
def tokens(place):
    (place / "lm.py").write_text(LANGUAGE_MODEL)
    rows = (np.arange(8) + np.random.default_rng(0).integers(0, 20, 200)[:, None]) % 20
    np.savez(place / "tokens.npz", x=rows, y=rows)
    return place


def test_a_language_model_trains_on_tokens(run, tokens, tmp_path):
    result = run(f"train --model lm.py:lm --data tokens.npz --epochs 4 --lr 0.01 --device cpu --out {tmp_path}/out")
    assert result.exit_code == 0, result.output
    rows = {row["metric"]: row for row in Report.load(tmp_path / "out" / "report.json").to_dict()["rows"]}
    # Each token follows from the one before it: far below the 3.0 of guessing among 20.
    assert rows["test loss"]["after"] < 1.5


def test_a_name_is_looked_up(run, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    result = run("train --model gpt2 --data tokens.npz --device cpu")
    assert result.exit_code == 2
    assert "'gpt2' was not found on this machine" in " ".join(result.output.split())
    GPT2(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "models--gpt2" / "snapshots" / "1"
    )
    result = run(f"train --model gpt2 --data tokens.npz --epochs 1 --device cpu --out {tmp_path}/out")
    assert result.exit_code == 0, result.output

"""A run that was killed goes on to the same bits."""

from __future__ import annotations

import random
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).with_name("killable.py")
KILLABLE = runpy.run_path(str(SCRIPT))
make, EPOCHS = KILLABLE["make"], KILLABLE["EPOCHS"]

# Python 3.12 warns of what torch's loaders do with workers when other threads live.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Stop(BaseException):
    """Ends a run as abruptly as can be within the process."""


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def scramble():
    """A new process would have other generator states."""
    random.seed(99)
    np.random.seed(98)
    torch.manual_seed(97)


@pytest.mark.parametrize(("kind", "kill_at"), [("global", 4), ("workers", 2)])
def test_sigkilled_process_resumes_to_the_same_bits(tmp_path, kind, kill_at):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "run"), kind, str(kill_at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = make(tmp_path / "whole", kind)
    whole.train(EPOCHS)

    scramble()
    resumed = make(tmp_path / "run", kind)
    scramble()
    assert resumed.resume().name == f"step-{kill_at - 1:08d}", "killed before the step's own checkpoint"
    resumed.train(EPOCHS)
    assert resumed.step == whole.step == 9
    assert same(whole.model, resumed.model)
    assert whole.losses == resumed.losses
    assert drop_seconds(whole.history) == drop_seconds(resumed.history)


def drop_seconds(history):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


@pytest.mark.parametrize("kind", ["global", "generator", "persistent"])
def test_every_step_can_be_resumed_from(tmp_path, kind):
    whole = make(tmp_path / "run", kind)
    whole.train(EPOCHS)
    saved = sorted((tmp_path / "run").glob("step-*"))
    assert len(saved) == 9
    for path in saved if kind != "persistent" else saved[3:7]:
        shutil.copytree(path, tmp_path / path.name / path.name)
        resumed = make(tmp_path / path.name, kind, save_every_steps=None)
        scramble()
        assert resumed.resume() == tmp_path / path.name / path.name
        resumed.train(EPOCHS)
        assert same(whole.model, resumed.model), path.name
        assert drop_seconds(whole.history) == drop_seconds(resumed.history)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    import deepseek_r1.train._checkpoint as disk

    trainer = make(tmp_path, "global")
    real, calls = disk.save_file, []

    def dying(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 6:
            raise Stop
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(disk, "save_file", dying)
    monkeypatch.setattr(
        "deepseek_r1.core.atomic.shutil.rmtree", lambda *a, **k: None
    )  # a killed process tidies nothing
    with pytest.raises(Stop):
        trainer.train(EPOCHS)
    monkeypatch.undo()
    assert list(tmp_path.glob(".step-*.tmp")), "the half-written directory is there"
    whole = make(tmp_path / "whole", "global")
    whole.train(EPOCHS)
    resumed = make(tmp_path, "global")
    assert resumed.resume().name == "step-00000002"
    resumed.train(EPOCHS)
    assert same(whole.model, resumed.model)
    assert not list(tmp_path.glob(".step-*.tmp")), "left-overs are cleared away"


def test_a_shorter_loader_at_resume_is_refused(tmp_path):
    make(tmp_path / "whole", "global").train(EPOCHS)
    trainer = make(tmp_path / "other", "global")
    trainer.resume(tmp_path / "whole" / "step-00000005")
    trainer.train_loader = list(trainer.train_loader)[:1]
    from deepseek_r1.core import InputError

    with pytest.raises(InputError, match="gives only 1 batches"):
        trainer.train(EPOCHS)

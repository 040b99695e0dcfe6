"""Checkpoints of a run: in the background, retained, and when the disk refuses."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import deepseek_r1.train._checkpoint as disk
from deepseek_r1.core import NonFiniteLossError, atomic
from deepseek_r1.train import Callback, CheckpointError, DSCheckpoint, Trainer, TrainingConfig
from deepseek_r1.train._folder import Retention, checkpoints, prune


def data(n=6):
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(4, 3, generator=g), torch.randint(0, 2, (4,), generator=g)) for _ in range(n)]


def make(folder, loader=None, callbacks=(), val=None, **fields):
    torch.manual_seed(0)
    fields = {"save_every_steps": 1, "save_every_epochs": None, "keep_last": None, "log_every": 1, **fields}
    config = TrainingConfig(device="cpu", save_dir=str(folder), **fields)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    return Trainer(model, loader or data(), val, lr=1e-2, config=config, callbacks=callbacks)


def steps(folder):
    return [int(p.name[5:]) for p in sorted(folder.glob("step-*"))]


def state(path):
    weights, rest = disk.read(path)
    rest["config"] = rest["progress"]["seconds"] = rest["progress"]["epoch_seconds"] = None
    for entry in rest["progress"]["history"]:
        entry["seconds"] = None
    return {"weights": weights, **rest}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else a == b


def test_checkpoints_in_the_background_are_those_of_the_foreground(tmp_path, monkeypatch):
    make(tmp_path / "a", async_save=False).train(epochs=2)
    threads = set()
    real = disk.save_file

    def watched(*args, **kwargs):
        threads.add(threading.current_thread().name)
        real(*args, **kwargs)

    monkeypatch.setattr(disk, "save_file", watched)
    make(tmp_path / "b", async_save=True).train(epochs=2)
    assert threads == {"deepseek-r1 checkpoint"}
    assert steps(tmp_path / "a") == steps(tmp_path / "b") == list(range(1, 13))
    for step in range(1, 13):
        name = f"step-{step:08d}"
        assert equal(state(tmp_path / "a" / name), state(tmp_path / "b" / name)), name


class Gate(Callback):
    """Lets the writer write only after some more steps were taken."""

    def __init__(self, monkeypatch, open_at):
        self.open_at, self.go, self.in_flight, self.most = open_at, threading.Event(), 0, 0
        real = disk.save_file

        def slow(tensors, path, metadata=None):
            if path.name == disk.MODEL:
                self.in_flight += 1
                self.most = max(self.most, self.in_flight)
                assert self.go.wait(20)
            real(tensors, path, metadata=metadata)
            self.in_flight -= path.name == disk.TRAINING

        monkeypatch.setattr(disk, "save_file", slow)

    def on_step_end(self, trainer):
        if trainer.step == self.open_at:
            assert not list(trainer._saver.folder.glob("step-*")), "training went on before the file was there"
            self.go.set()


def test_later_steps_do_not_leak_into_a_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    make(tmp_path / "a", async_save=False, save_every_steps=2).train(epochs=1)
    gate = Gate(monkeypatch, open_at=3)
    make(tmp_path / "b", async_save=True, save_every_steps=2, callbacks=[gate]).train(epochs=1)
    assert gate.most == 1, "one at a time"
    one, other = (state(tmp_path / d / "step-00000002") for d in "ab")
    for part in ("weights", "optimizer", "rng", "progress"):
        assert equal(one[part], other[part]), part


def full(monkeypatch, at, name=disk.TRAINING):
    real = disk.save_file

    def refuse(tensors, path, metadata=None):
        if any(f"step-{step:08d}" in str(path) for step in at) and path.name == name:
            path.write_bytes(b"half a fi")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(disk, "save_file", refuse)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_ends_the_run_and_names_the_step(tmp_path, monkeypatch, in_background):
    full(monkeypatch, at=[4])
    trainer = make(tmp_path, async_save=in_background, save_every_steps=2)
    with pytest.raises(CheckpointError, match=r"step 4 could not be written.*No space left.*unharmed"):
        trainer.train(epochs=2)
    assert trainer.step in ((4, 5, 6) if in_background else (4,)), "at the next step or checkpoint at the latest"
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"], "nothing half-written is left"
    monkeypatch.undo()
    resumed = make(tmp_path, save_every_steps=2)
    assert resumed.resume().name == "step-00000002"
    resumed.train(epochs=2)
    whole = make(tmp_path / "whole")
    whole.train(epochs=2)
    assert equal(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    assert resumed.losses == whole.losses


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_can_go_on_without_the_checkpoint(tmp_path, monkeypatch, in_background):
    full(monkeypatch, at=[2, 4])
    trainer = make(tmp_path, async_save=in_background, on_save_error="continue", save_every_steps=2)
    with pytest.warns(RuntimeWarning, match=r"training goes on without it: the checkpoint of step \d"):
        report = trainer.train(epochs=1)
    assert steps(tmp_path) == [6]
    assert [why.split(" could")[0] for _, why in report.skipped] == [f"the checkpoint of step {n}" for n in (2, 4)]


def test_the_last_checkpoint_counts_too(tmp_path, monkeypatch):
    full(monkeypatch, at=[6])
    with pytest.raises(CheckpointError, match="step 6"):
        make(tmp_path, async_save=True, save_every_steps=None).train(epochs=1)
    (tmp_path / "c").mkdir()
    with pytest.warns(RuntimeWarning, match="step 6"):
        make(tmp_path / "c", async_save=True, save_every_steps=None, on_save_error="continue").train(epochs=1)


def test_what_a_user_saves_is_there_on_return_and_its_error_is_raised(tmp_path, monkeypatch):
    trainer = make(tmp_path / "run", async_save=True, on_save_error="continue")
    trainer.train(epochs=1)
    assert trainer.save(tmp_path / "mine") == tmp_path / "mine"
    DSCheckpoint(tmp_path / "mine")
    full(monkeypatch, at=[6])
    with pytest.raises(CheckpointError):
        trainer.save()
    disk.verify(tmp_path / "run" / "step-00000006")


def test_a_loss_that_is_no_number_names_the_checkpoint_in_the_making(tmp_path, monkeypatch):
    loader = data()
    loader[3][0][0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"step 4 \(epoch 1\), batch 4: .*step-00000003"):
        make(tmp_path, loader=loader, async_save=True).train(epochs=1)
    assert steps(tmp_path) == [1, 2, 3]


def test_an_error_of_the_user_is_not_hidden_by_one_of_the_disk(tmp_path, monkeypatch):
    class Fails(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 3:
                raise ValueError("mine")

    full(monkeypatch, at=[2])
    gate = threading.Event()
    monkeypatch.setattr(disk, "save_file", _behind(gate, disk.save_file))
    trainer = make(tmp_path, async_save=True, save_every_steps=2, callbacks=[Fails()])
    monkeypatch.setattr(trainer._saver, "close", _opening(gate, trainer._saver.close))
    with pytest.warns(RuntimeWarning, match="step 2"), pytest.raises(ValueError, match="mine"):
        trainer.train(epochs=1)


def _behind(gate, function):
    def call(*args, **kwargs):
        assert gate.wait(20)
        return function(*args, **kwargs)

    return call


def _opening(gate, function):
    def call():
        gate.set()
        function()

    return call


class Scripted(Callback):
    """Validation losses as written down."""

    def __init__(self, values):
        self.values = values

    def on_epoch_end(self, trainer):
        trainer.history[-1]["val_score"] = self.values[trainer.epoch - 1]


@pytest.mark.parametrize(("mode", "kept"), [("min", [12, 30, 36]), ("max", [6, 30, 36])])
def test_the_best_checkpoints_stay_beside_the_last(tmp_path, mode, kept):
    trainer = make(
        tmp_path, callbacks=[Scripted([9, 1, 5, 3, 2, 4])], save_every_steps=None, save_every_epochs=1, keep_last=2,
        keep_best=1, early_stop_metric="val_score", early_stop_mode=mode,
    )  # fmt: skip
    trainer.train(epochs=6)
    assert steps(tmp_path) == kept
    assert DSCheckpoint(tmp_path / "step-00000030").metrics["val_score"] == 2


def test_checkpoints_without_the_metric_or_damaged_ones_do_not_count_as_best(tmp_path):
    for step, metrics in enumerate([{"a": 2.0}, {}, {"a": float("nan")}, {"a": 1.0}, {"b": 0.0}, {"a": 3.0}], 1):
        DSCheckpoint.save(tmp_path / f"step-{step:08d}", nn.Linear(1, 1), step=step, metrics=metrics)
    (tmp_path / "step-00000004" / disk.MANIFEST).write_text("{")
    prune(tmp_path, 6, Retention(keep_last=1, keep_best=1, metric="a"))
    assert steps(tmp_path) == [1, 6]


def test_a_kill_while_one_is_deleted_leaves_none_that_is_half_there(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dies(path, **_):
        if path.exists():
            (path / disk.STATE).unlink()
            raise Killed

    for step in (1, 2):
        DSCheckpoint.save(tmp_path / f"step-{step:08d}", nn.Linear(1, 1), step=step)
    monkeypatch.setattr("deepseek_r1.core.atomic.shutil.rmtree", dies)
    with pytest.raises(Killed):
        prune(tmp_path, 2, Retention(keep_last=1))
    monkeypatch.undo()
    assert steps(tmp_path) == [2]
    prune(tmp_path, 2, Retention(keep_last=1))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_what_was_replaced_does_not_come_back_when_its_successor_is_deleted(tmp_path):
    for step in (1, 2):
        DSCheckpoint.save(tmp_path / f"step-{step:08d}", nn.Linear(1, 1), step=step)
    # As a kill leaves it that comes right after the second of the two renames.
    DSCheckpoint.save(tmp_path / ".step-00000001.old", nn.Linear(1, 1), step=1)
    prune(tmp_path, 2, Retention(keep_last=1))
    assert steps(tmp_path) == [2]
    assert list(checkpoints(tmp_path)) == [2]


def test_a_directory_can_be_replaced_although_its_predecessor_was_not_wholly_deleted(tmp_path):
    (tmp_path / ".c.old").mkdir()
    (tmp_path / ".c.old" / "rest").write_text("")
    for text in ("one", "two"):
        with atomic.atomic_dir(tmp_path / "c") as tmp:
            (tmp / "file").write_text(text)
    assert (tmp_path / "c" / "file").read_text() == "two"
    assert not (tmp_path / ".c.old").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    # Lazily: what a failing test still holds open must not keep the directory from being removed.
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs")
@pytest.mark.parametrize("in_background", [False, True])
def test_a_disk_that_is_really_full(small_disk, in_background):
    trainer = make(small_disk, async_save=in_background, on_save_error="continue", keep_last=None)
    with pytest.warns(RuntimeWarning, match="No space left"):
        report = trainer.train(epochs=2)
    there = steps(small_disk)
    assert there, "the first ones fit"
    assert len(there) + len(report.skipped) >= 12
    for step in there:
        disk.verify(small_disk / f"step-{step:08d}")
    assert not list(small_disk.glob(".*")), "nothing half-written takes space"
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.save()
    resumed = make(small_disk, save_every_steps=None)
    resumed.resume(small_disk / f"step-{there[-1]:08d}")
    assert resumed.step == there[-1]


def test_a_directory_that_cannot_be_written_is_told_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("no directory")
    trainer = make(tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match=r"save_dir='.*run' cannot be written in: .*no step was taken") as caught:
        trainer.train(epochs=1)
    assert trainer.step == 0
    assert "arlier" not in str(caught.value)
    tolerant = make(tmp_path / "file" / "run", on_save_error="continue")
    with pytest.warns(RuntimeWarning):
        report = tolerant.train(epochs=1)
    assert tolerant.step == 6
    assert any("cannot be written in" in why for _, why in report.skipped)


def test_a_directory_that_can_be_written_is_left_as_it_was(tmp_path):
    make(tmp_path / "new" / "run").train(epochs=1)
    assert {p.name[:5] for p in (tmp_path / "new" / "run").iterdir()} == {"step-"}


def test_a_first_checkpoint_that_fails_promises_no_earlier_one(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step 1 could not be written.*There is none before it") as caught:
        make(tmp_path, async_save=False).train(epochs=1)
    assert "unharmed" not in str(caught.value)

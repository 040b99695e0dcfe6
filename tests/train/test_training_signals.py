"""Ctrl-C and SIGTERM within one process: what is finished, what is raised, what is left to others."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from torch import nn

import deepseek_r1.train._checkpoint as disk
from deepseek_r1.train import Callback, CheckpointError, Terminated, Trainer, TrainingConfig
from deepseek_r1.train._interrupt import Interrupts


def data(n=5):
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(4, 3, generator=g), torch.randint(0, 2, (4,), generator=g)) for _ in range(n)]


def send(number):
    os.kill(os.getpid(), number)


class At(Callback):
    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_step_end(self, trainer):
        if trainer.step == self.step:
            for number in self.numbers:
                send(number)


def make(folder=None, *callbacks, model=None, val=None, **fields):
    torch.manual_seed(0)
    config = TrainingConfig(device="cpu", save_dir=None if folder is None else str(folder), **fields)
    return Trainer(model or nn.Linear(3, 2), data(), val, lr=1e-2, config=config, callbacks=callbacks)


@pytest.mark.parametrize("in_background", [False, True])
def test_sigterm_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, capfd, in_background):
    trainer = make(tmp_path, At(3, signal.SIGTERM), async_save=in_background)
    with pytest.raises(Terminated, match=r"stopped at step 3; saved .*step-00000003") as error:
        trainer.train(epochs=2)
    assert error.value.code == 0
    err = capfd.readouterr().err
    assert "SIGTERM: finishing this step" in err
    assert err.endswith("\nresume with: trainer.resume(), then trainer.train(epochs=2)\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    disk.verify(tmp_path / "step-00000003")
    again, whole = make(tmp_path), make()
    again.resume()
    for run in (again, whole):
        run.train(epochs=2)
    assert torch.equal(again.model.weight, whole.model.weight)


def test_a_script_may_name_its_own_way_to_go_on(tmp_path, capfd):
    trainer = make(tmp_path, At(1, signal.SIGTERM))
    trainer.resume_with = "sbatch again.sh"
    with pytest.raises(Terminated):
        trainer.train(epochs=1)
    assert capfd.readouterr().err.endswith("resume with: sbatch again.sh\n")


def test_sigterm_without_a_save_dir_is_no_success(capfd):
    with pytest.raises(Terminated) as error:
        make(None, At(2, signal.SIGTERM)).train(epochs=1)
    assert error.value.code == 143
    assert "nothing was saved" in capfd.readouterr().err


def test_sigterm_in_validation_does_not_wait_for_it(tmp_path):
    class Validating(nn.Linear):
        def forward(self, x):
            if not self.training:
                send(signal.SIGTERM)
            return super().forward(x)

    with pytest.raises(Terminated, match="stopped at step 5; saved"):
        make(tmp_path, model=Validating(3, 2), val=data()).train(epochs=1)
    again = make(tmp_path, val=data())
    again.resume()
    again.train(epochs=1)
    assert (again.step, len(again.history)) == (5, 1)


@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
def test_two_signals_in_a_save_wait_for_it(tmp_path, monkeypatch, signals):
    real = disk.save_file

    def interrupted(tensors, path, metadata=None):
        real(tensors, path, metadata=metadata)
        if "step-00000002" in str(path):
            for number in signals:
                send(number)

    monkeypatch.setattr(disk, "save_file", interrupted)
    expected = Terminated if signals[0] == signal.SIGTERM else KeyboardInterrupt
    with pytest.raises(expected, match="stopped at step 2; saved"):
        make(tmp_path, save_every_steps=1, async_save=False).train(epochs=1)
    disk.verify(tmp_path / "step-00000002")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]


def test_a_signal_in_the_last_save_is_not_lost(tmp_path, monkeypatch):
    real = disk.save_file

    def interrupted(tensors, path, metadata=None):
        real(tensors, path, metadata=metadata)
        if "step-00000005" in str(path) and path.name == disk.MODEL:
            send(signal.SIGTERM)

    monkeypatch.setattr(disk, "save_file", interrupted)
    with pytest.raises(Terminated, match="stopped at step 5; saved"):
        make(tmp_path, save_every_epochs=None, async_save=False).train(epochs=1)


def test_a_disk_that_refuses_the_last_checkpoint_is_an_error(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        make(tmp_path, At(2, signal.SIGTERM), on_save_error="continue").train(epochs=1)


def test_ctrl_c_after_sigterm_stops_at_once(tmp_path):
    class Both(nn.Linear):
        def forward(self, x):
            if self.training:
                send(signal.SIGTERM)
                send(signal.SIGINT)
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt, match="in the middle of step 1"):
        make(tmp_path, model=Both(3, 2)).train(epochs=1)


def test_a_programs_own_handler_is_left_alone(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        trainer = make(tmp_path, At(2, signal.SIGTERM))
        trainer.train(epochs=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (seen, trainer.step) == ([1], 5)


def test_another_thread_installs_nothing(tmp_path):
    trainer = make(tmp_path)
    thread = threading.Thread(target=trainer.train, kwargs={"epochs": 1})
    thread.start()
    thread.join(30)
    assert trainer.step == 5


def test_children_die_of_sigterm_as_usual():
    """A child that inherited the handler, such as one of multiprocessing, must end when it is told to."""
    with Interrupts() as interrupts:
        pid = os.fork()
        if pid == 0:
            send(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert interrupts.asked is None

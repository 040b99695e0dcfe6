"""Callbacks, early stopping, and Ctrl-C."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.train import Callback, EarlyStopping, Trainer, TrainingConfig


def data(n=5):
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(4, 3, generator=g), torch.randint(0, 2, (4,), generator=g)) for _ in range(n)]


def make(*callbacks, model=None, loader=None, val=True, **fields):
    model = nn.Linear(3, 2) if model is None else model
    config = TrainingConfig(device="cpu", **fields)
    return Trainer(
        model, data() if loader is None else loader, data(2) if val else None, 1e-2, config, callbacks=callbacks
    )


class Recorder(Callback):
    def __init__(self):
        self.events = []

    def on_train_start(self, trainer):
        self.events.append("start")

    def on_step_end(self, trainer):
        self.events.append(trainer.step)

    def on_epoch_end(self, trainer):
        self.events.append(("epoch", trainer.epoch, trainer.history[-1]["epoch"]))

    def on_train_end(self, trainer):
        self.events.append("end")


def test_hooks_are_called_in_order():
    recorder = Recorder()
    make(recorder, gradient_accumulation_steps=3).train(epochs=2)
    assert recorder.events == ["start", 1, 2, ("epoch", 1, 1), 3, 4, ("epoch", 2, 2), "end"]


@pytest.mark.parametrize("hook", ["on_train_start", "on_step_end", "on_epoch_end", "on_train_end"])
def test_an_error_names_the_callback(hook):
    def fail(self, trainer):
        raise KeyError("lost")

    broken = type("Broken", (Callback,), {hook: fail})()
    with pytest.raises(InputError, match=rf"callback Broken\.{hook} failed at step \d+: KeyError: 'lost'") as error:
        make(broken).train(epochs=1)
    assert isinstance(error.value.__cause__, KeyError)


def test_what_is_no_callback_is_refused():
    with pytest.raises(ConfigError, match="no Callback"):
        make(print)


class Scripted(Callback):
    """Puts given values into the history."""

    def __init__(self, values):
        self.values = values

    def on_epoch_end(self, trainer):
        trainer.history[-1]["val_score"] = self.values[trainer.epoch - 1]


@pytest.mark.parametrize(
    ("values", "mode", "delta", "epochs"),
    [
        ([3, 2, 2, 2, 1], "min", 0.0, 4),
        ([1, 2, 3, 4, 5], "max", 0.0, 5),
        ([1, 2, 2.05, 2.1, 3], "max", 0.2, 4),
        ([float("nan")] * 5, "min", 0.0, 2),
    ],
)
def test_early_stopping_counts_epochs_without_gain(values, mode, delta, epochs):
    trainer = make(Scripted(values), EarlyStopping(2, "val_score", mode, delta))
    report = trainer.train(epochs=5)
    assert trainer.epoch == epochs
    assert any(note.startswith("stopped early: val_score") for note in report.notes) == (epochs < 5)


def test_early_stopping_from_the_config_and_its_errors():
    trainer = make(early_stop_patience=1, early_stop_metric="val_accuracy", early_stop_mode="min", val=True)
    trainer.train(epochs=30)
    assert trainer.epoch < 30
    with pytest.raises(InputError, match=r"val_loss.*val_loader"):
        make(val=False, early_stop_patience=1).train(epochs=1)
    for arguments in ({"patience": 0}, {"patience": 1, "mode": "up"}, {"patience": 1, "min_delta": -1}):
        with pytest.raises(ConfigError, match="EarlyStopping"):
            EarlyStopping(**arguments)


def test_a_stopped_run_stays_stopped_when_resumed(tmp_path):
    values = [1, 2, 3, 4, 5, 6, 7, 8]
    fields = {"save_dir": str(tmp_path), "save_every_epochs": 1}
    first = make(Scripted(values), EarlyStopping(2, "val_score"), **fields)
    first.train(epochs=6)
    assert first.epoch == 3
    second = make(Scripted(values), EarlyStopping(2, "val_score"), **fields)
    second.resume()
    assert "stopped early" in str(second.train(epochs=6).notes)
    assert second.epoch == 3
    third = make(Scripted(values), EarlyStopping(2, "val_score"), **fields)
    third.resume(tmp_path / "step-00000010")
    assert third.callbacks[1].waited == 1


class At(Callback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, trainer):
        if trainer.step == self.step:
            self.action()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


class Interrupting(nn.Linear):
    """A model in whose forward pass Ctrl-C is pressed."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.training and self.calls == 4:
            interrupt()
        return super().forward(x)


def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(tmp_path, capfd):
    torch.manual_seed(0)
    model = Interrupting(3, 2)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = make(model=model, save_dir=str(tmp_path), val=False)
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 4; saved .*step-00000004.*trainer\.resume\(\)"):
        trainer.train(epochs=2)
    assert "finishing this step" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    again = make(save_dir=str(tmp_path), val=False)
    again.resume()
    again.train(epochs=2)
    whole = nn.Linear(3, 2)
    whole.load_state_dict(start)
    make(model=whole, val=False).train(epochs=2)
    assert torch.equal(whole.weight, again.model.weight)


def test_ctrl_c_without_a_save_dir_says_so():
    with pytest.raises(KeyboardInterrupt, match="stopped at step 2; nothing was saved"):
        make(At(2, interrupt)).train(epochs=1)


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing_half_done(tmp_path):
    class Twice(nn.Linear):
        def forward(self, x):
            if self.training and getattr(self, "armed", False):
                interrupt()
                interrupt()
            return super().forward(x)

    model = Twice(3, 2)
    arm = At(2, lambda: setattr(model, "armed", True))
    trainer = make(arm, model=model, save_dir=str(tmp_path), save_every_steps=1)
    with pytest.raises(
        KeyboardInterrupt, match=r"in the middle of step 3\. The last good checkpoint is .*step-00000002"
    ):
        trainer.train(epochs=1)
    assert max(p.name for p in tmp_path.iterdir()) == "step-00000002"
    with pytest.raises(InputError, match="did not end"):
        trainer.save()


def test_ctrl_c_in_validation_stops_at_once(tmp_path):
    class Validating(nn.Linear):
        def forward(self, x):
            if not self.training:
                interrupt()
            return super().forward(x)

    trainer = make(model=Validating(3, 2), save_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt, match="stopped at step 5; saved"):
        trainer.train(epochs=1)
    again = make(save_dir=str(tmp_path))
    again.resume()
    again.train(epochs=1)
    assert (again.step, len(again.history)) == (5, 1), "the validation is made up for"

"""Moving averages of the parameters: the formula, evaluation with them, and runs that go on exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.train import Callback, ExponentialMovingAverage, Trainer, TrainingConfig


def data(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 16, 4, generator=g)
    return [(x[i], (x[i].sum(dim=1) > 0).long()) for i in range(n)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


class Keep(Callback):
    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer):
        self.seen.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})

    on_step_end = on_train_start


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_is_its_formula(decay):
    keep = Keep()
    trainer = Trainer(net(), data(), lr=0.05, config=TrainingConfig(ema_decay=decay), callbacks=[keep])
    trainer.train(epochs=2)
    assert len(keep.seen) == 13
    expected = {n: p.double() for n, p in keep.seen[0].items()}
    for n, values in enumerate(keep.seen[1:]):
        d = min(decay, (1 + n) / (10 + n))
        expected = {k: d * expected[k] + (1 - d) * values[k].double() for k in expected}
    averages = dict(trainer.ema_model.named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(averages[name].double(), value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(averages[name], trainer.model.get_parameter(name))


def test_the_trainer_evaluates_predicts_and_exports_with_it(tmp_path):
    trainer = Trainer(net(), data(), data(2, seed=1), lr=0.1, config=TrainingConfig(ema_decay=0.99))
    trainer.train(epochs=2)
    raw = [p.detach().clone() for p in trainer.model.parameters()]
    averaged = Trainer(trainer.ema_model, data(), data(2, seed=1))
    assert not trainer.ema_model.training
    assert trainer.evaluate() == averaged.evaluate() != Trainer(trainer.model, data(), data(2, seed=1)).evaluate()
    assert trainer.history[-1]["val_loss"] == trainer.evaluate()["loss"]
    assert torch.equal(trainer.predict(data(2)), averaged.predict(data(2)))
    with trainer.averaged():
        inside = [p.detach().clone() for p in trainer.model.parameters()]
        with trainer.averaged():
            pass
    assert all(torch.equal(a, b) for a, b in zip(inside, trainer.ema_model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(raw, trainer.model.parameters()))
    with pytest.raises(RuntimeError, match="here"), trainer.averaged():
        raise RuntimeError("here")
    assert all(torch.equal(a, b) for a, b in zip(raw, trainer.model.parameters()))


def test_training_itself_is_unchanged():
    plain, with_average = (Trainer(net(), data(), lr=0.05, config=TrainingConfig(ema_decay=d)) for d in (None, 0.9))
    plain.train(epochs=1)
    with_average.train(epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), with_average.model.parameters()))


def test_a_resumed_run_is_the_same_run(tmp_path):
    def trainer(folder):
        config = TrainingConfig(ema_decay=0.99, seed=0, save_dir=str(folder), save_every_steps=4, keep_last=None)
        return Trainer(net(), data(), data(2), lr=0.05, config=config)

    whole = trainer(tmp_path / "a")
    whole.train(epochs=2)
    other = trainer(tmp_path / "b")
    other.resume(tmp_path / "a" / "step-00000008")
    before = other.evaluate()
    other.train(epochs=2)
    for a, b in ((whole.model, other.model), (whole.ema_model, other.ema_model)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert whole.history[-1]["val_loss"] == other.history[-1]["val_loss"] != before["loss"]


def test_a_new_run_begins_a_new_average():
    trainer = Trainer(net(), data(), lr=0.05, config=TrainingConfig(ema_decay=0.99))
    trainer.train(epochs=1)
    trainer.train(epochs=1)
    (average,) = (c for c in trainer.callbacks if isinstance(c, ExponentialMovingAverage))
    assert average.updates == 6


def test_half_precision_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(torch.bfloat16)
    model[0].requires_grad_(False)
    average = ExponentialMovingAverage(0.9)
    average.update(model)
    with torch.no_grad():
        model[1].weight.add_(1.0)
    average.update(model)
    assert set(average.state_dict()["average"]) == {"1.weight", "1.bias"}
    assert {v.dtype for v in average.state_dict()["average"].values()} == {torch.float32}
    with average.applied(model):
        assert model[1].weight.dtype == torch.bfloat16


def test_misuse_is_named():
    for decay in (0, 1, 1.5, "0.9", True):
        with pytest.raises(ConfigError, match="ema_decay"):
            TrainingConfig(ema_decay=decay)
        with pytest.raises(ConfigError, match="decay"):
            ExponentialMovingAverage(decay)
    with pytest.raises(InputError, match="ema_decay"):
        _ = Trainer(net(), data()).ema_model
    average = ExponentialMovingAverage()
    average.update(net())
    with pytest.raises(InputError, match="another model"):
        average.update(nn.Linear(2, 2))

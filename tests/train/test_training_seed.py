"""Seeding: same seed, same bits; and who draws from the global generators."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deepseek_r1.core import ConfigError
from deepseek_r1.train import Trainer, TrainingConfig, seed_everything
from deepseek_r1.train._rng import deterministic_kernels, preserved_rng, rng_state


def draws():
    return random.random(), float(np.random.rand()), torch.rand(3).tolist()


def test_every_generator_is_seeded():
    seed_everything(7)
    first = draws()
    assert draws() != first
    seed_everything(7)
    assert draws() == first


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "1", True])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ConfigError, match=r"2\*\*32"):
        seed_everything(seed)


def test_preserved_generators():
    seed_everything(1)
    first = draws()
    seed_everything(1)
    with preserved_rng(torch.device("cpu")):
        draws()
    assert draws() == first


def test_deterministic_kernels_are_set_back():
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def run(*, validate=True, **fields):
    seed_everything(11)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 2))
    data = TensorDataset(torch.randn(20, 5), torch.randint(0, 2, (20,)))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    val = DataLoader(data, batch_size=4, shuffle=True) if validate else None
    trainer = Trainer(model, loader, val, lr=1e-2, config=TrainingConfig(device="cpu", **fields))
    trainer.train(epochs=2)
    return torch.cat([p.flatten() for p in model.parameters()]), rng_state(torch.device("cpu"))["torch"], trainer


def test_two_runs_are_equal_to_the_bit_and_draw_equally_often():
    (a, state_a, first), (b, state_b, second) = run(), run()
    assert torch.equal(a, b)
    assert torch.equal(state_a, state_b)
    assert first.losses == second.losses
    c, _, _ = run(seed=12)
    assert not torch.equal(a, c)


def test_validation_prediction_and_progress_draw_nothing():
    a, state_a, _ = run(validate=True)
    b, state_b, trainer = run(validate=False)
    assert torch.equal(a, b)
    assert torch.equal(state_a, state_b)
    before = rng_state(torch.device("cpu"))
    trainer.predict(trainer.train_loader)
    trainer.evaluate(trainer.train_loader)
    after = rng_state(torch.device("cpu"))
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]


def test_a_seed_in_the_config_makes_runs_equal_whatever_was_drawn_before():
    results = []
    for noise in (1, 5):
        model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        nn.init.ones_(model[0].weight)
        for p in model.parameters():
            nn.init.constant_(p, 0.1)
        torch.rand(noise)
        data = TensorDataset(torch.arange(40.0).reshape(8, 5), torch.arange(8) % 2)
        loader = DataLoader(data, batch_size=2, shuffle=True)
        Trainer(model, loader, lr=1e-2, config=TrainingConfig(device="cpu", seed=4)).train(epochs=1)
        results.append(model[0].weight.detach().clone())
    assert torch.equal(*results)

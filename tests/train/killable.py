"""A training run that can be killed: run as a program by test_training_kill.py, and imported by it.

Usage: killable.py SAVE_DIR KIND KILL_AT
"""

from __future__ import annotations

import os
import random
import signal
import sys

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from deepseek_r1.train import Callback, Trainer, TrainingConfig, seed_everything

EPOCHS = 3


class Noisy(Dataset):
    """Samples with randomness of their own from all three generators."""

    def __len__(self):
        return 22

    def __getitem__(self, i):
        x = torch.linspace(-1, 1, 6) * i / 10
        return x + 0.1 * torch.randn(6) + 0.01 * random.random() + 0.01 * float(np.random.rand()), i % 3


class Kill(Callback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, trainer):
        if trainer.step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def make(save_dir, kind, kill_at=0, *, save_every_steps=1, **fields):
    seed_everything(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    options = {
        "global": {},
        "generator": {"generator": torch.Generator().manual_seed(9)},
        "workers": {"num_workers": 2},
        "persistent": {"num_workers": 1, "persistent_workers": True},
    }[kind]
    dataset = Noisy()
    if kind == "persistent":
        dataset = [(torch.linspace(-1, 1, 6) * i, i % 3) for i in range(22)]
    train = DataLoader(dataset, batch_size=4, shuffle=True, **options)
    given = {
        "gradient_accumulation_steps": 2, "micro_batch_size": 2, "schedule": "cosine", "warmup": 2,
        "clip_grad_norm": 1.0, "save_dir": str(save_dir), "save_every_steps": save_every_steps, "keep_last": None,
        "seed": 5, "device": "cpu",
    }  # fmt: skip
    config = TrainingConfig(**{**given, **fields})
    val = DataLoader(dataset, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))
    return Trainer(model, train, val, lr=1e-2, config=config, callbacks=[Kill(kill_at)])


if __name__ == "__main__":
    make(sys.argv[1], sys.argv[2], int(sys.argv[3])).train(EPOCHS)

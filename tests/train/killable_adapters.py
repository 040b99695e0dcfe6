"""A run that trains adapters, with a penalty, and can be killed: run as a program and imported by tests.

Usage: killable_adapters.py SAVE_DIR KILL_AT
"""

from __future__ import annotations

import os
import signal
import sys

import torch
from torch import nn

from deepseek_r1.lora import LoraConfig, get_peft_model
from deepseek_r1.train import Callback, ElasticWeightConsolidation, Trainer, TrainingConfig, seed_everything


class Kill(Callback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, trainer):
        if trainer.step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def make(save_dir, kill_at=0, *, old_seed=7):
    """`old_seed`: of the old data that the penalty is made of."""
    seed_everything(3)
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 3))
    config = LoraConfig(r=4, target_modules=["0"], modules_to_save=["3"], lora_dropout=0.1)
    model = get_peft_model(base, config, base_dtype="nf4")
    x = torch.randn(48, 64)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    g = torch.Generator().manual_seed(old_seed)
    old = [(torch.randn(16, 64, generator=g), torch.randint(0, 3, (16,), generator=g))]
    penalty = ElasticWeightConsolidation(model, old, strength=100.0)
    config = TrainingConfig(
        device="cpu", seed=5, threads=1, save_dir=str(save_dir), save_every_steps=1, keep_last=None, log_every=1
    )
    return Trainer(model, loader, lr=1e-2, config=config, callbacks=[Kill(kill_at)], penalties=[penalty])


if __name__ == "__main__":
    make(sys.argv[1], int(sys.argv[2])).train(2)

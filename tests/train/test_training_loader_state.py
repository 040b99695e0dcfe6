"""A run that stops in the middle of an epoch of a DSDataLoader goes on to the bit, without reading what it read."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from deepseek_r1.data import DSDataLoader, block_mask, sample_weights
from deepseek_r1.train import Trainer, TrainingConfig


class Texts(Dataset):
    def __init__(self):
        self.lengths = [1 + (5 * i) % 13 for i in range(40)]
        self.read = 0

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        self.read += 1
        ids = torch.arange(self.lengths[i]) * (i + 1) % 17
        # What the dataset draws must come back too.
        return {"input_ids": (ids + torch.randint(17, ids.shape)) % 17, "labels": ids}


class Flat(Texts):
    def __getitem__(self, i):
        self.read += 1
        return {"input_ids": torch.full((4,), i % 17), "labels": (torch.arange(4) + torch.randint(9, (4,))) % 17}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(17, 8), nn.Dropout(0.3), nn.Linear(8, 17)

    def forward(self, input_ids, sequence_ids=None, position_ids=None, attention_mask=None, labels=None):
        x = self.drop(self.embed(input_ids))
        if sequence_ids is not None:
            x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], block_mask(sequence_ids))[:, 0]
        logits = self.head(x)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        weights = sample_weights((labels != -100).long() if sequence_ids is None else sequence_ids)
        return {"loss": (losses * weights).sum(), "logits": logits}


MODES = {
    "fixed": {"batch_size": 4},
    "buckets": {"batch_size": 4, "batching": "buckets", "multiple": 4},
    "packed": {"batch_size": 2, "batching": "packed", "max_length": 16},
}


def _trainer(mode, folder, **more):
    torch.manual_seed(3)
    data = Flat() if mode == "fixed" else Texts()
    loader = DSDataLoader(data, shuffle=True, **MODES[mode], **more)
    config = TrainingConfig(
        save_dir=str(folder), seed=0, threads=1, gradient_accumulation_steps=2, save_every_steps=1, keep_last=None
    )
    return Trainer(Net(), loader, lr=0.05, config=config)


def _weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("mode", MODES)
def test_resumes_to_the_bit_in_the_middle_of_an_epoch(tmp_path, mode, seed, workers):
    whole = _trainer(mode, tmp_path / "whole", seed=seed, num_workers=workers)
    whole.train(epochs=3)
    steps = whole.step // 3
    assert steps >= 3
    # In the middle of the second epoch, and after its last step, when it has not ended yet.
    for step in (steps + 2, 2 * steps):
        again = _trainer(mode, tmp_path / f"again-{step}", seed=seed, num_workers=workers)
        torch.rand(7)
        again.resume(tmp_path / "whole" / f"step-{step:08d}")
        assert again.step == step
        again.train(epochs=3)
        assert again.step == whole.step
        assert torch.equal(_weights(again), _weights(whole))


@pytest.mark.tiny
def test_what_was_read_is_not_read_again(tmp_path):
    whole = _trainer("fixed", tmp_path / "a", seed=4)
    whole.train(epochs=1)
    again = _trainer("fixed", tmp_path / "b", seed=4)
    again.resume(tmp_path / "a" / "step-00000004")
    again.train(epochs=1)
    assert whole.train_loader.dataset.read == 40
    assert again.train_loader.dataset.read == 8


@pytest.mark.tiny
def test_evaluating_on_the_same_loader_in_between_changes_nothing(tmp_path):
    from deepseek_r1.train import Callback

    class Look(Callback):
        def on_epoch_end(self, trainer):
            trainer.evaluate(trainer.train_loader)
            trainer.save(tmp_path / f"epoch-{trainer.epoch}")

    whole = _trainer("packed", tmp_path / "a", seed=4)
    whole.callbacks = [Look()]
    whole.train(epochs=3)
    again = _trainer("packed", tmp_path / "b", seed=4)
    again.callbacks = [Look()]
    again.resume(tmp_path / "epoch-1")
    again.train(epochs=3)
    assert torch.equal(_weights(again), _weights(whole))

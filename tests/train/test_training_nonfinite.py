"""A loss or gradient that is no finite number stops the run, is placed, and spoils nothing that was saved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from deepseek_r1.core import NonFiniteLossError
from deepseek_r1.train import Trainer, TrainingConfig


class Log(nn.Module):
    def forward(self, x):
        return torch.log(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid())
        self.log = Log()

    def forward(self, x):
        return self.log(self.inner(x) - (x.abs().amax() > 50).float())


def data(bad_batch=None, value=100.0, batches=6):
    g = torch.Generator().manual_seed(0)
    made = [(torch.rand(4, 3, generator=g), torch.randint(0, 2, (4,), generator=g)) for _ in range(batches)]
    if bad_batch is not None:
        made[bad_batch][0][2, 1] = value
    return made


def trainer(model, loader, tmp_path=None, **options):
    fields = {} if tmp_path is None else {"save_dir": str(tmp_path), "save_every_steps": 2}
    fields.update(options.pop("fields", {}))
    return Trainer(model, loader, lr=1e-2, config=TrainingConfig(device="cpu", **fields), **options)


def test_the_layer_that_went_first_is_named_and_the_last_checkpoint_stands(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Linear(3, 2))
    run = trainer(model, data(bad_batch=4), tmp_path)
    with pytest.raises(NonFiniteLossError) as error:
        run.train(epochs=2)
    text = str(error.value)
    assert "step 5 (epoch 1)" in text
    assert "layer '0.log' (Log)" in text
    assert str(tmp_path / "step-00000004") in text
    assert all(torch.isfinite(p).all() for p in model.parameters()), "the bad update was not applied"
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())

    again = trainer(nn.Sequential(Block(), nn.Linear(3, 2)), data(), tmp_path)
    assert again.resume() == tmp_path / "step-00000004"
    again.train(epochs=2)
    assert again.step == 12


def test_a_gradient_is_named_where_the_forward_is_finite():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False))
    for p in model.parameters():
        nn.init.zeros_(p)
    run = trainer(model, data(), loss=lambda output, _: output.abs().sqrt().mean())
    with pytest.raises(NonFiniteLossError, match=r"step 1 .*gradient of parameter '1.weight'.*no save_dir"):
        run.train(epochs=1)


def test_bad_data_are_told_from_bad_layers():
    run = trainer(nn.Linear(3, 2), data(bad_batch=1, value=math.nan))
    with pytest.raises(NonFiniteLossError, match=r"step 2 .*batch's inputs hold non-finite"):
        run.train(epochs=1)


def test_a_loss_that_is_bad_by_itself_is_named():
    def loss(output, labels):
        return output.sum() * math.inf

    with pytest.raises(NonFiniteLossError, match="every layer's output is finite, the loss itself"):
        trainer(nn.Linear(3, 2), data(), loss=loss).train(epochs=1)


def test_bad_weights_are_named():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.bias[0] = math.inf
    with pytest.raises(NonFiniteLossError, match="parameter 'bias' holds non-finite numbers before the step"):
        trainer(model, data()).train(epochs=1)


def test_the_right_micro_batch_is_looked_at():
    run = trainer(
        nn.Sequential(Block(), nn.Linear(3, 2)), data(bad_batch=3),
        fields={"micro_batch_size": 1, "gradient_accumulation_steps": 2},
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match=r"step 2 .*'0.log'"):
        run.train(epochs=1)


def test_fp16_that_never_finds_a_scale_stops(tmp_path):
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    run = trainer(
        model, data(batches=40), loss=lambda output, _: output.abs().sqrt().mean(),
        fields={"precision": "fp16", "log_every": 1},
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match="gradient of parameter 'weight'"):
        run.train(epochs=1)
    assert run.step == 17, "65536 was halved until it was below one"

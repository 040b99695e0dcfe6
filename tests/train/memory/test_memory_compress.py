"""Saved tensors in 8 bits: how far off, how few bytes, and only where asked for."""

import pytest
import torch
from torch import nn

from deepseek_r1.core import ConfigError
from deepseek_r1.train import MemoryPlanner, Trainer, TrainingConfig, plan_memory
from deepseek_r1.train.memory._compress import GROUP, Levels, compressed

from .models_for_memory import Transformer, stack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (3, 5, 7, 41), (4097,)])
def test_every_number_is_within_half_a_level(shape, dtype):
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[-1])).to(dtype)
    found = Levels(x).tensor()
    assert found.shape == x.shape
    assert found.dtype == dtype
    assert found.stride() == x.stride()
    rows = torch.nn.functional.pad(x.float().flatten(), (0, -x.numel() % GROUP), value=x.float().flatten()[-1])
    rows = rows.reshape(-1, GROUP)
    step = (rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)) / 255
    off = torch.nn.functional.pad((found.float() - x.float()).flatten(), (0, -x.numel() % GROUP)).reshape(-1, GROUP)
    slack = rows.abs() * torch.finfo(dtype).eps
    assert (off.abs() <= 0.501 * step + slack + 1e-30).all()


def test_layouts_and_constants_come_back():
    for x in (
        torch.randn(4, 8, 16, 16).contiguous(memory_format=torch.channels_last),
        torch.randn(64, 128).t(),
        torch.full((80, 80), 3.25),
    ):
        found = Levels(x).tensor()
        assert found.stride() == x.stride()
        assert (found - x).abs().max() <= 0.501 * (x.max() - x.min()) / 255
    assert torch.equal(Levels(torch.full((80, 80), 3.25)).tensor(), torch.full((80, 80), 3.25))


def test_a_tensor_that_two_operators_save_is_stored_once():
    made = []
    original = Levels.__init__

    def counted(self, tensor):
        made.append(tensor.shape)
        original(self, tensor)

    layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])
    x = torch.randn(128, 64, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Levels, "__init__", counted)
        y = compressed(lambda v: layers[0](v) + layers[1](v), (x,), {})
    assert made == [torch.Size([128, 64])]
    y.sum().backward()
    assert torch.allclose(layers[0].weight.grad, x.sum(0).expand(64, 64), atol=1.0)


def test_a_plan_compresses_only_where_asked_and_says_so():
    torch.manual_seed(0)
    # Few numbers to a weight: the activations are what counts, and computing them is dear.
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)) for _ in range(6)))
    x = torch.randn(2048, 256)
    plain = MemoryPlanner(model, (x, x))
    planner = MemoryPlanner(model, (x, x), compress=True)
    block = planner.profile.chain.blocks[2]
    choices = {choice.name: choice for choice in block.choices}
    assert "compress" not in {choice.name for choice in plain.profile.chain.blocks[2].choices}
    # The input is stored in 8 bits as well, and freed.
    stored = (choices["keep"].held + block.boundary) / 4 - block.boundary
    assert choices["compress"].held == pytest.approx(stored, rel=0.1)
    limit = planner.alive_bytes + 0.75 * (planner.unconstrained_bytes - planner.alive_bytes)
    plan = planner.plan(limit / 1e9)
    assert plan.measured_peak_bytes <= limit
    if any(block.action == "compress" for block in plan.blocks):
        assert "gradients are rounded" in str(plan.report)
    with plan.applied(model):
        model(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradients_are_near_and_training_learns():
    torch.manual_seed(0)
    model = Transformer()
    for block in model.blocks:
        block.mlp[4].p = 0.0
    x = torch.randint(0, 40, (16, 24))

    def gradients(run):
        model.zero_grad()
        torch.manual_seed(1)
        nn.functional.cross_entropy(run(x), x).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact = gradients(model)
    near = gradients(lambda ids: compressed(model, (ids,), {}))
    assert not torch.equal(exact, near)
    assert (exact - near).norm() < 0.05 * exact.norm()


def test_the_trainer_takes_it_and_refuses_it_without_a_limit(monkeypatch):
    monkeypatch.delenv("R1_MEMORY_OPTIMIZER", raising=False)
    with pytest.raises(ConfigError, match="memory_gb"):
        TrainingConfig(compress_activations=True)
    with pytest.raises(ConfigError, match="True or False"):
        TrainingConfig(compress_activations="yes", memory_gb=1)
    torch.manual_seed(0)
    x, y = torch.randn(512, 32), torch.randn(512, 1)
    model = stack()
    limit = plan_memory(model, (x, y), compress=True, budget_gb=1).minimum_bytes * 1.2 / 1e9
    config = TrainingConfig(device="cpu", memory_gb=limit, compress_activations=True)
    trainer = Trainer(model, [(x, y)] * 3, lr=1e-2, config=config)
    trainer.train(epochs=2)
    assert trainer.history[-1]["train_loss"] < trainer.history[0]["train_loss"]

"""Plans on a GPU: the allocator's own peak, offloading, half precision."""

import pytest
import torch

from deepseek_r1.train import MemoryPlanner, Trainer, TrainingConfig
from deepseek_r1.train.memory._offload import Offloader

from .models_for_memory import ResNet, Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("offload", [False, True])
def test_the_allocators_peak_keeps_the_promise(precision, offload):
    torch.manual_seed(0)
    model = Transformer(blocks=8, d=256).cuda()
    ids = torch.randint(0, 40, (32, 256), device="cuda")
    planner = MemoryPlanner(model, (ids, ids), precision=precision, offload=offload)
    low, high, alive = planner.minimum_bytes, planner.unconstrained_bytes, planner.alive_bytes
    peaks = []
    for share in (0.35, 0.5, 0.7, 1.0):
        limit = max(alive + share * (high - alive), low * 1.001)
        plan = planner.plan(limit / 1e9)
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        with plan.applied(model):
            planner.workload.run()
        peaks.append(torch.cuda.max_memory_allocated())
        assert peaks[-1] <= limit
        assert max(peaks[-1], alive) == pytest.approx(plan.predicted_peak_bytes, rel=0.02)
    assert peaks == sorted(peaks)


def test_recomputed_dropout_and_statistics_on_the_device():
    torch.manual_seed(0)
    for model, x, y in [
        (Transformer().cuda(), torch.randint(0, 40, (8, 24)).cuda(), torch.randint(0, 40, (8, 24)).cuda()),
        (ResNet().cuda(), torch.randn(8, 3, 16, 16).cuda(), torch.randint(0, 10, (8,)).cuda()),
    ]:
        planner = MemoryPlanner(model, (x, y), offload=False)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        found = []
        for limit in (planner.unconstrained_bytes, planner.minimum_bytes):
            model.load_state_dict(state)
            model.zero_grad()
            with planner.plan(limit * 1.01 / 1e9).applied(model):
                torch.manual_seed(1)
                planner.workload.run()
            found.append([*(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


def test_offloaded_tensors_leave_the_device_and_come_back():
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.GELU()).cuda() for _ in range(6)]
    x = torch.randn(4096, 1024, device="cuda")

    def run(call):
        for layer in layers:
            layer.zero_grad()
        h = x
        for layer in layers:
            h = call(layer, h)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        h.sum().backward()
        return held, [p.grad.clone() for layer in layers for p in layer.parameters()]

    offloader = Offloader()
    plain, expected = run(lambda layer, h: layer(h))
    less, found = run(lambda layer, h: offloader.call(layer, (h,), {}))
    assert less < 0.6 * plain
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_trainer_stays_below_its_limit_from_the_first_step():
    torch.manual_seed(0)
    model = Transformer(blocks=8, d=256)
    ids = torch.randint(0, 40, (32, 256))
    free = Trainer(model, [(ids, ids)] * 2, config=TrainingConfig(device="cuda", compile=False, cuda_graph=False))
    torch.cuda.reset_peak_memory_stats()
    free.train(epochs=1)
    limit = 0.7 * torch.cuda.max_memory_allocated()
    del free
    torch.cuda.empty_cache()
    trainer = Trainer(
        model, [(ids, ids)] * 2, config=TrainingConfig(device="cuda", memory_gb=limit / 1e9, compile=False)
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train(epochs=1)
    assert torch.cuda.max_memory_allocated() <= limit


class Perceptron(torch.nn.Module):
    """A block without random numbers, whose step can be recorded."""

    def __init__(self, d):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(d), torch.nn.Linear(d, 4 * d), torch.nn.Linear(4 * d, d)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("compile", [False, "blocks"])
def test_steps_under_a_plan_are_recorded_and_keep_the_promise(compile):
    batches = [(torch.randn(4096, 256), torch.randn(4096, 256)) for _ in range(6)]

    def trained(**settings):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(Perceptron(256) for _ in range(8)))
        config = TrainingConfig(device="cuda", precision="bf16", compile=compile, log_every=1, **settings)
        trainer = Trainer(model, batches, lr=1e-3, config=config)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        report = trainer.train(epochs=1)
        return torch.cuda.max_memory_allocated(), [p.detach().clone() for p in model.parameters()], str(report)

    everything, expected, _ = trained()
    limit = 0.7 * everything
    peak, found, report = trained(memory_gb=limit / 1e9)
    assert peak <= limit
    assert "whole steps, for 1 shape(s)" in report
    assert all(torch.allclose(a, b, rtol=0.02, atol=2e-3) for a, b in zip(expected, found, strict=True))

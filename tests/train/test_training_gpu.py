"""What is different on a GPU: the late verdict, device-side skipping, half precision, the device's generator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import deepseek_r1 as dr1
from deepseek_r1.core import NonFiniteLossError
from deepseek_r1.train import Callback, Trainer, TrainingConfig
from deepseek_r1.train._logs import NAME, read_lines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What torch 2.11 compiles with says so of itself when it is imported.
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))


def batches(n=20, bad=None):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 32, 4, generator=g)
    if bad is not None:
        x[bad, 3, 1] = math.inf
    return [(x[i], (x[i].sum(dim=1) > 0).long()) for i in range(n)]


def weights(model):
    return [p.detach().cpu().clone() for p in model.parameters()]


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16"])
def test_training_learns_at_each_precision(precision):
    trainer = Trainer(net(), batches(), batches(4), lr=1e-2, config=TrainingConfig(precision=precision))
    report = trainer.train(epochs=4)
    assert report.facts["device"].startswith("cuda")
    assert not next(trainer.model.parameters()).is_cuda
    assert next(trainer.model.parameters()).dtype == torch.float32
    assert report["val_accuracy"].after > 0.9
    assert trainer.predict(batches(2)).device.type == "cpu"
    assert precision != "auto" or trainer.config.precision in ("bf16", "fp16")


def test_a_model_is_afterwards_where_it_was(tmp_path):
    """So that batches on the CPU go on to serve `quantize` and `optimize`; a run is resumed all the same."""
    runs = []
    for folder in (None, str(tmp_path)):
        torch.manual_seed(0)
        model = net()
        first = next(model.parameters())
        trainer = Trainer(model, batches(), lr=1e-2, config=TrainingConfig(precision="fp32", save_dir=folder, seed=0))
        if folder:
            trainer.train(epochs=1)
            model = net()
            first = next(model.parameters())
            trainer = Trainer(model, batches(), lr=1e-2, config=trainer.config)
            trainer.resume()
        trainer.train(epochs=2)
        assert next(model.parameters()) is first
        assert first.device.type == "cpu"
        assert all(s["exp_avg"].is_cuda for s in trainer.optimizer.state.values())
        runs.append(weights(model))
    for one, other in zip(*runs):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert dr1.quantize(model, dataset=batches()).precision == "int8"


class Keep(Callback):
    """Keeps the weights after every step (the copy waits for the device)."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, trainer):
        self.seen.append(weights(trainer.model))


@pytest.mark.parametrize("bad", [7, 19])
@pytest.mark.parametrize(
    "optimizer", [None, torch.optim.SGD, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True)]
)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_bad_step_is_never_applied(bad, optimizer, clip):
    keep = Keep()
    config = TrainingConfig(precision="fp32", clip_grad_norm=clip)
    trainer = Trainer(net(), batches(bad=bad), lr=1e-2, config=config, optimizer=optimizer, callbacks=[keep])
    with pytest.raises(NonFiniteLossError, match=rf"step {bad + 1} \(epoch 1\).*batch's inputs hold non-finite"):
        trainer.train(epochs=1)
    good = keep.seen[bad - 1]
    assert all(torch.equal(a, b) for a, b in zip(good, weights(trainer.model)))


def test_the_log_has_the_norms_of_steps_that_the_host_only_starts(tmp_path):
    found = {}
    for name, fields in (("plain", {"cuda_graph": False, "compile": False}), ("recorded", {})):
        config = TrainingConfig(
            precision="fp32", clip_grad_norm=0.5, log_dir=str(tmp_path / name), log_every=2, **fields
        )
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
        Trainer(model, batches(), lr=1e-2, config=config).train(epochs=2)
        entries = [e for e in read_lines(tmp_path / name / NAME) if e["kind"] == "step"]
        found[name] = {e["step"]: e["grad_norm"] for e in entries if e["step"] % 2 == 0}
    assert found["recorded"] == pytest.approx(found["plain"], rel=1e-3)
    assert len(found["plain"]) > 4


def test_a_bad_layer_is_named_although_the_verdict_is_late(tmp_path):
    class Log(nn.Module):
        def forward(self, x):
            return torch.log(x)

    model = nn.Sequential(nn.Identity(), Log(), nn.Linear(4, 2))
    data = [(x.abs() + 0.1, y) for x, y in batches()]
    data[5][0][0, 0] = -1.0
    config = TrainingConfig(precision="fp32", save_dir=str(tmp_path), save_every_steps=1)
    with pytest.raises(NonFiniteLossError, match=r"step 6 .*layer '1' \(Log\).*step-00000005"):
        Trainer(model, data, lr=1e-2, config=config).train(epochs=1)
    assert max(p.name for p in tmp_path.iterdir()) == "step-00000005"


def test_resuming_is_exact_with_deterministic_kernels(tmp_path):
    x = torch.randn(60, 4)
    data = TensorDataset(x, (x.sum(dim=1) > 0).long())

    def make(folder):
        config = TrainingConfig(save_dir=str(folder), save_every_steps=1, keep_last=None, seed=1, deterministic=True)
        return Trainer(net(), DataLoader(data, batch_size=8, shuffle=True), lr=1e-2, config=config)

    whole = make(tmp_path / "a")
    whole.train(epochs=2)
    resumed = make(tmp_path / "b")
    torch.cuda.manual_seed(99)
    resumed.resume(tmp_path / "a" / "step-00000005")
    resumed.train(epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(resumed.model)))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_does_not_wait_for_the_device():
    trainer = Trainer(net(), [(x.pin_memory(), y.pin_memory()) for x, y in batches()], config=TrainingConfig())
    trainer.train(epochs=1)
    window = [tuple(t.pin_memory() for t in batches(1)[0])]
    trainer.model.to(trainer.device).train()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer._stepper.step(window, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer._stepper.settle()


class Times(nn.Module):
    """A network of repeated blocks without dropout, which can be made to wait for the GPU."""

    def __init__(self, waits=False):
        super().__init__()
        torch.manual_seed(0)
        block = lambda: nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))  # noqa: E731
        self.blocks, self.head, self.waits = nn.Sequential(*[block() for _ in range(4)]), nn.Linear(16, 2), waits

    def forward(self, x):
        if self.waits and not torch.compiler.is_compiling() and bool(x.sum() > 1e9):
            x = x + 1
        return self.head(self.blocks(x))


def wide(n=12, size=32, bad=None):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, size, 16, generator=g)
    if bad is not None:
        x[bad, 3, 1] = math.nan
    return [(x[i], (x[i].sum(dim=1) > 0).long()) for i in range(n)]


def trained(data, epochs=2, model=None, **options):
    model = model or Times()
    config = TrainingConfig(precision="fp32", log_every=1, seed=0, **options)
    trainer = Trainer(model, data, lr=1e-2, config=config)
    return trainer, trainer.train(epochs=epochs)


def test_recorded_and_compiled_steps_are_the_eager_ones():
    data = wide() + wide(1, size=7)
    for extra in ({}, {"clip_grad_norm": 0.1}, {"schedule": "cosine", "warmup": 5}, {"gradient_accumulation_steps": 2}):
        mine, report = trained(data, **extra)
        plain, _ = trained(data, compile=False, cuda_graph=False, **extra)
        assert mine.config.compile == "blocks"
        assert any("whole steps, for 1 shape" in note for note in report.notes)
        torch.testing.assert_close([v for _, v in mine.losses], [v for _, v in plain.losses], rtol=1e-4, atol=1e-5)
        for one, other in zip(weights(mine.model), weights(plain.model)):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert all(isinstance(g["lr"], float) and not g["capturable"] for g in mine.optimizer.param_groups)


def test_a_bad_step_in_a_recorded_run_is_never_applied():
    for bad in (1, 2, 3, 8, 11):
        good, _ = trained(wide(bad), epochs=1)
        model = Times()
        with pytest.raises(NonFiniteLossError, match=rf"step {bad + 1} .*batch's inputs"):
            trained(wide(bad=bad), epochs=1, model=model)
        for one, other in zip(weights(model), weights(good.model)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_step_that_waits_is_compiled_as_a_whole_and_else_not_recorded():
    mine, report = trained(wide(), model=Times(waits=True))
    assert any("compiled as a whole" in note and "whole steps, for 1" in note for note in report.notes)
    given, report = trained(wide(), model=Times(waits=True), compile=False)
    assert any("cuda_graph: not used: the step waits for the GPU, at" in note for note in report.notes)
    torch.testing.assert_close([v for _, v in mine.losses], [v for _, v in given.losses], rtol=1e-4, atol=1e-5)


def test_a_loader_pins_batches_while_a_step_is_recorded():
    data = TensorDataset(torch.randn(4096, 16), torch.randint(0, 2, (4096,)))
    loader = DataLoader(data, 32, num_workers=2, pin_memory=True)
    _, report = trained(loader, epochs=1)
    assert any("whole steps, for 1 shape" in note for note in report.notes)


def test_a_recorded_run_goes_on_after_a_checkpoint(tmp_path):
    whole, _ = trained(wide(), epochs=3)
    first = Trainer(
        Times(), wide(), lr=1e-2,
        config=TrainingConfig(precision="fp32", log_every=1, seed=0, save_dir=str(tmp_path), save_every_steps=7),
    )  # fmt: skip

    class Stop(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 19:
                trainer.stop("enough")

    first.callbacks.append(Stop())
    first.train(epochs=3)
    second = Trainer(Times(), wide(), lr=1e-2, config=first.config)
    # The one that was written when the run was stopped says so, and ends there.
    second.resume(tmp_path / "step-00000014")
    second.train(epochs=3)
    torch.testing.assert_close([v for _, v in second.losses], [v for _, v in whole.losses], rtol=1e-4, atol=1e-5)


def test_memory_is_free_after_a_run():
    before = torch.cuda.memory_allocated()
    model = Times()
    trainer, _ = trained(wide(size=512), model=model)
    del trainer
    assert torch.cuda.memory_allocated() - before < 2**20


def test_what_a_callback_freezes_is_frozen_in_recorded_steps():
    class Freeze(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 8:
                trainer.model[0].requires_grad_(False)
                self.weight = trainer.model[0].weight.detach().clone()

    freeze, model = Freeze(), net()
    config = TrainingConfig(precision="fp32", compile=False)
    report = Trainer(model, batches(), lr=1e-2, config=config, callbacks=[freeze]).train(epochs=1)
    assert any("whole steps, for 1 shape(s)" in note for note in report.notes)
    assert torch.equal(model[0].weight.cpu(), freeze.weight.cpu())


def test_steps_that_draw_on_the_host_are_not_recorded():
    class LayerDrop(nn.Linear):
        def forward(self, x):
            return x if torch.rand(()) < 0.5 else super().forward(x)

    model = nn.Sequential(nn.Linear(4, 8), LayerDrop(8, 8), nn.Linear(8, 2))
    report = Trainer(model, batches(), lr=1e-2, config=TrainingConfig(compile=False)).train(epochs=1)
    assert any("not used: the step draws from torch's generator" in note for note in report.notes)

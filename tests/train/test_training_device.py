"""Steps that the host only starts: what a GPU runs, here on the CPU with a stand-in for its graphs."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepseek_r1 import TrainingConfig
from deepseek_r1.core import ConfigError
from deepseek_r1.lora import LoraConfig, get_peft_model
from deepseek_r1.models import ResNet, ResNetConfig
from deepseek_r1.train import Callback, Objective, Trainer, resolve, train_step
from deepseek_r1.train._blocks import block_runs, compiled, share_in_blocks
from deepseek_r1.train._config import _choose_compile
from deepseek_r1.train._device_run import DeviceRates
from deepseek_r1.train._device_step import Graphs, device_step, signature
from deepseek_r1.train._logs import NAME, read_lines

CPU = torch.device("cpu")
LORA = LoraConfig(r=2, target_modules="all-linear")


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def _window(seed: int, size: int = 6) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator))]


def _runner(model: nn.Module, clip: float | None = None) -> tuple[Callable[[list[Any]], Any], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    objective, bad = Objective(model), torch.zeros(())

    def run(window: list[Any]) -> Any:
        return device_step(
            model, window, optimizer, objective, bad,
            device=CPU, precision="fp32", micro_batch_size=None, clip_grad_norm=clip,
        )  # fmt: skip

    return run, bad


def _parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("clip", [None, 0.05, 100.0])
def test_a_started_step_is_the_plain_step(clip: float | None) -> None:
    mine, plain = _net(), _net()
    run, bad = _runner(mine, clip)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    objective = Objective(plain)
    for seed in range(5):
        loss, _, norm = run(_window(seed))
        expected = train_step(plain, _window(seed), optimizer, objective, clip_grad_norm=clip)
        torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-6)
        if clip is not None:
            torch.testing.assert_close(norm, expected.grad_norm, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(_parameters(mine), _parameters(plain), rtol=1e-5, atol=1e-6)
    assert not bool(bad)


def test_a_bad_step_and_those_behind_it_change_nothing_until_it_was_read() -> None:
    model = _net()
    run, bad = _runner(model)
    run(_window(0))
    before = _parameters(model)
    spoilt = _window(1)
    spoilt[0][0][2, 1] = float("nan")
    run(spoilt)
    run(_window(2))
    assert bool(bad)
    torch.testing.assert_close(_parameters(model), before, rtol=0, atol=0)
    bad.zero_()
    run(_window(3))
    assert not torch.equal(_parameters(model)[0], before[0])


class _Recorder:
    """Like a CUDA graph: does nothing while it records, and gives its results in the same tensors ever after."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.replays = fails, 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        results = tuple(torch.full((), torch.nan) for _ in range(3))

        def again() -> None:
            self.replays += 1
            for mine, new in zip(results, function(), strict=True):
                mine.copy_(new)

        return again, results


def test_recorded_steps_are_the_same_steps() -> None:
    model, plain = _net(), _net()
    run, _ = _runner(model)
    by_hand, _ = _runner(plain)
    recorder = _Recorder()
    graphs = Graphs(run, recorder)
    sizes = [6, 6, 6, 6, 2, 6, 3, 6, 6, 3, 3, 3]
    losses = [float(graphs.step(_window(seed, size))[0]) for seed, size in enumerate(sizes)]
    assert losses == [float(by_hand(_window(seed, size))[0]) for seed, size in enumerate(sizes)]
    torch.testing.assert_close(_parameters(model), _parameters(plain), rtol=0, atol=0)
    # Two steps of a shape are run before it is recorded; the size that came once is not.
    assert (graphs.recorded, recorder.replays, graphs.refused) == (2, 7, "")


def test_the_losses_and_norms_of_replays_do_not_overwrite_each_other() -> None:
    run, _ = _runner(_net())
    graphs = Graphs(run, _Recorder())
    outcomes = [graphs.step(_window(0)) for _ in range(5)]
    losses, norms = ([float(outcome[i]) for outcome in outcomes] for i in (0, 2))
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(set(norms)) == 5


class _StartedRun:
    """In the place of a `DeviceRun`: the same steps, recorded too, without streams."""

    def __init__(self, stepper: Any) -> None:
        self._bad = torch.zeros(())
        self.graphs = Graphs(lambda window: stepper._started(window, self._bad), _Recorder())

    def step(self, number: int, window: list[Any]) -> tuple[Tensor, Tensor, None]:
        loss, _, norm = self.graphs.step(window)
        return loss, norm, None

    def settle(self) -> None: ...

    def forget(self) -> None: ...

    def close(self) -> None: ...


class _Started(Callback):
    def on_train_start(self, trainer: Any) -> None:
        trainer._stepper._run = _StartedRun(trainer._stepper)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_log_has_the_norms_of_started_steps(tmp_path: Path, clip: float | None) -> None:
    found = {}
    for name, callbacks in (("plain", []), ("started", [_Started()])):
        model = _net()
        config = TrainingConfig(device="cpu", clip_grad_norm=clip, log_dir=str(tmp_path / name), log_every=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        data = [_window(seed)[0] for seed in range(8)]
        report = Trainer(model, data, config=config, optimizer=optimizer, callbacks=callbacks).train(epochs=1)
        assert any("whole steps, for 1 shape" in note for note in report.notes) == (name == "started")
        found[name] = [e.get("grad_norm") for e in read_lines(tmp_path / name / NAME) if e["kind"] == "step"]
    assert len(found["started"]) == 4
    if clip is None:
        assert found["started"] == [None] * 4
    else:
        assert found["started"] == pytest.approx(found["plain"], rel=1e-5)


def test_what_cannot_be_recorded_is_run() -> None:
    model, plain = _net(), _net()
    run, _ = _runner(model)
    by_hand, _ = _runner(plain)
    graphs = Graphs(run, _Recorder(fails=True))
    for seed in range(4):
        assert float(graphs.step(_window(seed))[0]) == float(by_hand(_window(seed))[0])
    assert graphs.refused == (
        "the step could not be recorded: RuntimeError: operation not permitted when stream is capturing"
    )
    assert graphs.recorded == 0


@pytest.mark.parametrize(
    ("draw", "whose"),
    [(random.random, "python's"), (np.random.rand, "numpy's"), (lambda: float(torch.rand(())), "torch's")],
)
def test_steps_that_draw_on_the_host_are_not_recorded(draw: Callable[[], float], whose: str) -> None:
    class LayerDrop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x if draw() < 0.5 else self.inner(x)

    run, _ = _runner(nn.Sequential(LayerDrop(), nn.Linear(4, 3)))
    graphs = Graphs(run, _Recorder())
    for seed in range(4):
        graphs.step(_window(seed))
    assert f"draws from {whose} generator on the CPU" in graphs.refused
    assert (graphs.recorded, graphs.waits) == (0, False)


class _Frozen(_Recorder):
    """A graph that goes on with what Python had decided when it was recorded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._dropout = model[1]

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        p, training = self._dropout.p, self._dropout.training
        again, results = super().__call__(function)

        def frozen() -> None:
            now = self._dropout.p, self._dropout.training
            self._dropout.p, self._dropout.training = p, training
            again()
            self._dropout.p, self._dropout.training = now

        return frozen, results


class _Changes(_Started):
    """Records, and does something to the Trainer after some steps."""

    def __init__(self, records: bool, change: Callable[[Any], None], at: Callable[[int], bool]) -> None:
        self.records, self.change, self.at = records, change, at

    def on_train_start(self, trainer: Any) -> None:
        if self.records:
            super().on_train_start(trainer)
            trainer._stepper._run.graphs._record = _Frozen(trainer.model)

    def on_step_end(self, trainer: Any) -> None:
        if self.at(trainer.step):
            self.change(trainer)


def _no_dropout(trainer: Any) -> None:
    trainer.model[1].p = 0.0


def _dropout_off(trainer: Any) -> None:
    trainer.model[1].eval()


def _changing(records: bool, change: Callable[[Any], None], at: Callable[[int], bool]) -> tuple[Trainer, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    data = [_window(seed)[0] for seed in range(12)]
    trainer = Trainer(
        model, data, config=TrainingConfig(device="cpu", seed=0), optimizer=optimizer,
        callbacks=[_Changes(records, change, at)],
    )  # fmt: skip
    return trainer, trainer.train(epochs=1)


@pytest.fixture
def _drawing_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU dropout draws there.
    monkeypatch.setattr("deepseek_r1.train._device_step.drawn_on_host", lambda function: (function(), ""))


@pytest.mark.usefixtures("_drawing_is_fine")
@pytest.mark.parametrize("change", [_no_dropout, _dropout_off])
def test_what_a_callback_changes_reaches_recorded_steps(change: Callable[[Any], None]) -> None:
    plain, _ = _changing(False, change, lambda step: step == 6)
    recorded, report = _changing(True, change, lambda step: step == 6)
    torch.testing.assert_close(_parameters(recorded.model), _parameters(plain.model), rtol=1e-5, atol=1e-6)
    assert any("whole steps, for 1 shape(s)" in note for note in report.notes)


@pytest.mark.usefixtures("_drawing_is_fine")
def test_what_changes_all_the_time_is_not_recorded() -> None:
    def decay(trainer: Any) -> None:
        trainer.optimizer.param_groups[0]["weight_decay"] *= 0.9

    _, report = _changing(True, decay, lambda step: True)
    assert any("not used: callbacks change options of the optimizer" in note for note in report.notes)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_groups_that_a_callback_adds_are_trained_on_their_own_rate(schedule: str) -> None:
    class Unfreeze(Callback):
        def on_step_end(self, trainer: Any) -> None:
            if trainer.step == 2:
                trainer.model[2].requires_grad_(True)
                trainer.optimizer.add_param_group({"params": list(trainer.model[2].parameters()), "lr": 0.5})

    model = _net()
    model[2].requires_grad_(False)
    before = model[2].weight.detach().clone()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    config = TrainingConfig(device="cpu", schedule=schedule)
    data = [_window(seed)[0] for seed in range(4)]
    trainer = Trainer(model, data, optimizer=optimizer, config=config, callbacks=[Unfreeze()])
    trainer.train(epochs=1)
    assert trainer._stepper.base_lrs == [0.1, 0.5]
    assert not torch.equal(model[2].weight, before)
    first, added = (group["lr"] for group in optimizer.param_groups)
    assert added == pytest.approx(5 * first)


def test_rates_on_the_device_take_added_groups_in() -> None:
    first, second = _net(), _net()
    optimizer = torch.optim.AdamW(first.parameters(), lr=0.1)
    rates = DeviceRates(optimizer, CPU)
    optimizer.add_param_group({"params": list(second.parameters()), "lr": 0.3})
    rates.take()
    held = [group["lr"] for group in optimizer.param_groups]
    assert all(isinstance(rate, Tensor) for rate in held)
    assert [group["capturable"] for group in optimizer.param_groups] == [True, True]
    optimizer.param_groups[1]["lr"] = 0.2
    rates.take()
    assert optimizer.param_groups[1]["lr"] is held[1]
    rates.close()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.2])
    assert [group["capturable"] for group in optimizer.param_groups] == [False, False]


def test_shapes_beyond_the_limit_are_run() -> None:
    run, _ = _runner(_net())
    graphs = Graphs(run, _Recorder())
    for size in range(2, 14):
        for seed in range(3):
            graphs.step(_window(seed, size))
    assert graphs.recorded == 8


def test_a_graph_depends_on_shapes_types_and_plain_values() -> None:
    window = [({"a": torch.zeros(2, 3), "causal": True}, torch.zeros(2))]
    same = [({"a": torch.ones(2, 3), "causal": True}, torch.ones(2))]
    assert signature(window) == signature(same)
    for other in (
        [({"a": torch.zeros(2, 4), "causal": True}, torch.zeros(2))],
        [({"a": torch.zeros(2, 3).long(), "causal": True}, torch.zeros(2))],
        [({"a": torch.zeros(2, 3), "causal": False}, torch.zeros(2))],
        [({"b": torch.zeros(2, 3), "causal": True}, torch.zeros(2))],
        window * 2,
    ):
        assert signature(other) != signature(window)


class _Block(nn.Module):
    def __init__(self, width: int = 4, out: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 8), nn.Linear(8, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_blocks_are_found() -> None:
    stage = nn.Sequential(_Block(3), _Block(), _Block())
    model = nn.ModuleDict(
        {"stem": nn.Linear(3, 3), "stages": nn.Sequential(stage, nn.Sequential(_Block(), _Block(4, 2)))}
    )
    runs = block_runs(model)
    assert [len(run) for run in runs] == [3], "the second stage has no two alike"
    assert 0.5 < share_in_blocks(model, runs) < 1
    assert block_runs(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))) == [], "single layers are no blocks"
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, enable_nested_tensor=False
    )
    assert [len(run) for run in block_runs(nn.ModuleList([encoder]))] == [3]


def test_blocks_are_compiled_in_place_and_back() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(_Block(), _Block()))
    names = list(model.state_dict())
    x = torch.randn(5, 3)
    expected = model(x)
    counted: list[int] = []

    def backend(module: Any, _: Any) -> Any:
        counted.append(1)
        return module

    blocks = [block for run in block_runs(model) for block in run]
    with compiled(blocks, backend=backend):
        torch.testing.assert_close(model(x), expected)
        assert list(model.state_dict()) == names
    assert len(counted) == 1, "blocks alike share what was compiled"
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    assert all(block._compiled_call_impl is None for block in blocks)


def test_blocks_of_several_shapes_are_compiled_for_each() -> None:
    dynamic: list[bool] = []

    def backend(module: Any, inputs: list[Any]) -> Any:
        sizes = [size for value in inputs if isinstance(value, Tensor) for size in value.shape]
        dynamic.append(any(isinstance(value, torch.SymInt) for value in [*inputs, *sizes]))
        return module

    config = ResNetConfig(embedding_size=8, hidden_sizes=(16, 32, 64), depths=(2, 2, 2), layer_type="basic")
    model = ResNet(config)
    blocks = [block for run in block_runs(model.resnet.encoder) for block in run]
    with compiled(blocks, backend=backend):
        model(torch.randn(2, 3, 64, 64))
    assert len(dynamic) > 3
    assert not any(dynamic)
    dynamic.clear()
    torch._dynamo.reset()  # what other tests have taught it about lengths
    alike = nn.Sequential(_Block(), _Block())
    with compiled(list(alike), backend=backend):
        for length in (3, 5, 7):
            alike(torch.randn(length, 4, requires_grad=True))
    assert dynamic == [False, True], "batches of several lengths share what was compiled for any"


def test_weights_in_fewer_bits_count_in_what_auto_compiles() -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64, bias=False)) for _ in range(4))
    model = get_peft_model(nn.ModuleDict({"words": nn.Embedding(64, 64), "blocks": blocks}), LORA, base_dtype="nf4")
    assert _choose_compile(torch.device("cuda"), model)[0] == "blocks"


def test_what_auto_compiles() -> None:
    repeated = nn.Sequential(*[_Block() for _ in range(4)])
    assert _choose_compile(torch.device("cuda"), repeated)[0] == "blocks"
    chosen, why = _choose_compile(torch.device("cuda"), _net())
    assert chosen is False
    assert "0% of the parameters" in why
    config, _ = resolve(TrainingConfig(device="cpu"), repeated)
    assert (config.compile, config.cuda_graph) == (False, False)


@pytest.mark.parametrize("field", ["compile", "cuda_graph"])
def test_other_choices_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        TrainingConfig(**{field: "maybe"})

"""Settings of a run for a limit of memory."""

from dataclasses import replace

import pytest
import torch

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.train import AdamW, DSOptimizer, MemoryPlanner, Trainer, TrainingConfig, _config
from deepseek_r1.train._ds_optimizer import _Trial

from .models_for_memory import cases

CPU = TrainingConfig(device="cpu", precision="fp32")


def test_what_fits_is_left_alone_and_a_trainer_takes_the_result():
    torch.manual_seed(0)
    model, x, y = cases()["transformer"]
    setup = DSOptimizer(model, 1, lr=1e-3, config=CPU).setup((x, y))
    assert setup.config.micro_batch_size is None
    assert {block.action for block in setup.plan.blocks} == {"keep"}
    optimizer = setup.optimizer(model.parameters())
    assert type(optimizer).__name__ == "AdamW"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [CPU.weight_decay, 0.0]
    report = Trainer(model, [(x, y)], config=setup.config, optimizer=setup.optimizer).train(epochs=1)
    assert report.ok
    assert "chosen: fp32, AdamW with 32-bit states" in setup.report.notes[0]


def test_a_limit_too_small_for_the_whole_batch_takes_pieces():
    torch.manual_seed(0)
    model, x, y = cases()["transformer"]
    least = MemoryPlanner(model, (x, y), optimizer=AdamW(model.parameters())).minimum_bytes
    limit = 0.9 * least
    setup = DSOptimizer(model, limit / 1e9, config=CPU).setup((x, y))
    assert setup.config.micro_batch_size is not None
    assert setup.plan.measured_peak_bytes <= limit
    assert any("micro-batch 8" in what for what, _ in setup.report.skipped)
    Trainer(model, [(x, y)], config=setup.config, optimizer=setup.optimizer).train(epochs=1)


def test_8_bit_states_are_taken_only_where_they_are_worth_it():
    fast, slow = _Trial("8-bit", 8, 1.0, None), _Trial("32-bit", 4, 1.1, None)
    assert DSOptimizer._best([fast, slow]) is slow
    assert DSOptimizer._best([fast, replace(slow, seconds=1.3)]) is fast
    assert DSOptimizer._best([fast]) is fast


def test_nothing_fits_is_said_with_the_least():
    torch.manual_seed(0)
    model, x, y = cases()["twice"]
    with pytest.raises(ConfigError, match=r"nothing fits.*at least"):
        DSOptimizer(model, 1e-6, config=CPU).setup((x, y))
    with pytest.raises(InputError, match=r"nn\.Module"):
        DSOptimizer(lambda x: x)


@pytest.mark.parametrize(("isa", "precision"), [(("amx_bf16",), "bf16"), ((), "fp32")])
def test_precision_is_chosen_by_the_hardware_and_planned_with(monkeypatch, isa, precision):
    real = _config.probe()
    monkeypatch.setattr(_config, "probe", lambda: replace(real, isa=frozenset(isa)))
    torch.manual_seed(0)
    model, x, y = cases()["transformer"]
    setup = DSOptimizer(model, 1, config=TrainingConfig(device="cpu")).setup((x, y))
    assert setup.config.precision == precision
    assert f"chosen: {precision}, AdamW" in setup.report.notes[0]
    (why,) = (note for note in setup.report.notes if note.startswith("precision: "))
    assert f"{precision}: this CPU has" in why
    trainer = Trainer(model, [(x, y)], config=setup.config, optimizer=setup.optimizer)
    assert trainer.config.precision == precision
    by_hand = DSOptimizer(model, 1, config=TrainingConfig(device="cpu", precision="fp32")).setup((x, y))
    assert by_hand.config.precision == "fp32"
    assert not any(note.startswith("precision: ") for note in by_hand.report.notes)
    if precision == "bf16":
        assert setup.plan.unconstrained_peak_bytes < by_hand.plan.unconstrained_peak_bytes

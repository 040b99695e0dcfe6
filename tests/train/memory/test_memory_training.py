"""The Trainer under a limit of memory."""

import pytest
import torch

from deepseek_r1.core import ConfigError
from deepseek_r1.train import Trainer, TrainingConfig
from deepseek_r1.train.memory import measured_peak

from .models_for_memory import Transformer, cases


def trained(limit_of=None, **settings):
    torch.manual_seed(0)
    model = Transformer()
    data = [(torch.randint(0, 40, (8, 24)), torch.randint(0, 40, (8, 24))) for _ in range(3)]
    config = TrainingConfig(device="cpu", precision="fp32", seed=1, **settings)
    trainer = Trainer(model, data, data[:1], lr=1e-3, config=config)
    return model, trainer.train(epochs=2), trainer


def notes(report):
    return [note for note in report.notes if note.startswith("memory: ")]


def test_training_under_a_limit_gives_the_same_weights_and_says_what_was_chosen():
    plain, report, _ = trained()
    assert not notes(report)
    limited, report, trainer = trained(memory_gb=0.0024)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), limited.state_dict().values(), strict=True)
    )
    assert "recompute" in notes(report)[0]
    assert "GB measured" in notes(report)[0]
    assert report.sections[0].title == "memory plan"
    assert report.ok
    assert not any("_compiled_call_impl" in m.__dict__ for m in limited.modules()), "the plan is off after the run"
    trainer.train(epochs=1)


def test_runs_of_blocks_without_a_plan():
    plain, _, _ = trained()
    other, report, _ = trained(checkpoint_interval=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), other.state_dict().values(), strict=True))
    assert "runs of 2" in notes(report)[0]


def test_the_first_steps_of_a_whole_run_stay_below_the_limit():
    torch.manual_seed(0)
    model, x, y = cases()["transformer"]
    limit = 0.0028
    config = TrainingConfig(device="cpu", precision="fp32", memory_gb=limit, micro_batch_size=4, clip_grad_norm=1.0)
    trainer = Trainer(model, [(x, y)] * 2, lr=1e-3, config=config)
    # The plan is made in a run of its own, the next run is measured from its first step on.
    trainer.train(epochs=1)
    state = [t for s in trainer.optimizer.state.values() for t in s.values()]
    held = [*model.parameters(), *state, x, y]
    assert measured_peak(lambda: trainer.train(epochs=1), held=held) <= limit * 1e9


def test_a_limit_that_is_too_small_stops_before_the_first_step():
    with pytest.raises(ConfigError, match="at least"):
        trained(memory_gb=0.0004)


def test_the_environment_switches_auto_on(monkeypatch):
    monkeypatch.setenv("R1_MEMORY_OPTIMIZER", "1")
    _, report, trainer = trained()
    assert trainer.config.memory_gb == "auto"
    assert "all fits" in notes(report)[0]
    assert any("R1_MEMORY_OPTIMIZER" in note for note in report.notes)
    _, _, trainer = trained(checkpoint_interval=1)
    assert trainer.config.memory_gb is None, "what was asked for by hand comes first"
    monkeypatch.setenv("R1_MEMORY_OPTIMIZER", "0")
    assert trained()[2].config.memory_gb is None


@pytest.mark.parametrize(
    "settings",
    [{"memory_gb": 0}, {"memory_gb": "lots"}, {"memory_gb": True}, {"checkpoint_interval": 0},
     {"checkpoint_interval": 1.0}, {"memory_gb": 1, "checkpoint_interval": 2}],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_named(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        TrainingConfig(**settings)


def test_compiled_training_compiles_block_by_block(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda run, **_: compiled.append(run) or run)
    plain, _, _ = trained()
    other, _, _ = trained(checkpoint_interval=1, compile=True)
    assert len(compiled) == 4, "the blocks, and not the model"
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), other.state_dict().values(), strict=True))


def test_export_and_evaluation_inside_a_limited_run(tmp_path):
    from deepseek_r1.train import Callback

    class Exports(Callback):
        def on_epoch_end(self, trainer):
            trainer.evaluate()
            trainer.export(tmp_path / f"{trainer.epoch}.onnx")

    torch.manual_seed(0)
    x, y = torch.randn(16, 32), torch.randn(16, 1)
    from .models_for_memory import stack

    trainer = Trainer(
        stack(),
        [(x, y)] * 2,
        [(x, y)],
        lr=1e-3,
        config=TrainingConfig(device="cpu", checkpoint_interval=3),
        callbacks=[Exports()],
    )
    trainer.train(epochs=2)
    assert (tmp_path / "2.onnx").exists()

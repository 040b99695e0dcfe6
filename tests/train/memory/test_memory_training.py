"""The Trainer under a limit of memory."""

import functools
from dataclasses import replace

import pytest
import torch

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.data import DSDataLoader
from deepseek_r1.train import Callback, MemoryPlanner, Trainer, TrainingConfig, resolve
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


@pytest.mark.parametrize(("value", "on"), [("true", True), ("ON", True), ("False", False), ("no", False), ("", False)])
def test_the_switch_of_the_environment_takes_the_usual_words(monkeypatch, value, on):
    monkeypatch.setenv("R1_MEMORY_OPTIMIZER", value)
    settled, _ = resolve(TrainingConfig(device="cpu"), torch.nn.Linear(2, 2))
    assert settled.memory_gb == ("auto" if on else None)


def test_other_words_in_the_environment_are_refused(monkeypatch):
    monkeypatch.setenv("R1_MEMORY_OPTIMIZER", "4GB")
    with pytest.raises(ConfigError, match=r"R1_MEMORY_OPTIMIZER='4GB'.*true.*memory_gb"):
        resolve(TrainingConfig(device="cpu"), torch.nn.Linear(2, 2))


class NoBlocks(torch.nn.Module):
    """Its layer is never called as a module."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, x):
        return x @ self.layer.weight.T


class Forgetful(torch.nn.Module):
    """Its blocks do something else every time."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Counting() for _ in range(3))
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = torch.nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        for _ in range(50 - self.calls):
            x = torch.tanh(self.layer(x))
        return x


@pytest.mark.parametrize(("kind", "why"), [(NoBlocks, "no block of NoBlocks"), (Forgetful, "something else")])
def test_what_cannot_be_planned_is_an_error_only_where_a_limit_was_given(monkeypatch, kind, why):
    data = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))] * 3
    config = TrainingConfig(device="cpu", precision="fp32")
    with pytest.raises(InputError, match=why):
        Trainer(kind(), data, config=replace(config, memory_gb="auto")).train(epochs=1)
    monkeypatch.setenv("R1_MEMORY_OPTIMIZER", "1")
    report = Trainer(kind(), data, config=config).train(epochs=1)
    assert report["steps"].after == 3
    assert "trained without a limit" in notes(report)[0]
    assert why in notes(report)[0]
    assert not report.sections


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
    monkeypatch.setattr(torch, "compile", lambda run, **_: compiled.append(run) or functools.partial(run))
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


def tokens(*shape):
    return torch.randint(0, 40, shape)


def steps_measured(data, limit_gb, **settings):
    """A run's Trainer and Report, and the peak of each step of a second epoch."""
    torch.manual_seed(0)
    model = Transformer()
    config = TrainingConfig(device="cpu", precision="fp32", seed=1, memory_gb=limit_gb, **settings)
    trainer = Trainer(model, data, lr=1e-3, config=config)
    report = trainer.train(epochs=1)
    state = [t for s in trainer.optimizer.state.values() for t in s.values()]
    held = [*model.parameters(), *state]
    stepper, peaks = trainer._stepper, []
    every = max(settings.get("gradient_accumulation_steps", 1), 1)
    for at in range(0, len(data), every):
        window = data[at : at + every]
        peaks.append(
            measured_peak(lambda w=window: stepper.step(w, None), held=[*held, *(t for batch in window for t in batch)])
        )
    stepper.release()
    trainer.optimizer.zero_grad()
    return trainer, report, peaks


def least_gb(batch, **settings):
    torch.manual_seed(0)
    model = Transformer()
    planner = MemoryPlanner(model, batch, optimizer=torch.optim.AdamW(model.parameters()), **settings)
    return planner.minimum_bytes / 1e9


def pair(*shape):
    return tokens(*shape), tokens(*shape)


def test_a_larger_batch_later_on_is_planned_for_before_its_step():
    small, large = pair(8, 6), pair(8, 48)
    limit = 1.15 * least_gb(large)
    trainer, report, peaks = steps_measured([small, large, small, pair(4, 48), large], limit)
    assert max(peaks) <= limit * 1e9
    assert "planned 2 times" in notes(report)[0]
    assert "(8, 48)" in notes(report)[0]
    assert [section.title for section in report.sections] == ["memory plan"] * 2
    first, second = trainer._stepper.memory._made
    assert {block.action for block in first.plan.blocks} == {"keep"}, "what fits goes on as it was"
    assert {block.action for block in second.plan.blocks} != {"keep"}


def test_a_limit_that_a_later_batch_breaks_is_refused_before_its_step():
    limit = 0.8 * least_gb(pair(8, 48))

    class Count(Callback):
        steps = 0

        def on_step_end(self, trainer):
            self.steps = trainer.step

    count = Count()
    config = TrainingConfig(device="cpu", precision="fp32", memory_gb=limit)
    trainer = Trainer(Transformer(), [pair(8, 6), pair(8, 48)], lr=1e-3, config=config, callbacks=[count])
    with pytest.raises(ConfigError, match=r"at least [\d.]+ GB.*\(8, 48\).*larger than those before"):
        trainer.train(epochs=1)
    assert count.steps == 1


def test_a_step_of_batches_that_no_one_plan_covers_changes_plans_within():
    many, long = pair(24, 8), pair(4, 48)
    limit = 1.1 * max(least_gb(many, accumulates=True), least_gb(long, accumulates=True))
    trainer, _, peaks = steps_measured([many, long] * 2, limit, gradient_accumulation_steps=2)
    assert max(peaks) <= limit * 1e9
    assert len(trainer._stepper.memory._made) == 2


class Texts(torch.utils.data.Dataset):
    def __init__(self, lengths):
        self.lengths = lengths
        self.tokens = [torch.arange(n) % 40 for n in lengths]

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return self.tokens[i], self.tokens[i]


def test_buckets_are_planned_for_at_once_by_their_largest_batch():
    # The short texts come first.
    texts = Texts([5] * 16 + [8] * 16 + [40] * 16)
    loader = DSDataLoader(texts, batch_size=8, batching="buckets", multiple=8)
    assert loader.largest_batch()[0].shape == (8, 40)
    limit = 1.2 * least_gb(pair(8, 40))
    config = TrainingConfig(device="cpu", precision="fp32", memory_gb=limit)
    trainer = Trainer(Transformer(), loader, lr=1e-3, config=config)
    report = trainer.train(epochs=1)
    assert "planned" not in notes(report)[0]
    (made,) = trainer._stepper.memory._made
    assert made.extent[0][0] == (8, 40)
    refused = TrainingConfig(device="cpu", precision="fp32", memory_gb=0.8 * least_gb(pair(8, 40)))
    trainer = Trainer(Transformer(), loader, lr=1e-3, config=refused)
    with pytest.raises(ConfigError, match="at least"):
        trainer.train(epochs=1)
    assert trainer.step == 0, "known before the first step"


@pytest.mark.parametrize("known", [True, False])
def test_buckets_stay_below_the_limit_and_give_the_weights_of_no_limit(monkeypatch, known):
    if not known:
        monkeypatch.setattr(DSDataLoader, "largest_batch", lambda self: None)
    limit = 1.2 * least_gb(pair(8, 40))
    weights = []
    for memory_gb in (None, limit):
        torch.manual_seed(0)
        loader = DSDataLoader(Texts([5] * 16 + [8] * 16 + [40] * 16), batch_size=8, batching="buckets", multiple=8)
        config = TrainingConfig(device="cpu", precision="fp32", memory_gb=memory_gb, seed=3)
        trainer = Trainer(Transformer(), loader, lr=1e-3, config=config)
        trainer.train(epochs=2)
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    made = trainer._stepper.memory._made
    assert len(made) == (1 if known else 2)
    assert all(m.plan.measured_peak_bytes <= limit * 1e9 for m in made)


def test_parameters_that_a_callback_unfreezes_are_planned_for():
    class Unfreeze(Callback):
        def on_epoch_end(self, trainer):
            trainer.model.blocks.requires_grad_(True)

    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters())
    model.blocks.requires_grad_(False)
    config = TrainingConfig(device="cpu", precision="fp32", memory_gb=1)
    trainer = Trainer(model, [pair(8, 24)] * 2, config=config, optimizer=optimizer, callbacks=[Unfreeze()])
    report = trainer.train(epochs=2)
    frozen, whole = report.sections
    assert frozen["not activations"].after < whole["not activations"].after
    assert "planned 2 times" in notes(report)[0]

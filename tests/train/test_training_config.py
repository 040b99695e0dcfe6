"""TrainingConfig: what is allowed, what is refused and how, and what "auto" becomes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import deepseek_r1.train._config as config_module
from deepseek_r1.core import ConfigError
from deepseek_r1.train import Callback, Trainer, TrainingConfig, resolve

pytestmark = pytest.mark.tiny


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("micro_batch_size", 0, "integer >= 1"),
        ("micro_batch_size", 2.0, "integer >= 1"),
        ("gradient_accumulation_steps", True, "integer >= 1"),
        ("gradient_accumulation_steps", None, "integer >= 1"),
        ("precision", "half", "'bf16'"),
        ("schedule", "step", "'cosine'"),
        ("warmup", 1.0, "fraction"),
        ("warmup", -1, "fraction"),
        ("warmup", "10%", "fraction"),
        ("weight_decay", -0.1, ">= 0"),
        ("weight_decay", float("nan"), ">= 0"),
        ("clip_grad_norm", 0, "> 0"),
        ("compile", "yes", "'auto'"),
        ("deterministic", 1, "True or False"),
        ("seed", -1, "2\\*\\*32"),
        ("early_stop_mode", "best", "'min', 'max'"),
        ("early_stop_patience", 0, ">= 1"),
        ("early_stop_metric", 3, "key of the history"),
        ("save_dir", 3, "directory"),
        ("save_every_steps", 0, ">= 1"),
        ("save_every_epochs", -1, ">= 1"),
        ("keep_last", 0, ">= 1"),
        ("keep_best", -1, ">= 0"),
        ("keep_best", True, ">= 0"),
        ("async_save", "yes", "'auto'"),
        ("on_save_error", "ignore", "'stop', 'continue'"),
        ("shard_gb", 0, "> 0"),
        ("log_dir", 3, "directory"),
        ("log_every", 0, ">= 1"),
        ("device", 3, "'cuda:N'"),
        ("schema_version", 2, "update deepseek-r1"),
        ("zero_stage", 4, "must be 0"),
        ("zero_stage", 2, "not in this release.*zero_stage=0"),
        ("memory_gb", "much", "'auto' or a number > 0"),
        ("checkpoint_interval", 0, ">= 1.*save_every_steps"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name_with_the_fix(field, value, says):
    with pytest.raises(ConfigError, match=says) as error:
        TrainingConfig(**{field: value})
    assert f"{field}=" in str(error.value)


def test_it_is_frozen_keyword_only_and_knows_its_keys():
    config = TrainingConfig(save_dir=None, warmup=0.25)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(TypeError):
        TrainingConfig(4)
    with pytest.raises(TypeError, match="micro_batchsize"):
        TrainingConfig(micro_batchsize=4)
    assert TrainingConfig(**dataclasses.asdict(config)) == config


def test_a_path_is_kept_as_text(tmp_path):
    assert TrainingConfig(save_dir=tmp_path).save_dir == str(tmp_path)


def test_auto_is_settled_once_with_reasons():
    settled, reasons = resolve(TrainingConfig(), nn.Linear(2, 2))
    assert "auto" not in (settled.device, settled.precision, settled.compile)
    assert set(reasons) == {"device", "precision", "compile"}
    assert resolve(settled, nn.Linear(2, 2)) == (settled, {})


def test_explicit_choices_are_honoured():
    given = TrainingConfig(
        device="cpu", precision="bf16", compile=True, cuda_graph=False, async_save=True, save_frozen=True
    )
    assert resolve(given, nn.Linear(2, 2)) == (given, {})


@pytest.mark.parametrize(
    ("isa", "precision", "says"),
    [
        (("avx2",), "fp32", "no bf16"),
        (("avx512_bf16",), "fp32", "worth a try"),
        (("avx512_bf16", "amx_bf16"), "bf16", "AMX"),
    ],
)
def test_precision_on_a_cpu_follows_its_units(monkeypatch, isa, precision, says):
    hardware = dataclasses.replace(config_module.probe(), isa=isa)
    monkeypatch.setattr(config_module, "probe", lambda: hardware)
    settled, reasons = resolve(TrainingConfig(device="cpu"), nn.Linear(2, 2))
    assert settled.precision == precision
    assert says in reasons["precision"]


@pytest.mark.parametrize(
    ("bf16", "capability", "precision"), [(True, (9, 0), "bf16"), (False, (7, 5), "fp16"), (False, (6, 1), "fp32")]
)
def test_precision_on_a_gpu_follows_its_generation(monkeypatch, bf16, capability, precision):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert resolve(TrainingConfig(device="cuda"), nn.Linear(2, 2))[0].precision == precision


def test_a_gpu_without_bf16_units_is_not_asked_for_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ConfigError, match=r"no bf16 units.*'fp16'"):
        resolve(TrainingConfig(device="cuda", precision="bf16"), nn.Linear(2, 2))


def test_large_models_are_saved_in_the_background(tmp_path):
    small, large = nn.Linear(2, 2), nn.Linear(4000, 4100, device="meta")
    config = TrainingConfig(device="cpu", save_dir=tmp_path)
    assert resolve(config, small)[0].async_save is False
    settled, reasons = resolve(config, large)
    assert settled.async_save is True
    assert "host memory" in reasons["async_save"]


@pytest.mark.parametrize(("device", "says"), [("cuda:99", "torch finds"), ("mps", "trains on"), ("nowhere", "one of")])
def test_a_device_that_is_not_there_is_refused(device, says):
    with pytest.raises(ConfigError, match=says):
        resolve(TrainingConfig(device=device), nn.Linear(2, 2))


def test_threads_hold_while_training_and_are_put_back_after() -> None:
    seen: list[int] = []

    class Look(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    data = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    Trainer(torch.nn.Linear(3, 2), data, config=TrainingConfig(threads=1), callbacks=[Look()]).train(epochs=2)
    assert seen == [1, 1]
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match="threads"):
        TrainingConfig(threads=0)

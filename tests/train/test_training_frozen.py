"""Checkpoints without what training leaves as it is: what is in them, what they need, and what is never left out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from deepseek_r1.core import ArtifactError, ConfigError, InputError
from deepseek_r1.lora import LoraConfig, get_peft_model
from deepseek_r1.nn import NF4Linear
from deepseek_r1.train import Callback, DSCheckpoint, Trainer, TrainingConfig
from deepseek_r1.train import _frozen as frozen

SCRIPT = Path(__file__).with_name("killable_adapters.py")
BLOCK = frozen._ROWS * frozen._COLUMNS * 8


@settings(deadline=None, max_examples=25)
@given(at=st.integers(0, 2 * BLOCK + 98), bit=st.integers(0, 7))
def test_every_bit_counts(at, bit):
    raw = torch.zeros(2 * BLOCK + 99, dtype=torch.uint8)
    before = frozen.fingerprint(raw)
    raw[at] ^= 1 << bit
    assert frozen.fingerprint(raw) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64, torch.bool])
def test_a_fingerprint_is_of_values_in_their_places(dtype):
    torch.manual_seed(0)
    x = torch.randint(0, 200, (1400, 2100)).to(dtype)
    whole = torch.cat([x.view(-1)[:1], x.view(-1)]).contiguous()
    assert frozen.fingerprint(x) == frozen.fingerprint(whole[1:].view(x.shape)), "wherever it lies in its memory"
    assert frozen.fingerprint(x) == frozen.fingerprint(x.t().contiguous().t())
    swapped = x[torch.tensor([1, 0, *range(2, 1400)])]
    assert len({frozen.fingerprint(t) for t in (x, swapped, x.flip(1), x.flip(0))}) == 4
    assert frozen.fingerprint(torch.zeros(0)) != frozen.fingerprint(torch.zeros(()))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.up, self.norm = nn.Embedding(9, 64), nn.Linear(64, 64), nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.up(self.emb(x).mean(1)))))


def adapted(base_dtype=None, seed=0, **fields):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["up"], **fields)
    return get_peft_model(Base(), config, base_dtype=base_dtype)


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 9, (48, 5), generator=g)
    return [(part, part.sum(1) % 3) for part in x.split(8)]


def make(folder, model, *, callbacks=(), optimizer=None, **fields):
    given = {"save_every_steps": 2, "keep_last": None, "seed": 1, "threads": 1, "log_every": 1, **fields}
    config = TrainingConfig(device="cpu", save_dir=None if folder is None else str(folder), **given)
    return Trainer(model, data(), lr=1e-2, config=config, callbacks=callbacks, optimizer=optimizer)


def same(a, b):
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def names(path):
    return set(load_file(path / "model.safetensors"))


@pytest.mark.parametrize("base_dtype", [None, "bf16", "nf4", "int4"])
def test_of_adapters_only_what_is_trained_is_kept(tmp_path, base_dtype):
    whole = adapted(base_dtype)
    trainer = make(tmp_path, whole, async_save=True)
    report = trainer.train(epochs=2)
    assert any(note.startswith("save_frozen: False") for note in report.notes)
    path = tmp_path / "step-00000004"
    trained = {n for n, p in whole.named_parameters() if p.requires_grad}
    statistics = {n for n in whole.state_dict() if ".norm." in n and not n.endswith(("weight", "bias"))}
    assert names(path) == trained | statistics
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["schema_version"], manifest["left_out"]) == (2, len(whole.state_dict()) - len(names(path)))

    resumed = adapted(base_dtype)
    again = make(None, resumed)
    again.resume(path)
    again.train(epochs=2)
    assert same(whole, resumed)
    assert again.losses == trainer.losses

    assert same(whole, loaded(tmp_path / "step-00000012", adapted(base_dtype)))


def test_all_is_kept_if_asked_for_and_of_other_models(tmp_path):
    model = adapted("nf4")
    make(tmp_path / "a", model, save_frozen=True).train(epochs=1)
    assert names(tmp_path / "a" / "step-00000006") == set(model.state_dict())
    model = Base()
    model.emb.requires_grad_(False)
    make(tmp_path / "b", model).train(epochs=1)
    assert names(tmp_path / "b" / "step-00000006") == set(model.state_dict())
    assert json.loads((tmp_path / "b" / "step-00000006" / "manifest.json").read_text())["schema_version"] == 1
    make(tmp_path / "c", model, save_frozen=False).train(epochs=1)
    assert names(tmp_path / "c" / "step-00000006") == set(model.state_dict()) - {"emb.weight"}
    with pytest.raises(ConfigError, match="save_frozen='never'"):
        TrainingConfig(save_frozen="never")


def test_another_base_is_refused_by_its_first_tensor_and_nothing_is_changed(tmp_path):
    make(tmp_path, adapted("nf4")).train(epochs=1)
    path = tmp_path / "step-00000006"
    cases = []
    one = adapted("nf4")
    with torch.no_grad():
        one.base_model.norm.weight[5] += 1e-6
    cases.append((one, r"'base_model\.norm\.weight': it has other values"))
    packed = adapted("nf4")
    assert isinstance(packed.base_model.up.base_layer, NF4Linear)
    packed.base_model.up.base_layer.packed[3] ^= 1
    cases.append((packed, r"'base_model\.up\.base_layer\.packed': it has other values"))
    half = adapted("nf4")
    half.base_model.emb.bfloat16()
    cases.append((half, r"emb\.weight': it is bfloat16 of the shape \(9, 64\) in this model and was float32"))
    cases.append((adapted(None), "another model"))
    for model, says in cases:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        trainer = make(None, model)
        with pytest.raises(InputError, match=says):
            trainer.resume(path)
        with pytest.raises(InputError, match=says):
            DSCheckpoint(path).load(model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert trainer.step == 0


def test_a_model_for_other_programs_needs_the_base(tmp_path):
    model = adapted("nf4")
    make(tmp_path / "run", model).train(epochs=1)
    saved = DSCheckpoint(tmp_path / "run" / "step-00000006")
    for call in (saved.model_state, lambda: saved.export_hf(tmp_path / "hf")):
        with pytest.raises(InputError, match=r"leaves out \d+ frozen tensors, .* give base="):
            call()
    with pytest.raises(InputError, match="other values"):
        saved.model_state(base=adapted("nf4", seed=1))
    state = saved.model_state(base=adapted("nf4"))
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    saved.export_hf(tmp_path / "hf", base=adapted("nf4"))
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(written[k], v) for k, v in model.state_dict().items())


class Meddle(Callback):
    """Changes a frozen tensor behind autograd's back."""

    def on_step_end(self, trainer):
        if trainer.step == 3:
            trainer.model.base_model.emb.weight.data[2].mul_(1.5)


def test_a_frozen_tensor_that_was_changed_is_kept(tmp_path):
    whole = adapted()
    make(tmp_path, whole, callbacks=[Meddle()]).train(epochs=2)
    name = "base_model.emb.weight"
    kept = {int(p.name[5:]): name in names(p) for p in tmp_path.glob("step-*")}
    assert kept == {2: False, **dict.fromkeys((4, 6, 8, 10, 12), True)}
    for step in (2, 4):
        resumed = adapted()
        trainer = make(tmp_path / f"again{step}", resumed, callbacks=[Meddle()])
        trainer.resume(tmp_path / f"step-{step:08d}")
        trainer.train(epochs=2)
        assert same(whole, resumed)
        assert name in names(tmp_path / f"again{step}" / "step-00000012"), "what the program makes has it not"


class Thaw(Callback):
    """Trains the embedding too from step 4 to step 7."""

    def on_train_start(self, trainer):
        trainer.model.base_model.emb.requires_grad_(4 <= trainer.step < 7)

    on_step_end = on_train_start


def test_what_is_trained_for_a_while_is_kept_from_then_on(tmp_path):
    def all_of(params):
        return torch.optim.AdamW([*params, model.base_model.emb.weight], lr=1e-2)

    model = whole = adapted()
    make(tmp_path, whole, callbacks=[Thaw()], optimizer=all_of, ema_decay=0.9).train(epochs=2)
    name = "base_model.emb.weight"
    assert {int(p.name[5:]) for p in tmp_path.glob("step-*") if name in names(p)} == {4, 6, 8, 10, 12}
    for step in (2, 6, 8):
        model = adapted()
        trainer = make(None, model, callbacks=[Thaw()], optimizer=all_of, ema_decay=0.9)
        trainer.resume(tmp_path / f"step-{step:08d}")
        trainer.train(epochs=2)
        assert same(whole, model), step


def test_a_checkpoint_with_everything_is_resumed_with_any_base(tmp_path):
    """As releases before wrote them. What follows is not left out: the program does not make it."""
    whole = adapted()
    make(tmp_path / "old", whole, save_frozen=True).train(epochs=2)
    resumed = adapted(seed=5)
    trainer = make(tmp_path / "new", resumed)
    trainer.resume(tmp_path / "old" / "step-00000006")
    trainer.train(epochs=2)
    assert same(whole, resumed)
    kept = names(tmp_path / "new" / "step-00000012")
    assert {"base_model.emb.weight", "base_model.up.base_layer.weight"} <= kept
    assert same(whole, loaded(tmp_path / "new" / "step-00000012", adapted(seed=5)))


def loaded(path, model):
    DSCheckpoint(path).load(model)
    return model


def test_a_second_run_goes_on_leaving_out(tmp_path):
    model = adapted()
    trainer = make(None, model)
    trainer.train(epochs=1)
    trainer.train(epochs=1)
    path = trainer.save(tmp_path / "mine")
    assert "base_model.emb.weight" not in names(path)
    trainer.resume(path)
    again = make(None, adapted())
    again.resume(path)
    assert same(model, again.model)


def test_a_list_that_was_altered_is_refused(tmp_path):
    make(tmp_path, adapted()).train(epochs=1)
    path = tmp_path / "step-00000006" / "state.json"
    document = json.loads(path.read_text())
    document["frozen"].clear()
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"state\.json"):
        DSCheckpoint(path.parent)


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "run"), "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    import runpy

    make = runpy.run_path(str(SCRIPT))["make"]
    whole = make(tmp_path / "whole")
    whole.train(2)
    torch.manual_seed(99)
    # The penalty of other old data is replaced by the one that the run had.
    resumed = make(tmp_path / "run", old_seed=8)
    assert resumed.resume().name == "step-00000004"
    assert not any("base_layer" in name for name in names(tmp_path / "run" / "step-00000004"))
    resumed.train(2)
    assert same(whole.model, resumed.model)
    assert whole.losses == resumed.losses

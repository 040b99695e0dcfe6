"""Checkpoints: what can be held, what is refused, what survives."""

from __future__ import annotations

import errno
import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deepseek_r1.train._checkpoint as disk
import deepseek_r1.train._pack as packing
from deepseek_r1.core import ArtifactError, ConfigError, InputError
from deepseek_r1.train import Callback, CheckpointError, Trainer, TrainingConfig

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(plain)
def test_plain_values_survive(value):
    tensors = {}
    assert packing.unpack(json.loads(json.dumps(packing.pack(value, tensors, "x"))), tensors) == value
    assert tensors == {}


def round_trip(tmp_path, model, state):
    disk.write(tmp_path / "step-00000001", disk.gather(model, state, 1))
    return disk.read(tmp_path / "step-00000001")


def test_generators_tensors_and_tuples_survive(tmp_path):
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "bits": np.random.default_rng(3).bit_generator.state,
        "torch": torch.get_rng_state(),
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(7.0),
        "nothing": torch.zeros(0, 3),
        "inf": math.inf,
        "number": np.float32(0.5),
        4: (1, [None, True]),
    }
    _, back = round_trip(tmp_path, {}, state)
    random.setstate(back["python"])
    np.random.set_state(back["numpy"])
    assert back["bits"] == state["bits"]
    for name in ("torch", "half", "scalar", "nothing"):
        assert back[name].dtype == state[name].dtype
        assert torch.equal(back[name], state[name])
    assert (back["inf"], back["number"], back[4]) == (math.inf, 0.5, (1, [None, True]))


def test_shared_memory_is_stored_once_and_views_apart(tmp_path):
    base = torch.arange(6.0)
    model = {"a": base, "tied": base, "view": base.view(2, 3), "part": base[2:4], "turned": base.view(2, 3).t()}
    back, _ = round_trip(tmp_path, model, {})
    for name, tensor in model.items():
        assert torch.equal(back[name], tensor), name
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "step-00000001" / disk.MODEL)
    assert set(stored) == {"a", "view", "part", "turned"}, "the tied tensor is there once"


def test_names_that_would_clash_are_kept_apart(tmp_path):
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    _, back = round_trip(tmp_path, {}, {"x.y": a, "x": {"y": b}})
    assert back["x.y"].item() == 1.0
    assert back["x"]["y"].item() == 2.0


def test_what_cannot_be_held_is_named(tmp_path):
    with pytest.raises(InputError, match=r"state\.callback\.0 is of type function"):
        disk.write(tmp_path / "c", disk.gather({}, {"callback": [lambda: 0]}, 1))
    assert not list(tmp_path.iterdir())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(InputError, match="is no checkpoint"):
        disk.write(tmp_path / "other", disk.gather({}, {}, 1))


def data(n=6):
    g = torch.Generator().manual_seed(0)
    return [(torch.rand(4, 3, generator=g), torch.randint(0, 2, (4,), generator=g)) for _ in range(n)]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def make(folder, model=None, **options):
    fields = {"save_every_steps": 2, "save_every_epochs": None, "keep_last": None, **options.pop("fields", {})}
    config = TrainingConfig(device="cpu", save_dir=None if folder is None else str(folder), **fields)
    return Trainer(Tied() if model is None else model, data(), lr=1e-2, config=config, **options)


def steps(folder):
    return [int(p.name[5:]) for p in sorted(folder.glob("step-*"))]


def test_tied_weights_and_optimizer_come_back(tmp_path):
    first = make(tmp_path)
    first.train(epochs=1)
    second = make(tmp_path)
    second.resume()
    assert second.model.a.weight is second.model.b.weight
    assert torch.equal(first.model.a.weight, second.model.a.weight)
    for a, b in zip(first.optimizer.state.values(), second.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_retention_and_the_last_checkpoint_of_a_run(tmp_path):
    make(tmp_path, fields={"keep_last": 2}).train(epochs=2)
    assert steps(tmp_path) == [10, 12]
    make(tmp_path / "b", fields={"save_every_steps": None, "save_every_epochs": 2}).train(epochs=3)
    assert steps(tmp_path / "b") == [12, 18], "and one at the end"


def damage(path, how):
    file = path / how[0]
    if how[1] == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif how[1] == "flip":
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    elif how[1] == "gone":
        file.unlink()
    else:
        manifest = json.loads(file.read_text())
        manifest.update(how[1])
        if "schema_version" in how[1]:
            manifest["digest"] = disk.digest(manifest)
        file.write_text(json.dumps(manifest))


DAMAGE = [
    (("model.safetensors", "cut"), "model.safetensors is damaged"),
    (("training.safetensors", "flip"), "training.safetensors was altered"),
    (("state.json", "gone"), "state.json is missing"),
    (("manifest.json", "cut"), "manifest.json is damaged"),
    (("manifest.json", {"step": 99}), "manifest.json was altered"),
    (("manifest.json", {"schema_version": 9}), "schema version 9.*Update"),
    (("manifest.json", {"kind": "cake"}), "does not describe"),
]


@pytest.mark.parametrize(("how", "says"), DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(tmp_path, how, says):
    make(tmp_path).train(epochs=1)
    damage(tmp_path / "step-00000006", how)
    with pytest.raises(ArtifactError, match=says):
        disk.verify(tmp_path / "step-00000006")
    trainer = make(tmp_path)
    assert trainer.resume() == tmp_path / "step-00000004"
    report = trainer.train(epochs=1)
    assert any("step-00000006" in what for what, _ in report.skipped)
    disk.verify(tmp_path / "step-00000006")


def test_if_all_are_damaged_that_is_an_error(tmp_path):
    make(tmp_path, fields={"keep_last": 1}).train(epochs=1)
    damage(tmp_path / "step-00000006", DAMAGE[0][0])
    with pytest.raises(ArtifactError, match=r"no checkpoint can be used.*model\.safetensors is damaged"):
        make(tmp_path).resume()


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint"):
        make(tmp_path).resume()
    assert make(tmp_path).resume(missing_ok=True) is None
    with pytest.raises(ConfigError, match="save_dir"):
        make(None).resume()
    with pytest.raises(ConfigError, match="save_dir"):
        make(None).save()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    make(tmp_path).train(epochs=1)
    with pytest.raises(InputError, match="another model"):
        make(tmp_path, nn.Linear(3, 2)).resume()


def test_a_directory_of_another_run_is_not_written_over(tmp_path):
    make(tmp_path).train(epochs=1)
    with pytest.raises(ConfigError, match=r"step-00000006.*resume\(\)"):
        make(tmp_path).train(epochs=1)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    real = disk.save_file

    def full(tensors, path, metadata=None):
        if "step-00000004" in str(path) and path.name == disk.TRAINING:
            path.write_bytes(b"half a fi")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(disk, "save_file", full)
    trainer = make(tmp_path)
    with pytest.raises(CheckpointError, match=r"step 4 could not be written.*No space left on device.*unharmed"):
        trainer.train(epochs=1)
    assert steps(tmp_path) == [2]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"], "nothing half-written is left"
    monkeypatch.undo()
    resumed = make(tmp_path)
    assert resumed.resume() == tmp_path / "step-00000002"
    resumed.train(epochs=1)
    assert resumed.step == 6


def test_save_to_a_path_and_resume_from_it(tmp_path):
    trainer = make(None, fields={"save_every_steps": None})
    trainer.train(epochs=1)
    assert trainer.save(tmp_path / "mine") == tmp_path / "mine"
    other = make(None)
    other.resume(tmp_path / "mine")
    assert other.step == 6
    assert torch.equal(other.model.a.weight, trainer.model.a.weight)


def test_a_changed_configuration_is_told(tmp_path):
    make(tmp_path).train(epochs=1)
    trainer = make(tmp_path, fields={"clip_grad_norm": 1.0, "log_every": 1})
    trainer.resume()
    report = trainer.train(epochs=2)
    assert any("not an exact continuation: clip_grad_norm" in note for note in report.notes)


class Counter(Callback):
    def __init__(self):
        self.seen = 0

    def on_step_end(self, trainer):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_callbacks_state_is_kept(tmp_path):
    make(tmp_path, callbacks=[Counter()]).train(epochs=1)
    counter = Counter()
    trainer = make(tmp_path, callbacks=[counter])
    trainer.resume()
    assert counter.seen == 6
    bare = make(tmp_path)
    bare.resume()
    assert ("state of callback Counter", "this Trainer has no such callback") in bare.train(epochs=1).skipped

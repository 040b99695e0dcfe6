"""The checkpoint format without a Trainer: shards, what is refused, copies that later steps cannot reach, exports."""

from __future__ import annotations

import dataclasses
import json
import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import deepseek_r1 as dr1
import deepseek_r1.train._checkpoint as disk
from deepseek_r1.core import ArtifactError, InputError
from deepseek_r1.train import CheckpointError, DSCheckpoint, Trainer, TrainingConfig
from deepseek_r1.train._background import Background, Staging


def net(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


def stepped(model):
    """An optimizer with a state, after two steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    return optimizer


def same(a, b):
    return all(torch.equal(x, b[n]) for n, x in a.items()) and set(a) == set(b)


def test_it_is_the_public_one():
    assert dr1.DSCheckpoint is DSCheckpoint


def test_model_optimizer_and_anything_else_come_back(tmp_path):
    model = net()
    optimizer = stepped(model)
    extra = {"epoch": 3, "seen": torch.arange(4), "names": ["a", ("b", None)], "array": np.arange(3)}
    saved = DSCheckpoint.save(
        tmp_path / "c", model, optimizer, state=extra, step=9, metrics={"val_loss": 0.5}, rng=True
    )
    expected = torch.rand(3), random.random(), np.random.rand()
    assert (saved.step, saved.metrics) == (9, {"val_loss": 0.5})

    torch.manual_seed(5)
    other = net(8)
    for p in other.parameters():
        nn.init.zeros_(p)
    fresh = torch.optim.AdamW(other.parameters(), lr=1.0)
    back = DSCheckpoint(tmp_path / "c").load(other, fresh, rng=True)
    assert same(model.state_dict(), other.state_dict())
    assert fresh.param_groups[0]["lr"] == 1e-2
    for a, b in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert same(a, b)
    assert back["epoch"] == 3
    assert back["names"] == ["a", ("b", None)]
    assert torch.equal(back["seen"], torch.arange(4))
    assert np.array_equal(back["array"], np.arange(3))
    assert torch.equal(expected[0], torch.rand(3))
    assert (random.random(), np.random.rand()) == expected[1:]


@pytest.mark.parametrize("limit", [100, 300, 10**9])
def test_shards_are_no_larger_than_asked_and_come_back(tmp_path, limit):
    model = net()
    optimizer = stepped(model)
    saved = DSCheckpoint.save(tmp_path / "c", model, optimizer, shard_bytes=limit)
    files = sorted(p.name for p in (tmp_path / "c").glob("model*.safetensors"))
    if limit == 10**9:
        assert files == ["model.safetensors"]
        assert not list((tmp_path / "c").glob("*.index.json"))
    else:
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == model.state_dict().keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
        for name in files:
            part = load_file(tmp_path / "c" / name)
            assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= limit
            assert all(index["weight_map"][key] == name for key in part)
    other = net()
    DSCheckpoint(saved.path).load(other, torch.optim.AdamW(other.parameters()))
    assert same(model.state_dict(), other.state_dict())


def test_a_lost_or_exchanged_shard_is_named(tmp_path):
    saved = DSCheckpoint.save(tmp_path / "c", net(), shard_bytes=100)
    one, two = sorted(saved.path.glob("model-*.safetensors"))[:2]
    data = one.read_bytes()
    one.write_bytes(two.read_bytes().ljust(len(data))[: len(data)])
    with pytest.raises(ArtifactError, match=f"{one.name} was altered"):
        DSCheckpoint(saved.path)
    one.unlink()
    with pytest.raises(ArtifactError, match=f"{one.name} is missing"):
        DSCheckpoint(saved.path)


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path):
    saved = DSCheckpoint.save(tmp_path / "c", net())
    manifest = json.loads((saved.path / disk.MANIFEST).read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    manifest["digest"] = disk.digest(manifest)
    (saved.path / disk.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="list of files"):
        DSCheckpoint(saved.path)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: net(16), r"'0\.weight' has the shape \(8, 4\) in the checkpoint and \(16, 4\) in the model \(and 6"),
        (
            lambda: nn.Sequential(nn.Linear(4, 8)),
            r"the checkpoint has '1\.weight' of the shape \(8,\), which",
        ),
        (
            lambda: nn.Sequential(*net(), nn.Linear(2, 1)),
            r"the model has '4\.weight' of the shape \(1, 2\), which the checkpoint has not",
        ),
    ],
)
def test_another_architecture_is_refused_by_its_first_difference_and_nothing_changes(tmp_path, other, says):
    saved = DSCheckpoint.save(tmp_path / "c", net())
    model = other()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(InputError, match=says):
        DSCheckpoint(saved.path).load(model)
    assert same(before, model.state_dict())


def test_another_optimizer_is_refused_before_the_model_changes(tmp_path):
    model = net()
    saved = DSCheckpoint.save(tmp_path / "c", model, stepped(model))
    other = nn.Sequential(*net())
    nn.init.zeros_(other[0].weight)
    with pytest.raises(InputError, match="optimizer AdamW, not of SGD"):
        saved.load(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(InputError, match=r"hold \[6\] parameters, those of this AdamW \[2\]"):
        saved.load(other, torch.optim.AdamW(other[0].parameters()))
    assert not other[0].weight.any()
    bare = DSCheckpoint.save(tmp_path / "d", model)
    with pytest.raises(InputError, match="no optimizer's state"):
        bare.load(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(InputError, match="rng=True"):
        bare.load(model, rng=True)


class Config:
    def to_dict(self):
        return {"model_type": "tiny", "width": 8}


@dataclasses.dataclass
class Plain:
    width: int = 8


@pytest.mark.parametrize("config", [Config(), Plain(), {"width": 8}])
def test_the_layout_of_hugging_face(tmp_path, config):
    model = net()
    model.config = config
    saved = DSCheckpoint.save(tmp_path / "c", model, stepped(model))
    assert {p.name for p in saved.export_hf(tmp_path / "hf")} == {"model.safetensors", "config.json"}
    assert same(load_file(tmp_path / "hf" / "model.safetensors"), model.state_dict())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["width"] == 8
    parts = saved.export_hf(tmp_path / "parts", shard_bytes=200)
    assert "model.safetensors.index.json" in {p.name for p in parts}
    assert all(p.is_file() for p in parts)
    with pytest.raises(InputError, match="not empty"):
        saved.export_hf(tmp_path / "hf")


def test_transformers_reads_the_export(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=32)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    saved = DSCheckpoint.save(tmp_path / "c", model)
    saved.export_hf(tmp_path / "hf", shard_bytes=10_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.arange(10).reshape(1, 10)
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_a_trainers_checkpoint_is_one(tmp_path):
    data = [(torch.randn(4, 4), torch.randint(0, 2, (4,))) for _ in range(3)]
    model = net()
    config = TrainingConfig(device="cpu", save_dir=str(tmp_path), shard_gb=1e-7)
    Trainer(model, data, data, lr=1e-2, config=config).train(epochs=1)
    found = DSCheckpoint(tmp_path / "step-00000003")
    assert found.step == 3
    assert set(found.metrics) == {"train_loss", "val_loss", "val_accuracy"}
    assert len(list(found.path.glob("model-*.safetensors"))) > 1
    assert same(found.model_state(), model.state_dict())
    other = net()
    assert found.load(other)["progress"]["step"] == 3
    assert same(other.state_dict(), model.state_dict())


def test_what_happens_after_an_asynchronous_save_does_not_reach_the_file(tmp_path, monkeypatch):
    """The thread begins to write only when everything in memory has changed."""
    import threading

    model = net()
    tied = nn.Linear(4, 2)
    model.add_module("one", tied)
    model.add_module("two", tied)
    model.register_buffer("view", model[0].weight.detach()[1:3])
    optimizer = stepped(nn.Sequential(*model[:4]))
    seen = {"tensor": torch.ones(3), "list": [1, 2]}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    moments = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    go, real = threading.Event(), disk.save_file

    def late(*args, **kwargs):
        assert go.wait(20)
        real(*args, **kwargs)

    monkeypatch.setattr(disk, "save_file", late)
    pending = DSCheckpoint.save_async(tmp_path / "c", model, optimizer, state=seen, step=2)
    assert not pending.done
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
        for state in optimizer.state.values():
            for tensor in state.values():
                tensor.fill_(8)
        seen["tensor"].fill_(9)
    seen["list"].append(3)
    assert not (tmp_path / "c").exists()
    go.set()
    saved = pending.wait()
    assert pending.done
    assert same(before, saved.model_state())
    _, state = disk.read(saved.path)
    for a, b in zip(moments, state["optimizer"]["state"].values(), strict=True):
        assert same(a, b)
    assert state["extra"]["list"] == [1, 2]
    assert torch.equal(state["extra"]["tensor"], torch.ones(3))


def test_an_error_of_the_thread_is_raised_by_wait(tmp_path):
    (tmp_path / "file").write_text("")
    pending = DSCheckpoint.save_async(tmp_path / "file" / "c", net(), step=12)
    with pytest.raises(CheckpointError, match="step 12 could not be written"):
        pending.wait()


def test_copies_use_their_memory_again_and_follow_changes_of_shape():
    staging = Staging()
    staging.begin()
    live = torch.arange(6.0).reshape(2, 3)
    first = staging.copy("a", live.t())
    staging.end()
    assert first.is_contiguous()
    assert first.data_ptr() != live.data_ptr()
    staging.begin()
    again = staging.copy("a", live.t() + 1)
    other = staging.copy("b", torch.ones(2, dtype=torch.int64))
    staging.end()
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(again, live.t() + 1)
    assert other.dtype == torch.int64
    staging.begin()
    changed = staging.copy("a", torch.zeros(5))
    staging.end()
    assert changed.shape == (5,)


def test_only_one_piece_of_work_at_a_time():
    order = []
    work = Background()
    for i in range(3):
        work.start(lambda i=i: order.append((i, os.getpid())))
    work.wait()
    assert [i for i, _ in order] == [0, 1, 2]
    work.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        work.start(lambda: order.append(4))
    work.check()
    assert len(order) == 3, "the work after a failure does not begin unseen"


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"an nn\.Module"):
        DSCheckpoint.save(tmp_path / "c", {"a": torch.ones(2)})
    with pytest.raises(ArtifactError, match="no checkpoint"):
        DSCheckpoint(tmp_path)

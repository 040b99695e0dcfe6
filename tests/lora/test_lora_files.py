"""Adapters on disk: names and fields of PEFT's format, what comes back, and what is refused. Needs no PEFT."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_r1.core import ArtifactError, InputError
from deepseek_r1.lora import LoraConfig, PeftModel, get_peft_model

from .conftest import Net, disturb
from .test_lora_model import CONFIGS, config


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_comes_back(net, ids, name, tmp_path):
    plain = copy.deepcopy(net)
    model = disturb(get_peft_model(net, config(name)))
    assert model.save_pretrained(tmp_path) == tmp_path
    again = PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(again(ids), model(ids))
    assert again.peft_config == model.peft_config
    assert not again.training
    assert not [n for n, p in again.named_parameters() if p.requires_grad]


def test_names_and_fields_are_peft_s(net, tmp_path):
    model = disturb(get_peft_model(net, config("others with magnitudes", modules_to_save=["head"])))
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    stored = {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    q = {f"base_model.model.layers.{i}.q_proj.{n}": s for i in range(3) for n, s in
         (("lora_A.weight", (4, 16)), ("lora_B.weight", (16, 4)), ("lora_magnitude_vector", (16,)))}  # fmt: skip
    assert stored == {
        **q,
        "base_model.model.emb.lora_embedding_A": (4, 11),
        "base_model.model.emb.lora_embedding_B": (16, 4),
        "base_model.model.emb.lora_magnitude_vector": (16,),
        "base_model.model.conv.lora_A.weight": (4, 16, 3),
        "base_model.model.conv.lora_B.weight": (16, 4, 1),
        "base_model.model.conv.lora_magnitude_vector": (1, 16, 1),
        "base_model.model.head.weight": (4, 16),
        "base_model.model.head.bias": (4,),
    }
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA"
    assert (fields["r"], fields["lora_alpha"], fields["use_dora"], fields["inference_mode"]) == (4, 6, True, True)
    assert fields["target_modules"] == ["emb", "conv", "q_proj"]
    assert fields["modules_to_save"] == ["head"]
    assert list(fields) == sorted(fields)


def test_biases_are_in_the_file(net, tmp_path):
    disturb(get_peft_model(net, config(bias="all"))).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {"base_model.model.layers.0.q_proj.base_layer.bias", "base_model.model.conv.bias"} <= names


def test_several_adapters_have_folders(net, ids, tmp_path):
    plain = copy.deepcopy(net)
    model = disturb(get_peft_model(net, config()))
    model.add_adapter("other", config("dora"))
    model.set_adapter("other")
    disturb(model, 3)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "other" / "adapter_config.json").is_file()
    again = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained
    again.load_adapter(tmp_path / "other", "other")
    assert again.active_adapters == ("default",)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained
    again.set_adapter("other")
    assert not [n for n, p in again.named_parameters() if p.requires_grad], "it was loaded for use only"
    assert torch.equal(again.eval()(ids), model(ids))
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "one" / "adapter_config.json").exists()


def test_trained_further(net, tmp_path):
    model = disturb(get_peft_model(copy.deepcopy(net), config()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net, tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.fixture
def saved(net, tmp_path):
    disturb(get_peft_model(copy.deepcopy(net), config())).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(net, ids, folder, error, words):
    names, before = list(net.state_dict()), net(ids)
    with pytest.raises(error, match=words):
        PeftModel.from_pretrained(net, folder)
    assert list(net.state_dict()) == names, "the model is as it was"
    assert torch.equal(net(ids), before)


def test_another_size(ids, saved):
    words = (
        r"another architecture or config: base_model.model.layers.0.q_proj.lora_A.weight is \[4, 16\] in the file, and "
        r"\[4, 24\] is needed"
    )
    refused(Net(24).eval(), ids, saved, InputError, words)


def test_another_architecture(ids, saved):
    other = Net().eval()
    other.layers.append(copy.deepcopy(other.layers[0]))
    refused(other, ids, saved, InputError, r"has no base_model.model.layers.3.q_proj.lora_A.weight")
    del other.layers[2:]
    refused(other, ids, saved, InputError, r"no place for base_model.model.layers.2.q_proj")
    with pytest.raises(InputError, match="matches no layer"):
        PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(2, 2)), saved)


def test_values_that_are_not_finite(net, ids, saved):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    refused(net, ids, saved, InputError, f"{name} has values that are not finite")
    model = get_peft_model(net, config())
    model.base_model.layers[0].q_proj.lora_A["default"].weight.data[0] = float("inf")
    with pytest.raises(InputError, match="the adapter was not written"):
        model.save_pretrained(saved.parent / "new")
    assert not (saved.parent / "new").exists()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("adapter_config.json", None, "has no adapter_config.json"),
        ("adapter_model.safetensors", None, "has no adapter_model.safetensors"),
        ("adapter_config.json", b"{", "damaged: no JSON"),
        ("adapter_config.json", b"[]", "an object is needed"),
        ("adapter_config.json", b'{"peft_type": "VERA"}', "of the kind 'VERA'"),
        ("adapter_config.json", b'{"r": 0}', r"LoraConfig\(r=0\)"),
        ("adapter_model.safetensors", b"rubbish", "no safetensors file"),
    ],
)
def test_damaged_files(net, ids, saved, file, content, words):
    if content is None:
        (saved / file).unlink()
    else:
        (saved / file).write_bytes(content)
    refused(net, ids, saved, ArtifactError, words)


def test_pickles_are_not_opened(net, ids, saved):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    refused(net, ids, saved, ArtifactError, "is a pickle, which is not opened")


def test_paths_that_are_files(net, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; give a directory"):
        get_peft_model(net, config()).save_pretrained(tmp_path / "file")


def test_unknown_adapters_are_not_saved(net, tmp_path):
    model = get_peft_model(net, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match="no adapter 'x'"):
        model.save_pretrained(tmp_path, selected_adapters=["x"])

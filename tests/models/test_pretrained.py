"""Weight files: where they are looked for, what must be in them, and what is written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_r1.core import ArtifactError, ConfigError, InputError, UnsafeFileError
from deepseek_r1.models import GPT2, BERTConfig, BERTForSequenceClassification, GPT2Config, Llama, LlamaConfig

SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
IDS = torch.tensor([[3, 4, 5]])


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model and its directory; no cache of this machine is looked at."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    torch.manual_seed(0)
    model = BERTForSequenceClassification(BERTConfig(**SIZES, num_labels=3, label_names=("a", "b", "c"))).eval()
    return model, model.save_pretrained(tmp_path / "model")


def load(path, **options):
    return BERTForSequenceClassification.from_pretrained(path, **options)


def _edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_is_saved_is_loaded(saved):
    model, folder = saved
    again = load(folder)
    assert again.config == model.config
    assert not again.training
    assert torch.equal(again(IDS), model(IDS))
    assert again.load_report["tensors read"].after == len(model.state_dict())
    assert again.load_report.facts["new"] == []
    assert all(p.requires_grad for p in again.parameters())
    written = json.loads((folder / "config.json").read_text())
    assert (written["architectures"], written["id2label"]["2"]) == (["BertForSequenceClassification"], "c")


def test_types(saved):
    model, folder = saved
    model.to(torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in load(folder).parameters()} == {torch.float32}
    assert {p.dtype for p in load(folder, dtype="auto", num_labels=5).parameters()} == {torch.bfloat16}
    with pytest.raises(InputError, match="dtype='half'"):
        load(folder, dtype="half")


def test_shards(saved):
    model, folder = saved
    (folder / "tokenizer.json").write_text("{}")
    model.save_pretrained(folder, shard_bytes=1500)
    names = sorted(p.name for p in folder.iterdir())
    assert "model.safetensors" not in names
    assert "model.safetensors.index.json" in names
    shards = [n for n in names if n.startswith("model-")]
    assert len(shards) > 2
    assert torch.equal(load(folder)(IDS), model(IDS))
    (folder / shards[1]).rename(folder / "gone")
    with pytest.raises(ArtifactError, match=f"names {shards[1]}, which is not there"):
        load(folder)
    model.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "gone", "model.safetensors", "tokenizer.json"]


def test_an_index_that_points_elsewhere(saved):
    _, folder = saved
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"classifier.bias": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="only files beside it are read"):
        load(folder)


def test_pickled_weights_are_tensors_alone(saved):
    model, folder = saved
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(load(folder)(IDS), model(IDS))

    class Bomb:
        def __reduce__(self):
            return print, ("boom",)

    torch.save({"a": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(UnsafeFileError, match="was not opened"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"holds none of model\.safetensors"):
        load(folder)


def test_names_are_looked_up_in_the_cache(saved, tmp_path, monkeypatch):
    model, folder = saved
    repository = tmp_path / "home" / "hub" / "models--google-bert--bert-base-uncased"
    (repository / "snapshots").mkdir(parents=True)
    with pytest.raises(InputError) as error:
        load("bert-base")
    for text in (
        "'bert-base' was not found on this machine", "the directory", "bert-base",
        f"google-bert/bert-base-uncased in {repository / 'snapshots'}", "Nothing is downloaded", "bert-large",
    ):  # fmt: skip
        assert text in str(error.value)
    folder.rename(repository / "snapshots" / "abc")
    for name in ("bert-base", "google-bert/bert-base-uncased"):
        assert torch.equal(load(name)(IDS), model(IDS))
    other = BERTForSequenceClassification(BERTConfig(**SIZES)).save_pretrained(repository / "snapshots" / "def")
    with pytest.raises(InputError, match="several snapshots and no refs/main"):
        load("bert-base")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("def\n")
    assert str(other) in load("bert-base").load_report.title
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="elsewhere"):
        load("bert-base")


def test_what_is_no_directory(saved, tmp_path):
    _, folder = saved
    with pytest.raises(InputError, match="is a file; give the directory"):
        load(folder / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON"), ("[]", "holds a list")])
def test_a_damaged_configuration(saved, text, message):
    _, folder = saved
    (folder / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


def test_damaged_weights(saved):
    _, folder = saved
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ArtifactError, match="damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("bert.embeddings.LayerNorm.bias"),
            r"1 missing, first: bert\.embeddings\.LayerNorm\.bias \[8\]",
        ),
        (lambda t: t.update(extra=torch.zeros(2)), r"1 unknown, first: extra \[2\]"),
        (
            lambda t: t.update({"bert.pooler.dense.weight": torch.zeros(8, 9)}),
            r"1 of another shape, first: bert\.pooler\.dense\.weight is \[8, 9\], expected \[8, 8\]",
        ),
        (lambda t: t.pop("classifier.bias"), r"1 missing, first: classifier\.bias \[3\]"),
    ],
)
def test_tensors_that_do_not_fit(saved, change, message):
    _, folder = saved
    _edit(folder, change)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


def test_a_head_of_another_size_is_new_when_asked_for(saved):
    model, folder = saved
    assert load(folder, num_labels=3).load_report.facts["new"] == []
    torch.manual_seed(1)
    other = load(folder, num_labels=5)
    assert other(IDS).shape == (1, 5)
    assert other.config.label_names == ()
    assert other.load_report.facts["new"] == ["classifier"]
    assert "classifier is new, with random weights: the file's has another size" in other.load_report.notes[0]
    assert 0.01 < other.classifier.weight.std() < 0.03
    assert torch.equal(other.bert.pooler["dense"].weight, model.bert.pooler["dense"].weight)
    data = json.loads((folder / "config.json").read_text())
    data["id2label"] = {"0": "x", "1": "y"}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"2 of another shape, first: classifier\.bias is \[3\], expected \[2\]"):
        load(folder)


def test_a_file_without_a_head(hf, tmp_path):
    torch.manual_seed(0)
    theirs = hf.BertForPreTraining(hf.BertConfig(**SIZES)).eval()
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path, num_labels=3)
    assert model.load_report.facts["new"] == ["classifier"]
    assert "7 tensors, first cls." in model.load_report.skipped[0][0]
    wanted = theirs.bert(IDS).pooler_output
    torch.testing.assert_close(model.classifier(wanted), model(IDS), rtol=0, atol=1e-6)


def test_files_of_a_body_alone(hf, tmp_path):
    torch.manual_seed(0)
    bert = hf.BertModel(hf.BertConfig(**SIZES), add_pooling_layer=False).eval()
    bert.save_pretrained(tmp_path / "bert")
    model = load(tmp_path / "bert")
    assert model.load_report.facts["new"] == ["classifier", "bert.pooler"]
    gpt2 = hf.GPT2Model(
        hf.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()
    gpt2.save_pretrained(tmp_path / "gpt2")
    ours = GPT2.from_pretrained(tmp_path / "gpt2")
    wanted = gpt2(IDS).last_hidden_state
    torch.testing.assert_close(ours.transformer(IDS), wanted, rtol=0, atol=1e-5)


def test_names_of_older_files(saved):
    model, folder = saved

    def older(tensors):
        for name in list(tensors):
            if "LayerNorm" in name:
                tensors[name.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(512)[None]

    _edit(folder, older)
    assert torch.equal(load(folder)(IDS), model(IDS))


def test_a_tied_matrix_that_the_file_repeats(tmp_path):
    for kind, config in (
        (GPT2, GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)),
        (Llama, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    ):
        model = kind(config)
        folder = model.save_pretrained(tmp_path / kind.__name__)
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
        _edit(folder, lambda t, m=model: t.update({"lm_head.weight": m.output_weight.detach().clone()}))
        assert torch.equal(kind.from_pretrained(folder)(IDS), model.eval()(IDS))
        _edit(folder, lambda t: t["lm_head.weight"].add_(1))
        with pytest.raises(ArtifactError, match=r"lm_head\.weight differs from .*e.*weight"):
            kind.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "type 'roberta'; BERTConfig reads 'bert'"),
        ({"position_embedding_type": "relative_key"}, "computes only None or 'absolute'"),
        ({"is_decoder": True}, "computes only False"),
        ({"hidden_act": "mish"}, "one of 'gelu'"),
    ],
)
def test_configurations_of_another_kind(saved, change, message):
    _, folder = saved
    data = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_keys_that_nothing_reads_are_reported(saved):
    _, folder = saved
    data = {**json.loads((folder / "config.json").read_text()), "new_key": 1}
    (folder / "config.json").write_text(json.dumps(data))
    assert load(folder).load_report.skipped == [
        ("keys of config.json: new_key", "nothing in this implementation reads them")
    ]
    with pytest.raises(ConfigError, match="no field 'num_label'"):
        load(folder, num_label=3)


def test_a_changed_module_is_not_saved(saved, tmp_path):
    model, _ = saved
    model.classifier = torch.nn.Sequential(torch.nn.Linear(8, 3))
    with pytest.raises(
        InputError,
        match=r"no plain BERTForSequenceClassification of its config any more: 4 tensors.*classifier\.0\.bias",
    ):
        model.save_pretrained(tmp_path / "changed")
    model.classifier = torch.nn.Linear(8, 4)
    with pytest.raises(
        InputError, match=r"2 tensors were added, are gone or have another shape, first 'classifier\.bias'"
    ):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def test_loading_needs_no_second_copy(tmp_path):
    folder = Llama(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    model = Llama.from_pretrained(folder)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    # The file can go: nothing is mapped from it.
    (folder / "model.safetensors").write_bytes(b"")
    assert model(IDS).isfinite().all()


def test_the_source_reads_the_architecture(saved, tmp_path):
    import deepseek_r1 as dr1

    model, folder = saved
    assert torch.equal(dr1.load_model(f"hf:{folder}")(IDS), model(IDS))
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "model_type": "mamba"}))
    with pytest.raises(InputError, match="type 'mamba'; those here are bert, gpt2, llama"):
        dr1.load_model(f"hf:{folder}")
    with pytest.raises(InputError, match=r"not found on this machine.*models--openai-community--gpt2"):
        dr1.load_model("hf:gpt2")

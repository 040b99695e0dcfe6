"""BERT against transformers, packed against unpacked, compiled against eager."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from deepseek_r1.core import ConfigError, InputError
from deepseek_r1.models import BERTConfig, BERTForSequenceClassification, num_parameters

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 24,
}  # fmt: skip


def small(**changes):
    torch.manual_seed(0)
    return BERTForSequenceClassification(BERTConfig(**{**SIZES, "num_labels": 3, **changes})).eval()


@pytest.fixture
def pair(hf, both_ways):
    def make(**changes):
        torch.manual_seed(0)
        theirs = hf.BertForSequenceClassification(hf.BertConfig(**{**SIZES, "num_labels": 3, **changes}))
        return theirs, *both_ways(theirs, BERTForSequenceClassification)

    return make


def _batch(masked=True):
    torch.manual_seed(2)
    batch = {"input_ids": torch.randint(1, 60, (3, 11)), "token_type_ids": torch.randint(0, 2, (3, 11))}
    if masked:
        mask = torch.ones(3, 11, dtype=torch.long)
        mask[0, 6:], mask[1, 9:] = 0, 0
        batch["attention_mask"] = mask
        batch["input_ids"][mask == 0] = 0
    return batch


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_outputs_are_those_of_transformers(pair, masked, activation):
    theirs, ours, again = pair(hidden_act=activation)
    with torch.no_grad():
        wanted = theirs(**_batch(masked)).logits
        torch.testing.assert_close(ours(**_batch(masked)), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(again(**_batch(masked)).logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(torch.tensor([0, 2, 1]), 3), (torch.randn(3), 1), (torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]]), 3)],
)
def test_losses_and_gradients(pair, same_gradients, labels, classes):
    theirs, ours, _ = pair(num_labels=classes)
    wanted = theirs(**_batch(), labels=labels)
    got = ours(**_batch(), labels=labels)
    torch.testing.assert_close(got["loss"], wanted.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(got["logits"], wanted.logits, rtol=0, atol=1e-5)
    wanted.loss.backward()
    got["loss"].backward()
    same_gradients(ours, theirs, lambda _, grad: grad)


def test_given_positions(pair):
    theirs, ours, _ = pair()
    places = torch.arange(11).flip(0).repeat(3, 1)
    wanted = theirs(**_batch(), position_ids=places).logits
    torch.testing.assert_close(ours(**_batch(), position_ids=places), wanted, rtol=0, atol=1e-5)


def test_packed_texts_do_not_see_each_other():
    model = small()
    texts = [torch.randint(1, 60, (n,)) for n in (4, 6, 3, 5)]
    kinds = [torch.randint(0, 2, t.shape) for t in texts]
    rows, ids, types = (
        torch.zeros(2, 12, dtype=torch.long),
        torch.zeros(2, 12, dtype=torch.long),
        torch.zeros(2, 12).long(),
    )
    for row, start, number, text in ((0, 0, 1, 0), (0, 4, 2, 1), (1, 0, 1, 2), (1, 3, 2, 3)):
        place = slice(start, start + len(texts[text]))
        rows[row, place], ids[row, place], types[row, place] = texts[text], number, kinds[text]
    alone = [model(t[None], token_type_ids=k[None])[0] for t, k in zip(texts, kinds, strict=True)]
    packed = model(rows, token_type_ids=types, sequence_ids=ids, num_sequences=3)
    assert packed.shape == (2, 3, 3)
    for logits, place in zip(alone, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        torch.testing.assert_close(packed[place], logits, rtol=0, atol=1e-5)
    labels = torch.tensor([[0, 1, -100], [2, 1, 0]])
    loss = model(rows, token_type_ids=types, sequence_ids=ids, labels=labels)["loss"]
    wanted = torch.nn.functional.cross_entropy(torch.stack(alone), torch.tensor([0, 1, 2, 1]))
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-5)


def test_packed_values_and_absent_texts():
    model = small(num_labels=1)
    rows, ids = torch.randint(1, 60, (2, 6)), torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
    labels = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    out = model(rows, sequence_ids=ids, labels=labels)
    wanted = ((out["logits"].squeeze(-1) - labels)[[0, 0, 1], [0, 1, 0]] ** 2).mean()
    torch.testing.assert_close(out["loss"], wanted)
    out["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_without_a_label_that_counts_the_loss_is_nothing():
    loss = small()(**_batch(), labels=torch.full((3,), -100))["loss"]
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("form", ["plain", "masked", "packed"])
def test_it_compiles_into_one_graph(form):
    model = small().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    batch = {**_batch(form == "masked"), "labels": torch.tensor([0, 2, 1])}
    if form == "packed":
        batch["sequence_ids"] = torch.tensor([[1] * 5 + [2] * 6]).repeat(3, 1)
        batch["labels"] = torch.tensor([[0, 1]] * 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**batch)["loss"]
    torch.testing.assert_close(loss, model(**batch)["loss"], rtol=0, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_dropout_is_there_in_training_alone():
    model, batch = small(), _batch()
    assert torch.equal(model(**batch), model(**batch))
    model.train()
    assert not torch.equal(model(**batch), model(**batch))
    for part in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
        one = small(**{**none, part: 0.5}).train()
        assert not torch.equal(one(**batch), one(**batch)), part


def test_first_weights():
    model = small(vocab_size=3000)
    words = model.bert.embeddings.word_embeddings.weight
    assert abs(words.std().item() - 0.02) < 0.001
    assert not words[0].any()
    assert abs(model.bert.encoder.layer[1].intermediate["dense"].weight.std().item() - 0.02) < 0.002
    assert not model.classifier.bias.any()


def test_names_that_adapters_look_for():
    names = {n.split(".")[-1] for n, m in small().named_modules() if isinstance(m, torch.nn.Linear)}
    assert {"query", "key", "value", "dense", "classifier"} == names
    assert len({type(layer) for layer in small().bert.encoder.layer}) == 1


def test_a_bert_base_has_110_million_parameters():
    with torch.device("meta"):
        model = BERTForSequenceClassification(BERTConfig())
    assert num_parameters(model) == 109_483_778
    # 12 layers of 4 D^2 + 2 * 4 D^2 weights.
    assert model.flops_per_token(128) == 6 * 12 * 12 * 768**2 + 12 * 12 * 768 * 128


def test_the_trainer_trains_it():
    from deepseek_r1.train import Trainer

    torch.manual_seed(0)
    ids = torch.randint(1, 60, (64, 8))
    batches = [{"input_ids": i, "labels": (i[:, 0] > 30).long()} for i in ids.split(16)]
    model = small(num_labels=2, hidden_dropout_prob=0.0)
    trainer = Trainer(model, batches, batches, lr=3e-3)
    trainer.train(epochs=12)
    assert trainer.evaluate()["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 30}, r"hidden_size=30.*multiple of num_attention_heads=4"),
        ({"num_hidden_layers": 0}, "an integer >= 1"),
        ({"hidden_act": "mish"}, "'gelu'"),
        ({"hidden_dropout_prob": 1.0}, "below 1"),
        ({"pad_token_id": 60}, "0 to 59"),
        ({"label_names": ("a", "b")}, "3 names"),
        ({"problem_type": "ranking"}, "'regression'"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        BERTConfig(**{**SIZES, "num_labels": 3, **change})
    with pytest.raises(dataclasses.FrozenInstanceError):
        BERTConfig().hidden_size = 3


def test_inputs_that_do_not_fit():
    model, ids = small(), torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(InputError, match=r"attention_mask of shape \(2, 4\) with input_ids of shape \(2, 5\)"):
        model(ids, attention_mask=ids[:, :4])
    with pytest.raises(InputError, match="length 25: this model's positions end at 24"):
        model(torch.ones(1, 25, dtype=torch.long))
    with pytest.raises(InputError, match=r"a tensor \[batch, length\]"):
        model(ids[0])
    with pytest.raises(InputError, match="num_sequences"):
        model(ids, sequence_ids=ids)
    with pytest.raises(InputError, match=r"labels \(3,\).*give class numbers \(2,\)"):
        model(ids, labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match="from_pretrained"):
        BERTForSequenceClassification("bert-base")

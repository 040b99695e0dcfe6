"""Micro-batches and accumulation where the loss is a mean over tokens: the gradients of the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_r1.data import unpack_batch
from deepseek_r1.models import GPT2, GPT2Config, Llama, LlamaConfig
from deepseek_r1.train import Objective, Trainer, TrainingConfig, train_step
from deepseek_r1.train._device_step import device_step

VOCAB, LENGTH = 23, 8


def _llama():
    return Llama(LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16))  # fmt: skip


def _gpt2():
    return GPT2(GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=1, n_head=2, embd_pdrop=0.0,
                           resid_pdrop=0.0, attn_pdrop=0.0))  # fmt: skip


def _hf(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "causal":
        config = transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                          num_attention_heads=2, max_position_embeddings=16)  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    if kind == "head":
        config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=1, n_head=2,
                                         embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    if kind == "t5":
        config = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                                       dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                     num_attention_heads=2, hidden_dropout_prob=0.0,
                                     attention_probs_dropout_prob=0.0)  # fmt: skip
    return transformers.BertForMaskedLM(config)


class _OwnLoss(nn.Module):
    """A user's model that computes its own loss, without a shift."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(VOCAB, 12), nn.Linear(12, VOCAB)

    def forward(self, input_ids, labels=None):
        logits = self.out(torch.tanh(self.table(input_ids)))
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)}


class _Logits(nn.Module):
    """A user's model of logits [B, V, L]."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(VOCAB, 12), nn.Linear(12, VOCAB)

    def forward(self, input_ids):
        return self.out(torch.tanh(self.table(input_ids))).transpose(1, 2)


MODELS = {
    "llama": _llama,
    "gpt2": _gpt2,
    "own loss": _OwnLoss,
    "logits": _Logits,
    "hf llama": lambda: _hf("causal"),
    "hf gpt2": lambda: _hf("head"),
    "hf bert": lambda: _hf("masked"),
    "hf t5": lambda: _hf("t5"),
}


def _batch(rows=4, seed=0, all_ignored=()):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, LENGTH), generator=g)
    labels = torch.randint(0, VOCAB, (rows, LENGTH), generator=g)
    # Two rows of little, of which one begins with labels and the other ends with them.
    labels[0, 2:] = -100
    labels[1, :-2] = -100
    labels[2, 0] = -100
    for row in all_ignored:
        labels[row] = -100
    return {"input_ids": ids, "labels": labels}


def _step(model, batches, loss=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    objective = Objective(model, loss)
    result = train_step(model, batches, optimizer, objective, **options)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, result, objective


def _rows(batch, *parts):
    return [{k: v[part] for k, v in batch.items()} for part in parts]


def _made(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def _equal(found, expected):
    assert found[1].loss.item() == pytest.approx(expected[1].loss.item(), rel=1e-6)
    assert found[0].keys() == expected[0].keys()
    for name, gradient in expected[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ignored", [(), (3,)], ids=["", "a row of nothing"])
def test_pieces_give_what_the_whole_batch_gives(name, ignored):
    model, batch = _made(name), _batch(all_ignored=ignored)
    whole = _step(model, [batch])
    _equal(_step(model, [batch], micro_batch_size=1), whole)
    _equal(_step(model, [batch], micro_batch_size=3), whole)
    parts = _rows(batch, slice(0, 1), slice(1, 2), slice(2, 4))
    found = _step(model, parts)
    _equal(found, whole)
    _equal(_step(model, parts, micro_batch_size=1), whole)
    assert ("labels that are not -100" in found[2].split_note) is (name == "own loss")
    assert whole[2].split_note == ""


def test_packed_rows_of_a_language_model_too():
    model, batch = _made("llama"), _batch()
    batch["sequence_ids"] = torch.tensor([[1] * 4 + [2] * 4, [1] * 7 + [0], [1, 2, 3, 4, 5, 6, 0, 0], [1] * 8])
    _equal(_step(model, [batch], micro_batch_size=1), _step(model, [batch]))


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(ignore_index=3),
        nn.CrossEntropyLoss(weight=torch.linspace(0.1, 3, VOCAB, dtype=torch.float64)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ],
)
def test_losses_of_torch_are_known(loss):
    model, batch = _made("logits"), _batch()
    if getattr(loss, "ignore_index", -100) == 3:
        batch["labels"] = torch.where(batch["labels"] == -100, 3, batch["labels"])
    found = _step(model, [batch], loss, micro_batch_size=1)
    _equal(found, _step(model, [batch], loss))
    assert not found[2].split_note


def test_a_function_may_say_what_it_averages_over_and_else_the_report_tells():
    def loss(output, labels):
        return F.cross_entropy(output, labels)

    batch = _batch()
    config = TrainingConfig(device="cpu", micro_batch_size=1)
    notes = Trainer(_made("logits"), [batch], config=config, loss=loss).train(epochs=1).notes
    assert any("weighted by their samples" in note for note in notes)
    whole = _step(_made("logits"), [batch], loss)
    with pytest.raises(AssertionError):
        _equal(_step(_made("logits"), [batch], loss, micro_batch_size=1), whole)
    loss.counted_labels = lambda labels: (labels != -100).sum()
    _equal(_step(_made("logits"), [batch], loss, micro_batch_size=1), whole)
    notes = Trainer(_made("logits"), [batch], config=config, loss=loss).train(epochs=1).notes
    assert not any("weighted by" in note for note in notes)


def test_classes_that_do_not_count_are_no_samples():
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([1, -100, -100, 0, 3])
    _equal(_step(model, [(x, y)], micro_batch_size=2), _step(model, [(x, y)]))


def test_a_mean_over_samples_stays_one():
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(0, 2, (5, 2))

    def loss(output, labels):
        return (output - labels).square().mean()

    _equal(_step(model, [(x, y)], loss, micro_batch_size=2), _step(model, [(x, y)], loss))


def test_a_step_without_a_label_changes_nothing():
    model, batch = _made("llama"), _batch(all_ignored=range(4))
    gradients, result, _ = _step(model, [batch], micro_batch_size=2)
    assert result.loss.item() == 0
    assert not any(g.any() for g in gradients.values())


def test_the_started_step_of_a_gpu_weights_alike():
    model, batch = _made("llama").float(), _batch()
    results = []
    for micro in (None, 1):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        window = [unpack_batch(batch)[1] | {"labels": batch["labels"]}]
        loss, bad, norm = device_step(
            model, window, optimizer, Objective(model), torch.zeros(()), device=torch.device("cpu"),
            precision="fp32", micro_batch_size=micro, clip_grad_norm=None,
        )  # fmt: skip
        assert not bad
        results.append((loss, norm))
    torch.testing.assert_close(*results)


@pytest.mark.gpu
def test_recorded_steps_of_a_gpu_weight_alike():
    trained = []
    for micro in (None, 1):
        torch.manual_seed(0)
        model = _llama()
        config = TrainingConfig(device="cuda", precision="fp32", micro_batch_size=micro)
        batches = [_batch(seed=seed) for seed in range(6)]
        report = Trainer(model, batches, config=config, lr=1e-3).train(epochs=1)
        assert any("whole steps, for 1 shape" in note for note in report.notes)
        trained.append([p.detach().cpu() for p in model.parameters()])
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"micro_batch_size": 1}, {"micro_batch_size": 2, "memory_gb": 1}])
def test_a_trainer_with_pieces_or_a_limit_of_memory_steps_alike(options):
    trained = []
    for more in ({}, options):
        model = _made("llama")
        config = TrainingConfig(device="cpu", **more)
        trainer = Trainer(model, [_batch()], config=config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        trainer.train(epochs=2)
        trained.append((trainer.history[-1]["train_loss"], *model.parameters()))
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-7)
